"""timm's NaFlexVit, given whole images: C-RADIO, NaFlex SigLIP 2 and others.

Shapes: B batch, N tokens, D embed dim.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from timm.layers import to_2tuple
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit, NaFlexVitCfg, checkpoint_filter_fn
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from adala.attention import AttentionShell
from adala.families.base import Family, LinearizedModel
from adala.families.vision_transformer import LayoutBlock


@dataclasses.dataclass(frozen=True)
class Patches:
    """What other families' ``patch_embed`` says of itself.

    Attributes:
        img_size: Height and width in pixels that the model was built for.
        patch_size: Height and width of a patch.
        proj: From a patch's pixels to D.
    """

    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    proj: nn.Module

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]


class ImageNaFlexVit(NaFlexVit):
    """timm's model for whole images, which says of its patches what others do.

    Attributes:
        img_size: Height and width in pixels that it was built for. Its position embedding has a grid of its own, from
            which it is resampled to that of each image.
    """

    img_size: tuple[int, int]

    @property
    def patch_embed(self) -> Patches:
        return Patches(self.img_size, self.embeds.patch_size, self.embeds.proj)

    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: None = None) -> None:
        """Takes note of the size; no weights change with it."""
        self.img_size = img_size or self.img_size


class LinearizedNaFlexVit(LinearizedModel, ImageNaFlexVit):
    """timm's NaFlexVit that tells its blocks how the tokens of each image lie; in all else timm's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Features of all tokens, (B, N, D), of images (B, 3, height, width); with timm's head on, its logits.

        Raises:
            ValueError: Anything but images of one size.
        """
        if not (isinstance(x, Tensor) and x.ndim == 4):
            raise ValueError(
                "a linearized NaFlexVit takes images (B, 3, height, width): batches of patches come with a mask over "
                "those that fill up, and linearized models support none"
            )
        return super().forward(x)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """See :class:`LinearizedModel`; no weights change, since each image gets its own position embedding anyway.

        Raises:
            ValueError: An image size that the patch size does not divide, or another patch size.
        """
        if patch_size is not None and to_2tuple(patch_size) != tuple(self.embeds.patch_size):
            raise ValueError("the patch size of a NaFlexVit cannot change: build the teacher with it (model_args)")
        super().set_input_size(img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch. The blocks do it, and timm's model must not do it around them."""
        super().set_grad_checkpointing(enable)
        self.grad_checkpointing = False


class NaFlexFamily(Family):
    """Adapter of timm's ``NaFlexVit`` with plain blocks; those of ``Eva``, with a rotary embedding, it refuses."""

    model_class = NaFlexVit
    backbone_class = ImageNaFlexVit
    student_class = LinearizedNaFlexVit
    modules = ("naflexvit",)
    blocks: ClassVar = {Block: LayoutBlock}
    shells: ClassVar = {Attention: AttentionShell}

    def check_patches(self, model: NaFlexVit) -> None:
        if type(model.embeds) is not NaFlexEmbeds:
            raise ValueError(f"embeds is a {type(model.embeds).__name__}; only timm's plain NaFlexEmbeds is supported")

    def constructor_arguments(self) -> list[str]:
        own = [name for name in super().constructor_arguments() if name not in ("cfg", "kwargs")]
        return [*own, *(field.name for field in dataclasses.fields(NaFlexVitCfg))]

    def build_arguments(self, image_size: Sequence[int]) -> dict[str, Any]:
        return {"img_size": tuple(image_size)}

    def make_backbone(self, model: NaFlexVit, image_size: Sequence[int]) -> None:
        super().make_backbone(model, image_size)
        model.__class__ = ImageNaFlexVit
        model.img_size = tuple(image_size)

    def read_state(self, tensors: Mapping[str, Tensor], model: NaFlexVit) -> dict[str, Tensor]:
        """timm's names, those of its plain ViT, and C-RADIO's."""
        return checkpoint_filter_fn(dict(tensors), model)

    def prepare_student(self, student: NaFlexVit) -> None:
        if type(student) is NaFlexVit:
            rows, columns = student.embeds.pos_embed_grid_size
            student.img_size = (rows * student.embeds.patch_size[0], columns * student.embeds.patch_size[1])
        super().prepare_student(student)
