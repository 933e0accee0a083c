"""Image classification: one label an image, a linear classifier on pooled tokens, top-1.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adala.data import Preparation, View
from adala.data.labels import Classes, read_label
from adala.data.tars import Fields
from adala.families import Backbone
from adala.heads import ClassificationHead, Pooling
from adala.tasks.base import Task

if TYPE_CHECKING:
    from torchmetrics import Metric


def check_label(label: int, num_classes: int, whose: str) -> None:
    """Refuses a label that is none of the classes, with a ValueError that begins with ``whose`` it is."""
    if not 0 <= label < num_classes:
        raise ValueError(
            f"{whose} has the label {label}, but stage3.task.num_classes is {num_classes}: labels are 0 to "
            f"{num_classes - 1}"
        )


def build_pooled_head(student: Backbone, num_classes: int, pooling: Pooling) -> ClassificationHead:
    """A fresh linear classifier on the student's pooled tokens."""
    return ClassificationHead(
        student.embed_dim, num_classes, student.num_prefix_tokens, pooling, student.has_class_token
    )


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy on labels.

    Attributes:
        num_classes: Classes in the labels.
        pooling: What the head sees, see :class:`adala.heads.ClassificationHead`.
        label_smoothing: Of the cross-entropy, in training.
    """

    name: ClassVar[str] = "classification"
    score: ClassVar[str] = "top1"
    score_title: ClassVar[str] = "top-1 (%)"
    probe: ClassVar[Literal["linear"]] = "linear"
    fields_of_head: ClassVar[tuple[str, ...]] = ("pooling", "label_smoothing")

    num_classes: int
    pooling: Pooling = "cls_patch"
    label_smoothing: float = 0.0

    def read_target(self, fields: Fields, classes: Classes | None, image_size: tuple[int, int]) -> int:
        """The label."""
        label = read_label(fields, classes)
        check_label(label, self.num_classes, "it")
        return label

    def prepare(self, view: View, augmentation: str | None) -> Preparation:
        """``image`` (3, H, W) and ``label``."""
        transform = view.image_transform(augmentation, as_uint8=view.trains_on_uint8)
        return Preparation(lambda image, label: {"image": transform(image), "label": torch.tensor(label)}, self.reader)

    def build_head(self, student: Backbone) -> ClassificationHead:
        return build_pooled_head(student, self.num_classes, self.pooling)

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """(B,) int64.

        Raises:
            ValueError: The batch has no labels, or one outside the classes.
        """
        if "label" not in batch:
            raise ValueError("classification needs labels: the batch has none (stage3.train_data, data.train)")
        for label in (batch["label"].min(), batch["label"].max()):
            check_label(int(label), self.num_classes, "a sample")
        return batch["label"].to(device, non_blocking=True)

    def example_target(self, image_size: tuple[int, int]) -> Tensor:
        return torch.tensor(0)

    def loss(self, prediction: Tensor, target: Tensor, training: bool) -> Tensor:
        smoothing = self.label_smoothing if training else 0.0
        return F.cross_entropy(prediction.float(), target, label_smoothing=smoothing)

    def batch_metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"top1": 100 * (prediction.argmax(-1) == target).float().mean()}

    def build_metrics(self) -> dict[str, "Metric"]:
        """``top1``, and ``top5`` where there are more than five classes."""
        from adala.tasks.metrics import TopK

        return {f"top{k}": TopK(self.num_classes, k) for k in (1, 5) if k == 1 or self.num_classes > k}
