"""Multi-label classification: any number of labels an image, one binary classifier each, mean average precision.

Shapes: B batch, N tokens, D embed dim, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adala.data import Preparation, View
from adala.data.labels import Classes, read_labels
from adala.data.tars import Fields
from adala.families import Backbone
from adala.heads import ClassificationHead, Pooling
from adala.tasks.base import Task
from adala.tasks.classification import build_pooled_head, check_label

if TYPE_CHECKING:
    from torchmetrics import Metric


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

    def build_metrics(self) -> dict[str, "Metric"]:
        """``map`` and ``micro_f1``."""
        from adala.tasks.metrics import MeanAveragePrecision, MicroF1

        return {"map": MeanAveragePrecision(self.num_classes), "micro_f1": MicroF1(self.num_classes)}
