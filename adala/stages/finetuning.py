"""Stage 3: a classification head and the student, supervised.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adala.stages.base import Stage


class Finetuning(Stage):
    """Cross-entropy on labels; the teacher only says, in eval mode, how far the features have moved.

    Paper: arXiv 2603.16063, Stage 3; with ``freeze_backbone`` its linear probe.
    """

    def __init__(
        self,
        student: VisionTransformer,
        teacher: VisionTransformer,
        head: nn.Module,
        label_smoothing: float = 0.0,
        freeze_backbone: bool = False,
    ):
        """Builds the stage around ``head``, which maps features (B, N, D) to logits (B, classes)."""
        super().__init__(student, teacher)
        self.head = head
        self.label_smoothing = label_smoothing
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            student.requires_grad_(False)

    def train(self, mode: bool = True) -> "Finetuning":
        super().train(mode)
        if self.freeze_backbone:
            self.student.eval()
        return self

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and ``top1`` in percent; in eval mode the features' cosine too.

        Raises:
            ValueError: The batch has no labels, or one outside the head's classes.
        """
        images = self.images_for(self.student, batch)
        labels = self._labels(batch, images.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            features = self.student(images)
        logits = self.head(features).float()
        smoothing = self.label_smoothing if self.training else 0.0
        named = {"top1": 100 * (logits.argmax(-1) == labels).float().mean()}
        if not self.training:
            named |= self.feature_metrics(features, self.teacher(self.images_for(self.teacher, batch)))
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=smoothing), **named}

    def _labels(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        if "label" not in batch:
            raise ValueError("Stage 3 needs labels: its shards have no .cls files (stage3.train_data, data.train)")
        num_classes = self.head.linear.out_features
        if batch["label"].max() >= num_classes:
            raise ValueError(
                f"a sample has the label {int(batch['label'].max())}, but stage3.num_classes is {num_classes}"
            )
        return batch["label"].to(device)
