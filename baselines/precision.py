"""The numerical context of every mechanism here: neither autocast nor TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adala.attention import autocast_off


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """A context in which float32 operations on ``tensor``'s device really are float32.

    Autocast is off everywhere. On CUDA, TF32 (10 bits of mantissa, too few for a pseudo-inverse or for a sum over
    a thousand tokens) is off for matrix products as long as the context lasts and on again afterwards if it was.
    The switch is one for the whole process and autograd runs later: the backward pass follows the user's setting.
    """
    matmul = torch.backends.cuda.matmul
    # `fp32_precision` replaces `allow_tf32` since PyTorch 2.9; there the old name refuses to be read after the new
    # one was set, the new one can always be read.
    switch, tf32, exact = (
        ("fp32_precision", "tf32", "ieee")
        if hasattr(matmul, "fp32_precision")
        else (
            "allow_tf32",
            True,
            False,
        )
    )
    switched = tensor.device.type == "cuda" and getattr(matmul, switch) == tf32
    with autocast_off(tensor):
        if not switched:
            yield
            return
        setattr(matmul, switch, exact)
        try:
            yield
        finally:
            setattr(matmul, switch, tf32)
