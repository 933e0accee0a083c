"""MonarchAttention: softmax attention projected onto Monarch matrices, without parameters or training.

Paper: "MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured Attention", arXiv 2505.18698.

Shapes: B batch, H heads, N tokens, d head dim, b block size, M blocks (M b >= N). A token is (block, position): a
query (l, j), a key (k, i). The weights are A[(l, j), (k, i)] = L[l, j, k] R[k, j, i], where rows of L sum to 1 over k
and those of R over i.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adala.attention import TokenLayout, TokenMixer, accumulation_dtype, full_precision
from adala.conversion import Conversion, ConversionStep

NATIVE = Conversion(name="native", steps=(ConversionStep("finetuning"),))


@dataclass(frozen=True)
class MonarchOptions:
    """Options of MonarchAttention.

    Attributes:
        block_size: b, in tokens; None is the width of the patch grid, by which every block but those of the prefix
            tokens is one row of the image.
        num_steps: Alternating updates of R and L.
        padding_side: Side on which the tokens are filled up with zeros to M b of them.
        eps: Guard of the divisions and of the row maximum, as its authors have it; None is the exact optimisation
            in log space, which differs visibly only where scores are several times larger than usual.
    """

    block_size: int | None = None
    num_steps: int = 2
    padding_side: Literal["left", "right"] = "left"
    eps: float | None = 1e-12

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"option block_size is {self.block_size}: it must be at least 1")
        if self.num_steps < 1:
            raise ValueError(f"option num_steps is {self.num_steps}: it must be at least 1")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"option padding_side is {self.padding_side!r}: it can be 'left' or 'right'")


class MonarchMixer(TokenMixer):
    """Alternating maximisation over block-structured weights. M b D ((2T + 1) b + 2 T M) MACs for T steps.

    No parameters. Memory is M b max(M, b) for each head, N^1.5 for blocks of one image row.

    Paper: arXiv 2505.18698, algorithm 1.
    """

    Options = MonarchOptions
    native_conversion: ClassVar[Conversion] = NATIVE

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        options, dtype, num_tokens = self.options, accumulation_dtype(v), q.shape[-2]
        block_size = options.block_size or layout.grid_size[1]
        num_blocks = -(-num_tokens // block_size)
        padding = _padding(num_tokens, block_size, options.padding_side)
        with full_precision(v):
            queries, keys, values = (
                F.pad(x.to(dtype), (0, 0, *padding)).unflatten(-2, (num_blocks, block_size)) for x in (q, k, v)
            )  # (B, H, M, b, d)
            real = F.pad(torch.ones(num_tokens, dtype=torch.bool, device=q.device), padding)
            real = real.unflatten(0, (num_blocks, block_size))
            left, right = monarch_factors(queries, keys, real, options)
            block_outputs = (right @ values).transpose(-3, -2)  # (B, H, b, M, d)
            out = (left @ block_outputs).transpose(-3, -2).flatten(-3, -2)
            return out[..., padding[0] : padding[0] + num_tokens, :].to(v.dtype)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        return monarch_reference(q, k, v, self.options.block_size or layout.grid_size[1], self.options)


def _padding(num_tokens: int, block_size: int, side: str) -> tuple[int, int]:
    missing = -num_tokens % block_size
    return (missing, 0) if side == "left" else (0, missing)


def monarch_factors(queries: Tensor, keys: Tensor, real: Tensor, options: MonarchOptions) -> tuple[Tensor, Tensor]:
    """The factors after ``num_steps`` updates of each.

    Args:
        queries: (B, H, M, b, d), zeros where padded.
        keys: (B, H, M, b, d), zeros where padded.
        real: (M, b) bool, False where padded; no block is padded throughout.
        options: Steps and guards.

    Returns:
        L as (B, H, b, M, M), indexed (j, l, k), and R as (B, H, M, b, b), indexed (k, j, i).
    """
    scale = queries.shape[-1] ** -0.5
    by_position = queries.transpose(-3, -2)  # (B, H, b, M, d)
    real_queries = real.t()[..., None]  # (b, M, 1)
    # What the keys of block k are asked for position j, (B, H, M, b, d); every query has mass 1 at first.
    centres = queries / (1 + (options.eps or 0.0))
    for step in range(options.num_steps):
        scores = scale * centres @ keys.transpose(-2, -1)
        if options.eps is None:
            right, entropy = _exact_rows(scores, real)
        else:
            right, entropy = _guarded_rows(scores, real, options.eps)
        key_means = scale * right @ keys  # (B, H, M, b, d)
        logits = by_position @ key_means.transpose(-3, -2).transpose(-2, -1)
        logits = logits - entropy.transpose(-2, -1)[..., None, :]  # (B, H, b, M, M)
        left = logits.softmax(dim=-1)
        if step + 1 == options.num_steps:
            return left, right
        if options.eps is None:
            # The ratio of the two sums below, as weights over the queries that cannot all vanish.
            log_left = logits.log_softmax(dim=-1).masked_fill(~real_queries, torch.finfo(logits.dtype).min)
            centres = log_left.softmax(dim=-2).transpose(-2, -1) @ by_position
        else:
            left = left * real_queries
            mass = left.sum(dim=-2)[..., None] + options.eps
            centres = left.transpose(-2, -1) @ by_position / mass
        centres = centres.transpose(-3, -2)
    raise AssertionError("num_steps is at least 1")


def _guarded_rows(scores: Tensor, real: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Softmax over the real keys with the authors' guards, and sum R log R of each row."""
    scores = scores.masked_fill(~real[:, None, :], float("-inf"))
    shifted = (scores - scores.amax(dim=-1, keepdim=True).clamp_min(eps)).exp()
    rows = shifted / (shifted.sum(dim=-1, keepdim=True) + eps)
    rows = rows.clamp_min(torch.finfo(rows.dtype).tiny)
    return rows, (rows * rows.log()).sum(dim=-1)


