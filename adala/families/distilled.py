"""timm's DeiT with a distillation token beside the class token, and a second head that reads it.

Shapes: B batch, N tokens, D embed dim.
"""

import inspect
from collections.abc import Sequence

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adala.families.base import LinearizedModel
from adala.families.vision_transformer import VisionTransformerFamily


class HeadlessDistilled(VisionTransformerDistilled):
    """timm's model, which gives all tokens once its heads are removed; timm's own averages the first two even then."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, N, D) as they come where pooling is off, else timm's logits."""
        return x if self.global_pool == "" else super().forward_head(x, pre_logits)


class LinearizedDistilled(LinearizedModel, HeadlessDistilled):
    """A timm DeiT with a distillation token that tells its blocks how the tokens of each image lie."""


class DistilledFamily(VisionTransformerFamily):
    """Adapter of timm's ``VisionTransformerDistilled``: a plain ViT with two prefix tokens."""

    model_class = VisionTransformerDistilled
    backbone_class = HeadlessDistilled
    student_class = LinearizedDistilled
    modules = ()  # names of timm's module deit are of either class
    tokens = "a class and a distillation token"

    def constructor_arguments(self) -> list[str]:
        # timm's class passes what it gets on to its base.
        return list(inspect.signature(VisionTransformer).parameters)

    def make_backbone(self, model: VisionTransformerDistilled, image_size: Sequence[int]) -> None:
        model.__class__ = HeadlessDistilled
        super().make_backbone(model, image_size)
        # timm's does not take it over: its heads read the first two tokens whatever the pooling.
        model.global_pool = ""
