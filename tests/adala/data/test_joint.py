"""Image and mask stay over each other whatever is done to them."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from adala.data.images import DecodeError
from adala.data.joint import build_eval_pair_transform, build_train_pair_transform, whole_size
from adala.data.transforms import build_eval_transform, build_train_transform, seeded

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
AUGMENTATIONS = ["none", "crop", "shift", "strong", "scale"]
IGNORE = 255


def squares(height: int, width: int, side: int = 9) -> tuple[Image.Image, np.ndarray]:
    """A board of squares, black where the mask is 0 and white where it is 1."""
    rows, columns = np.mgrid[:height, :width] // side
    mask = ((rows + columns) % 2).astype(np.int32)
    pixels = np.repeat(255 * mask.astype(np.uint8)[..., None], 3, axis=-1)
    return Image.fromarray(pixels), mask


def noise(height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), generator.integers(0, 150, (height, width), dtype=np.int32)


def draws(transform, pair: tuple[Image.Image, np.ndarray], count: int):
    image, mask = pair
    for number in range(count):
        yield seeded(partial(transform, image, mask), 0, 0, f"{number}")


def apart(pixels: torch.Tensor, mask: torch.Tensor) -> float:
    """Share of pixels whose colour is another class than the mask says; white is what is brighter than the middle.

    Colours are jittered, but all of them alike, so that the known pixels' own middle parts them.
    """
    grey, known = pixels.mean(0), mask != IGNORE
    middle = (grey[known].min() + grey[known].max()) / 2
    return ((grey > middle) != (mask == 1))[known].float().mean().item()


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("source", [(48, 64), (101, 67), (37, 90)])
def test_a_mask_stays_over_its_image(augmentation: str, source: tuple[int, int]) -> None:
    transform = build_train_pair_transform((48, 64), **PLAIN, augmentation=augmentation, ignore_index=IGNORE)
    shares = []
    for pixels, mask in draws(transform, squares(*source), 25):
        assert type(pixels) is type(mask) is torch.Tensor
        assert (pixels.shape, pixels.dtype) == ((3, 48, 64), torch.float32)
        assert (mask.shape, mask.dtype) == ((48, 64), torch.int64)
        assert set(mask.unique().tolist()) <= {0, 1, IGNORE}
        shares.append(apart(pixels, mask))
    # Where an edge falls into the middle of a pixel, rounding decides. A mask half a pixel off would be 5 % and more.
    assert np.mean(shares) < 0.015, shares
    pickle.dumps(transform)


@pytest.mark.parametrize("view", ["crop", "resize"])
@pytest.mark.parametrize("source", [(48, 64), (101, 67), (37, 90)])
def test_a_mask_stays_over_what_is_evaluated(view: str, source: tuple[int, int]) -> None:
    transform = build_eval_pair_transform((48, 64), **PLAIN, view=view, patch_size=16)
    pixels, mask = transform(*squares(*source))
    assert (pixels.shape, mask.shape) == ((3, 48, 64), (48, 64))
    assert type(pixels) is type(mask) is torch.Tensor and mask.dtype == torch.int64
    assert apart(pixels, mask) < 0.02


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("source", [(28, 28), (61, 40)])
def test_an_image_comes_out_as_it_does_alone(augmentation: str, source: tuple[int, int]) -> None:
    both = build_train_pair_transform((28, 28), **PLAIN, augmentation=augmentation, ignore_index=IGNORE)
    alone = build_train_transform((28, 28), **PLAIN, augmentation=augmentation)
    image, _ = pair = noise(*source)
    for number, (pixels, _) in enumerate(draws(both, pair, 6)):
        assert torch.equal(pixels, seeded(partial(alone, image), 0, 0, f"{number}"))


def test_what_is_evaluated_comes_out_as_an_image_does_alone() -> None:
    image, mask = noise(61, 40)
    pixels, _ = build_eval_pair_transform((28, 28), **PLAIN, view="crop", patch_size=14)(image, mask)
    assert torch.equal(pixels, build_eval_transform((28, 28), **PLAIN)(image))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_no_class_comes_out_that_did_not_go_in(augmentation: str) -> None:
    image, mask = noise(40, 40)
    mask[mask % 2 == 1] = 149
    transform = build_train_pair_transform((28, 28), **PLAIN, augmentation=augmentation, ignore_index=-1)
    seen = {value for _, out in draws(transform, (image, mask), 20) for value in out.unique().tolist()}
    assert seen - {-1} <= set(np.unique(mask).tolist())
    assert (-1 in seen) == (augmentation in ("shift", "scale"))


@pytest.mark.parametrize("augmentation, beside", [("shift", 0.0), ("scale", (0.2, 0.4, 0.6))])
def test_beside_the_picture_nothing_is_known(augmentation: str, beside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adala.data.transforms.SCALE_COLOURS", ())
    transform = build_train_pair_transform(
        (28, 28), (0.2, 0.4, 0.6), (1.0, 1.0, 1.0), augmentation=augmentation, ignore_index=IGNORE
    )
    black = Image.new("RGB", (28, 28)), np.zeros((28, 28), np.int32)
    colour = torch.tensor(beside).expand(3) - torch.tensor((0.2, 0.4, 0.6))
    padded = [(pixels, mask) for pixels, mask in draws(transform, black, 20) if (mask == IGNORE).any()]
    assert padded
    for pixels, mask in padded:
        torch.testing.assert_close(
            pixels[:, mask == IGNORE], colour[:, None].expand(3, int((mask == IGNORE).sum())), atol=0.5 / 255, rtol=0
        )
        if augmentation == "scale":  # whose black picture differs from what is beside it
            assert torch.equal(pixels[0] < -0.1, mask == 0)


def test_scale_goes_from_half_to_double_size() -> None:
    transform = build_train_pair_transform((200, 200), **PLAIN, augmentation="scale", ignore_index=IGNORE)
    columns = np.broadcast_to(np.arange(200, dtype=np.int32), (200, 200)).copy()
    factors = []
    for _, mask in draws(transform, (Image.new("RGB", (200, 200)), columns), 60):
        known = mask[mask != IGNORE]
        width = (mask != IGNORE).any(0).sum().item()
        factors.append(width / (known.max() - known.min() + 1).item())
    assert 0.5 <= min(factors) < 0.6 and 1.9 < max(factors) <= 2.0, sorted(factors)
    assert 0.9 < np.median(factors) < 1.6


@pytest.mark.parametrize(
    "source, shorter, patch, expected",
    [
        ((683, 512), 518, 14, (686, 518)),
        ((1024, 2048), 1022, 14, (1022, 2044)),
        ((1024, 2048), 1024, 16, (1024, 2048)),
        ((300, 100), 28, 14, (84, 28)),
        ((10, 10), 4, 14, (14, 14)),
    ],
)
def test_the_whole_view_is_in_whole_patches(source, shorter: int, patch: int, expected: tuple[int, int]) -> None:
    assert whole_size(source, shorter, patch) == expected
    assert whole_size(source[::-1], shorter, patch) == expected[::-1]


def test_the_whole_view_leaves_the_mask_alone() -> None:
    image, mask = noise(60, 45)
    pixels, classes = build_eval_pair_transform((28, 42), **PLAIN, view="whole", patch_size=14)(image, mask)
    assert pixels.shape == (3, 42, 28) and type(pixels) is type(classes) is torch.Tensor
    assert classes.dtype == torch.int64 and np.array_equal(classes.numpy(), mask)
    image, mask = noise(28, 56)
    pixels, _ = build_eval_pair_transform((28, 28), **PLAIN, view="whole", patch_size=14)(image, mask)
    assert torch.equal((255 * pixels).round().byte(), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("view", ["crop", "resize", "whole", None])
def test_a_mask_of_another_size_is_a_bad_sample(view: str | None) -> None:
    if view is None:
        transform = build_train_pair_transform((28, 28), **PLAIN, augmentation="crop", ignore_index=IGNORE)
    else:
        transform = build_eval_pair_transform((28, 28), **PLAIN, view=view, patch_size=14)
    with pytest.raises(DecodeError, match="image has 30 x 40 pixels and its mask 40 x 30"):
        transform(Image.new("RGB", (30, 40)), np.zeros((30, 40), np.int32))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="known are none, crop, shift, strong, scale"):
        build_train_pair_transform((28, 28), **PLAIN, augmentation="mixup", ignore_index=IGNORE)
    with pytest.raises(ValueError, match="unknown view 'slide': known are crop, resize, whole"):
        build_eval_pair_transform((28, 28), **PLAIN, view="slide", patch_size=14)