def _exact_rows(scores: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the real keys, and sum R log R of each row."""
    masked = scores.masked_fill(~real[:, None, :], float("-inf"))
    rows = masked.softmax(dim=-1)
    return rows, (rows * scores).sum(dim=-1) - masked.logsumexp(dim=-1)


def monarch_reference(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, options: MonarchOptions = MonarchOptions()
) -> Tensor:
    """MonarchAttention by way of its N x N matrix of weights, (B, H, N, d) in and out, index by index."""
    num_tokens, scale = q.shape[-2], q.shape[-1] ** -0.5
    padding = _padding(num_tokens, block_size, options.padding_side)
    queries, keys, values = (F.pad(x, (0, 0, *padding)).unflatten(-2, (-1, block_size)) for x in (q, k, v))
    real = F.pad(torch.ones(num_tokens, dtype=torch.bool, device=q.device), padding).unflatten(0, (-1, block_size))
    eps = 0.0 if options.eps is None else options.eps
    asked, mass = queries, torch.ones_like(queries[..., 0])
    for step in range(options.num_steps):
        r = scale * torch.einsum("bhkjd,bhkid->bhkji", asked, keys) / (mass + eps)[..., None]
        r = torch.where(real[:, None, :], r, float("-inf"))
        largest = r.amax(-1, keepdim=True)
        exponential = (r - (largest if options.eps is None else largest.clamp_min(eps))).exp()
        right = exponential / (exponential.sum(-1, keepdim=True) + eps)
        right = right.clamp_min(torch.finfo(right.dtype).tiny)
        entropy = (right * right.log()).sum(-1)
        key_means = scale * torch.einsum("bhkji,bhkid->bhkjd", right, keys)
        logits = torch.einsum("bhljd,bhkjd->bhljk", queries, key_means) - entropy.transpose(-2, -1)[..., None, :, :]
        left = logits.softmax(-1)
        if step + 1 < options.num_steps:
            counted = left * real[..., None]
            mass = counted.sum(-3).transpose(-2, -1)
            asked = torch.einsum("bhljk,bhljd->bhkjd", counted, queries)
    weights = torch.einsum("bhljk,bhkji->bhljki", left, right).flatten(-2).flatten(-3, -2)
    out = weights @ values.flatten(-3, -2)
    return out[..., padding[0] : padding[0] + num_tokens, :]
