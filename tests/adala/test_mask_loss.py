"""The mask loss against one written plainly, with every assignment tried; and what must not change it."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adala.tasks.mask_loss import (
    MaskLossWeights,
    find_segments,
    mask_classification_loss,
    match,
    nearest,
)

NUM_CLASSES, QUERIES, SIZE = 5, 4, (4, 6)
UNEQUAL = MaskLossWeights(classes=1.5, masks=4.0, dice=3.0, no_object=0.2)


def make_prediction(batch: int = 4, queries: int = QUERIES, auxiliary: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def output() -> dict[str, Tensor]:
        return {
            "class_logits": torch.randn(batch, queries, NUM_CLASSES + 1, generator=generator).requires_grad_(),
            "mask_logits": (2 * torch.randn(batch, queries, *SIZE, generator=generator)).requires_grad_(),
        }

    return {**output(), "auxiliary": [output() for _ in range(auxiliary)]}


def make_target(seed: int = 0) -> Tensor:
    """(4, 8, 12): unequal numbers of classes and of ignored pixels; nothing is known of the last image."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(NUM_CLASSES, (4, *SIZE), generator=generator)
    target[0] %= 2
    target[1] %= 3
    target[2] = 4
    target[1, :2] = 255
    target[2, :, :5] = 255
    target[3] = 255
    return target.repeat_interleave(2, 1).repeat_interleave(2, 2)


def parts(prediction: dict[str, Any]) -> list[Tensor]:
    outputs = (prediction, *prediction["auxiliary"])
    return [output[key] for output in outputs for key in ("class_logits", "mask_logits")]


def loss_and_gradients(prediction: dict[str, Any], target: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    loss = mask_classification_loss(prediction, target, **options)
    return loss.detach(), list(torch.autograd.grad(loss, parts(prediction)))


def piece(prediction: dict[str, Any], images: slice) -> dict[str, Any]:
    return {
        key: [piece(output, images) for output in value] if isinstance(value, list) else value[images]
        for key, value in prediction.items()
    }


def pair_cost(classes: Tensor, mask: Tensor, wanted: int, truth: Tensor, weights: MaskLossWeights) -> float:
    """Of one query, (K + 1,) and (P,), with one segment."""
    probability = classes.exp()[wanted] / classes.exp().sum()
    share = 1 / (1 + (-mask).exp())
    entropy = -(truth * share.log() + (1 - truth) * (1 - share).log()).mean()
    dice = 1 - (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1)
    return (-weights.classes * probability + weights.masks * entropy + weights.dice * dice).item()


def best_assignment(costs: list[list[float]]) -> list[tuple[int, int]]:
    """Pairs (query, segment) of least total cost, every one tried."""
    queries, segments = len(costs), len(costs[0])
    if queries < segments:
        flipped = best_assignment([list(column) for column in zip(*costs, strict=True)])
        return [(query, segment) for segment, query in flipped]
    chosen = min(
        itertools.permutations(range(queries), segments),
        key=lambda order: sum(costs[query][segment] for segment, query in enumerate(order)),
    )
    return [(query, segment) for segment, query in enumerate(chosen)]


def plain_loss(prediction: dict[str, Any], target: Tensor, weights: MaskLossWeights) -> Tensor:
    """The loss in float64, image by image and query by query."""
    small = F.interpolate(target[:, None].double(), SIZE, mode="nearest-exact")[:, 0].long()
    total = torch.zeros((), dtype=torch.float64)
    for output, image in itertools.product((prediction, *prediction["auxiliary"]), range(len(target))):
        known = small[image] != 255
        present = sorted(set(small[image][known].tolist()))
        if not present:
            continue
        classes, masks = output["class_logits"][image].double(), output["mask_logits"][image].double()[:, known]
        truths = [(small[image][known] == label).double() for label in present]
        costs = [
            [pair_cost(c, m, label, truth, weights) for label, truth in zip(present, truths, strict=True)]
            for c, m in zip(classes.detach(), masks.detach(), strict=True)
        ]
        pairs = dict(best_assignment(costs))
        weighed, weight_sum, entropies, dices = 0, 0, [], []
        for query in range(len(classes)):
            label = present[pairs[query]] if query in pairs else NUM_CLASSES
            weight = 1 if query in pairs else weights.no_object
            weighed = weighed - weight * classes[query].log_softmax(0)[label]
            weight_sum += weight
            if query in pairs:
                truth, share = truths[pairs[query]], masks[query].sigmoid()
                entropies.append(-(truth * share.log() + (1 - truth) * (1 - share).log()).mean())
                dices.append(1 - (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1))
        total = total + weights.classes * weighed / weight_sum
        total = total + (weights.masks * sum(entropies) + weights.dice * sum(dices)) / len(pairs)
    return total / len(target)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize("weights", [MaskLossWeights(), UNEQUAL], ids=["default", "unequal"])
def test_loss_and_gradients_are_those_of_the_plain_one(seed: int, queries: int, weights: MaskLossWeights) -> None:
    """With fewer queries than segments, too."""
    prediction, target = make_prediction(queries=queries, seed=seed), make_target(seed)
    loss, gradients = loss_and_gradients(prediction, target, weights=weights)
    expected = plain_loss(prediction, target, weights)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, parts(prediction)), strict=True):
        torch.testing.assert_close(gradient, exact, atol=1e-6, rtol=1e-4)


