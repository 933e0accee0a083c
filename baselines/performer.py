"""Performer: positive random features (FAVOR+) that estimate the softmax kernel.

Paper: "Rethinking Attention with Performers", arXiv 2009.14794.

Shapes: B batch, H heads, N tokens, d head dim, M random features.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adala.attention import AttentionShape, TokenLayout, TokenMixer, accumulation_dtype, full_precision
from adala.attention.linear import linear_attention, linear_attention_reference
from adala.conversion import Conversion, ConversionStep

NATIVE = Conversion(name="native", steps=(ConversionStep("finetuning"),))

# One more than the largest seed a layer draws; redraw r of a layer is seeded with its seed plus r times this.
_SEED_RANGE = 2**31


@dataclass(frozen=True)
class PerformerOptions:
    """Options of Performer.

    Attributes:
        num_features: M. The original library takes int(d ln d), which is 266 for d = 64.
        mode: ``stable`` is the softmax kernel in log space, free of an epsilon; ``max`` the softmax kernel of the
            original library, whose epsilon swamps the estimate as soon as q and k have large norms; ``relu`` is
            relu(w) + kernel_eps.
        feature_eps: Added to every feature in mode ``max``.
        kernel_eps: Added to every feature in mode ``relu``.
        row_norms: Length of the projection's rows: that of a fresh ``gaussian`` each, or ``constant`` sqrt(d).
        redraw_interval: Optimizer steps after which a new projection is drawn; 0 is never. The trainer says which step
            begins; a training loop of one's own calls ``begin_step`` of every mixer.
        seed: Mixed with an integer from torch's global generator, drawn at construction, so that the layers of a
            model differ and are reproducible whenever the global generator is seeded.
    """

    num_features: int = 64
    mode: Literal["stable", "max", "relu"] = "stable"
    feature_eps: float = 1e-4
    kernel_eps: float = 1e-3
    row_norms: Literal["gaussian", "constant"] = "gaussian"
    redraw_interval: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_features < 1:
            raise ValueError(f"option num_features is {self.num_features}: it must be at least 1")
        if self.mode not in ("stable", "max", "relu"):
            raise ValueError(f"option mode is {self.mode!r}: it can be 'stable', 'max' or 'relu'")
        if self.row_norms not in ("gaussian", "constant"):
            raise ValueError(f"option row_norms is {self.row_norms!r}: it can be 'gaussian' or 'constant'")
        if self.redraw_interval < 0:
            raise ValueError(f"option redraw_interval is {self.redraw_interval}: it must be 0 (never) or more")


def orthogonal_projection(
    num_features: int, head_dim: int, generator: torch.Generator, row_norms: str = "gaussian"
) -> Tensor:
    """Rows that are orthogonal in blocks of d, (M, d) in float32 on the CPU.

    Paper: arXiv 2009.14794, section 2.4.
    """
    gaussian = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    num_blocks = -(-num_features // head_dim)
    blocks = [torch.linalg.qr(torch.randn(head_dim, head_dim, **gaussian)).Q.t() for _ in range(num_blocks)]
    directions = torch.cat(blocks)[:num_features]
    if row_norms == "constant":
        return directions * head_dim**0.5
    return directions * torch.randn(num_features, head_dim, **gaussian).norm(dim=1, keepdim=True)


def softmax_kernel_exponents(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """w = P x d^-1/4, (B, H, N, M), and h = |x d^-1/4|^2 / 2, (B, H, N, 1): a feature is exp(w - h) / sqrt(M)."""
    dtype = accumulation_dtype(x)
    x = x.to(dtype) * x.shape[-1] ** -0.25
    return x @ projection.to(dtype).t(), x.square().sum(dim=-1, keepdim=True) / 2


def stable_features(q: Tensor, k: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the softmax kernel in which nothing can vanish altogether, each (B, H, N, M).

    Every feature of the keys is scaled to a largest entry of 1 over the tokens, and the queries' exponents take the
    reverse scale before theirs are shifted to a largest entry of 1. Both cancel in the normalised output, and the
    denominator is at least 1: the epsilon that the original needs has no place left.
    """
    query_w, _ = softmax_kernel_exponents(q, projection)
    key_w, key_h = softmax_kernel_exponents(k, projection)
    key_exponents = key_w - key_h
    key_scale = key_exponents.detach().amax(dim=-2, keepdim=True)
    query_exponents = query_w + key_scale
    query_scale = query_exponents.detach().amax(dim=-1, keepdim=True)
    return (query_exponents - query_scale).exp(), (key_exponents - key_scale).exp()


