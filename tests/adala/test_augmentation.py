"""What an augmentation changes, on pictures that show one change alone."""

from functools import partial

import pytest
import torch
from PIL import Image

from adala.data import build_train_transform
from adala.data.transforms import seeded

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def drawn(image: Image.Image, augmentation: str, count: int = 300) -> torch.Tensor:
    """(count, 3, 8, 8) in 0 .. 1."""
    transform = build_train_transform((8, 8), **PLAIN, augmentation=augmentation)
    return torch.stack([seeded(partial(transform, image), 0, 0, str(number)) for number in range(count)])


def test_strong_changes_the_brightness_of_four_images_in_five() -> None:
    """A grey picture, on which crops, contrast, saturation and hue leave no trace."""
    levels = drawn(Image.new("RGB", (16, 16), (100, 100, 100)), "strong")[:, 0, 4, 4] * 255
    # A factor between 0.6 and 1.4, and levels that are cut to whole ones; now and then it is the one that was.
    assert 57 <= levels.min() < 65 and 135 < levels.max() <= 141
    assert (levels.round() != 100).float().mean() == pytest.approx(0.8, abs=0.07)


def test_strong_makes_one_image_in_five_grey() -> None:
    pictures = drawn(Image.new("RGB", (16, 16), (200, 60, 20)), "strong")
    grey = (pictures.amax(1) - pictures.amin(1)).amax((1, 2)) < 0.01
    assert grey.float().mean() == pytest.approx(0.2, abs=0.07)


@pytest.mark.parametrize("augmentation", ["none", "crop"])
def test_the_others_keep_colours(augmentation: str) -> None:
    pictures = drawn(Image.new("RGB", (16, 16), (200, 60, 20)), augmentation, 20)
    expected = torch.tensor([200, 60, 20])[:, None, None] / 255
    torch.testing.assert_close(pictures, expected.expand(20, 3, 8, 8), atol=0.005, rtol=0)
