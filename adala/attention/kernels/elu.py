"""Normalised linear attention under the feature map ELU + 1, forward and backward, fused: in Triton on a GPU, in chunks
of tokens on a CPU (``chunked.py``). What follows on launches and spans is about the former.

Shapes: B batch, H heads, N tokens, d head dim.

Of every pair of image and head, with a = elu1(q), b = elu1(k) and elu1(x) = x + 1 above zero, exp(x) below:

    S = sum_n b_n v_n^T    z = sum_n b_n    den_n = a_n . z + den_added    o_n = a_n S / den_n

    g_n = do_n / den_n     e_n = -(do_n . o_n) / den_n
    dS = sum_n a_n g_n^T   dz = sum_n a_n e_n
    da_n = S g_n + z e_n   db_n = dS v_n + dz   dv_n = dS^T b_n

Nothing of size B N H d is kept between the passes but the input: features, denominators and outputs are computed again.
Saved are S and z, float32, d (d + 1) numbers a pair. Each pass reads its tokens twice at most, and nothing lies between
the projection and the kernels: they read and write the packed (B, N, 3, H, d) by its strides.

**The result is deterministic, always**: no atomic additions, and the partial sums of a pair's spans are added in fixed
order. How many spans there are follows from the shapes and the device's number of multiprocessors, so that another
model of GPU may give other last bits.

Why custom operators and not ``torch.library.triton_op``: how the work is cut is decided in Python, by comparing B H and
N with the size of the chip. Traced by torch.compile, each such decision becomes a condition on the shapes, and Inductor
compiles the kernels anew; there is nothing around them that it could fuse into them in return. Under the interpreter a
``triton_op`` cannot be compiled at all (tried with PyTorch 2.14, Triton 3.8: it asks a fake tensor for its address). As
custom operators they are the same to eager mode, compiler, interpreter and FLOP counter.

Paper: arXiv 2603.16063 (ViT-AdaLA); arXiv 2006.16236, eq. 7.
"""

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adala.attention.kernels import chunked
from adala.attention.kernels.plan import SCHEMES, Tile, choose_split, choose_tiles, padded_head_dim
from adala.attention.kernels.support import is_chunked, unsupported_reason

# Few, as every program takes the interpreter milliseconds, yet enough that tokens are split among some.
INTERPRETED_MULTIPROCESSORS = 1
ADDITIONS_PER_PROGRAM = 1024


def fused_elu_attention_packed(qkv: Tensor, den_added: float = 1e-6) -> Tensor:
    """Linear attention from the packed projection: no permutation, no copy, in either pass.

    Differentiable once. Computes in float32 whatever comes in, and heeds no autocast.

    Args:
        qkv: (B, N, 3, H, d) of bfloat16, float16 or float32, d a multiple of 8 from 16 to 128; by any strides, but
            copied where neighbours in d are not neighbours in memory.
        den_added: Added to the denominator.

    Returns:
        (B, N, H d), contiguous, in the dtype of ``qkv``. Its gradient reaches ``qkv`` as one contiguous tensor.

    Raises:
        ValueError: Another shape, or the kernels cannot run on this device or with this dtype or head dim, see
            :func:`~adala.attention.kernels.support.unsupported_reason`.

    Paper: arXiv 2603.16063; arXiv 2006.16236, eq. 7.
    """
    out, _ = _attention_packed(qkv, den_added)
    return out