def max_features(q: Tensor, k: Tensor, projection: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Features of the original library, each (B, H, N, M): exp(w - h - max w) + eps, the maximum not of w - h."""
    query_w, query_h = softmax_kernel_exponents(q, projection)
    key_w, key_h = softmax_kernel_exponents(k, projection)
    query_max = query_w.detach().amax(dim=-1, keepdim=True)
    key_max = key_w.detach().amax(dim=(-2, -1), keepdim=True)
    factor = projection.shape[0] ** -0.5
    return factor * ((query_w - query_h - query_max).exp() + eps), factor * ((key_w - key_h - key_max).exp() + eps)


def relu_features(q: Tensor, k: Tensor, projection: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Features of the ReLU kernel, each (B, H, N, M)."""
    return tuple(softmax_kernel_exponents(x, projection)[0].relu() + eps for x in (q, k))


class PerformerMixer(TokenMixer):
    """Linear attention over positive random features. 4 N D M MACs, no parameters, one buffer of M d.

    Paper: arXiv 2009.14794, eq. 7 and section 2.4; the ReLU kernel is its Performer-ReLU.
    Differs: default mode ``stable`` (see :func:`stable_features`); at unit-variance q and k the original's epsilon
        already makes the output nearly a uniform average. No redraw by default, since a converted model is tuned to
        the projection that it has.
    """

    Options = PerformerOptions
    native_conversion: ClassVar[Conversion] = NATIVE
    rows_are_independent = True

    def __init__(self, shape: AttentionShape, options: PerformerOptions | None = None):
        super().__init__(shape, options)
        drawn = torch.randint(_SEED_RANGE, (), dtype=torch.int64, device="cpu")
        layer_seed = (drawn + self.options.seed) % _SEED_RANGE
        self.register_buffer("projection", self._draw(int(layer_seed)).to(torch.get_default_device()))
        if self.options.redraw_interval:
            self.register_buffer("layer_seed", layer_seed.to(torch.get_default_device()))
            self._draws = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        with full_precision(v):
            return linear_attention(*self.feature_maps(q, k), v)

    def feature_maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features of queries and keys, each (B, H, N, M) in float32 (float64 for float64 input)."""
        with full_precision(q):
            if self.options.mode == "stable":
                return stable_features(q, k, self.projection)
            if self.options.mode == "max":
                return max_features(q, k, self.projection, self.options.feature_eps)
            return relu_features(q, k, self.projection, self.options.kernel_eps)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        return performer_reference(q, k, v, self.projection.to(q), self.options)

    @property
    def reference_width(self) -> int:
        return self.options.num_features

    def _draw(self, seed: int) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return orthogonal_projection(self.options.num_features, self.shape.head_dim, generator, self.options.row_norms)

    @torch.no_grad()
    def begin_step(self, step: int) -> None:
        """Draws a new projection at every ``redraw_interval``-th optimizer step but the first.

        A function of the layer's seed and the step alone, so that all ranks, and a resumed run, draw the same.
        """
        draws = step // self.options.redraw_interval if self.options.redraw_interval else 0
        if draws and draws != self._draws:
            # A new tensor: the old one may still be saved for a backward pass.
            self.projection = self._draw(int(self.layer_seed) + draws * _SEED_RANGE).to(self.projection)
            self._draws = draws


def performer_reference(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, options: PerformerOptions = PerformerOptions()
) -> Tensor:
    """Performer's output by way of its N x N matrix of weights, (B, H, N, d) in and out. Memory N^2 M."""
    if options.mode == "stable":
        query_w, query_h = softmax_kernel_exponents(q, projection)
        key_w, key_h = softmax_kernel_exponents(k, projection)
        exponents = (query_w - query_h)[..., :, None, :] + (key_w - key_h)[..., None, :, :]
        return exponents.logsumexp(-1).softmax(-1) @ v
    if options.mode == "max":
        features = max_features(q, k, projection, options.feature_eps)
    else:
        features = relu_features(q, k, projection, options.kernel_eps)
    return linear_attention_reference(*features, v)
