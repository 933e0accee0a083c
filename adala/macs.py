"""Multiply-accumulates of a network, counted without memory or data."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, image_size: Sequence[int]) -> int:
    """Multiply-accumulates of one image's forward pass, as PyTorch's counter sees the operations that are called.

    Those of matrix products and convolutions alone: exponentials, sums, norms and element-wise products are not
    counted. The fused kernels of softmax attention are taken apart, since not every version counts each of them.

    Args:
        model: On the meta device; takes images (B, 3, height, width).
        image_size: Height and width in pixels.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *image_size, device="meta"))
    return counter.get_total_flops() // 2
