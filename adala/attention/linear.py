"""Linear attention: the normalised product form that most mechanisms share, and ViT-AdaLA's own ELU + 1 instance.

Shapes: B batch, H heads, N tokens, d head dim, M features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adala.attention.base import TokenMixer
from adala.attention.kernels import describe_kernel, fused_elu_attention, fused_elu_attention_packed, uses_kernel
from adala.attention.layout import TokenLayout
from adala.attention.precision import accumulation_dtype, full_precision


def linear_attention(
    query_features: Tensor, key_features: Tensor, v: Tensor, den_added: float = 0.0, den_min: float | None = None
) -> Tensor:
    """a (b^T v) / den with den = a . sum_tokens b, in time linear in N.

    Args:
        query_features: a, (B, H, N, M), non-negative, float32 or float64.
        key_features: b, (B, H, N, M).
        v: Values, (B, H, N, d), of any floating dtype.
        den_added: Added to the denominator.
        den_min: Lower clamp of the denominator; None is no clamp.

    Returns:
        (B, H, N, d) in the dtype of ``v``; sums are kept in the dtype of the features.
    """
    with full_precision(v):
        key_values = key_features.transpose(-2, -1) @ v.to(key_features.dtype)
        numerator = query_features @ key_values
        denominator = query_features @ key_features.sum(dim=-2).unsqueeze(-1)
        denominator = denominator + den_added
        if den_min is not None:
            denominator = denominator.clamp_min(den_min)
        return (numerator / denominator).to(v.dtype)


def linear_attention_reference(
    query_features: Tensor, key_features: Tensor, v: Tensor, den_added: float = 0.0, den_min: float | None = None
) -> Tensor:
    """The same as :func:`linear_attention` by way of the N x N matrix of weights."""
    weights = query_features @ key_features.transpose(-2, -1)
    denominator = weights.sum(dim=-1, keepdim=True) + den_added
    if den_min is not None:
        denominator = denominator.clamp_min(den_min)
    return (weights / denominator @ v.to(weights.dtype)).to(v.dtype)


def elu_plus_one(x: Tensor) -> Tensor:
    """ELU(x) + 1 in float32 (float64 for float64 input), written so that small values survive.

    ``elu(x) + 1`` subtracts 1 and adds it again, which loses everything below the dtype's epsilon: exact zeros, and
    gradients of millions, in bf16. This is x + 1 above zero and exp(x) below; as a sum, because a ``where`` and its
    backward pass took a quarter of a small model's training step on a CPU.
    """
    x = x.to(accumulation_dtype(x))
    positive = x.relu()
    # x - positive is min(x, 0), with the derivative 1 at zero that relu and clamp do not have there.
    return positive + (x - positive).exp()


@dataclass(frozen=True)
class LinearOptions:
    """Options of vanilla linear attention.

    Attributes:
        den_added: Added to the denominator.
    """

    den_added: float = 1e-6


class LinearMixer(TokenMixer):
    """Vanilla linear attention with the feature map ELU + 1. 2 N D d MACs, no parameters.

    Paper: arXiv 2603.16063 (ViT-AdaLA), whose default instance it is; arXiv 2006.16236, eq. 7.
    """

    Options = LinearOptions
    rows_are_independent = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        if uses_kernel(v.device, v.dtype, v.shape[-1]):
            return fused_elu_attention(q, k, v, self.options.den_added)
        return linear_attention(elu_plus_one(q), elu_plus_one(k), v, den_added=self.options.den_added)

    def describe_kernel(self, device: torch.device, dtype: torch.dtype) -> str:
        return describe_kernel(device, dtype, self.shape.head_dim)

    def mix_packed(self, qkv: Tensor, layout: TokenLayout) -> Tensor:
        # A subclass that mixes in another way has another forward, and not necessarily another one of this.
        if type(self).forward is _FORWARD and uses_kernel(qkv.device, qkv.dtype, qkv.shape[-1]):
            return fused_elu_attention_packed(qkv, self.options.den_added)
        return super().mix_packed(qkv, layout)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        return elu_attention_reference(q, k, v, self.options.den_added)


_FORWARD = LinearMixer.forward


def elu_attention_reference(q: Tensor, k: Tensor, v: Tensor, den_added: float = 1e-6) -> Tensor:
    """Vanilla linear attention with its N x N matrix written out, (B, H, N, d) in and out."""
    return linear_attention_reference(elu_plus_one(q), elu_plus_one(k), v, den_added=den_added)
