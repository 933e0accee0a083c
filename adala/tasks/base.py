"""What a task is: a target, a head, a loss and metrics.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics import Metric


class Task:
    """What Stage 3 trains for. A subclass is a frozen dataclass, whose fields are its options.

    Attributes:
        name: Under which recipes and exported students name it.
        score: Name of the metric by which models are compared, in percent.
    """

    name: ClassVar[str]
    score: ClassVar[str]

    def build_head(self, student: VisionTransformer) -> nn.Module:
        """A fresh head from features (B, N, D) to predictions."""
        raise NotImplementedError(f"{type(self).__name__} does not implement build_head")

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """The batch's target on ``device``.

        Raises:
            ValueError: The batch has none, or one that the task cannot have.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement target")

    def loss(self, prediction: Tensor, target: Tensor, training: bool) -> Tensor:
        """The loss to minimise, a mean over the batch's images, so that it does not depend on micro-batches."""
        raise NotImplementedError(f"{type(self).__name__} does not implement loss")

    def batch_metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Scalars of one training batch, for the log."""
        return {}

    def build_metrics(self) -> dict[str, Metric]:
        """Metrics over a data set: updated with (prediction, target), reduced over ranks as they are computed."""
        raise NotImplementedError(f"{type(self).__name__} does not implement build_metrics")
