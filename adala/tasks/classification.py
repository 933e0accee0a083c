"""Image classification: one label an image, a linear classifier on pooled tokens, top-1.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from adala.heads import ClassificationHead, Pooling
from adala.tasks.base import Task


class TopOne(MulticlassAccuracy):
    """Share of images whose largest logit is the label's, in percent."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes=num_classes, average="micro", validate_args=False)

    def compute(self) -> Tensor:
        return 100 * super().compute()


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

    num_classes: int
    pooling: Pooling = "cls_patch"
    label_smoothing: float = 0.0

    def build_head(self, student: VisionTransformer) -> ClassificationHead:
        return ClassificationHead(
            student.embed_dim, self.num_classes, student.num_prefix_tokens, self.pooling, student.has_class_token
        )

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """(B,) int64.

        Raises:
            ValueError: The batch has no labels, or one outside the head's classes.
        """
        if "label" not in batch:
            raise ValueError("Stage 3 needs labels: its shards have none (stage3.train_data, data.train)")
        lowest, highest = int(batch["label"].min()), int(batch["label"].max())
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(
                f"a sample has the label {lowest if lowest < 0 else highest}, but stage3.num_classes is "
                f"{self.num_classes}: labels are 0 to {self.num_classes - 1}"
            )
        return batch["label"].to(device)

    def loss(self, prediction: Tensor, target: Tensor, training: bool) -> Tensor:
        smoothing = self.label_smoothing if training else 0.0
        return F.cross_entropy(prediction.float(), target, label_smoothing=smoothing)

    def batch_metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"top1": 100 * (prediction.argmax(-1) == target).float().mean()}

    def build_metrics(self) -> dict[str, Metric]:
        return {"top1": TopOne(self.num_classes)}
