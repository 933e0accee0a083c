import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from adala.data.transforms import build_eval_transform, build_train_transform, normalise, seeded

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
AUGMENTATIONS = ["none", "crop", "shift", "strong", "scale"]


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def exact(image: Image.Image) -> torch.Tensor:
    """What normalising alone gives."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("size", [(28, 28), (32, 48)])
def test_an_image_of_the_right_size_passes_unchanged(size):
    image = picture(*size)
    for transform in (
        build_eval_transform(size, MEAN, STD),
        build_train_transform(size, MEAN, STD, augmentation="none"),
    ):
        torch.testing.assert_close(transform(image), exact(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("source", [(28, 28), (97, 41), (20, 300)])
def test_every_augmentation_gives_normalised_floats_of_the_size(augmentation, source):
    transform = build_train_transform((32, 48), MEAN, STD, augmentation=augmentation)
    tensor = transform(picture(*source))
    assert type(tensor) is torch.Tensor
    assert (tensor.shape, tensor.dtype) == ((3, 32, 48), torch.float32)
    assert tensor.min() >= -0.5 / 0.2 - 1e-6 and tensor.max() <= 0.5 / 0.2 + 1e-6
    pickle.dumps(transform)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_normalising_a_batch_of_uint8_gives_the_same_bits(augmentation):
    """What is left for the device, and of float images nothing."""
    as_float, as_uint8 = (
        build_train_transform((32, 48), MEAN, STD, augmentation=augmentation, as_uint8=as_uint8)
        for as_uint8 in (False, True)
    )
    images = [[seeded(partial(each, picture(60, 90)), 0, 0, name) for name in "abc"] for each in (as_float, as_uint8)]
    floats, bytes_ = map(torch.stack, images)
    assert bytes_.dtype == torch.uint8
    assert torch.equal(normalise(bytes_, MEAN, STD), floats) and normalise(floats, MEAN, STD) is floats


@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
@pytest.mark.parametrize("source", [(120, 200), (233, 151), (64, 64)])
def test_evaluation_sees_what_timm_shows(crop_fraction, source):
    theirs = create_transform(
        (64, 64), is_training=False, interpolation="bicubic", mean=MEAN, std=STD, crop_pct=crop_fraction
    )
    ours = build_eval_transform((64, 64), MEAN, STD, crop_fraction=crop_fraction)
    # One step of 255 from rounding in the resize, two implementations of the same filter.
    torch.testing.assert_close(ours(picture(*source)), theirs(picture(*source)), rtol=0, atol=1.5 / 255 / min(STD))


def test_a_shift_moves_by_at_most_two_pixels():
    image = picture(28, 28)
    transform = build_train_transform((28, 28), MEAN, STD, augmentation="shift")
    inner = exact(image)[:, 2:-2, 2:-2]
    candidates = [inner, inner.flip(-1)]
    shifts = set()
    for number in range(60):
        shifted = seeded(partial(transform, image), 0, 0, f"{number}")
        found = [
            (flipped, row, column)
            for flipped, candidate in enumerate(candidates)
            for row in range(5)
            for column in range(5)
            if torch.allclose(shifted[:, row : row + 24, column : column + 24], candidate, atol=1e-5)
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert {shift[0] for shift in shifts} == {0, 1}
    assert {shift[1] for shift in shifts} == {shift[2] for shift in shifts} == set(range(5))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS[1:])
def test_augmentation_is_a_function_of_seed_epoch_and_sample(augmentation):
    transform = build_train_transform((28, 28), MEAN, STD, augmentation=augmentation)
    image = picture(28, 28)
    first = seeded(partial(transform, image), 1, 2, "train-00000.tar/7")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(seeded(partial(transform, image), 1, 2, "train-00000.tar/7"), first)
    assert torch.equal(torch.get_rng_state(), before)
    # One other draw may agree by chance; that all eight do is not.
    others = [(2, 2, "train-00000.tar/7"), (1, 3, "train-00000.tar/7"), (1, 2, "train-00000.tar/8")]
    for seed, epoch, sample_id in others:
        views = [seeded(partial(transform, image), seed, epoch, sample_id + "0" * number) for number in range(8)]
        same = [seeded(partial(transform, image), 1, 2, "train-00000.tar/7" + "0" * number) for number in range(8)]
        assert not all(map(torch.equal, views, same))


def test_the_generator_is_put_back_after_an_error():
    def broken(image):
        torch.rand(1)
        raise RuntimeError("no")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        seeded(partial(broken, picture(8, 8)), 0, 0, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_names_and_fractions_are_refused():
    with pytest.raises(ValueError, match="unknown augmentation 'mixup': known are none, crop, shift, strong, scale"):
        build_train_transform((28, 28), MEAN, STD, augmentation="mixup")
    with pytest.raises(ValueError, match="crop_fraction"):
        build_eval_transform((28, 28), MEAN, STD, crop_fraction=1.2)
