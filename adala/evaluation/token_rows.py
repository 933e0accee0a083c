"""Features of a model as rows of a store, and heads that were fitted on such rows.

Shapes: B batch, N tokens, D embed dim, h x w patch grid, K classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adala.attention import TokenLayout, full_precision
from adala.evaluation.dense_probe import DenseHead
from adala.evaluation.evaluator import precision
from adala.evaluation.feature_store import Field, RowWriter
from adala.families import Backbone
from adala.students import token_layout
from adala.tasks import Task


class FrozenHead(nn.Module):
    """A head that was fitted on stored patch features, on the features of a model."""

    def __init__(self, head: DenseHead, has_class_token: bool):
        super().__init__()
        self.head, self.has_class_token = head, has_class_token

    def forward(self, features: Tensor, layout: TokenLayout) -> Tensor:
        """Logits (B, K, h, w) of features (B, N, D)."""
        parts = token_parts(features, layout, self.has_class_token)
        # As it was fitted, whatever the model computes in.
        with full_precision(features):
            return self.head(parts["patches"], parts["cls"])


def token_parts(features: Tensor, layout: TokenLayout, has_class_token: bool) -> dict[str, Tensor]:
    """What the measures read of features (B, N, D), float32: ``cls`` (B, D), without a class token the mean patch,
    ``patch`` (B, D), the mean patch, and ``patches`` (B, h, w, D)."""
    features = features.float()
    patches = features[:, layout.num_prefix_tokens :]
    mean = patches.mean(1)
    cls = features[:, 0] if has_class_token else mean
    return {"cls": cls, "patch": mean, "patches": patches.unflatten(1, layout.grid_size)}


class InPrecision(nn.Module):
    """A model that computes in what a protocol says."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, images: Tensor) -> Tensor:
        with precision(self.autocast):
            return self.model(images)


class RowCollector:
    """Writes what measures read of a batch into the store: a model's features, or targets."""

    def __init__(self, writer: RowWriter, model: Backbone | None, task: Task, fields: Mapping[str, Field]):
        """``model`` None collects targets."""
        self._writer, self._model, self._task, self._fields = writer, model, task, fields

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        if self._model is None:
            target = self._task.target(batch, torch.device("cpu")).to(self._fields["target"].dtype)
            self._writer.add(batch["id"], target=target)
            return
        layout = token_layout(self._model, batch["image"])
        parts = token_parts(outputs["features"], layout, self._model.has_class_token)
        self._writer.add(batch["id"], **{name: parts[name].cpu() for name in self._fields})