def fused_elu_attention(q: Tensor, k: Tensor, v: Tensor, den_added: float = 1e-6) -> Tensor:
    """Linear attention of separate queries, keys and values, for models that normalise q and k.

    Differentiable once. Computes in float32 whatever comes in, and heeds no autocast.

    Args:
        q: Queries, (B, H, N, d), by any strides, as in :func:`fused_elu_attention_packed`.
        k: Keys, (B, H, N, d).
        v: Values, (B, H, N, d); q and k may be of another of the three dtypes.
        den_added: Added to the denominator.

    Returns:
        (B, H, N, d) in the dtype of ``v``, a view of (B, N, H, d) in memory; the gradients are of the same form, each
        in its input's dtype.

    Raises:
        ValueError: As in :func:`fused_elu_attention_packed`.

    Paper: arXiv 2603.16063; arXiv 2006.16236, eq. 7.
    """
    out, _ = _attention(q, k, v, den_added)
    return out


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton program, before it is made.

    A program's arguments are its operands, those read before those written, then numbers, then constants: what is
    counted is what it is given.

    Attributes:
        program: Name of the program in ``elu_programs``.
        grid: Programs: pairs, then spans or pieces of a pair.
        reads: Tensors that it reads, each element once.
        writes: Tensors that it writes.
        numbers: Strides, sizes and den_added.
        constants: What it is compiled for.
        tile: Warps and stages.
    """

    program: str
    grid: tuple[int, int]
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    numbers: tuple[int | float, ...]
    constants: dict[str, int | str]
    tile: Tile

    @property
    def bytes_moved(self) -> int:
        """Bytes of all operands, read and written."""
        return sum(operand.numel() * operand.element_size() for operand in (*self.reads, *self.writes))

    def run(self) -> None:
        """Launches it."""
        program = getattr(_programs(), self.program)
        warps = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        program[self.grid](*self.reads, *self.writes, *self.numbers, **self.constants, **warps)


class _Pass:
    """Makes the launches of one pass over the tokens of every pair."""

    def __init__(self, v: Tensor, tile: Tile, num_multiprocessors: int):
        """``v`` is (B, N, H, d)."""
        self.batch, self.num_tokens, self.num_heads, self.head_dim = v.shape
        self.pairs = self.batch * self.num_heads
        self.tile = tile
        self.split = choose_split(self.pairs, self.num_tokens, tile.block_tokens, num_multiprocessors)
        self.scheme = SCHEMES[v.dtype]

    def over_tokens(
        self,
        program: str,
        read: Sequence[Tensor],
        written: Sequence[Tensor] = (),
        sums_read: Sequence[Tensor] = (),
        sums_written: Sequence[Tensor] = (),
        numbers: Sequence[float] = (),
    ) -> Launch:
        """A program for each span; ``read`` and ``written`` are (B, N, H, d), of any strides but 1 in d."""
        strides = [stride for tokens in (*read, *written) for stride in tokens.stride()[:3]]
        return Launch(
            program,
            (self.pairs, self.split.splits),
            (*read, *sums_read),
            (*written, *sums_written),
            (*strides, self.num_tokens, self.num_heads, self.split.span, *numbers),
            {
                "HEAD_DIM": self.head_dim,
                "PADDED": padded_head_dim(self.head_dim),
                "BLOCK": self.tile.block_tokens,
                "SCHEME": self.scheme,
            },
            self.tile,
        )

    def parts_of(self, sums: Tensor) -> Tensor:
        """Where the spans' sums go: straight to ``sums`` (B, H, d + 1, d) when there is one span."""
        splits = self.split.splits
        return sums if splits == 1 else sums.new_empty(self.batch, self.num_heads, splits, *sums.shape[2:])

    def additions(self, parts: Tensor, sums: Tensor) -> list[Launch]:
        """What brings the spans' sums together: nothing when there is one span."""
        if parts is sums:
            return []
        elements = self.head_dim * (self.head_dim + 1)
        constants = {"ELEMENTS": elements, "BLOCK": ADDITIONS_PER_PROGRAM}
        grid = (self.pairs, -(-elements // ADDITIONS_PER_PROGRAM))
        return [Launch("add_splits", grid, (parts,), (sums,), (self.split.splits,), constants, Tile(0, 4, 1))]


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, den_added: float, num_multiprocessors: int
) -> list[Launch]:
    """The forward pass: sums over keys, their total where tokens are split, outputs. Runs nothing.

    Args:
        q: Queries, (B, N, H, d).
        k: Keys.
        v: Values.
        out: Output, (B, N, H, d), written.
        sums: S and z, (B, H, d + 1, d) float32, written.
        den_added: Added to the denominator.
        num_multiprocessors: Of the device.
    """
    work = _Pass(v, choose_tiles(v.dtype, v.shape[-1]).forward, num_multiprocessors)
    parts = work.parts_of(sums)
    return [
        work.over_tokens("sum_keys", [k, v], sums_written=[parts]),
        *work.additions(parts, sums),
        work.over_tokens("mix_values", [q], [out], sums_read=[sums], numbers=[den_added]),
    ]


def backward_launches(
    inputs: Sequence[Tensor],
    grad: Tensor,
    sums: Tensor,
    gradients: Sequence[Tensor],
    den_added: float,
    num_multiprocessors: int,
) -> list[Launch]:
    """The backward pass: over queries, the total of their sums where tokens are split, over keys. Runs nothing.

    Args:
        inputs: q, k, v, (B, N, H, d) each.
        grad: Gradient of the output, (B, N, H, d), in the dtype of v.
        sums: S and z, (B, H, d + 1, d) float32.
        gradients: dq, dk, dv, (B, N, H, d) each, written.
        den_added: Added to the denominator.
        num_multiprocessors: Of the device.
    """
    (q, k, v), (dq, dk, dv) = inputs, gradients
    work = _Pass(v, choose_tiles(v.dtype, v.shape[-1]).backward, num_multiprocessors)
    grad_sums = torch.empty_like(sums)
    parts = work.parts_of(grad_sums)
    return [
        work.over_tokens("queries_backward", [q, grad], [dq], [sums], [parts], [den_added]),
        *work.additions(parts, grad_sums),
        work.over_tokens("keys_backward", [k, v], [dk, dv], sums_read=[grad_sums]),
    ]


def packed_launches(
    qkv: Tensor, num_multiprocessors: int, den_added: float = 1e-6
) -> tuple[list[Launch], list[Launch]]:
    """What :func:`fused_elu_attention_packed` launches, forward and backward. Runs nothing.

    Args:
        qkv: (B, N, 3, H, d), on ``meta`` where only numbers are asked for.
        num_multiprocessors: Of the device that is meant; an H100 SXM has 132.
        den_added: Added to the denominator.
    """
    out, sums = _new_output(qkv.select(2, 2))
    forward = forward_launches(*qkv.unbind(2), out, sums, den_added, num_multiprocessors)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    backward = backward_launches(qkv.unbind(2), out, sums, dqkv.unbind(2), den_added, num_multiprocessors)
    return forward, backward


@torch.library.custom_op("adala::elu_attention_packed", mutates_args=())
def _attention_packed(qkv: Tensor, den_added: float) -> tuple[Tensor, Tensor]:
    """Output (B, N, H d), and the sums (B, H, d + 1, d)."""
    _check_packed(qkv)
    _check_device(qkv[:, :, 2])
    out, sums = _forward(*qkv.unbind(2), den_added)
    return out.flatten(2), sums


@_attention_packed.register_fake
def _(qkv: Tensor, den_added: float) -> tuple[Tensor, Tensor]:
    _check_packed(qkv)
    out, sums = _new_output(qkv.select(2, 2))
    return out.flatten(2), sums


@torch.library.custom_op("adala::elu_attention_packed_backward", mutates_args=())
def _attention_packed_backward(grad: Tensor, qkv: Tensor, sums: Tensor, den_added: float) -> Tensor:
    """Gradient of the packed projection, (B, N, 3, H, d), from that of the output, (B, N, H d)."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad = grad.unflatten(-1, qkv.shape[-2:])
    _backward(qkv.unbind(2), grad, sums, dqkv.unbind(2), den_added)
    return dqkv


@_attention_packed_backward.register_fake
def _(grad: Tensor, qkv: Tensor, sums: Tensor, den_added: float) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


@torch.library.custom_op("adala::elu_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, den_added: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, d), and the sums (B, H, d + 1, d)."""
    _check_separate(q, k, v)
    _check_device(q, k, v)
    out, sums = _forward(*_tokens_first(q, k, v), den_added)
    return out.transpose(1, 2), sums


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, den_added: float) -> tuple[Tensor, Tensor]:
    _check_separate(q, k, v)
    out, sums = _new_output(v.transpose(1, 2))
    return out.transpose(1, 2), sums


