"""When an exported model counts as the same."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adala.export.agreement import compare

IMAGES = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2) + 1


def tokens(images: Tensor) -> Tensor:
    """(B, 2, 3), other values for every image and token."""
    scale = images[:, :1, 0, :1]
    return torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]) * scale


def changed(change: Tensor) -> Callable[[Tensor], Tensor]:
    def model(images: Tensor) -> Tensor:
        found = tokens(images)
        found[-1] += change
        return found

    return model


def test_what_is_measured_is_the_worst_token_of_all_batches() -> None:
    found = compare(changed(torch.tensor([[0.0] * 3, [0.01, 0.0, 0.0]])), tokens, IMAGES, (1, 3))
    # Of one image, whose second token (0, 1, 0) became (0.01, 1, 0).
    assert found.worst_cosine == pytest.approx(1 / math.hypot(1, 0.01), abs=1e-9)
    assert (found.largest_difference, found.largest_value) == (pytest.approx(0.01), 12.0)
    assert found.batch_sizes == (1, 3)


@pytest.mark.parametrize("change", [0.015, float("nan"), float("inf")])
def test_one_token_is_enough_to_refuse(change: float) -> None:
    with pytest.raises(ValueError, match="refused, its cosine is below"):
        compare(changed(torch.tensor([[0.0] * 3, [change, 0.0, 0.0]])), tokens, IMAGES, (3, 1))


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives \(3, 2, 2\) for a batch of 3, PyTorch's \(3, 2, 3\)"):
        compare(lambda images: tokens(images)[..., :2], tokens, IMAGES, (3,))


def test_scores_of_pixels_are_compared_by_pixel() -> None:
    def scores(images: Tensor) -> Tensor:
        return torch.ones(len(images), 2, 4, 5)

    def of_another_pixel(images: Tensor) -> Tensor:
        found = scores(images)
        found[0, 0, 2, 3] = -1
        return found

    assert compare(scores, scores, IMAGES, (2,)).worst_cosine == pytest.approx(1)
    with pytest.raises(ValueError, match=r"worst cosine 0\.0000"):
        compare(of_another_pixel, scores, IMAGES, (2,))


def test_zero_agrees_with_zero_alone() -> None:
    def nothing(images: Tensor) -> Tensor:
        return torch.zeros(len(images), 2, 3)

    assert compare(nothing, nothing, IMAGES, (1,)).worst_cosine == 1
    with pytest.raises(ValueError, match="refused"):
        compare(nothing, tokens, IMAGES, (1,))


def test_what_is_lost_in_the_rounding_of_others_has_no_direction() -> None:
    def faint(sign: float) -> Callable[[Tensor], Tensor]:
        return lambda images: torch.tensor([[100.0, 0.0], [0.0, sign]]).expand(len(images), 2, 2)

    assert compare(faint(9e-4), faint(-9e-4), IMAGES, (1,)).worst_cosine == 1
    with pytest.raises(ValueError, match="refused"):
        compare(faint(2e-3), faint(-2e-3), IMAGES, (1,))