def test_the_defaults_are_the_papers() -> None:
    assert MaskLossWeights() == MaskLossWeights(classes=2.0, masks=5.0, dice=5.0, no_object=0.1)


@pytest.mark.parametrize("queries", [2, 3, 5])
def test_matching_finds_the_least_cost(queries: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randn(queries, NUM_CLASSES + 1, generator=generator)
        masks = 2 * torch.randn(queries, 24, generator=generator)
        segments = find_segments(torch.randint(3, SIZE, generator=generator), 255)
        costs = [
            [
                pair_cost(c.double(), m.double(), label, truth.double(), UNEQUAL)
                for label, truth in zip(segments.classes.tolist(), segments.masks, strict=True)
            ]
            for c, m in zip(classes, masks, strict=True)
        ]
        found = match(classes, masks, segments, UNEQUAL)
        assert sorted(zip(*(index.tolist() for index in found), strict=True)) == sorted(best_assignment(costs))


def test_segments_are_the_classes_that_occur_among_labelled_pixels() -> None:
    segments = find_segments(torch.tensor([[7, 255, 2], [2, 0, 255]]), 255)
    assert segments.pixels.tolist() == [0, 2, 3, 4] and segments.classes.tolist() == [0, 2, 7]
    assert segments.masks.tolist() == [[0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0]]
    assert find_segments(torch.tensor([[1, 255]]), 1).classes.tolist() == [255]


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (8, 12), (7, 11), (16, 24), (1, 1)], ids=str)
def test_nearest_pixels_are_those_of_pytorch(size: tuple[int, int]) -> None:
    target = torch.arange(2 * 8 * 12).reshape(2, 8, 12)
    expected = F.interpolate(target[:, None].double(), size, mode="nearest-exact")[:, 0].long()
    assert torch.equal(nearest(target, size), expected)


def test_ignored_pixels_change_nothing() -> None:
    """Neither the loss nor a gradient elsewhere, and their own gradient is zero."""
    prediction, target = make_prediction(), make_target()
    loss, gradients = loss_and_gradients(prediction, target)
    ignored = nearest(target, SIZE)[:, None].expand(-1, QUERIES, -1, -1) == 255
    other = piece(prediction, slice(None))
    for output in (other, *other["auxiliary"]):
        output["mask_logits"] = torch.where(ignored, 50 * torch.randn_like(output["mask_logits"]), 0) + torch.where(
            ignored, 0, output["mask_logits"].detach()
        )
        output["mask_logits"].requires_grad_()
    assert not torch.equal(other["mask_logits"], prediction["mask_logits"])
    same_loss, same_gradients = loss_and_gradients(other, target)
    assert torch.equal(loss, same_loss) and all(map(torch.equal, gradients, same_gradients))
    assert all(gradient[ignored].eq(0).all() for gradient in gradients[1::2])
    renamed = torch.where(target == 255, -1, target)
    assert torch.equal(mask_classification_loss(prediction, renamed, ignore_index=-1), loss)


