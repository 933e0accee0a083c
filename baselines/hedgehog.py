"""Hedgehog: linear attention whose feature maps are trained to imitate the softmax map.

Paper: "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", arXiv 2402.04347.

Shapes: B batch, H heads, N tokens, d head dim, f columns of a feature map's weight, M features (2f, or f for ``half``).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adala.attention import AttentionShape, TokenLayout, TokenMixer, accumulation_dtype, full_precision
from adala.attention.linear import linear_attention, linear_attention_reference
from adala.conversion import Conversion, ConversionStep

Activation = Literal["softmax", "exp"]

NATIVE = Conversion(
    name="native",
    steps=(
        ConversionStep(
            "attention_alignment",
            trainable=("blocks.*.attn.token_mixer.*",),
            loss="attention_map_cross_entropy",
            lr=1e-2,
            weight_decay=0.0,
        ),
        ConversionStep("finetuning"),
    ),
)


@dataclass(frozen=True)
class HedgehogOptions:
    """Options of Hedgehog.

    Attributes:
        feature_dim: f, columns of each head's weight; None is d / 2, which makes as many features as d.
        activation: ``softmax`` over the features; ``exp`` subtracts the largest of each token without normalising.
        half: Features of z alone, without those of -z.
        tied: One weight for queries and keys.
        clamp_min: Lower clamp of every feature.
        den_added: Added to the denominator.
    """

    feature_dim: int | None = None
    activation: Activation = "softmax"
    half: bool = False
    tied: bool = False
    clamp_min: float = 1e-12
    den_added: float = 1e-12

    def __post_init__(self) -> None:
        if self.activation not in ("softmax", "exp"):
            raise ValueError(f"option activation is {self.activation!r}: it can be 'softmax' or 'exp'")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"option feature_dim is {self.feature_dim}: it must be at least 1")


def hedgehog_features(
    x: Tensor, weight: Tensor, activation: Activation = "softmax", half: bool = False, clamp_min: float = 1e-12
) -> Tensor:
    """concat[g(x W), g(-x W)], non-negative, each half normalised on its own.

    Args:
        x: Queries or keys, (B, H, N, d), no scale applied.
        weight: W, (H, d, f).
        activation: g: softmax over f, or exp(z - max over f of z).
        half: g(x W) alone.
        clamp_min: Lower clamp of every feature.

    Returns:
        (B, H, N, M) in float32, or float64 where ``x`` is.
    """
    dtype = accumulation_dtype(x)
    z = x.to(dtype) @ weight.to(dtype)
    halves = (z,) if half else (z, -z)
    if activation == "softmax":
        features = [part.softmax(dim=-1) for part in halves]
    else:
        features = [(part - part.amax(dim=-1, keepdim=True)).exp() for part in halves]
    return torch.cat(features, dim=-1).clamp_min(clamp_min)


class HedgehogMixer(TokenMixer):
    """Linear attention over trained softmax features. 2 N D f + 4 N D f MACs, 2 H d f parameters.

    Paper: arXiv 2402.04347, the softmax form of its feature map.
    Differs: starts at the identity (eye(d, f) for each head), from which features follow q and k at once; a Kaiming
        start gives nearly uniform attention.
    """

    Options = HedgehogOptions
    native_conversion: ClassVar[Conversion] = NATIVE
    rows_are_independent = True

    def __init__(self, shape: AttentionShape, options: HedgehogOptions | None = None):
        super().__init__(shape, options)
        feature_dim = self.options.feature_dim or max(1, shape.head_dim // 2)
        identity = torch.eye(shape.head_dim, feature_dim).repeat(shape.num_heads, 1, 1)
        self.query_weight = nn.Parameter(identity)
        self.register_parameter("key_weight", None if self.options.tied else nn.Parameter(identity.clone()))

    def feature_maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features of queries and keys, each (B, H, N, M) in float32 (float64 for float64 input)."""
        options = self.options
        key_weight = self.query_weight if self.key_weight is None else self.key_weight
        with full_precision(q):
            return (
                hedgehog_features(q, self.query_weight, options.activation, options.half, options.clamp_min),
                hedgehog_features(k, key_weight, options.activation, options.half, options.clamp_min),
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        query_features, key_features = self.feature_maps(q, k)
        with full_precision(v):
            return linear_attention(query_features, key_features, v, den_added=self.options.den_added)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        key_weight = self.query_weight if self.key_weight is None else self.key_weight
        weights = (weight[heads].to(q) for weight in (self.query_weight, key_weight))
        return hedgehog_reference(q, k, v, *weights, self.options)


def hedgehog_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    options: HedgehogOptions = HedgehogOptions(),
) -> Tensor:
    """Hedgehog's output by way of its N x N matrix of weights, (B, H, N, d) in and out."""
    shared = (options.activation, options.half, options.clamp_min)
    return linear_attention_reference(
        hedgehog_features(q, query_weight, *shared),
        hedgehog_features(k, key_weight, *shared),
        v,
        den_added=options.den_added,
    )
