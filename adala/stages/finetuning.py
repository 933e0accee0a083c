"""Stage 3: a task's head and the student, supervised.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adala.families import Backbone
from adala.stages.base import Stage
from adala.students import LinearizedModel
from adala.tasks import Task


class Finetuning(Stage):
    """The task's loss; the teacher only says, in eval mode, how far the features have moved.

    Paper: arXiv 2603.16063, Stage 3; with ``freeze_backbone`` its linear probe.
    """

    def __init__(
        self,
        student: LinearizedModel,
        teacher: Backbone,
        task: Task,
        head: nn.Module,
        freeze_backbone: bool = False,
    ):
        """Builds the stage around ``head``: ``head(features, layout)`` maps features (B, N, D) to a prediction."""
        super().__init__(student, teacher)
        self.task = task
        self.head = head
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            student.requires_grad_(False)

    def train(self, mode: bool = True) -> "Finetuning":
        super().train(mode)
        if self.freeze_backbone:
            self.student.eval()
        return self

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and the task's metrics of the batch; in eval mode features, the decision and the target.

        Raises:
            ValueError: The batch has no target, or one that the task cannot have.
        """
        images = self.images_for(self.student, batch)
        target = self.task.target(batch, images.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            features = self.student(images)
        prediction = self.head(features, self.student.token_layout(images))
        loss = self.task.loss(prediction, target, self.training)
        if self.training:
            return {"loss": loss, **self.task.batch_metrics(prediction, target)}
        teacher_features = self.teacher(self.images_for(self.teacher, batch))
        compared = {"features": features, "teacher_features": teacher_features}
        decision = self.task.decision(prediction, tuple(images.shape[-2:]))
        return {"loss": loss, **compared, "decision": decision, "target": target}
