"""Segmentation by a linear head on frozen patch features, and the two baselines that it has to beat.

Shapes: n images, B batch, h x w patch grid, H x W mask, D embed dim, F inputs of the head, K classes, G rates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adala.distributed import device
from adala.evaluation.linear_probe import annealed, check_rates, draw_batches, finite, rank_rates, split_stratified
from adala.tasks.iou import iou_by_class

# Logits at full mask resolution that are held at a time: 256 MiB of float32.
CHUNK_ELEMENTS = 2**26
# Images that are read at a time for sums over all of them.
READ_AT_ONCE = 32

# Images (B, 3, H, W) uint8 and their masks (B, H, W).
Pictures = Iterable[tuple[Tensor, Tensor]]


class Rows(Protocol):
    """One array an image: a tensor, or what reads rows of a file as it is asked for them."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DenseFeatures:
    """A model's features of n images, in float16, bfloat16 or float32, in memory or in a file.

    Attributes:
        patches: (n, h, w, D).
        pooled: (n, D'), one vector an image that its patches are seen beside; None for patches alone.
    """

    patches: Rows
    pooled: Rows | None = None

    def __len__(self) -> int:
        return len(self.patches)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, h, w, D) and pooled (B, D'), D' = 0 where there are none, float32 on the device."""
        patches = self.patches[rows].to(device()).float()
        return patches, patches.new_zeros(len(rows), 0) if self.pooled is None else self.pooled[rows].to(patches)


@dataclass(frozen=True)
class DenseSettings:
    """How a dense probe is fitted: by AdamW, its rate annealed to zero along a cosine, at a grid of rates at once.

    Attributes:
        num_classes: K.
        ignore_index: Of pixels that do not count.
        rates: Learning rates, for any batch size.
        epochs: Passes over the training set.
        batch_size: Images of a step; a last, smaller batch of an epoch is left out.
        weight_decay: Of AdamW.
        held_fraction: Part of the training images on which the rate is chosen, where there are several.
        fit_scale: The loss compares at most so many pixels a patch along each side; masks are thinned out to that.
            Scores are always taken at the masks' own size.
        seed: Of the held part and of the order of images.

    Raises:
        ValueError: A value that cannot be.
    """

    num_classes: int
    ignore_index: int = 255
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2)
    epochs: int = 20
    batch_size: int = 16
    weight_decay: float = 1e-4
    held_fraction: float = 0.1
    fit_scale: int = 4
    seed: int = 0

    def __post_init__(self):
        check_rates(self.rates, self.held_fraction)
        for name in ("num_classes", "epochs", "batch_size", "fit_scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the dense probe is {getattr(self, name)}: it must be 1 or more")


class DenseHead(nn.Module):
    """Batch normalisation and a 1 x 1 convolution on [patch; pooled].

    The statistics are those of all images that it is fitted on, and the norm has no weights of its own: the convolution
    would undo them. What the convolution makes of ``pooled`` is the same at all patches, so it is computed once.

    Attributes:
        rate: At which it was fitted; None if it was not.
        scores: Of the rates among which that was chosen, mean IoU in percent on *training* images held back; None at
            those that diverged. Empty without a choice.
    """

    def __init__(self, mean: Tensor, std: Tensor, num_patch_features: int, num_classes: int):
        """A head whose logits are all zero.

        Args:
            mean: (F,) of each input, patch features first.
            std: (F,).
            num_patch_features: D.
            num_classes: K.
        """
        super().__init__()
        self.num_patch_features = num_patch_features
        self.rate: float | None = None
        self.scores: dict[float, float | None] = {}
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.weight = nn.Parameter(mean.new_zeros(num_classes, len(mean)))
        self.bias = nn.Parameter(mean.new_zeros(num_classes))

    def forward(self, patches: Tensor, pooled: Tensor) -> Tensor:
        """Logits (B, K, h, w) of patches (B, h, w, D) and pooled (B, F - D)."""
        return joint_logits([self], patches, pooled)[0]


def joint_logits(heads: Sequence[DenseHead], patches: Tensor, pooled: Tensor) -> Tensor:
    """Logits (G, B, K, h, w) of heads with the same statistics, in one product."""
    first = heads[0]
    width = first.num_patch_features
    weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
    of_patches = F.linear((patches - first.mean[:width]) / first.std[:width], weight[:, :width])
    of_pooled = F.linear((pooled - first.mean[width:]) / first.std[width:], weight[:, width:], bias)
    logits = of_patches + of_pooled[:, None, None]
    return logits.unflatten(-1, (len(heads), -1)).permute(3, 0, 4, 1, 2)


def fit_dense_probe(features: DenseFeatures, masks: Rows, settings: DenseSettings) -> DenseHead:
    """A linear segmentation head fitted on frozen features.

    Logits are upsampled bilinearly to the masks' (thinned out, see ``settings.fit_scale``) and compared with them by
    cross-entropy. The rate is chosen by mean IoU on training images that the grid was not fitted on, and then fitted
    again on all; rates that diverge drop out. Features are read in batches, so that they may lie in a file.

    Args:
        features: Of n images.
        masks: (n, H, W) integer classes, and ``settings.ignore_index``.
        settings: How to fit.

    Raises:
        ValueError: No image, masks that do not belong to the features, no pixel to learn from, a class beyond
            ``num_classes``, too few images to choose a rate on, or no rate that does not diverge.

    Paper: arXiv 2304.07193 (DINOv2), section 7.4: its linear segmentation.
    Differs: the norm's statistics are of the whole training set instead of running means, and there is no augmentation,
        both because features are computed once.
    """
    _check(features, masks, settings)
    ranked, scores = list(settings.rates), {}
    if len(settings.rates) > 1:
        # A mask has many classes, so that there is none to split by.
        fitted, held = split_stratified(torch.empty(len(features), 0), settings.held_fraction, settings.seed)
        heads = fit_dense_heads(features, masks, fitted, settings.rates, settings)
        scores = {rate: _score(head, features, masks, held, settings) for rate, head in heads.items()}
        ranked = rank_rates(scores)
    for rate in ranked:
        head = fit_dense_heads(features, masks, torch.arange(len(features)), [rate], settings)[rate]
        if finite(head.weight, head.bias):
            head.rate, head.scores = rate, scores
            return head.eval().requires_grad_(False)
    raise ValueError(
        f"the dense probe diverges at all rates ({', '.join(f'{rate:g}' for rate in settings.rates)}): add smaller "
        "ones, or look whether the features are finite"
    )


def _check(features: DenseFeatures, masks: Rows, settings: DenseSettings) -> None:
    if not len(features) or len(features) != len(masks):
        raise ValueError(
            f"there are features of {len(features)} images and {len(masks)} masks: a dense probe needs as many, at "
            "least one"
        )
    every = torch.arange(len(masks))
    counts = class_counts(
        (masks[rows] for rows in every.split(READ_AT_ONCE)), settings.num_classes, settings.ignore_index
    )
    if not counts.sum():
        raise ValueError(
            f"every pixel of the {len(masks)} training masks is {settings.ignore_index}, the one that is ignored: "
            "correct ignore_index, or how masks are read"
        )


def _score(
    head: DenseHead, features: DenseFeatures, masks: Rows, held: Tensor, settings: DenseSettings
) -> float | None:
    if not finite(head.weight, head.bias):
        return None
    return mean_iou(dense_confusion(head, features, masks, settings.ignore_index, held))[0]


@torch.enable_grad()
def fit_dense_heads(
    features: DenseFeatures, masks: Rows, rows: Tensor, rates: Sequence[float], settings: DenseSettings
) -> dict[float, DenseHead]:
    """A head by rate, each as if its rate had been trained alone; ``settings.rates`` is not looked at.

    Logits at the masks' size are there for one rate at a time.
    """
    mean, std = input_statistics(features, rows)
    width = features.patches[rows[:1]].shape[-1]
    heads = [DenseHead(mean, std, width, settings.num_classes) for _ in rates]
    steps = settings.epochs * max(1, len(rows) // settings.batch_size)
    groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    schedule = annealed(optimizer, steps)
    for batch in draw_batches(rows, settings.batch_size, settings.epochs, settings.seed):
        logits = joint_logits(heads, *features.read(batch)).unbind()
        target = thinned(masks[batch], logits[0].shape[-2:], settings.fit_scale).to(device())
        optimizer.zero_grad()
        torch.autograd.backward(logits, [_gradient(each, target, settings.ignore_index) for each in logits])
        optimizer.step()
        schedule.step()
    return dict(zip(rates, heads, strict=True))


@torch.no_grad()
def input_statistics(features: DenseFeatures, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of a head's inputs over the patches of ``rows``, float32 on the device."""
    sums, count = 0, 0
    for batch in rows.split(READ_AT_ONCE):
        patches, pooled = features.read(batch)
        patches = patches.flatten(1, 2).double()
        # In float64, in which a difference of squares is exact enough; each image weighs alike.
        moments = [(values.mean(1), values.square().mean(1)) for values in (patches, pooled[:, None].double())]
        sums = sums + torch.stack([torch.cat(parts, 1).sum(0) for parts in zip(*moments, strict=True)])
        count += len(batch)
    mean, square = sums / count
    return mean.float(), (square - mean.square()).clamp_min(0).sqrt().clamp_min(1e-6).float()


def thinned(masks: Tensor, grid_size: Sequence[int], scale: int) -> Tensor:
    """Masks (B, H, W) as int64, of at most ``scale`` pixels a patch along each side: those nearest to the centres."""
    for dim, patches in enumerate(grid_size, start=1):
        size = masks.shape[dim]
        kept = min(size, scale * patches)
        masks = masks.index_select(dim, ((torch.arange(kept, device=masks.device) + 0.5) * size / kept).long())
    return masks.long()


def _gradient(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Of the mean cross-entropy over labelled pixels, with respect to logits (B, K, h, w)."""
    logits = logits.detach().requires_grad_()
    resized = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    # Not its mean, which is not a number for a batch without a labelled pixel.
    loss = F.cross_entropy(resized, target, ignore_index=ignore_index, reduction="sum")
    return torch.autograd.grad(loss / (target != ignore_index).sum().clamp_min(1), logits)[0]


@torch.no_grad()
def dense_confusion(
    head: nn.Module, features: DenseFeatures, masks: Rows, ignore_index: int = 255, rows: Tensor | None = None
) -> Tensor:
    """Confusion matrix (K, K), see :func:`confusion_matrix`, at the masks' own size.

    Args:
        head: From patches (B, h, w, D) and pooled (B, D') to logits (B, K, h, w), which are upsampled bilinearly.
        features: Of n images.
        masks: (n, H, W).
        ignore_index: Of pixels that do not count.
        rows: Indices of the images that count; None is all.

    Raises:
        ValueError: No image, or a pixel that is neither a class nor ignored.
    """
    rows = torch.arange(len(masks)) if rows is None else rows
    if not len(rows):
        raise ValueError("there is no held-out image to segment: name shards that have some")
    total, chunk = 0, 1
    while len(rows):
        batch, rows = rows[:chunk], rows[chunk:]
        logits, target = head(*features.read(batch)), masks[batch].to(device())
        resized = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
        # On a CPU, argmax over classes that do not lie side by side takes ten times as long as max.
        total = total + confusion_matrix(resized.max(1).indices, target, logits.shape[1], ignore_index)
        chunk = min(READ_AT_ONCE, max(1, CHUNK_ELEMENTS // resized[0].numel()))
    return total


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """(K, K) int64 on the CPU: how many pixels of class i, by row, were predicted as class j.

    Args:
        prediction: Integer classes of any shape.
        target: Integer classes of the same shape; those that are ``ignore_index`` do not count.
        num_classes: K.
        ignore_index: May lie among the classes or beyond.

    Raises:
        ValueError: A target that is neither a class nor ignored.
    """
    classes = _checked_classes(target, num_classes, ignore_index)
    pairs = torch.where(classes < num_classes, classes * num_classes + prediction.int(), num_classes**2)
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes).cpu()


def _checked_classes(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """``target`` as int32, where what is ignored is ``num_classes``."""
    counted = target != ignore_index
    lowest, highest = (int(bound) for bound in torch.where(counted, target, 0).aminmax())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"the class {lowest if lowest < 0 else highest} is in a mask, where classes are 0 to {num_classes - 1}, "
            f"and {ignore_index} is ignored: correct num_classes or ignore_index, or how masks are read"
        )
    return torch.where(counted, target.int(), num_classes)


def mean_iou(confusion: Tensor) -> tuple[float, Tensor]:
    """Mean intersection over union in percent, and that of each class.

    Args:
        confusion: (K, K), targets by row; summed over images, and over ranks.

    Returns:
        The mean over classes that occur in targets or predictions, and (K,) float64, NaN for those that do not.

    Raises:
        ValueError: No pixel was counted.
    """
    if not confusion.sum():
        raise ValueError("mean IoU of no pixel at all: every pixel of the masks is ignored, or there is no mask")
    per_class = iou_by_class(confusion)
    return per_class.nanmean().item(), per_class


def class_counts(masks: Iterable[Tensor], num_classes: int, ignore_index: int = 255) -> Tensor:
    """How many pixels (K,) int64 of each class there are in batches of masks (B, H, W).

    Raises:
        ValueError: A pixel that is neither a class nor ignored.
    """
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for batch in masks:
        classes = _checked_classes(batch, num_classes, ignore_index).flatten()
        counts += torch.bincount(classes, minlength=num_classes + 1)[:-1].cpu()
    return counts


def majority_confusion(
    train_masks: Iterable[Tensor], masks: Iterable[Tensor], num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Confusion matrix (K, K) of always predicting the class of which most training pixels are.

    Args:
        train_masks: Batches (B, H, W).
        masks: Batches of the held-out ones.
        num_classes: K.
        ignore_index: Of pixels that do not count.
    """
    majority = class_counts(train_masks, num_classes, ignore_index).argmax()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    confusion[:, majority] = class_counts(masks, num_classes, ignore_index)
    return confusion


def colour_table_confusion(
    train: Pictures, held_out: Pictures, num_classes: int, bins: int = 16, ignore_index: int = 255
) -> Tensor:
    """Confusion matrix (K, K) of predicting each pixel's class by its colour alone.

    A look-up table holds, for each colour, the class of which most training pixels of it are; of equally many the
    smallest. Colours that no training pixel has get the class of most training pixels.

    Args:
        train: Batches of images (B, 3, H, W) uint8 and masks (B, H, W).
        held_out: Likewise.
        num_classes: K.
        bins: Into so many parts, 64 at most, each of the three channels is cut.
        ignore_index: Of pixels that do not count.

    Raises:
        ValueError: ``bins`` or images that cannot be, no pixel to learn from, or a pixel that is neither a class nor
            ignored.
    """
    if not 1 <= bins <= 64:
        raise ValueError(f"the colour table has {bins} bins a channel: choose 1 to 64")
    counts = torch.zeros(bins**3, num_classes, dtype=torch.int64)
    for images, masks in train:
        classes = _checked_classes(masks, num_classes, ignore_index)
        cells = _colours(images, bins) * (num_classes + 1) + classes
        found = torch.bincount(cells.flatten(), minlength=bins**3 * (num_classes + 1))
        counts += found.view(bins**3, num_classes + 1)[:, :-1]
    if not counts.sum():
        raise ValueError("the colour table has no pixel to learn from: every training pixel is ignored")
    table = torch.where(counts.sum(1) > 0, counts.argmax(1), counts.sum(0).argmax())
    batches = (
        confusion_matrix(table[_colours(images, bins)], masks, num_classes, ignore_index) for images, masks in held_out
    )
    return sum(batches, torch.zeros(num_classes, num_classes, dtype=torch.int64))


def _colours(images: Tensor, bins: int) -> Tensor:
    """One number (B, H, W) a pixel for its quantised colour."""
    if images.dtype != torch.uint8:
        raise ValueError(f"the colour table wants images of uint8, not {images.dtype}: give them before normalisation")
    red, green, blue = (images.long() * bins // 256).unbind(1)
    return (red * bins + green) * bins + blue
