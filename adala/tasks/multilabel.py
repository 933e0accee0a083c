"""Multi-label classification: any number of labels an image, one binary classifier each, mean average precision.

Shapes: B batch, N tokens, D embed dim, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat

from adala.data import Preparation, View
from adala.data.labels import Classes, read_labels
from adala.data.tars import Fields
from adala.families import Backbone
from adala.heads import ClassificationHead, Pooling
from adala.tasks.base import Task
from adala.tasks.classification import build_pooled_head, check_label


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


@dataclass(frozen=True)
class Multilabel(Task):
    """Binary cross-entropy on each label.

    Attributes:
        num_classes: How many labels there are.
        pooling: What the head sees, see :class:`adala.heads.ClassificationHead`.
    """

    name: ClassVar[str] = "multilabel"
    score: ClassVar[str] = "map"
    score_title: ClassVar[str] = "mAP (%)"
    probe: ClassVar[Literal["multilabel"]] = "multilabel"
    fields_of_head: ClassVar[tuple[str, ...]] = ("pooling",)

    num_classes: int
    pooling: Pooling = "cls_patch"

    def read_target(self, fields: Fields, classes: Classes | None, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The labels, ascending; there may be none."""
        labels = read_labels(fields, classes)
        if labels:
            check_label(labels[-1], self.num_classes, "it")
        return labels

    def prepare(self, view: View, augmentation: str | None) -> Preparation:
        """``image`` (3, H, W) and ``labels`` (K,), 1 where a label holds."""
        transform = view.image_transform(augmentation, as_uint8=view.trains_on_uint8)

        def tensors(image: Any, labels: tuple[int, ...]) -> dict[str, Tensor]:
            multi_hot = torch.zeros(self.num_classes)
            multi_hot[list(labels)] = 1.0
            return {"image": transform(image), "labels": multi_hot}

        return Preparation(tensors, self.reader)

    def build_head(self, student: Backbone) -> ClassificationHead:
        return build_pooled_head(student, self.num_classes, self.pooling)

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """(B, K) float32 of zeros and ones."""
        if "labels" not in batch:
            raise ValueError("multilabel needs labels: the batch has none (stage3.train_data, data.train)")
        return batch["labels"].to(device, non_blocking=True)

    def example_target(self, image_size: tuple[int, int]) -> Tensor:
        return torch.zeros(self.num_classes)

    def loss(self, prediction: Tensor, target: Tensor, training: bool) -> Tensor:
        return F.binary_cross_entropy_with_logits(prediction.float(), target)

    def decision(self, prediction: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Probabilities. torchmetrics takes a batch whose logits all lie from 0 to 1 for such, and others not."""
        return prediction.double().sigmoid()

    def build_metrics(self) -> dict[str, Metric]:
        return {"map": MeanAveragePrecision(self.num_classes), "micro_f1": MicroF1(self.num_classes)}
