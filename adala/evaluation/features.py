"""Pooled features of a model over a data set, for probes.

Shapes: B batch, N tokens, D embed dim, F pooled features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adala.distributed import SharedError, device, gather_objects
from adala.evaluation.evaluator import precision, raising_together
from adala.families import Backbone
from adala.heads import Pooling, pool_tokens
from adala.preemption import end_if_asked
from adala.tasks import Task


@dataclass(frozen=True)
class Features:
    """One vector an image, of all ranks together.

    Attributes:
        values: (n, F) float32 on the CPU.
        labels: (n,) int64, or (n, K) of zeros and ones.
    """

    values: Tensor
    labels: Tensor


class FeatureCollector:
    """Gathers pooled features and labels batch by batch; :meth:`gathered` joins those of all ranks."""

    def __init__(self, model: Backbone, pooling: Pooling, task: Task):
        """Starts from nothing.

        Args:
            model: Whose features they are.
            pooling: Of its tokens.
            task: Whose targets are the labels.
        """
        self._model, self._pooling, self._task = model, pooling, task
        self._values: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._ids: list[str] = []

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Takes the ``features`` (B, N, D) of a batch.

        Raises:
            ValueError: The batch has no labels.
        """
        prefix, has_class_token = self._model.num_prefix_tokens, self._model.has_class_token
        tokens = outputs["features"].float()
        self._values.append(pool_tokens(tokens, prefix, self._pooling, has_class_token).cpu())
        self._ids += batch["id"]
        self._labels.append(self._task.target(batch, torch.device("cpu")))

    def gathered(self) -> Features:
        """Those of all ranks, in the order of their ids, which no number of ranks or workers changes; every rank calls
        it, also one that had no batch.

        Raises:
            ValueError: No rank had one; every rank raises.
        """
        parts = gather_objects((self._values, self._labels, self._ids))
        values, labels, ids = ([one for of_rank in kind for one in of_rank] for kind in zip(*parts, strict=True))
        if not values:
            raise SharedError("no labelled sample can be used: name other shards in stage3.train_data or data.train")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        return Features(torch.cat(values)[order], torch.cat(labels)[order])


@torch.no_grad()
def collect_features(
    models: Mapping[str, Backbone],
    batches: Iterable[Mapping[str, Any]],
    pooling: Pooling,
    task: Task,
    autocast: torch.dtype | None = None,
) -> dict[str, Features]:
    """Pooled features and labels of every sample that the ranks' ``batches`` hold, by model; the same on every rank.

    Raises:
        ValueError: A batch without labels; every rank raises.
    """
    collectors = {name: FeatureCollector(model, pooling, task) for name, model in models.items()}
    with raising_together():
        for batch in batches:
            end_if_asked("while features were computed")
            images = batch["image"].to(device())
            for name, model in models.items():
                with precision(autocast):
                    features = model(images)
                collectors[name].update({"features": features}, batch)
    return {name: collector.gathered() for name, collector in collectors.items()}
