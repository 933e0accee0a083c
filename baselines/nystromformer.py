"""Nystromformer: softmax attention through landmark tokens and a pseudo-inverse.

Paper: "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention", arXiv 2102.03902.

Shapes: B batch, H heads, N tokens, d head dim, M landmarks.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adala.attention import AttentionShape, TokenLayout, TokenMixer, accumulation_dtype, full_precision
from adala.conversion import Conversion, ConversionStep

PinvInit = Literal["per_matrix", "global"]

NATIVE = Conversion(name="native", steps=(ConversionStep("finetuning"),))


@dataclass(frozen=True)
class NystromformerOptions:
    """Options of Nystromformer.

    Attributes:
        num_landmarks: M. Images of at most so many tokens get exact softmax attention.
        pinv_iterations: Steps of the third-order iteration towards the pseudo-inverse.
        pinv_init: ``per_matrix`` divides the start by each matrix's own largest column sum; ``global`` by the largest
            over batch and heads, as in early releases, by which an image's output depends on its batch-mates.
        conv_kernel: Odd length, in tokens, of a depthwise convolution of the values that is added to the output;
            None is no convolution.
    """

    num_landmarks: int = 64
    pinv_iterations: int = 6
    pinv_init: PinvInit = "per_matrix"
    conv_kernel: int | None = None

    def __post_init__(self) -> None:
        if self.num_landmarks < 1:
            raise ValueError(f"option num_landmarks is {self.num_landmarks}: it must be at least 1")
        if self.pinv_init not in ("per_matrix", "global"):
            raise ValueError(f"option pinv_init is {self.pinv_init!r}: it can be 'per_matrix' or 'global'")
        if self.conv_kernel is not None and self.conv_kernel % 2 != 1:
            raise ValueError(f"option conv_kernel is {self.conv_kernel}: it must be odd, to be centred on a token")


def segment_means(x: Tensor, num_segments: int) -> Tensor:
    """Averages over contiguous segments of tokens that are as even as they can be, the shorter ones first.

    With s = floor(N / M), the first M (s + 1) - N segments have s tokens and the rest s + 1.

    Args:
        x: (..., N, d) with N at least ``num_segments``.
        num_segments: M.

    Returns:
        (..., M, d).
    """
    num_tokens = x.shape[-2]
    length = num_tokens // num_segments
    num_short = num_segments * (length + 1) - num_tokens
    short = x[..., : num_short * length, :].unflatten(-2, (num_short, length)).mean(dim=-2)
    if num_short == num_segments:
        return short
    rest = x[..., num_short * length :, :].unflatten(-2, (num_segments - num_short, length + 1)).mean(dim=-2)
    return torch.cat((short, rest), dim=-2)


def iterative_pinv(matrix: Tensor, iterations: int = 6, init: PinvInit = "per_matrix") -> Tensor:
    """Approximate pseudo-inverse of row-stochastic matrices, (B, H, M, M) in and out, in the dtype given.

    Paper: arXiv 2102.03902, eq. 11.
    """
    column_sum = matrix.sum(dim=-2, keepdim=True)
    largest = column_sum.amax() if init == "global" else column_sum.amax(dim=-1, keepdim=True)
    inverse = matrix.transpose(-2, -1) / largest
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse


class NystromformerMixer(TokenMixer):
    """Nystrom approximation of softmax attention. About 4 N M D + 2 M^2 D + 24 M^3 H MACs.

    No parameters, or H x conv_kernel with the convolution. Weights may be negative and rows sum to 1 only about.

    Paper: arXiv 2102.03902, eq. 13 and figure 2.
    Differs: for N <= M tokens it is exact softmax attention, where the original refuses. The convolution is off by
        default and starts at zero, since a random one would ruin a pretrained network at step 0.
    """

    Options = NystromformerOptions
    native_conversion: ClassVar[Conversion] = NATIVE

    def __init__(self, shape: AttentionShape, options: NystromformerOptions | None = None):
        super().__init__(shape, options)
        kernel = self.options.conv_kernel
        weight = None if kernel is None else nn.Parameter(torch.zeros(shape.num_heads, 1, kernel, 1))
        self.register_parameter("conv_weight", weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        options, dtype = self.options, accumulation_dtype(v)
        with full_precision(v):
            if q.shape[-2] <= options.num_landmarks:
                out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype))
            else:
                kernels = nystrom_kernels(q, k, options.num_landmarks)
                inverse = iterative_pinv(kernels[1], options.pinv_iterations, options.pinv_init)
                out = kernels[0] @ (inverse @ (kernels[2] @ v.to(dtype)))
            if self.conv_weight is not None:
                padding = (options.conv_kernel // 2, 0)
                out = out + F.conv2d(v.to(dtype), self.conv_weight.to(dtype), padding=padding, groups=v.shape[1])
            return out.to(v.dtype)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        conv_weight = None if self.conv_weight is None else self.conv_weight[heads].to(q)
        return nystromformer_reference(q, k, v, self.options, conv_weight)


def nystrom_kernels(q: Tensor, k: Tensor, num_landmarks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three softmax kernels: queries by landmarks (N x M), landmarks (M x M), landmarks by keys (M x N)."""
    dtype = accumulation_dtype(q)
    q, k = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype)
    q_landmarks, k_landmarks = segment_means(q, num_landmarks), segment_means(k, num_landmarks)
    return (
        (q @ k_landmarks.transpose(-2, -1)).softmax(dim=-1),
        (q_landmarks @ k_landmarks.transpose(-2, -1)).softmax(dim=-1),
        (q_landmarks @ k.transpose(-2, -1)).softmax(dim=-1),
    )


def nystromformer_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: NystromformerOptions = NystromformerOptions(),
    conv_weight: Tensor | None = None,
) -> Tensor:
    """Nystromformer's output by way of its N x N matrix of weights, the convolution a band in it.

    The matrix is softmax's where there are no more tokens than landmarks. (B, H, N, d) in and out.
    """
    num_tokens, scale = q.shape[-2], q.shape[-1] ** -0.5
    if num_tokens <= options.num_landmarks:
        weights = (scale * q @ k.transpose(-2, -1)).softmax(-1)
    else:
        averages = _segment_averages(num_tokens, options.num_landmarks).to(q)
        by_landmarks = (scale * q @ (averages @ k).transpose(-2, -1)).softmax(-1)
        between_landmarks = (scale * (averages @ q) @ (averages @ k).transpose(-2, -1)).softmax(-1)
        by_keys = (scale * (averages @ q) @ k.transpose(-2, -1)).softmax(-1)
        inverse = iterative_pinv(between_landmarks, options.pinv_iterations, options.pinv_init)
        weights = by_landmarks @ inverse @ by_keys
    if conv_weight is not None:
        kernel = conv_weight.shape[2]
        position = torch.arange(num_tokens, device=q.device)
        offset = position[None, :] - position[:, None] + kernel // 2
        inside = (offset >= 0) & (offset < kernel)
        weights = weights + conv_weight[:, 0, :, 0][:, offset.clamp(0, kernel - 1)] * inside.to(weights)
    return weights @ v


def _segment_averages(num_tokens: int, num_segments: int) -> Tensor:
    """(M, N) float64 matrix of averages over the segments of :func:`segment_means`, token by token."""
    length = num_tokens // num_segments
    num_short = num_segments * (length + 1) - num_tokens
    averages = torch.zeros(num_segments, num_tokens, dtype=torch.float64)
    start = 0
    for segment in range(num_segments):
        stop = start + length + (segment >= num_short)
        averages[segment, start:stop] = 1 / (stop - start)
        start = stop
    return averages
