"""Where the fused kernels can run."""

import functools
import importlib
import os

import torch

from adala.attention.kernels.plan import HEAD_DIM_STEP, MAX_HEAD_DIM, MIN_HEAD_DIM, SCHEMES, choose_tiles

# Below it tensor cores know neither bf16 nor tf32.
MIN_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the fused kernels cannot run, in a few words; None when they can. Never raises.

    On a CPU a chunked form of the same takes Triton's place; on ``meta`` nothing is computed, and everything can run.
    torch.compile takes the answer for constant.

    Args:
        device: Of the tensors.
        dtype: Of the values.
        head_dim: d.
    """
    if dtype not in SCHEMES:
        return str(dtype).removeprefix("torch.")
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_STEP:
        return f"head_dim {head_dim}"
    if is_chunked(device) or device.type == "meta":
        return None
    if not _has_triton():
        return "no Triton"
    if is_interpreted() and device.type in ("cpu", "cuda"):
        return None
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.version.hip is not None:
        return "ROCm"
    return _lack_of_gpu(device, choose_tiles(dtype, head_dim).shared_bytes, head_dim)


def is_chunked(device: torch.device) -> bool:
    """Whether tensors there go through :mod:`adala.attention.kernels.chunked` instead of Triton."""
    return device.type == "cpu" and not is_interpreted()


def is_interpreted() -> bool:
    """Whether Triton runs its programs in Python, on CPU tensors: ``TRITON_INTERPRET=1``, set before its import."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _has_triton() -> bool:
    try:
        importlib.import_module("triton.language")
    except Exception:  # a broken installation, of another Python or without its compiler, raises anything
        return False
    return True


@functools.cache
def _lack_of_gpu(device: torch.device, shared_bytes: int, head_dim: int) -> str | None:
    try:
        properties = torch.cuda.get_device_properties(device)
    except Exception:  # no driver, no such device, PyTorch without CUDA
        return "no CUDA"
    if (properties.major, properties.minor) < MIN_CAPABILITY:
        return f"compute capability {properties.major}.{properties.minor}"
    # Older PyTorch does not tell; 8.0 is the smallest that is certain to have this much.
    available = getattr(properties, "shared_memory_per_block_optin", 163 * 1024)
    if shared_bytes > available:
        return f"head_dim {head_dim} with {available // 1024} KiB of shared memory"
    return None
