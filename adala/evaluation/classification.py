"""Top-1 of a classifier over a labelled data set."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from adala.distributed import device, gather_objects


@torch.no_grad()
def classifier_top1(model: nn.Module, batches: Iterable[Mapping[str, Any]], num_classes: int) -> float:
    """Top-1 in percent over every sample that the ranks' ``batches`` hold; the same on every rank."""
    predicted: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        predicted.append(model(batch["image"].to(device())).argmax(-1).cpu())
        labels.append(batch["label"])
    gathered = gather_objects((torch.cat(predicted), torch.cat(labels)))
    everything = torch.cat([p for p, _ in gathered]), torch.cat([label for _, label in gathered])
    return 100 * multiclass_accuracy(*everything, num_classes=num_classes, average="micro").item()
