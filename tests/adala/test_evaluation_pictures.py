"""Features as colours, masks over images, errors by block: known colours for known inputs."""

import io
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adala.evaluation import BlockReport
from adala.evaluation.block_errors import BlockErrors
from adala.evaluation_pictures import (
    MOST_ENTRIES,
    as_png,
    block_error_picture,
    class_colours,
    mask_pictures,
    overlay,
    pca_colours,
    pca_pictures,
)


def shown(figure) -> dict[str, list[np.ndarray]]:
    """The pictures of a grid, from the top down, by the title of their column."""
    found: dict[str, list[np.ndarray]] = {}
    columns = {axis.get_subplotspec().colspan.start: axis.get_title() for axis in figure.axes if axis.get_title()}
    for axis in figure.axes:
        found.setdefault(columns[axis.get_subplotspec().colspan.start], []).append(
            np.asarray(axis.images[0].get_array())
        )
    return found


def low_rank_features(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features (2, 5, 4, 16) that are three waves (2, 5, 4, 3) of falling strength along orthonormal directions."""
    waves = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 3.0]) * 2 * torch.pi
    waves = waves.sin().reshape(2, 5, 4, 3)[..., torch.tensor([2, 1, 0])]
    waves = torch.linalg.qr((waves - waves.mean((0, 1, 2))).reshape(40, 3))[0].reshape(2, 5, 4, 3)
    directions = torch.linalg.qr(torch.randn(16, 3, generator=generator, dtype=torch.float64))[0]
    return (waves * torch.tensor([5.0, 3.0, 1.0])) @ directions.T + 7.0, waves


def test_a_low_rank_feature_gives_its_components_up_to_sign() -> None:
    features, waves = low_rank_features(torch.Generator().manual_seed(0))
    colours = pca_colours({"teacher": features.float()})["teacher"]
    assert colours.shape == (2, 5, 4, 3) and colours.min() == 0 and colours.max() == 1
    for channel in range(3):
        wave = waves[..., channel]
        candidates = []
        for signed in (wave, -wave):
            low, high = np.quantile(signed.numpy(), [0.02, 0.98])
            candidates.append(((signed - low) / (high - low)).clamp(0, 1))
        assert any(torch.allclose(colours[..., channel], expected, atol=1e-5) for expected in candidates)


def test_the_projection_is_that_of_a_singular_value_decomposition_of_the_teacher_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(3, 0.5, 8)
    teacher, student = (torch.randn(3, 4, 6, 8, generator=generator) * scale + 2 for _ in range(2))
    colours = pca_colours({"teacher": teacher, "student": student})
    patches = teacher.reshape(-1, 8).double().numpy()
    mean = patches.mean(0)
    directions = np.linalg.svd(patches - mean)[2][:3].T
    low, high = np.quantile((patches - mean) @ directions, [0.02, 0.98], axis=0)
    for name, features in (("teacher", teacher), ("student", student)):
        expected = ((features.reshape(-1, 8).double().numpy() - mean) @ directions - low) / (high - low)
        # Where a component points the other way, 0 and 1 are exchanged.
        for channel in range(3):
            found, plain = colours[name][..., channel].flatten().numpy(), expected[:, channel].clip(0, 1)
            assert np.allclose(found, plain, atol=1e-6) or np.allclose(found, 1 - plain, atol=1e-6), (name, channel)
    # One that sees more images of other models must not change the teacher's colours.
    assert torch.equal(pca_colours({"teacher": teacher, "other": 100 * student})["teacher"], colours["teacher"])


def test_teacher_and_identical_student_get_identical_pictures() -> None:
    generator = torch.Generator().manual_seed(2)
    images, features = torch.rand(2, 3, 12, 20, generator=generator), torch.randn(2, 3, 5, 7, generator=generator)
    figure = pca_pictures(images, {"teacher": features, "copy": features.clone(), "other": features.flip(0)})
    pictures = shown(figure)
    assert list(pictures) == ["image", "teacher", "copy", "other"]
    for row in range(2):
        assert np.allclose(pictures["image"][row], images[row].permute(1, 2, 0).numpy())
        assert np.array_equal(pictures["teacher"][row], pictures["copy"][row])
        assert np.array_equal(pictures["teacher"][row], pictures["other"][1 - row])
    # A coarse grid covers the whole image.
    assert {tuple(axis.images[0].get_extent()) for axis in figure.axes} == {(0, 20, 12, 0)}
    with Image.open(io.BytesIO(as_png(figure, dpi=40))) as picture:
        assert picture.format == "PNG" and picture.width > 2 * picture.height


@pytest.mark.parametrize("width", [1, 2, 3])
def test_few_channels_and_a_constant_feature_are_drawn(width: int) -> None:
    for features in (torch.randn(1, 3, 3, width), torch.ones(1, 3, 3, width)):
        colours = pca_colours({"teacher": features})["teacher"]
        assert colours.shape == (1, 3, 3, 3) and torch.isfinite(colours).all()


def test_features_that_cannot_be_drawn_together() -> None:
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="the patch features of b have 5 channels, the teacher's 4"):
        pca_pictures(images, {"a": torch.zeros(2, 2, 2, 4), "b": torch.zeros(2, 2, 2, 5)})
    with pytest.raises(ValueError, match="a has features of 1 images, and there are 2"):
        pca_pictures(images, {"a": torch.zeros(1, 2, 2, 4)})
    with pytest.raises(ValueError, match="there are no features to draw"):
        pca_pictures(images, {})


def legend_of(figure) -> dict[str, tuple]:
    (legend,) = figure.legends
    return {
        text.get_text(): (handle.get_facecolor(), handle.get_hatch())
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }


def test_masks_have_one_palette_and_a_legend_of_what_there_is() -> None:
    images = torch.full((1, 3, 8, 8), 0.5)
    target = torch.tensor([[0] * 4 + [2] * 2 + [255] * 2]).repeat(8, 1)[None]
    predicted = {"teacher": target.where(target != 255, torch.tensor(2)), "student": torch.full((1, 8, 8), 0)}
    figure = mask_pictures(images, target, predicted, 4, 255, ["sea", "ice", "land", "city"])
    pictures, palette = shown(figure), class_colours(4)
    assert list(pictures) == ["image", "ground truth", "teacher", "student"]
    legend = legend_of(figure)
    assert list(legend) == ["sea", "land", "ignored"] and legend["ignored"][1] == "////"
    assert legend["sea"][0][:3] == pytest.approx(palette[0]) and legend["land"][0][:3] == pytest.approx(palette[2])
    # 30 % of the image's grey and 70 % of the class's colour, the same in every column.
    expected = {number: 0.15 + 0.7 * palette[number] for number in (0, 2)}
    for name, column, number in (("ground truth", 0, 0), ("ground truth", 4, 2), ("teacher", 7, 2), ("student", 7, 0)):
        assert pictures[name][0][3, column] == pytest.approx(expected[number]), (name, column)
    ignored = pictures["ground truth"][0][:, 6:]
    assert np.ptp(ignored, axis=-1).max() == 0 and len(np.unique(ignored)) == 2, "grey, in stripes"
    without = mask_pictures(images, predicted["teacher"], {"student": predicted["student"]}, 4)
    assert list(legend_of(without)) == ["class 0", "class 2"]


def test_the_image_under_a_mask_is_grey() -> None:
    image = np.zeros((2, 2, 3))
    image[0, 0] = (1, 0, 0)
    covered = overlay(image, np.zeros((2, 2), int), np.zeros((1, 3)), 255, share=0.5)
    assert covered[0, 0] == pytest.approx([0.1495] * 3) and covered[1, 1] == pytest.approx([0] * 3)


def test_of_very_many_classes_the_most_frequent_are_named() -> None:
    mask = torch.arange(100).repeat(100, 1)
    mask[:90, :50] = 99
    figure = mask_pictures(torch.zeros(1, 3, 100, 100), mask[None], {}, 100)
    names = list(legend_of(figure))
    assert len(names) == MOST_ENTRIES + 1 and "class 99" in names and names[-1] == f"and {100 - MOST_ENTRIES} more"
    numbers = [int(name.split()[1]) for name in names[:-1]]
    assert numbers == sorted(numbers) and min(numbers) >= 50


def test_colours_differ_and_do_not_depend_on_how_many_there_are() -> None:
    colours = class_colours(150)
    assert colours.shape == (150, 3) and colours.min() >= 0 and colours.max() <= 1
    assert len(np.unique(colours.round(6), axis=0)) == 150
    nearest = min(np.abs(a - b).max() for a, b in permutations(colours[:20], 2))
    assert nearest > 0.08
    assert np.array_equal(class_colours(6), colours[:6]) and np.array_equal(class_colours(30), colours[:30])


def test_masks_that_do_not_fit_are_refused() -> None:
    images, mask = torch.zeros(1, 3, 4, 6), torch.zeros(1, 4, 6, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"the masks of student are of shape \(1, 6, 4\): images as these need \(1, 4, 6\)"
    ):
        mask_pictures(images, mask, {"student": mask.transpose(1, 2)}, 3)
    with pytest.raises(ValueError, match="class 3 is in the masks of student: there are 0 to 2, and 255"):
        mask_pictures(images, mask, {"student": mask + 3}, 3)
    with pytest.raises(ValueError, match="class -1 is in the masks of ground truth"):
        mask_pictures(images, mask - 1, {}, 3)
    with pytest.raises(ValueError, match="there are 2 names for 3 classes"):
        mask_pictures(images, mask, {}, 3, class_names=["a", "b"])


def block_report(factors: dict[str, float]) -> BlockReport:
    def errors(factor: float) -> BlockErrors:
        metric = [{"relative_error": factor * value} for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
        return BlockErrors(metric[:2], metric[2:4], metric[4])

    return BlockReport(8, [{"channel": 0}] * 2, {name: errors(factor) for name, factor in factors.items()})


def test_errors_by_block_are_lines_of_the_students() -> None:
    figure = block_error_picture({"a": block_report({"stage 1": 0.1, "mine": 0.2}), "b": block_report({"mine": 1.0})})
    lines = [{line.get_label(): line for line in axis.lines} for axis in figure.axes]
    drawn = [{name: list(line.get_ydata()) for name, line in panel.items()} for panel in lines]
    assert drawn[0] == {"stage 1": [0.1, 0.2], "mine": [0.2, 0.4]}
    assert drawn[1]["stage 1"] == pytest.approx([0.3, 0.4, 0.5]) and drawn[1]["mine"] == pytest.approx([0.6, 0.8, 1.0])
    assert drawn[2] == {"mine": [1.0, 2.0]} and drawn[3] == {"mine": [3.0, 4.0, 5.0]}
    # A student has one colour everywhere, and no two have the same.
    colours = {name: {panel[name].get_color() for panel in lines if name in panel} for name in ("stage 1", "mine")}
    assert all(len(found) == 1 for found in colours.values()) and colours["stage 1"] != colours["mine"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["stage 1", "mine"]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "1", "final\nnorm"]
    assert figure.axes[0].get_title().endswith("(a)")
    alone = block_error_picture(block_report({"stage 2": 1.0}))
    assert len(alone.axes) == 2 and not alone.axes[0].get_title().endswith(")")
    assert as_png(alone, dpi=30).startswith(b"\x89PNG")