@torch.library.custom_op("adala::elu_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, den_added: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, (B, H, N, d) each, from that of the output."""
    gradients = [_new_tokens(tokens) for tokens in (q, k, v)]
    _backward(_tokens_first(q, k, v), grad.transpose(1, 2), sums, _tokens_first(*gradients), den_added)
    return tuple(gradients)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, den_added: float) -> tuple[Tensor, Tensor, Tensor]:
    return _new_tokens(q), _new_tokens(k), _new_tokens(v)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.den_added = inputs
    _, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, sums)


def _differentiate_packed(ctx: Any, grad: Tensor | None, grad_sums: None) -> tuple:
    if grad is None:
        return None, None
    return _attention_packed_backward(grad, *ctx.saved_tensors, ctx.den_added), None


def _differentiate(ctx: Any, grad: Tensor | None, grad_sums: None) -> tuple:
    if grad is None:
        return None, None, None, None
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.den_added), None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the fused linear attention can be differentiated once only: for gradients of gradients, use the plain one "
        "(adala.attention.linear)"
    )


_attention_packed.register_autograd(_differentiate_packed, setup_context=_save)
_attention.register_autograd(_differentiate, setup_context=_save)
_attention_packed_backward.register_autograd(_refuse)
_attention_backward.register_autograd(_refuse)


