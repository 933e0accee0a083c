"""Windows that slide over an image, against a loop over its pixels."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from adala.tasks.sliding import slide, window_starts


@pytest.mark.parametrize("window", [1, 2, 7, 16, 48])
@pytest.mark.parametrize("beyond", [0, 1, 3, 16, 61])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.5, 0.99])
def test_windows_cover_a_side_from_its_beginning_to_its_end(window: int, beyond: int, overlap: float) -> None:
    length = window + beyond
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0 and starts[-1] == length - window
    steps = [later - earlier for earlier, later in pairwise(starts)]
    stride = max(1, int(window * (1 - overlap)))
    # The last window alone may come sooner.
    assert all(step == stride for step in steps[:-1]) and all(0 < step <= stride for step in steps[-1:])
    assert {pixel for start in starts for pixel in range(start, start + window)} == set(range(length))


def test_windows_of_published_evaluations() -> None:
    """ADE20K's 512 pixels by a third, Cityscapes' 768 by a third."""
    assert window_starts(683, 512, 1 / 3) == [0, 171]
    assert window_starts(2048, 768, 1 / 3) == [0, 512, 1024, 1280]


def depends_on_place(window: Tensor) -> Tensor:
    """Scores (n, 2, h, w) that depend on where in the window a pixel lies, and on the whole of the window."""
    height, width = window.shape[-2:]
    place = torch.arange(float(height))[:, None] * 10 + torch.arange(float(width))
    whole = window.mean(dim=(1, 2, 3))[:, None, None]
    return torch.stack([window[:, 0] + place, whole * (1 + place)], dim=1)


def slowly(model: Callable, images: Tensor, window: tuple[int, int], overlap: float) -> Tensor:
    """For each pixel the mean over the windows that it lies in."""
    height, width = (min(pair) for pair in zip(window, images.shape[-2:], strict=True))
    rows, columns = images.shape[-2:]
    result = torch.zeros(len(images), 2, rows, columns)
    for row in range(rows):
        for column in range(columns):
            found = []
            for top in window_starts(rows, height, overlap):
                for left in window_starts(columns, width, overlap):
                    if top <= row < top + height and left <= column < left + width:
                        scores = model(images[:, :, top : top + height, left : left + width])
                        found.append(scores[:, :, row - top, column - left])
            result[:, :, row, column] = torch.stack(found).mean(0)
    return result


@pytest.mark.parametrize(
    "size", [(6, 4), (6, 9), (13, 4), (9, 11), (3, 4), (3, 9), (2, 3)], ids=lambda size: "x".join(map(str, size))
)
@pytest.mark.parametrize("overlap", [0.0, 0.4])
def test_overlaps_are_averaged(size: tuple[int, int], overlap: float) -> None:
    """A window of 6 x 4 over an image of its own size, a larger one, and one that is smaller on one side or both."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    scores = slide(depends_on_place, images, (6, 4), overlap)
    assert scores.shape == (2, 2, *size) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, slowly(depends_on_place, images, (6, 4), overlap))


@pytest.mark.parametrize("window", [(9, 11), (20, 11), (20, 30)], ids=str)
def test_one_window_is_the_whole_image(window: tuple[int, int]) -> None:
    images = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slide(depends_on_place, images, window, 0.5), depends_on_place(images))


def test_scores_in_bf16_are_summed_in_float32() -> None:
    images = torch.randn(1, 3, 9, 4, generator=torch.Generator().manual_seed(0))
    scores = slide(lambda window: depends_on_place(window).bfloat16(), images, (6, 4), 0.5)
    rounded = slowly(lambda window: depends_on_place(window).bfloat16().float(), images, (6, 4), 0.5)
    torch.testing.assert_close(scores, rounded, atol=1e-5, rtol=1e-5)
