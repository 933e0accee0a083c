"""Softmax attention behind the common interface: the reference that everything else approximates.

Shapes: B batch, H heads, N tokens, d head dim.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from adala.attention.base import TokenMixer
from adala.attention.layout import TokenLayout
from adala.attention.precision import accumulation_dtype


@dataclass(frozen=True)
class SoftmaxOptions:
    """Options of softmax attention.

    Attributes:
        scale: Factor on the scores; None is d^-1/2.
    """

    scale: float | None = None


class SoftmaxMixer(TokenMixer):
    """softmax(scale q k^T) v through the fused kernel of PyTorch, bit for bit as timm computes it. 2 N^2 D MACs."""

    Options = SoftmaxOptions
    rows_are_independent = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.options.scale)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        return softmax_attention_reference(q, k, v, self.options.scale)


def softmax_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v with its N x N matrix written out, (B, H, N, d) in and out."""
    dtype = accumulation_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q.to(dtype) @ k.to(dtype).transpose(-2, -1)
    return (scores.softmax(-1) @ v.to(dtype)).to(v.dtype)
