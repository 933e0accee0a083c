"""Inference by a window that slides over an image, as segmentation is published.

Shapes: B batch, K classes, H, W height and width of an image in pixels, h, w of the window.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along one side, so that they cover it, the last one flush with its end.

    Args:
        length: Of the side.
        window: Of the window, at most ``length``.
        overlap: Part of a window that the next one covers too; below 1.
    """
    stride = max(1, int(window * (1 - overlap)))
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def slide(model: Callable[[Tensor], Tensor], images: Tensor, window: Sequence[int], overlap: float) -> Tensor:
    """Scores (B, K, H, W) of images (B, 3, H, W): the mean over all windows that saw a pixel.

    Args:
        model: From windows (n, 3, h, w) to scores (n, K, h, w).
        images: Where a side is shorter than the window's, the window is cut to it.
        window: h and w.
        overlap: See :func:`window_starts`.
    """
    height, width = (min(side, of_image) for side, of_image in zip(window, images.shape[-2:], strict=True))
    tops, lefts = (
        window_starts(of_image, side, overlap)
        for of_image, side in zip(images.shape[-2:], (height, width), strict=True)
    )
    places = [(slice(top, top + height), slice(left, left + width)) for top, left in product(tops, lefts)]
    total, seen = None, images.new_zeros(images.shape[-2:], dtype=torch.float32)
    for rows, columns in places:
        scores = model(images[..., rows, columns]).float()
        if total is None:
            total = scores.new_zeros(*scores.shape[:2], *images.shape[-2:])
        total[..., rows, columns] += scores
        seen[rows, columns] += 1
    return total / seen
