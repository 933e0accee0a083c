"""Pictures of an evaluation: features as colours, masks over images, errors by block.

Shapes: n images, H and W in pixels, (h, w) the grid of patches, D embed dim, K classes.
"""

import colorsys
import io
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from adala.evaluation import BlockReport

# Of a teacher's components, what is cut off at either end: a few outlier patches must not take all the contrast.
QUANTILES = (0.02, 0.98)
COLOURS = {"linearized": "#888888", "stage 1": "#d9822b", "stage 2": "#2b6cb0", "stage 3": "#3a8f5c"}
OTHER_COLOURS = ("#c8102e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
TRUTH = "ground truth"
# Side of a cell of a grid of pictures, in inches.
CELL = 2.2
# Characters of a column's title in a line, and inches that an entry of a legend takes, across and down.
TITLE_WIDTH, ENTRY = 30, (1.6, 0.24)
# More classes than that are not told apart: the legend names the most frequent ones.
MOST_ENTRIES = 24
IGNORED = 0.62
LUMINANCE = (0.299, 0.587, 0.114)
# Ten hues that are told apart by most eyes, and again in another lightness; from class 20 on hues in golden steps.
_HUES = ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "bcbd22", "17becf", "3b3b98")


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """The picture as a PNG file's contents."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=dpi)
    return written.getvalue()


def pca_colours(patch_features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Patch features as colours, by one projection for all models, so that equal colours mean equal features.

    The three components of largest variance of the first model's patches, over all images, are red, green and blue;
    each is scaled so that the first model's 2nd and 98th percentile are 0 and 1. Patches are weighted alike.

    Args:
        patch_features: (n, h, w, D) by model, the teacher first; the others may have another grid.

    Returns:
        (n, h, w, 3) in 0..1, float64, by model.

    Raises:
        ValueError: There is no model, or one has another D than the first.
    """
    if not patch_features:
        raise ValueError("there are no features to draw: name at least one model, the teacher first")
    of_teacher = next(iter(patch_features.values()))
    width = of_teacher.shape[-1]
    for name, features in patch_features.items():
        if features.shape[-1] != width:
            raise ValueError(
                f"the patch features of {name} have {features.shape[-1]} channels, the teacher's {width}: one "
                "projection draws models of one width only"
            )
    patches = of_teacher.detach().cpu().double().reshape(-1, width)
    mean = patches.mean(0)
    components = _principal_components(patches - mean)
    low, high = (torch.quantile((patches - mean) @ components, share, dim=0) for share in QUANTILES)
    span = (high - low).clamp_min(torch.finfo(low.dtype).tiny)
    return {
        name: (((features.detach().cpu().double() - mean) @ components - low) / span).clamp(0, 1)
        for name, features in patch_features.items()
    }


def _principal_components(centred: Tensor) -> Tensor:
    """Directions (D, 3) of largest variance of (m, D), the largest first, zeros where there are fewer than three."""
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    found = vectors.flip(1)[:, :3]
    # A direction's sign is arbitrary: fixed here, so that two runs give the same picture.
    largest = found.abs().argmax(0)
    found = found * found.gather(0, largest[None]).sign()
    return torch.nn.functional.pad(found, (0, 3 - found.shape[1]))


def pca_pictures(images: Tensor, patch_features: Mapping[str, Tensor]) -> Figure:
    """Images, and beside each what models make of it: :func:`pca_colours` of their patches.

    Args:
        images: (n, 3, H, W) in 0..1.
        patch_features: (n, h, w, D) by model, the teacher first.

    Raises:
        ValueError: As :func:`pca_colours`, or a model has another number of images.
    """
    _check_counts(images, patch_features)
    columns = {"image": list(_pixels(images))}
    columns |= {name: list(colours.numpy()) for name, colours in pca_colours(patch_features).items()}
    return _grid(columns, tuple(images.shape[-2:]))


def mask_pictures(
    images: Tensor,
    targets: Tensor,
    predicted: Mapping[str, Tensor],
    num_classes: int,
    ignore_index: int = 255,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Images with the true mask over them, then each model's, in one palette, with a legend of the classes there are.

    Under a mask the image is grey, so that a colour is a class. Where there are very many classes, the legend names the
    most frequent ones.

    Args:
        images: (n, 3, H, W) in 0..1.
        targets: (n, H, W), classes 0..K-1 or ``ignore_index``, which is hatched in grey.
        predicted: (n, H, W) by model.
        num_classes: K.
        ignore_index: What stands where nothing is known.
        class_names: K names; None numbers the classes.

    Raises:
        ValueError: A mask of another size than the images, or with an unknown class; names of another number.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"there are {len(class_names)} names for {num_classes} classes: give one for each")
    masks = {TRUTH: targets, **predicted}
    for name, mask in masks.items():
        _check_mask(name, mask, images, num_classes, ignore_index)
    palette, pixels = class_colours(num_classes), _pixels(images)
    columns = {"image": list(pixels)}
    for name, mask in masks.items():
        columns[name] = [overlay(*pair, palette, ignore_index) for pair in zip(pixels, mask.cpu().numpy(), strict=True)]
    figure = _grid(columns, tuple(images.shape[-2:]))
    names = class_names or [f"class {number}" for number in range(num_classes)]
    _add_legend(figure, _entries(list(masks.values()), names, palette, ignore_index))
    return figure