# The products of the plain implementation, in the forward pass and in its backward pass: what a mechanism is counted
# must not depend on which of the two runs.
def _forward_flops(batch: int, num_heads: int, num_tokens: int, head_dim: int) -> int:
    return 2 * batch * num_heads * num_tokens * head_dim * (2 * head_dim + 1)


@register_flop_formula(torch.ops.adala.elu_attention_packed)
def _(qkv_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, num_tokens, _, num_heads, head_dim = qkv_shape
    return _forward_flops(batch, num_heads, num_tokens, head_dim)


@register_flop_formula(torch.ops.adala.elu_attention_packed_backward)
def _(grad_shape: Sequence[int], qkv_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, num_tokens, _, num_heads, head_dim = qkv_shape
    return 2 * _forward_flops(batch, num_heads, num_tokens, head_dim)


@register_flop_formula(torch.ops.adala.elu_attention)
def _(q_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return _forward_flops(*q_shape)


@register_flop_formula(torch.ops.adala.elu_attention_backward)
def _(grad_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * _forward_flops(*grad_shape)


def _forward(q: Tensor, k: Tensor, v: Tensor, den_added: float) -> tuple[Tensor, Tensor]:
    """(B, N, H, d) in and out, and the sums."""
    out, sums = _new_output(v)
    if is_chunked(v.device):
        chunked.forward(*_heads_first(q, k, v, out), sums, den_added)
        return out, sums
    q, k, v = (_with_near_channels(tokens) for tokens in (q, k, v))
    _run(forward_launches(q, k, v, out, sums, den_added, _num_multiprocessors(v.device)))
    return out, sums


def _backward(
    inputs: Sequence[Tensor], grad: Tensor, sums: Tensor, gradients: Sequence[Tensor], den_added: float
) -> None:
    """(B, N, H, d) all but ``sums``; writes ``gradients``."""
    if is_chunked(grad.device):
        chunked.backward(_heads_first(*inputs), *_heads_first(grad), sums, _heads_first(*gradients), den_added)
        return
    inputs = [_with_near_channels(tokens) for tokens in inputs]
    grad = _with_near_channels(grad.to(inputs[2].dtype))
    _run(backward_launches(inputs, grad, sums, gradients, den_added, _num_multiprocessors(grad.device)))


def _run(launches: Sequence[Launch]) -> None:
    # Triton launches on the current device, which need not be the tensors'. No effect on a CPU.
    with torch.cuda.device_of(launches[0].reads[0]):
        for launch in launches:
            if 0 not in launch.grid:
                launch.run()


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_MULTIPROCESSORS


@functools.cache
def _programs() -> Any:
    """The Triton programs, imported when one is first wanted: there are machines without Triton."""
    return importlib.import_module("adala.attention.kernels.elu_programs")


def _new_output(v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, d) and sums (B, H, d + 1, d) for values (B, N, H, d), not yet written."""
    batch, num_tokens, num_heads, head_dim = v.shape
    out = v.new_empty(batch, num_tokens, num_heads, head_dim)
    return out, v.new_empty(batch, num_heads, head_dim + 1, head_dim, dtype=torch.float32)


def _new_tokens(like: Tensor) -> Tensor:
    """(B, H, N, d) as a view of (B, N, H, d) in memory."""
    batch, num_heads, num_tokens, head_dim = like.shape
    return like.new_empty(batch, num_tokens, num_heads, head_dim).transpose(1, 2)


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _with_near_channels(tokens: Tensor) -> Tensor:
    """The kernels take any strides but one: neighbours in d are neighbours in memory."""
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _check_packed(qkv: Tensor) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"the packed projection is (B, N, 3, H, d), not {tuple(qkv.shape)}")


def _check_separate(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise ValueError(f"q, k and v are (B, H, N, d) each, not {shapes}")


def _check_device(*tensors: Tensor) -> None:
    for tensor in tensors:
        reason = unsupported_reason(tensor.device, tensor.dtype, tensor.shape[-1])
        if reason is not None:
            raise ValueError(f"the fused linear attention cannot run: {reason}")
