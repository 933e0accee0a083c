"""How the files of a sample become the tensors of a batch: the image alone, or with a task's target.

Shapes: H, W height and width of the model's input, in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from adala.data.labels import Classes
from adala.data.tars import Fields
from adala.data.transforms import ImageTransform, build_eval_transform, build_train_transform, normalise


@dataclass(frozen=True)
class TargetReader:
    """How the target of a sample is read.

    Attributes:
        read: From the sample's files by extension, the names of classes, and the image's height and width in pixels, to
            the target. It raises DecodeError for a sample without one that can be used, which is a bad one then, and
            another ValueError for one that shows that the recipe is wrong, which stops the run.
        field: Extension of a file that is the target, and so is not the image, whatever it is called.
    """

    read: Callable[[Fields, Classes | None, tuple[int, int]], Any]
    field: str | None = None


@dataclass(frozen=True)
class View:
    """What a model is to see of images.

    Attributes:
        image_size: H and W.
        mean: Per channel, of values in 0 .. 1.
        std: Per channel, of values in 0 .. 1.
        patch_size: Height and width of a patch in pixels, which divide those of the image.
        trains_on_uint8: Whether images may come as uint8 where they are augmented, for :meth:`normalise` on the device.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: tuple[int, int]
    trains_on_uint8: bool = False

    def image_transform(self, augmentation: str | None = None, as_uint8: bool = False) -> ImageTransform:
        """From a PIL RGB image to float32 (3, H, W): augmented by that name, or as evaluations see it.

        Args:
            augmentation: Its name; None for evaluations.
            as_uint8: Gives augmented images before they are normalised, which :meth:`normalise` does.

        Raises:
            ValueError: Unknown augmentation.
        """
        if augmentation is None:
            return build_eval_transform(self.image_size, self.mean, self.std)
        return build_train_transform(self.image_size, self.mean, self.std, augmentation=augmentation, as_uint8=as_uint8)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the model is to see them: uint8 ones normalised on their device, others untouched."""
        return normalise(images, self.mean, self.std)


@dataclass(frozen=True)
class Preparation:
    """What becomes of a sample.

    Attributes:
        transform: From the RGB image and the target to tensors by name, ``image`` (3, H, W) and what else there is. In
            training its random numbers are seeded for each sample.
        reader: Of the target; None where none is wanted.
    """

    transform: Callable[[Image.Image, Any], dict[str, Tensor]]
    reader: TargetReader | None = None


def prepare_images(transform: ImageTransform) -> Preparation:
    """The image alone."""
    return Preparation(lambda image, target: {"image": transform(image)})
