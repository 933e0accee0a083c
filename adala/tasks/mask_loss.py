"""The loss of mask heads: queries matched with the classes of an image, then classified and compared as masks.

Shapes: B batch, Q queries, K classes, C classes present in an image, P labelled pixels, h x w mask logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from adala.attention import full_precision


@dataclass(frozen=True)
class MaskLossWeights:
    """How the parts of the loss, and of the costs of matching, are weighed; the defaults are the paper's.

    Attributes:
        classes: Of the cross-entropy over classes.
        masks: Of the binary cross-entropy of masks.
        dice: Of their dice loss.
        no_object: Of a query without a segment, within the cross-entropy, where a matched one has 1.
    """

    classes: float = 2.0
    masks: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1


@dataclass(frozen=True)
class Segments:
    """What is known of one image, at the resolution of the mask logits.

    Attributes:
        pixels: Index of the labelled pixels among the h w, (P,) int64.
        classes: Classes that occur, (C,) int64.
        masks: Where they are among the labelled pixels, (C, P) float32 of 0 and 1.
    """

    pixels: Tensor
    classes: Tensor
    masks: Tensor


def mask_classification_loss(
    prediction: Mapping[str, Any],
    target: Tensor,
    ignore_index: int = 255,
    weights: MaskLossWeights = MaskLossWeights(),
) -> Tensor:
    """The mean over images of the losses of the prediction and of all its auxiliary ones together.

    Queries and classes present in an image are matched at least cost. Matched queries are to have their class, and
    its pixels as their mask; the other queries are to be "no object". Pixels of ``ignore_index`` take no part in
    anything, and an image that has no other contributes zero.

    Paper: arXiv 2112.01527, section 3.3.
    Differs: every image's parts are normalised by its own segments and pixels, not by the batch's, so that the
        gradient does not depend on how a global batch is cut into micro-batches and ranks. Masks are compared at all
        labelled pixels of the logits' own resolution, the target resampled to it by its nearest pixels, instead of
        at 12,544 random points: the same result every time, and at stride 4 of 512 px about as many points, 16,384
        (6.6 MB a float32 map of 100 queries, one image at a time, and only matched queries in the graph). What is
        smaller than four pixels or so may therefore be lost from the target.

    Args:
        prediction: ``class_logits`` (B, Q, K + 1), the last class "no object"; ``mask_logits`` (B, Q, h, w);
            ``auxiliary``, a list of the same.
        target: Classes 0 to K - 1 or ``ignore_index``, (B, height, width) int64.
        ignore_index: Of pixels that nothing is known of.
        weights: Of the parts.

    Returns:
        A float32 scalar.
    """
    outputs = [prediction, *prediction["auxiliary"]]
    images = [find_segments(mask, ignore_index) for mask in nearest(target, prediction["mask_logits"].shape[-2:])]
    # Sums of nothing: a graph that every output is part of, even where no image has a labelled pixel.
    total = sum(logits.flatten()[:0].float().sum() for output in outputs for logits in _logits(output))
    with full_precision(prediction["mask_logits"]):
        for output in outputs:
            for class_logits, mask_logits, segments in zip(*_logits(output), images, strict=True):
                if len(segments.classes):
                    total = total + _image_loss(class_logits.float(), mask_logits.float(), segments, weights)
    return total / len(target)


def _logits(output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return output["class_logits"], output["mask_logits"]


def nearest(target: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels of ``target`` (B, height, width) that lie nearest to the centres of a grid of ``size``."""
    # In whole numbers: the centre of cell i of n lies at (2 i + 1) / 2 n of the edge.
    rows, columns = (
        (2 * torch.arange(n, device=target.device) + 1) * edge // (2 * n)
        for n, edge in zip(size, target.shape[1:], strict=True)
    )
    return target[:, rows[:, None], columns]


def find_segments(mask: Tensor, ignore_index: int) -> Segments:
    """The segments of a mask (h, w) of classes: one for each class that occurs."""
    labels = mask.flatten()
    pixels = (labels != ignore_index).nonzero().squeeze(1)
    labels = labels[pixels]
    classes = labels.unique()
    return Segments(pixels, classes, (labels == classes[:, None]).float())


def _image_loss(class_logits: Tensor, mask_logits: Tensor, segments: Segments, weights: MaskLossWeights) -> Tensor:
    """The loss of one output for one image; logits (Q, K + 1) and (Q, h, w)."""
    mask_logits = mask_logits.flatten(1)
    queries, matched = match(class_logits, mask_logits.detach()[:, segments.pixels], segments, weights)
    no_object = class_logits.shape[1] - 1
    wanted = torch.full_like(class_logits[:, 0], no_object, dtype=torch.int64)
    wanted[queries] = segments.classes[matched]
    class_weights = torch.ones_like(class_logits[0])
    class_weights[no_object] = weights.no_object
    class_loss = F.cross_entropy(class_logits, wanted, class_weights)
    # Queries before pixels: the graph then holds only those that were matched.
    logits, masks = mask_logits[queries][:, segments.pixels], segments.masks[matched]
    mask_loss = F.binary_cross_entropy_with_logits(logits, masks)
    probabilities = logits.sigmoid()
    overlap, extent = (probabilities * masks).sum(1), probabilities.sum(1) + masks.sum(1)
    dice_loss = _dice(overlap, extent).mean()
    return weights.classes * class_loss + weights.masks * mask_loss + weights.dice * dice_loss


def _dice(overlap: Tensor, extent: Tensor) -> Tensor:
    """1 minus the dice coefficient, smoothed by one pixel, of masks with this overlap and sum of extents."""
    return 1 - (2 * overlap + 1) / (extent + 1)


@torch.no_grad()
def match(
    class_logits: Tensor, mask_logits: Tensor, segments: Segments, weights: MaskLossWeights
) -> tuple[Tensor, Tensor]:
    """Pairs of query and segment of least total cost; each takes part at most once, as many as can do.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: At the labelled pixels, (Q, P).
        segments: Of the image.
        weights: Of the costs.

    Returns:
        Index of the queries and of their segments, each (min(Q, C),) int64.
    """
    probabilities = mask_logits.sigmoid()
    # Summed over pixels, softplus(x) - x t is the binary cross-entropy of a logit x with a target t.
    entropy = F.softplus(mask_logits).sum(1, keepdim=True) - mask_logits @ segments.masks.T
    extent = probabilities.sum(1, keepdim=True) + segments.masks.sum(1)
    cost = (
        weights.classes * -class_logits.softmax(1)[:, segments.classes]
        + weights.masks * entropy / mask_logits.shape[1]
        + weights.dice * _dice(probabilities @ segments.masks.T, extent)
    )
    # scipy refuses what is not finite; whoever looks at the loss or its gradient is to notice that, not the matching.
    queries, matched = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
    return torch.as_tensor(queries, device=cost.device), torch.as_tensor(matched, device=cost.device)
