"""Stage 2: the whole student learns the frozen teacher's final features.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adala.compilation import CompiledModules
from adala.families import Backbone
from adala.losses import ALIGNMENT_LOSSES, CALIBRATED_LOSSES
from adala.stages.base import Stage
from adala.students import LinearizedModel


class FeatureAlignment(Stage):
    """Compares the outputs of the final norm over all tokens, prefix and patches.

    Paper: arXiv 2603.16063, Stage 2: it undoes the error that the blocks' approximations accumulate.

    Differs: see ``normalized_mse``.
    """

    def __init__(self, student: LinearizedModel, teacher: Backbone, loss: str = "normalized_mse"):
        """Builds the stage.

        Raises:
            ValueError: An unknown loss.
        """
        super().__init__(student, teacher)
        if loss not in ALIGNMENT_LOSSES:
            raise ValueError(f"unknown Stage 2 loss {loss!r}: known are {', '.join(ALIGNMENT_LOSSES)}")
        self.feature_loss = ALIGNMENT_LOSSES[loss]
        self._calibrated = ("features",) if loss in CALIBRATED_LOSSES else ()

    @property
    def calibrated_targets(self) -> tuple[str, ...]:
        return self._calibrated

    def compile_blocks(self) -> None:
        super().compile_blocks()
        self._compiled.append(CompiledModules(self.teacher.blocks))

    def targets(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        yield "features", self.teacher(self.images_for(self.teacher, batch))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss``, and the features' cosines and relative error, in eval mode the features themselves."""
        with torch.no_grad():
            teacher_features = self.teacher(self.images_for(self.teacher, batch))
        features = self.student(self.images_for(self.student, batch))
        loss = self.feature_loss(features, teacher_features, self.variance_of("features"))
        if self.training:
            return {"loss": loss, **self.feature_metrics(features, teacher_features)}
        return {"loss": loss, "features": features, "teacher_features": teacher_features}
