"""Linformer: keys and values projected from N tokens to a fixed number of rows.

Paper: "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768.

Shapes: B batch, H heads, N tokens, d head dim, M projected rows (the paper's k), N_max tokens at construction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adala.attention import AttentionShape, TokenLayout, TokenMixer, accumulation_dtype, full_precision
from adala.conversion import Conversion, ConversionStep
from baselines.nystromformer import segment_means

NATIVE = Conversion(name="native", steps=(ConversionStep("finetuning"),))


@dataclass(frozen=True)
class LinformerOptions:
    """Options of Linformer.

    Attributes:
        num_landmarks: M, rows that keys and values are projected to; never more than N_max.
        init: ``segments`` averages the tokens of M contiguous segments; ``uniform`` draws from +-1/sqrt(M).
        scale: Factor on the scores; None is d^-1/2.
    """

    num_landmarks: int = 32
    init: Literal["segments", "uniform"] = "segments"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.num_landmarks < 1:
            raise ValueError(f"option num_landmarks is {self.num_landmarks}: it must be at least 1")
        if self.init not in ("segments", "uniform"):
            raise ValueError(f"option init is {self.init!r}: it can be 'segments' or 'uniform'")


class LinformerMixer(TokenMixer):
    """softmax over M of (scale q (E^T k)^T), times F^T v. 4 N M D MACs, 2 N_max M parameters.

    E and F are shared by the heads of a layer. Fewer tokens than N_max use the first N rows; an image size that
    needs more, or whose grid is another, calls for :meth:`resize`.

    Paper: arXiv 2006.04768, eq. 7, with heads sharing their projections.
    Differs: starts at segment means; the original's uniform start inflates the values by about sqrt(N / M) and ruins a
        pretrained network at step 0.
    """

    Options = LinformerOptions
    native_conversion: ClassVar[Conversion] = NATIVE

    def __init__(self, shape: AttentionShape, options: LinformerOptions | None = None):
        super().__init__(shape, options)
        num_tokens = shape.layout.num_tokens
        num_rows = min(self.options.num_landmarks, num_tokens)
        if self.options.init == "segments":
            key_projection = segment_means(torch.eye(num_tokens), num_rows).t().contiguous()
            value_projection = key_projection.clone()
        else:
            bound = num_rows**-0.5
            key_projection = torch.empty(num_tokens, num_rows).uniform_(-bound, bound)
            value_projection = torch.empty(num_tokens, num_rows).uniform_(-bound, bound)
        self.key_projection = nn.Parameter(key_projection)
        self.value_projection = nn.Parameter(value_projection)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """Mixes ``v`` over tokens.

        Raises:
            ValueError: More tokens than the projections have rows.
        """
        num_tokens, dtype = q.shape[-2], accumulation_dtype(v)
        if num_tokens > self.key_projection.shape[0]:
            raise ValueError(
                f"{num_tokens} tokens, but this Linformer layer has projections for {self.key_projection.shape[0]}: "
                "call set_input_size on the model, or resize(layout) on the mixers, for the larger image size"
            )
        scale = q.shape[-1] ** -0.5 if self.options.scale is None else self.options.scale
        with full_precision(v):
            keys = torch.einsum("nm,bhnd->bhmd", self.key_projection[:num_tokens].to(dtype), k.to(dtype))
            values = torch.einsum("nm,bhnd->bhmd", self.value_projection[:num_tokens].to(dtype), v.to(dtype))
            weights = (scale * q.to(dtype) @ keys.transpose(-2, -1)).softmax(dim=-1)
            return (weights @ values).to(v.dtype)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        projections = (projection.to(q) for projection in (self.key_projection, self.value_projection))
        return linformer_reference(q, k, v, *projections, self.options.scale)

    @torch.no_grad()
    def resize(self, layout: TokenLayout) -> None:
        """Fits the projections to another patch grid: bilinear, rescaled such that sums over tokens keep their size.

        Rows of prefix tokens stay. The parameters become new ones, so that an optimizer is built afterwards.

        Args:
            layout: The layout from now on.

        Raises:
            ValueError: Another number of prefix tokens than before.
        """
        before = self.shape.layout
        if layout.num_prefix_tokens != before.num_prefix_tokens:
            raise ValueError(
                f"resize to {layout.num_prefix_tokens} prefix tokens, but these projections were made for "
                f"{before.num_prefix_tokens}: only the patch grid can change"
            )
        self.key_projection = nn.Parameter(
            _resize_rows(self.key_projection, before, layout), self.key_projection.requires_grad
        )
        self.value_projection = nn.Parameter(
            _resize_rows(self.value_projection, before, layout), self.value_projection.requires_grad
        )
        super().resize(layout)


def _resize_rows(projection: Tensor, old: TokenLayout, new: TokenLayout) -> Tensor:
    """(N_old, M) -> (N_new, M) in the dtype of ``projection``."""
    prefix, patches = projection.split((old.num_prefix_tokens, old.num_patches))
    grid = patches.to(accumulation_dtype(patches)).t().reshape(1, -1, *old.grid_size)
    grid = F.interpolate(grid, size=new.grid_size, mode="bilinear", align_corners=False)
    rows = grid.reshape(-1, new.num_patches).t() * (old.num_patches / new.num_patches)
    return torch.cat((prefix, rows.to(projection.dtype)))


def linformer_reference(
    q: Tensor, k: Tensor, v: Tensor, key_projection: Tensor, value_projection: Tensor, scale: float | None = None
) -> Tensor:
    """Linformer's output by way of its N x N matrix, whose rows need not sum to 1. (B, H, N, d) in and out."""
    num_tokens = q.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q @ k.transpose(-2, -1)) @ key_projection[:num_tokens]
    return (scores.softmax(-1) @ value_projection[:num_tokens].t()) @ v
