"""Final features of a model over a data set, and how close a student's are to its teacher's.

Shapes: B batch, N tokens, D embed dim, F pooled features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adala.distributed import all_reduce_sum, device, gather_objects
from adala.heads import Pooling, pool_tokens


@dataclass(frozen=True)
class Features:
    """One vector an image, of all ranks together.

    Attributes:
        values: (n, F) float32 on the CPU.
        labels: (n,) int64.
    """

    values: Tensor
    labels: Tensor


class FeatureCollector:
    """Gathers pooled features and labels batch by batch; :meth:`gathered` joins those of all ranks."""

    def __init__(self, model: VisionTransformer, pooling: Pooling):
        self._model, self._pooling = model, pooling
        self._values: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, tokens: Tensor, batch: Mapping[str, Any]) -> None:
        """Takes the features (B, N, D) of a batch.

        Raises:
            ValueError: The batch has no labels.
        """
        if "label" not in batch:
            raise ValueError("a linear probe needs labels: its shards have no .cls files")
        prefix, has_class_token = self._model.num_prefix_tokens, self._model.has_class_token
        self._values.append(pool_tokens(tokens.float(), prefix, self._pooling, has_class_token).cpu())
        self._labels.append(batch["label"])

    def gathered(self) -> Features:
        parts = gather_objects((torch.cat(self._values), torch.cat(self._labels)))
        return Features(torch.cat([values for values, _ in parts]), torch.cat([labels for _, labels in parts]))


@torch.no_grad()
def collect_features(model: VisionTransformer, batches: Iterable[Mapping[str, Any]], pooling: Pooling) -> Features:
    """Pooled features and labels of every sample that the ranks' ``batches`` hold; the same on every rank.

    Raises:
        ValueError: A batch without labels.
    """
    collector = FeatureCollector(model, pooling)
    for batch in batches:
        collector.add(model(batch["image"].to(device())), batch)
    return collector.gathered()


@torch.no_grad()
def compare_features(
    student: VisionTransformer,
    teacher: VisionTransformer,
    batches: Iterable[Mapping[str, Any]],
    collector: FeatureCollector | None = None,
) -> dict[str, float]:
    """How close a student's final features are to its teacher's, over all ranks' batches.

    Args:
        student: Any model that gives (B, N, D).
        teacher: What it is compared with.
        batches: This rank's part of the data.
        collector: Gets the student's features as well, so that a probe needs no second pass over the data.

    Returns:
        ``feature_cosine`` (mean over all tokens), ``patch_cosine``, ``cls_cosine`` (without a class token absent) and
        ``relative_error`` (root of summed squared differences over root of summed squared teacher features).
    """
    sums = torch.zeros(8, dtype=torch.float64, device=device())
    for batch in batches:
        images = batch["image"].to(device())
        theirs = teacher(images).float()
        # Scoring the teacher itself need not run it twice.
        ours = theirs if student is teacher else student(images).float()
        sums += _comparison_sums(ours, theirs, student.num_prefix_tokens)
        if collector is not None:
            collector.add(ours, batch)
    total = all_reduce_sum(sums).tolist()
    metrics = {
        "feature_cosine": total[0] / total[1],
        "patch_cosine": total[2] / total[3],
        "relative_error": (total[6] / total[7]) ** 0.5,
    }
    return metrics | ({"cls_cosine": total[4] / total[5]} if student.has_class_token else {})


def _comparison_sums(ours: Tensor, theirs: Tensor, prefix: int) -> Tensor:
    """Cosines summed and counted over all tokens, patches and first tokens; squares of differences and of features."""
    cosine = F.cosine_similarity(ours, theirs, dim=-1).double()
    parts = (cosine, cosine[:, prefix:], cosine[:, 0])
    counted = [value for part in parts for value in (part.sum(), cosine.new_tensor(part.numel()))]
    return torch.stack([*counted, (ours - theirs).double().square().sum(), theirs.double().square().sum()])