def _entries(masks: Sequence[Tensor], names: Sequence[str], palette: np.ndarray, ignore_index: int) -> list[Patch]:
    """What the legend explains: in their order, the classes that cover most pixels of all masks."""
    found, counts = torch.cat([mask.cpu().flatten() for mask in masks]).unique(return_counts=True)
    known = found != ignore_index
    frequent = found[known][counts[known].argsort(descending=True, stable=True)].tolist()
    entries = [Patch(color=palette[number], label=names[number]) for number in sorted(frequent[:MOST_ENTRIES])]
    if len(frequent) > MOST_ENTRIES:
        entries.append(Patch(alpha=0, label=f"and {len(frequent) - MOST_ENTRIES} more"))
    if not known.all():
        entries.append(Patch(facecolor=str(IGNORED), edgecolor="black", hatch="////", label="ignored"))
    return entries


def _add_legend(figure: Figure, entries: Sequence[Artist]) -> None:
    """Below the panels, which keep their size: the figure grows."""
    width, height = figure.get_size_inches()
    across = max(1, min(len(entries), int(width / ENTRY[0])))
    figure.set_size_inches(width, height + ENTRY[1] * -(-len(entries) // across))
    figure.legend(handles=entries, loc="outside lower center", ncols=across, frameon=False, fontsize=9)


def _check_mask(name: str, mask: Tensor, images: Tensor, num_classes: int, ignore_index: int) -> None:
    expected = (len(images), *images.shape[-2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"the masks of {name} are of shape {tuple(mask.shape)}: images as these need {expected}")
    unknown = mask[((mask < 0) | (mask >= num_classes)) & (mask != ignore_index)]
    if len(unknown):
        raise ValueError(
            f"class {int(unknown[0])} is in the masks of {name}: there are 0 to {num_classes - 1}, and {ignore_index} "
            "where nothing is known"
        )


def class_colours(num_classes: int) -> np.ndarray:
    """(K, 3) in 0..1; a class has the same colour however many there are."""
    hues = np.array([[int(hue[at : at + 2], 16) for at in (0, 2, 4)] for hue in _HUES]) / 255
    fixed = np.concatenate([hues, 0.5 + 0.5 * hues])[:num_classes]
    golden = [
        colorsys.hsv_to_rgb(number * 0.61803398875 % 1, 0.55 + 0.4 * (number % 2), 0.6 + 0.2 * (number % 3))
        for number in range(len(fixed), num_classes)
    ]
    return np.concatenate([fixed, np.array(golden).reshape(-1, 3)])


def overlay(
    image: np.ndarray, mask: np.ndarray, palette: np.ndarray, ignore_index: int, share: float = 0.7
) -> np.ndarray:
    """A grey image of (H, W, 3) under the colours of a mask (H, W); pixels that are ignored are grey with stripes."""
    known = mask != ignore_index
    covered = np.repeat((1 - share) * (image @ LUMINANCE)[..., None], 3, axis=-1)
    covered[known] += share * palette[mask[known]]
    rows, columns = np.indices(mask.shape)
    period = max(4, mask.shape[0] // 20)
    stripes = np.where((rows + columns) % period < period / 4, 0.15, IGNORED)
    covered[~known] = stripes[~known, None]
    return covered


def block_error_picture(reports: BlockReport | Mapping[str, BlockReport]) -> Figure:
    """Relative errors by block: of attentions alone, and of the residual stream up to the final features.

    Args:
        reports: One report, or several by what they differ in (an image size), a row of panels each.
    """
    by_title = {"": reports} if isinstance(reports, BlockReport) else reports
    figure = Figure(figsize=(11, 3.6 * len(by_title)), layout="constrained")
    panels = figure.subplots(len(by_title), 2, squeeze=False)
    colours = _student_colours(name for report in by_title.values() for name in report.students)
    for (title, report), (left, right) in zip(by_title.items(), panels, strict=True):
        for name, errors in report.students.items():
            style = {"marker": "o", "markersize": 4, "color": colours[name], "label": name}
            left.plot([found["relative_error"] for found in errors.attention], **style)
            right.plot([found["relative_error"] for found in (*errors.stream, errors.features)], **style)
        blocks = range(len(report.outliers))
        left.set_xticks(blocks)
        right.set_xticks([*blocks, len(blocks)], [*map(str, blocks), "final\nnorm"])
        told = f" ({title})" if title else ""
        left.set_title(f"where it arises: attention on the teacher's input{told}")
        right.set_title(f"what accumulates: residual stream{told}")
        for axis in (left, right):
            axis.set(xlabel="block", ylabel="relative error", ylim=(0, None))
            axis.grid(alpha=0.3)
    by_name = {line.get_label(): line for axis in panels.flat for line in axis.lines}
    _add_legend(figure, list(by_name.values()))
    return figure


def _student_colours(names: Iterable[str]) -> dict[str, str]:
    others = itertools.cycle(OTHER_COLOURS)
    return {name: COLOURS.get(name) or next(others) for name in dict.fromkeys(names)}


def _check_counts(images: Tensor, found: Mapping[str, Tensor]) -> None:
    for name, values in found.items():
        if len(values) != len(images):
            raise ValueError(
                f"{name} has features of {len(values)} images, and there are {len(images)}: give one for each"
            )


def _pixels(images: Tensor) -> np.ndarray:
    """(n, H, W, 3) in 0..1."""
    return images.detach().cpu().double().clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _grid(columns: Mapping[str, Sequence[np.ndarray]], size: tuple[int, int]) -> Figure:
    """A row an image of ``size`` (height, width), a column a name; coarser pictures are stretched without smoothing."""
    rows = len(next(iter(columns.values())))
    height, width = size
    cell = (CELL * width / max(size), CELL * height / max(size))
    figure = Figure(figsize=(cell[0] * len(columns) + 0.3, cell[1] * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(textwrap.fill(name, TITLE_WIDTH), fontsize=10)
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
            axis.set_axis_off()
    return figure
