"""From PIL images to normalised tensors, with augmentation that depends on the sample and the epoch alone.

Shapes: H, W height and width of the model's input, in pixels.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

ImageTransform = Callable[[Image.Image], Tensor]

SHIFT_PIXELS = 2
# Of `scale`: sizes over the one that covers the model's input, and how far colours go.
SCALE_RANGE = (0.5, 2.0)
SCALE_COLOURS = ({"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1})


class ResizeToCover(v2.Transform):
    """Resizes an image, aspect ratio kept, to the smallest size that covers (height, width) pixels.

    An image that has such a size already passes unchanged, bit for bit. ``scale`` is the range of a factor that is
    drawn for every image, and changes that size.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float] | None = None):
        super().__init__()
        self.size = size
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        target_height, target_width = self.size
        # Integers throughout: a product of floats may miss the target by one pixel.
        if target_height * width >= target_width * height:
            size = [target_height, target_height * width // height]
        else:
            size = [target_width * height // width, target_width]
        if self.scale is not None:
            factor = torch.empty(1).uniform_(*self.scale).item()
            size = [max(1, round(side * factor)) for side in size]
        return {"size": size}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        if params["size"] == list(inpt.shape[-2:]):
            return inpt
        return F.resize(inpt, params["size"], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def build_eval_transform(
    image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], *, crop_fraction: float = 1.0
) -> ImageTransform:
    """Resize and centre crop, normalised.

    Args:
        image_size: H and W in pixels.
        mean: Per channel, of values in 0 .. 1.
        std: Per channel, of values in 0 .. 1.
        crop_fraction: Side of the crop over the side of the resized image, timm's ``crop_pct``.

    Returns:
        A map from a PIL RGB image to float32 (3, H, W).

    Raises:
        ValueError: ``crop_fraction`` is not in (0, 1].
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(
            f"crop_fraction is the part of the image that is kept, above 0 and up to 1, not {crop_fraction}"
        )
    covered = (int(image_size[0] / crop_fraction), int(image_size[1] / crop_fraction))
    return v2.Compose(
        [v2.PILToTensor(), ResizeToCover(covered), v2.CenterCrop(image_size), *normalising_steps(mean, std)]
    )


def build_train_transform(
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    augmentation: str,
    crop_scale: tuple[float, float] = (0.35, 1.0),
    as_uint8: bool = False,
) -> ImageTransform:
    """An augmentation by name, normalised.

    ``none``: resize and centre crop. ``crop``: a random crop resized, and a horizontal flip. ``shift``: up to two
    pixels to each side and a flip, for tiny images. ``strong``: ``crop`` with jittered colours and some images grey.
    ``scale``: half to double size, aspect ratio kept, a random crop, a flip and jittered colours, for segmentation.

    Args:
        image_size: H and W in pixels.
        mean: Per channel, of values in 0 .. 1.
        std: Per channel, of values in 0 .. 1.
        augmentation: One of the names above.
        crop_scale: Smallest and largest part of the image's area that a random crop covers.
        as_uint8: Leaves out the normalisation, which :func:`normalise` does for a whole batch: a quarter of the bytes
            on the way to the device.

    Returns:
        A map from a PIL RGB image to float32 or uint8 (3, H, W) that draws from torch's global generator; see
        :func:`seeded`.

    Raises:
        ValueError: Unknown augmentation.
    """
    steps = augmentation_steps(augmentation, image_size, mean, crop_scale=crop_scale)
    # Plain tensors from the start: wrapping and unwrapping tv_tensors takes a quarter of the time of a 28-pixel image,
    # and one that reached the model would carry its subclass through every operation.
    return v2.Compose([v2.PILToTensor(), *steps, *([] if as_uint8 else normalising_steps(mean, std))])


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised float32 images of uint8 ones (..., 3, H, W), on their device; what is float already is as it was."""
    return images if images.is_floating_point() else v2.Compose(normalising_steps(mean, std))(images)


def augmentation_steps(
    name: str,
    image_size: tuple[int, int],
    mean: Sequence[float],
    *,
    crop_scale: tuple[float, float] = (0.35, 1.0),
    fill: Mapping[type, int] | None = None,
) -> list[nn.Module]:
    """What an augmentation does to uint8 (3, height, width), and to what lies over it as tv_tensors.

    Args:
        name: See :func:`build_train_transform`, also for the further arguments.
        image_size: H and W in pixels.
        mean: Per channel, of values in 0 .. 1; the colour beside an image that ``scale`` makes smaller than H x W.
        crop_scale: Smallest and largest part of the image's area that a random crop covers.
        fill: By type of tv_tensor, what is beside an image.

    Raises:
        ValueError: Unknown augmentation.
    """
    fill = fill or {}
    covering = [ResizeToCover(image_size), v2.CenterCrop(image_size)]
    cropping = [
        v2.RandomResizedCrop(image_size, scale=crop_scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    mean_colour = [round(255 * value) for value in mean]
    augmentations = {
        "none": covering,
        "crop": cropping,
        "shift": [
            *covering,
            v2.RandomCrop(image_size, padding=SHIFT_PIXELS, fill={"others": 0, **fill}),
            v2.RandomHorizontalFlip(),
        ],
        "strong": [
            *cropping,
            v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
        ],
        "scale": [
            ResizeToCover(image_size, SCALE_RANGE),
            v2.RandomCrop(image_size, pad_if_needed=True, fill={"others": mean_colour, **fill}),
            v2.RandomHorizontalFlip(),
            *(v2.RandomApply([v2.ColorJitter(**amount)], p=0.5) for amount in SCALE_COLOURS),
        ],
    }
    if name not in augmentations:
        raise ValueError(f"unknown augmentation {name!r}: known are {', '.join(augmentations)}")
    return augmentations[name]


def normalising_steps(mean: Sequence[float], std: Sequence[float]) -> list[nn.Module]:
    """From uint8 images to normalised float32 ones."""
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def seeded(draw: Callable[[], Any], seed: int, epoch: int, sample_id: str) -> Any:
    """``draw()`` with torch's random numbers a function of (seed, epoch, sample id).

    The CPU generator's state is put back afterwards, so that nobody else's numbers depend on the data.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{sample_id}".encode(), digest_size=8).digest()
    generator = torch.default_generator  # `torch.manual_seed` would seed the accelerators too, once for each sample
    state = generator.get_state()
    generator.manual_seed(int.from_bytes(digest, "little"))
    try:
        return draw()
    finally:
        generator.set_state(state)
