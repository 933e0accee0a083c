"""Semantic segmentation: one class a pixel, a dense head on the tokens, mean intersection over union.

Shapes: B batch, N tokens, D embed dim, K classes, H, W height and width of an image or a mask in pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from adala.data import Preparation, View
from adala.data.joint import build_eval_pair_transform, build_train_pair_transform
from adala.data.labels import Classes
from adala.data.masks import MaskFormat, check_mask, read_mask
from adala.data.tars import Fields
from adala.families import Backbone
from adala.heads import build_segmentation_head, semantic_logits
from adala.rules import with_text_keys
from adala.tasks.base import Prediction, Task
from adala.tasks.mask_loss import mask_classification_loss
from adala.tasks.sliding import slide

if TYPE_CHECKING:
    from torchmetrics import Metric

# Classes in one image, more than most have: ADE20K's about nine on average, Cityscapes' all 19 at most.
MANY_CLASSES = 32


@dataclass(frozen=True)
class Segmentation(Task):
    """A class for each pixel.

    Attributes:
        num_classes: Classes in the masks, without what is ignored.
        head: ``linear`` (batch norm and a 1x1 convolution on patch beside global features), ``mask2former``, ``pmt``.
        head_options: Options of the head by field name.
        mask: How masks are coded, see :class:`adala.data.masks.MaskFormat`.
        mask_field: Extension of the mask's file in a sample; None takes the first of the usual ones.
        inference: How a head is finally scored: on the ``crop`` that training sees (image and mask cut to
            data.image_size), on the ``whole`` image, its shorter side resized to that, or by a window of that size that
            slides over it (``slide``). The last two score every pixel of the mask as it is.
        window_overlap: Part of a window that its neighbour covers too.
    """

    name: ClassVar[str] = "segmentation"
    score: ClassVar[str] = "miou"
    score_title: ClassVar[str] = "mIoU (%)"
    probe: ClassVar[Literal["dense"]] = "dense"
    fields_of_head: ClassVar[tuple[str, ...]] = ("head", "head_options", "inference", "window_overlap")

    num_classes: int
    head: str = "linear"
    head_options: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)
    mask_field: str | None = None
    inference: Literal["crop", "whole", "slide"] = "crop"
    window_overlap: float = 1 / 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", with_text_keys(self.mask))
        super().__post_init__()
        form = self.mask_format
        if form.ignore_index < self.num_classes:
            raise ValueError(
                f"mask.ignore_index is {form.ignore_index}: it must be {self.num_classes} (num_classes) or more, since "
                f"0 to {self.num_classes - 1} are classes"
            )

    @cached_property
    def mask_format(self) -> MaskFormat:
        known = [each.name for each in fields(MaskFormat)]
        for key in self.mask:
            if key not in known:
                raise ValueError(f"mask has no option {key!r}: it has {', '.join(known)}")
        return MaskFormat(**self.mask)

    @property
    def target_field(self) -> str | None:
        return self.mask_field

    def read_target(self, fields: Fields, classes: Classes | None, image_size: tuple[int, int]) -> np.ndarray:
        """The mask, (H, W)."""
        mask = read_mask(fields, self.mask_format, self.mask_field)
        check_mask(mask, self.num_classes, self.mask_format.ignore_index)
        return mask

    def is_labelled(self, target: np.ndarray) -> bool:
        return bool((target != self.mask_format.ignore_index).any())

    def prepare(self, view: View, augmentation: str | None) -> Preparation:
        """``image`` (3, H, W) and ``mask`` (H, W), cut alike."""
        shape = (view.image_size, view.mean, view.std)
        if augmentation is None:
            pair = build_eval_pair_transform(*shape, view="crop", patch_size=max(view.patch_size))
        else:
            ignore_index = self.mask_format.ignore_index
            pair = build_train_pair_transform(
                *shape, augmentation=augmentation, ignore_index=ignore_index, as_uint8=view.trains_on_uint8
            )
        return self._preparation(pair)

    def prepare_scoring(self, view: View) -> Preparation | None:
        if self.inference == "crop":
            return None
        shape = (view.image_size, view.mean, view.std)
        return self._preparation(build_eval_pair_transform(*shape, view="whole", patch_size=max(view.patch_size)))

    def _preparation(self, pair: Callable[[Image.Image, np.ndarray], tuple[Tensor, Tensor]]) -> Preparation:
        def tensors(image: Image.Image, mask: np.ndarray) -> dict[str, Tensor]:
            return dict(zip(("image", "mask"), pair(image, mask), strict=True))

        return Preparation(tensors, self.reader)

    def build_head(self, student: Backbone) -> nn.Module:
        return build_segmentation_head(self.head, student, self.num_classes, self.head_options)

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """(B, H, W) int64."""
        if "mask" not in batch:
            raise ValueError("segmentation needs masks: the batch has none (stage3.train_data, data.train)")
        return batch["mask"].to(device, torch.int64, non_blocking=True)

    def example_target(self, image_size: tuple[int, int]) -> Tensor:
        """Stripes of as many classes as an image may well have; what a loss of masks holds grows with them."""
        classes = torch.arange(min(self.num_classes, MANY_CLASSES))
        return classes.repeat_interleave(-(-image_size[1] // len(classes)))[: image_size[1]].expand(image_size)

    def loss(self, prediction: Prediction, target: Tensor, training: bool) -> Tensor:
        """Cross-entropy summed over labelled pixels, over the number of all: every labelled pixel of the data counts
        alike, however a global batch is cut. For heads of masks, see
        :func:`adala.tasks.mask_loss.mask_classification_loss`."""
        ignore_index = self.mask_format.ignore_index
        if isinstance(prediction, dict):
            return mask_classification_loss(prediction, target, ignore_index)
        logits = F.interpolate(prediction.float(), target.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum") / target.numel()

    @torch.no_grad()
    def batch_metrics(self, prediction: Prediction, target: Tensor) -> dict[str, Tensor]:
        labelled = target != self.mask_format.ignore_index
        right = (self.decision(prediction, tuple(target.shape[-2:])) == target) & labelled
        return {
            "pixel_accuracy": 100 * right.sum() / labelled.sum().clamp_min(1),
            "labelled": labelled.float().mean(),
        }

    def scores(self, prediction: Prediction, image_size: tuple[int, int]) -> Tensor:
        """(B, K, H, W), at the image's size."""
        return semantic_logits(prediction, image_size)

    def decision(self, prediction: Prediction, image_size: tuple[int, int]) -> Tensor:
        """Classes (B, H, W) int64; one image at a time, whose scores take K times the memory."""
        return torch.cat([self.scores(each, image_size).argmax(1) for each in _single_images(prediction)])

    def predict(
        self, model: Callable[[Tensor], Prediction], images: Tensor, target_size: tuple[int, int], view: View
    ) -> Tensor:
        """Classes (B, H, W) at the masks' size, on whole images or from windows whose scores are averaged."""
        if self.inference != "slide":
            return self.decision(model(images), target_size)

        def scores(window: Tensor) -> Tensor:
            return self.scores(model(window), tuple(window.shape[-2:]))

        return self.decision(slide(scores, images, view.image_size, self.window_overlap), target_size)

    def build_metrics(self) -> dict[str, "Metric"]:
        """``miou`` and ``pixel_accuracy``."""
        from adala.tasks.metrics import MeanIou, PixelAccuracy

        shape = (self.num_classes, self.mask_format.ignore_index)
        return {"miou": MeanIou(*shape), "pixel_accuracy": PixelAccuracy(*shape)}


def _single_images(prediction: Prediction) -> Iterator[Prediction]:
    """The predictions of a batch's images, each a batch of one."""
    if isinstance(prediction, Tensor):
        return iter(prediction.split(1))
    of_images = zip(prediction["class_logits"].split(1), prediction["mask_logits"].split(1), strict=True)
    return ({"class_logits": classes, "mask_logits": masks} for classes, masks in of_images)
