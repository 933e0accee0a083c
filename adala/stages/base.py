"""A stage: an nn.Module that turns a batch into named scalar losses, with the frozen teacher beside it.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adala.losses import relative_error


class Stage(nn.Module):
    """The student and, outside the registered modules, its teacher.

    The engine casts, partitions and saves registered modules; the teacher is none of them, so it keeps its weights to
    the bit. It stays in eval mode whatever mode the stage is put into.
    """

    def __init__(self, student: VisionTransformer, teacher: VisionTransformer):
        super().__init__()
        self.student = student
        # Not an attribute assignment, which nn.Module would register as a child.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))

    def train(self, mode: bool = True) -> "Stage":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Named scalars of a micro-batch; ``loss`` is the one to minimise.

        Args:
            batch: ``image`` (B, 3, height, width), already normalised, and what else the stage reads.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def images_for(self, model: VisionTransformer, batch: Mapping[str, Any]) -> Tensor:
        """The batch's images on the device and in the dtype of ``model``'s weights."""
        weight = model.patch_embed.proj.weight
        return batch["image"].to(weight.device, weight.dtype, non_blocking=True)

    @torch.no_grad()
    def feature_metrics(self, student_features: Tensor, teacher_features: Tensor) -> dict[str, Tensor]:
        """Cosine of patch tokens and of the class token, and relative error, of (B, N, D) features."""
        cosine = F.cosine_similarity(student_features.float(), teacher_features.float(), dim=-1)
        metrics = {
            "feature_cosine": cosine.mean(),
            "patch_cosine": cosine[:, self.student.num_prefix_tokens :].mean(),
            "relative_error": relative_error(student_features, teacher_features),
        }
        if self.student.has_class_token:
            metrics["cls_cosine"] = cosine[:, 0].mean()
        return metrics
