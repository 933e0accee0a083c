"""Metrics of the tasks, reduced over ranks as they are computed.

Tasks import this module when they are asked for metrics: importing torchmetrics takes seconds, and every rank and
every worker of a run imports the tasks.
"""

import torch
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat

from adala.distributed import SharedError
from adala.tasks.iou import iou_by_class


class TopK(MulticlassAccuracy):
    """Share of images whose label is among the k largest logits, in percent."""

    def __init__(self, num_classes: int, k: int = 1):
        super().__init__(num_classes=num_classes, top_k=k, average="micro", validate_args=False)

    def compute(self) -> Tensor:
        return 100 * super().compute()


class MeanAveragePrecision(MultilabelAveragePrecision):
    """Mean over those classes that occur of the average precision, in percent; exact, without thresholds of its own.

    A class without a positive image has no recall, and is left out; were there no positive at all, this is 0.
    """

    def __init__(self, num_classes: int):
        super().__init__(num_labels=num_classes, average=None, validate_args=False)
        self._start_with_no_rows()

    def reset(self) -> None:
        super().reset()
        self._start_with_no_rows()

    def _start_with_no_rows(self) -> None:
        """For a rank that gets no image: torchmetrics gathers rows of one width and kind only."""
        self.preds.append(torch.zeros(0, self.num_labels, dtype=torch.float64, device=self.device))
        self.target.append(torch.zeros(0, self.num_labels, dtype=torch.int64, device=self.device))

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds, target.long())

    def compute(self) -> Tensor:
        probabilities, target = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        occurring = target.sum(0) > 0
        if not occurring.any():
            return probabilities.new_zeros(())
        parts = probabilities[:, occurring], target[:, occurring], int(occurring.sum())
        return 100 * multilabel_average_precision(*parts, average="macro", validate_args=False)


class MicroF1(MultilabelF1Score):
    """Of all decisions at a probability of one half, in percent."""

    def __init__(self, num_classes: int):
        super().__init__(num_labels=num_classes, average="micro", validate_args=False)

    def compute(self) -> Tensor:
        return 100 * super().compute()


class MeanIou(MulticlassConfusionMatrix):
    """Mean intersection over union in percent, from one confusion matrix summed over all pixels and ranks.

    A class that occurs neither in a mask nor in a prediction has none, and is left out.
    """

    def __init__(self, num_classes: int, ignore_index: int):
        super().__init__(num_classes=num_classes, ignore_index=ignore_index, validate_args=False)

    def compute(self) -> Tensor:
        """Raises SharedError where not one pixel was labelled: all ranks' sums are the same."""
        confusion = super().compute()
        if confusion.sum() == 0:
            raise SharedError(
                "not one pixel of the held-out masks is labelled: all are ignored (stage3.task.mask, data.val)"
            )
        return iou_by_class(confusion).nanmean()


class PixelAccuracy(MulticlassConfusionMatrix):
    """Share of labelled pixels whose class is right, in percent."""

    def __init__(self, num_classes: int, ignore_index: int):
        super().__init__(num_classes=num_classes, ignore_index=ignore_index, validate_args=False)

    def compute(self) -> Tensor:
        confusion = super().compute().double()
        return 100 * confusion.diagonal().sum() / confusion.sum().clamp_min(1)