def test_an_image_without_labels_counts_as_zero() -> None:
    prediction, target = make_prediction(), make_target()
    loss, gradients = loss_and_gradients(prediction, target)
    assert all(gradient[3].eq(0).all() and gradient[:3].ne(0).any() for gradient in gradients)
    with_labels = mask_classification_loss(piece(prediction, slice(0, 3)), target[:3])
    torch.testing.assert_close(loss, with_labels.detach() * 3 / 4)


def test_a_batch_without_labels_has_a_gradient_of_zero() -> None:
    loss, gradients = loss_and_gradients(make_prediction(), torch.full((4, 8, 12), 255))
    assert loss.item() == 0.0 and all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("cuts", [[2, 2], [1, 1, 1, 1]], ids=str)
def test_micro_batches_give_the_gradient_of_the_batch(cuts: list[int]) -> None:
    """Although images differ in segments, in labelled pixels, and in whether they have any."""
    prediction, target = make_prediction(), make_target()
    loss, gradients = loss_and_gradients(prediction, target)
    ends = list(itertools.accumulate(cuts))
    images = [slice(end - cut, end) for end, cut in zip(ends, cuts, strict=True)]
    losses = torch.stack([mask_classification_loss(piece(prediction, i), target[i]) for i in images])
    torch.testing.assert_close(losses.mean(), loss)
    for gradient, expected in zip(torch.autograd.grad(losses.mean(), parts(prediction)), gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_the_order_of_queries_does_not_matter() -> None:
    prediction, target, order = make_prediction(), make_target(), torch.tensor([2, 0, 3, 1])
    loss, gradients = loss_and_gradients(prediction, target)
    other = {
        key: [{k: v[:, order] for k, v in output.items()} for output in value]
        if key == "auxiliary"
        else value[:, order]
        for key, value in prediction.items()
    }
    same_loss = mask_classification_loss(other, target)
    torch.testing.assert_close(same_loss.detach(), loss)
    for gradient, expected in zip(torch.autograd.grad(same_loss, parts(prediction)), gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_a_perfect_prediction_costs_next_to_nothing() -> None:
    target = make_target()[:2]
    small = nearest(target, SIZE)
    masks = torch.stack([torch.where(small == label, 30.0, -30.0) for label in (2, 0, 1)], dim=1)
    classes = torch.zeros(2, 3, NUM_CLASSES + 1)
    for image in range(2):
        for query, label in enumerate((2, 0, 1)):
            classes[image, query, label if (small[image] == label).any() else NUM_CLASSES] = 30.0
    prediction = {"class_logits": classes, "mask_logits": masks, "auxiliary": []}
    assert mask_classification_loss(prediction, target).item() < 1e-5
    worse = {**prediction, "class_logits": classes.roll(1, dims=1)}
    assert mask_classification_loss(worse, target).item() > 1


def test_bf16_predictions_give_a_float32_loss() -> None:
    prediction, target = make_prediction(), make_target()
    rounded = {
        key: [{k: v.bfloat16() for k, v in output.items()} for output in value]
        if key == "auxiliary"
        else value.bfloat16()
        for key, value in prediction.items()
    }
    loss = mask_classification_loss(rounded, target)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask_classification_loss(rounded, target), loss)
    assert loss.item() == pytest.approx(mask_classification_loss(prediction, target).item(), rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_loss(value: float) -> None:
    """Where training looks for it, instead of ending as an error of the matching."""
    prediction, target = make_prediction(), make_target()
    with torch.no_grad():
        prediction["mask_logits"][0] = value
    assert not mask_classification_loss(prediction, target).isfinite()
