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


@torch.no_grad()
def collect_features(model: VisionTransformer, batches: Iterable[Mapping[str, Any]], pooling: Pooling) -> Features:
    """Pooled features and labels of every sample that the ranks' ``batches`` hold; the same on every rank.

    Raises:
        ValueError: A batch without labels.
    """
    values, labels = [], []
    for batch in batches:
        if "label" not in batch:
            raise ValueError("a linear probe needs labels: its shards have no .cls files")
        tokens = model(batch["image"].to(device()))
        pooled = pool_tokens(tokens.float(), model.num_prefix_tokens, pooling, model.has_class_token)
        values.append(pooled.cpu())
        labels.append(batch["label"])
    gathered = gather_objects((torch.cat(values), torch.cat(labels)))
    return Features(torch.cat([v for v, _ in gathered]), torch.cat([label for _, label in gathered]))


@torch.no_grad()
def compare_features(
    student: VisionTransformer, teacher: VisionTransformer, batches: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """How close a student's final features are to its teacher's, over all ranks' batches.

    Returns:
        ``feature_cosine`` (mean over all tokens), ``patch_cosine``, ``cls_cosine`` (without a class token absent) and
        ``relative_error`` (root of summed squared differences over root of summed squared teacher features).
    """
    prefix = student.num_prefix_tokens
    sums = torch.zeros(8, dtype=torch.float64, device=device())
    for batch in batches:
        images = batch["image"].to(device())
        ours, theirs = student(images).float(), teacher(images).float()
        cosine = F.cosine_similarity(ours, theirs, dim=-1).double()
        sums += torch.stack(
            [
                cosine.sum(),
                torch.tensor(cosine.numel(), device=device()),
                cosine[:, prefix:].sum(),
                torch.tensor(cosine[:, prefix:].numel(), device=device()),
                cosine[:, 0].sum(),
                torch.tensor(len(cosine), device=device()),
                (ours - theirs).double().square().sum(),
                theirs.double().square().sum(),
            ]
        )
    total = all_reduce_sum(sums).tolist()
    metrics = {
        "feature_cosine": total[0] / total[1],
        "patch_cosine": total[2] / total[3],
        "relative_error": (total[6] / total[7]) ** 0.5,
    }
    return metrics | ({"cls_cosine": total[4] / total[5]} if student.has_class_token else {})
