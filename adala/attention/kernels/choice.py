"""Which of its forms linear attention is computed in: a fused kernel, or plain tensor operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from adala.attention.kernels.support import is_chunked, unsupported_reason

Kernel = Literal["auto", "fused", "reference"]
_chosen: Kernel = "auto"


def set_kernel(kernel: Kernel) -> None:
    """Chooses for this process from here on; what is compiled already stays as it is.

    Args:
        kernel: ``auto`` and ``fused`` take a fused kernel wherever there is one for device, dtype and head dim, and
            plain operations elsewhere; ``reference`` takes plain operations everywhere.

    Raises:
        ValueError: Another name.
    """
    global _chosen
    if kernel not in get_args(Kernel):
        raise ValueError(f"unknown kernel {kernel!r}: known are {', '.join(get_args(Kernel))}")
    _chosen = kernel


@contextmanager
def chosen_kernel(kernel: Kernel) -> Iterator[None]:
    """A context in which ``kernel`` is chosen for this process; what was chosen before holds again afterwards.

    Raises:
        ValueError: See :func:`set_kernel`.
    """
    before = _chosen
    set_kernel(kernel)
    try:
        yield
    finally:
        set_kernel(before)


def uses_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a fused kernel is taken for values of this kind.

    On a CPU not under torch.compile and torch.export: what the former makes of plain operations is faster than a chunk
    of tokens at a time, and the latter's programs are to run elsewhere.
    """
    if is_chunked(device) and torch.compiler.is_compiling():
        return False
    return _chosen != "reference" and unsupported_reason(device, dtype, head_dim) is None


def describe_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """In words, which form is taken and why."""
    kind = f"{str(dtype).removeprefix('torch.')} and {head_dim} channels a head on {device.type}"
    if _chosen == "reference":
        return f"plain tensor operations, as kernel: reference says ({kind})"
    reason = unsupported_reason(device, dtype, head_dim)
    if reason is not None:
        return f"plain tensor operations, no fused kernel for {reason} ({kind})"
    return f"{'a chunk of tokens at a time' if is_chunked(device) else 'fused Triton kernels'} ({kind})"
