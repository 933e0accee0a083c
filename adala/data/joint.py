"""From a PIL image and its mask to tensors that still lie over each other: transforms of both with the same draws.

Images are resampled bicubically, masks by the nearest pixel. With the same random numbers an image comes out as
:mod:`adala.data.transforms` gives it alone.

Shapes: H, W height and width of the model's input, in pixels; h, w those of the picture before it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from adala.data.images import DecodeError
from adala.data.transforms import ResizeToCover, augmentation_steps, normalising_steps

PairTransform = Callable[[Image.Image, np.ndarray], tuple[Tensor, Tensor]]
View = Literal["crop", "resize", "whole"]


class ClassMask(tv_tensors.Mask):
    """A mask of classes (1, h, w), of which resizing takes the pixel at the same place of the picture.

    torchvision's own masks take ``InterpolationMode.NEAREST``, which lies up to half a pixel up and left of what an
    image's resampling has there.
    """


@F.register_kernel(F.resize, ClassMask)
def _resize(mask: ClassMask, size: list[int], **image_options: object) -> ClassMask:
    plain = F.resize(mask.as_subclass(Tensor), size, interpolation=v2.InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(plain, like=mask)


@F.register_kernel(F.resized_crop, ClassMask)
def _resized_crop(
    mask: ClassMask, top: int, left: int, height: int, width: int, size: list[int], **image_options: object
) -> ClassMask:
    return _resize(F.crop(mask, top, left, height, width), size)


def build_train_pair_transform(
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    augmentation: str,
    ignore_index: int,
    as_uint8: bool = False,
) -> PairTransform:
    """An augmentation by name, of image and mask alike, normalised.

    Args:
        image_size: H and W in pixels.
        mean: Per channel, of values in 0 .. 1.
        std: Per channel, of values in 0 .. 1.
        augmentation: See :func:`adala.data.transforms.build_train_transform`.
        ignore_index: What the mask has beside the picture, where it is padded.
        as_uint8: Leaves out the normalisation, see :func:`adala.data.transforms.build_train_transform`.

    Returns:
        A map from a PIL RGB image and its mask (h, w) to float32 or uint8 (3, H, W) and int64 (H, W) that draws from
        torch's global generator; see :func:`adala.data.transforms.seeded`.

    Raises:
        ValueError: Unknown augmentation.
    """
    steps = augmentation_steps(augmentation, image_size, mean, fill={ClassMask: ignore_index})
    return functools.partial(_transform_both, _sequence(*steps, *([] if as_uint8 else normalising_steps(mean, std))))


def build_eval_pair_transform(
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    view: View,
    patch_size: int,
) -> PairTransform:
    """What a model is evaluated on, normalised.

    ``crop``: both resized to cover H x W and cut from the middle. ``resize``: both squashed to H x W. ``whole``: the
    image resized, its shorter side to the smaller of H and W and each side to a multiple of ``patch_size``; the mask as
    it is, since published scores count its own pixels.

    Args:
        image_size: H and W in pixels.
        mean: Per channel, of values in 0 .. 1.
        std: Per channel, of values in 0 .. 1.
        view: One of the names above.
        patch_size: Side of the model's patches, in pixels.

    Returns:
        A map from a PIL RGB image and its mask (h, w) to float32 (3, H, W) and int64 (H, W); with ``whole`` to an image
        of its own size and int64 (h, w).

    Raises:
        ValueError: Unknown view.
    """
    normalising = normalising_steps(mean, std)
    if view == "crop":
        return functools.partial(
            _transform_both, _sequence(ResizeToCover(image_size), v2.CenterCrop(image_size), *normalising)
        )
    if view == "resize":
        squashing = v2.Resize(image_size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        return functools.partial(_transform_both, _sequence(squashing, *normalising))
    if view == "whole":
        return functools.partial(_transform_image, min(image_size), patch_size, _sequence(*normalising))
    raise ValueError(f"unknown view {view!r}: known are {', '.join(get_args(View))}")


def _sequence(*steps: nn.Module) -> v2.Compose:
    return v2.Compose(list(steps))


def _transform_both(transform: nn.Module, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
    _check_sizes(image, mask)
    both = tv_tensors.Image(F.pil_to_tensor(image)), ClassMask(torch.from_numpy(mask)[None])
    pixels, classes = transform(*both)
    # A subclass would be carried through every operation of the model and the loss.
    return pixels.as_subclass(Tensor), classes.as_subclass(Tensor)[0].long()


def _transform_image(
    shorter_side: int, patch_size: int, normalise: nn.Module, image: Image.Image, mask: np.ndarray
) -> tuple[Tensor, Tensor]:
    _check_sizes(image, mask)
    pixels = F.pil_to_tensor(image)
    size = whole_size((image.height, image.width), shorter_side, patch_size)
    if size != (image.height, image.width):
        pixels = F.resize(pixels, list(size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return normalise(pixels), torch.from_numpy(mask).long()


def whole_size(size: tuple[int, int], shorter_side: int, patch_size: int) -> tuple[int, int]:
    """The nearest size in whole patches, one at least, to the one with that shorter side and the same aspect ratio."""
    sides = (side * shorter_side / min(size) for side in size)
    height, width = (max(1, round(side / patch_size)) * patch_size for side in sides)
    return height, width


def _check_sizes(image: Image.Image, mask: np.ndarray) -> None:
    if mask.shape != (image.height, image.width):
        raise DecodeError(
            f"its image has {image.width} x {image.height} pixels and its mask {mask.shape[1]} x {mask.shape[0]}: they "
            "must have the same size"
        )
