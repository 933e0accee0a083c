"""In which precision statistics, normalisers and sums over tokens are computed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of statistics and token sums: float32, or float64 where the input already is."""
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """A context in which float32 operations on ``tensor``'s device really are float32.

    Autocast is off everywhere. On CUDA, TF32 (10 bits of mantissa, too few for a pseudo-inverse or for a sum over
    a thousand tokens) is off for matrix products as long as the context lasts and on again afterwards if it was.
    The switch is one for the whole process and autograd runs later: the backward pass follows the user's setting.
    """
    with _without_autocast(tensor.device.type):
        if not _tf32_applies(tensor.device.type):
            yield
            return
        switch, tf32, exact = _matmul_switch()
        setattr(torch.backends.cuda.matmul, switch, exact)
        try:
            yield
        finally:
            setattr(torch.backends.cuda.matmul, switch, tf32)


@torch.compiler.assume_constant_result
def _tf32_applies(device_type: str) -> bool:
    """Whether there is TF32 to be switched off.

    torch.compile can neither read nor set the switch and would break the graph in every attention. It takes this answer
    for constant instead, and traces anew when the switch is turned, which it guards by itself. With TF32 on, the graph
    does break there.
    """
    switch, tf32, _ = _matmul_switch()
    return device_type == "cuda" and getattr(torch.backends.cuda.matmul, switch) == tf32


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast refuses devices that it cannot cast on, among them ``meta``, on which shapes and costs are found out."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _matmul_switch() -> tuple[str, str | bool, str | bool]:
    """The name of CUDA's TF32 switch with its values for TF32 and for exact float32.

    ``fp32_precision`` replaces ``allow_tf32`` since PyTorch 2.9; there the old name refuses to be read after the new
    one was set, while the new one can always be read.
    """
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return "fp32_precision", "tf32", "ieee"
    return "allow_tf32", True, False
