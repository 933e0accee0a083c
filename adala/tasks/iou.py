"""Intersection over union from a confusion matrix, in the one place that metric and probes read it from.

Shapes: K classes.
"""

from torch import Tensor


def iou_by_class(confusion: Tensor) -> Tensor:
    """(K,) float64 in percent; NaN for a class that occurs neither in targets nor in predictions.

    Args:
        confusion: (K, K) counts of pixels, targets by row.
    """
    confusion = confusion.double()
    intersection, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return 100 * intersection / union
