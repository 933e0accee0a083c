"""The dense probe rate by rate against plain torch; confusion and mean IoU against torchmetrics and scikit-learn."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix as of_scikit_learn
from torch import nn
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from adala.evaluation import (
    DenseFeatures,
    DenseSettings,
    colour_table_confusion,
    confusion_matrix,
    dense_confusion,
    dense_probe,
    fit_dense_probe,
    majority_confusion,
    mean_iou,
)
from adala.evaluation.dense_probe import DenseHead, fit_dense_heads, input_statistics, thinned
from adala.evaluation.linear_probe import draw_batches, split_stratified

IGNORED = 255


def random_masks(seed: int, classes: list[int], ignored: float = 0.2, size: tuple[int, ...] = (4, 9, 11)):
    """Predictions and targets of ``classes``, some targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(classes)[torch.randint(len(classes), (2, *size), generator=generator)]
    prediction, target = drawn.unbind()
    target[torch.rand(size, generator=generator) < ignored] = IGNORED
    return prediction, target


CASES = {
    "all classes": [0, 1, 2, 3, 4],
    "absent classes": [0, 3],
    "one class": [2],
}


@pytest.mark.parametrize("classes", CASES.values(), ids=CASES)
def test_confusion_and_mean_iou_are_those_of_torchmetrics(classes: list[int]) -> None:
    prediction, target = random_masks(0, classes)
    found = confusion_matrix(prediction, target.to(torch.uint8), 5, IGNORED)
    assert found.dtype == torch.int64
    assert found.equal(MulticlassConfusionMatrix(5, ignore_index=IGNORED)(prediction, target))
    kept = target != IGNORED
    assert found.tolist() == of_scikit_learn(target[kept], prediction[kept], labels=range(5)).tolist()
    mean, per_class = mean_iou(found)
    reference = {
        average: MulticlassJaccardIndex(5, average=average, ignore_index=IGNORED)(prediction, target)
        for average in ("macro", "none")
    }
    assert mean == pytest.approx(100 * reference["macro"].item(), abs=1e-4)
    occurring = per_class.isfinite()
    assert occurring.tolist() == [label in classes for label in range(5)]
    torch.testing.assert_close(per_class[occurring].float(), 100 * reference["none"][occurring])


def test_a_class_that_is_only_predicted_counts_as_missed() -> None:
    mean, per_class = mean_iou(confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, IGNORED]), 3))
    assert mean == 25.0 and per_class.tolist()[:2] == [50.0, 0.0] and per_class[2].isnan()


def test_a_class_may_be_what_is_ignored() -> None:
    prediction, target = random_masks(1, [0, 1, 2], ignored=0)
    found = confusion_matrix(prediction, target, 3, ignore_index=0)
    assert found.equal(MulticlassConfusionMatrix(3, ignore_index=0)(prediction, target))


def test_no_pixel_and_unknown_classes_are_named() -> None:
    with pytest.raises(ValueError, match="no pixel at all"):
        mean_iou(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="the class 3 is in a mask, where classes are 0 to 2, and 255 is ignored"):
        confusion_matrix(torch.tensor([0, 0]), torch.tensor([3, 1], dtype=torch.uint8), 3)


CLASSES = 3


def scenes(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[DenseFeatures, torch.Tensor]:
    """Patches (count, 4, 5, 6) that tell the halves of their masks (16, 20) apart."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(CLASSES, (count, 2), generator=generator)
    halves = drawn.repeat_interleave(torch.tensor([8, 12]), dim=1)
    masks = halves[:, None].expand(count, 16, 20).clone().to(torch.uint8)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = IGNORED
    patches = torch.randn(count, 4, 5, 6, generator=generator)
    patches += 2 * F.one_hot(halves[:, 2::4], 6)[:, None]
    pooled = torch.randn(count, 4, generator=generator) * 10 + 100
    return DenseFeatures(patches.to(dtype), pooled.to(dtype)), masks


SETTINGS = DenseSettings(CLASSES, rates=(1e-3, 0.1, 1e-2), epochs=5, batch_size=4, fit_scale=2, seed=1)


class Plain(nn.Module):
    """The head as it is usually written: batch norm and a convolution on what is concatenated at each patch."""

    def __init__(self, features: DenseFeatures, rows: torch.Tensor):
        super().__init__()
        width = features.patches.shape[-1] + features.pooled.shape[-1]
        self.norm, self.conv = (
            nn.BatchNorm2d(width, affine=False, eps=1e-12, momentum=None),
            nn.Conv2d(width, CLASSES, 1),
        )
        nn.init.zeros_(self.conv.weight), nn.init.zeros_(self.conv.bias)
        pixels = len(rows) * features.patches[0, ..., 0].numel()
        self.norm(self.inputs(features.patches[rows], features.pooled[rows]))
        # torch keeps the variance with a denominator of n - 1, and normalises by n while it trains.
        self.norm.running_var *= (pixels - 1) / pixels
        self.norm.eval()

    def inputs(self, patches: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        beside = pooled[:, None, None].expand(*patches.shape[:3], -1)
        return torch.cat([patches, beside], -1).permute(0, 3, 1, 2)

    def forward(self, patches: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(self.inputs(patches, pooled)))


def trained_alone(features: DenseFeatures, masks: torch.Tensor, rows: torch.Tensor, rate: float) -> Plain:
    head = Plain(features, rows)
    batches = list(draw_batches(rows, SETTINGS.batch_size, SETTINGS.epochs, SETTINGS.seed))
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=SETTINGS.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches), eta_min=0)
    for batch in batches:
        logits = head(features.patches[batch], features.pooled[batch])
        # Half the masks' size: the pixel beyond the middle of every two.
        target = masks[batch, 1::2, 1::2].long()
        optimizer.zero_grad()
        resized = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
        F.cross_entropy(resized, target, ignore_index=IGNORED).backward()
        optimizer.step()
        schedule.step()
    return head.requires_grad_(False)


def test_each_rate_of_a_grid_is_as_if_it_were_trained_alone() -> None:
    features, masks = scenes(14, seed=0)
    rows = torch.arange(2, 14)
    heads = fit_dense_heads(features, masks, rows, SETTINGS.rates, SETTINGS)
    assert list(heads) == list(SETTINGS.rates)
    for rate, head in heads.items():
        plain = trained_alone(features, masks, rows, rate)
        torch.testing.assert_close(head.mean, plain.norm.running_mean, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(head.weight.detach(), plain.conv.weight[..., 0, 0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(head.bias.detach(), plain.conv.bias, atol=1e-4, rtol=1e-3)
        logits = head(features.patches, features.pooled).detach()
        torch.testing.assert_close(logits, plain(features.patches, features.pooled), atol=1e-3, rtol=1e-3)


def iou_by_torchmetrics(head: nn.Module, features: DenseFeatures, masks: torch.Tensor, rows: torch.Tensor) -> float:
    logits = head(features.patches[rows].float(), features.pooled[rows].float())
    resized = F.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False)
    metric = MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=IGNORED)
    return 100 * metric(resized.argmax(1), masks[rows].long()).item()


def test_the_rate_is_chosen_on_held_training_images_and_fitted_again_on_all() -> None:
    features, masks = scenes(30, seed=0)
    head = fit_dense_probe(features, masks, SETTINGS)
    fitted, held = split_stratified(torch.empty(30, 0), 0.1, SETTINGS.seed)
    assert len(held) == 3
    on_part = fit_dense_heads(features, masks, fitted, SETTINGS.rates, SETTINGS)
    for rate, score in head.scores.items():
        assert score == pytest.approx(iou_by_torchmetrics(on_part[rate], features, masks, held), abs=1e-3)
    best = max(head.scores.values())
    assert head.rate == min(rate for rate, score in head.scores.items() if score == best)
    (on_all,) = fit_dense_heads(features, masks, torch.arange(30), [head.rate], SETTINGS).values()
    assert head.weight.equal(on_all.weight) and not head.weight.requires_grad


@pytest.mark.parametrize("chunk", [2**26, 3 * 16 * 20 * 2], ids=["one chunk", "many chunks"])
def test_held_out_images_are_scored_at_the_masks_own_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_probe, "CHUNK_ELEMENTS", chunk)
    (features, masks), (others, their_masks) = scenes(30, seed=0), scenes(9, seed=1)
    head = fit_dense_probe(features, masks, DenseSettings(CLASSES, rates=(0.1,), epochs=10, batch_size=4))
    assert head.rate == 0.1 and head.scores == {}
    confusion = dense_confusion(head, others, their_masks)
    assert confusion.sum() == (their_masks != IGNORED).sum()
    score = mean_iou(confusion)[0]
    assert score == pytest.approx(iou_by_torchmetrics(head, others, their_masks, torch.arange(9)), abs=1e-3)
    assert 60 < score < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_features_may_be_of_half_precision(dtype: torch.dtype) -> None:
    features, masks = scenes(10, seed=0, dtype=dtype)
    widened = DenseFeatures(features.patches.float(), features.pooled.float())
    settings = DenseSettings(CLASSES, rates=(0.1,), epochs=1, batch_size=4)
    assert fit_dense_probe(features, masks, settings).weight.equal(fit_dense_probe(widened, masks, settings).weight)


def test_a_head_may_see_patches_alone() -> None:
    features, masks = scenes(10, seed=0)
    alone = DenseFeatures(features.patches)
    head = fit_dense_probe(alone, masks, DenseSettings(CLASSES, rates=(0.1,), epochs=10, batch_size=4))
    assert head.weight.shape == (CLASSES, 6)
    assert mean_iou(dense_confusion(head, alone, masks))[0] > 60


def test_a_feature_that_never_changes_has_no_weight() -> None:
    features, masks = scenes(10, seed=0)
    features.patches[..., 2] = 7.0
    head = fit_dense_probe(features, masks, DenseSettings(CLASSES, rates=(0.1,), epochs=2, batch_size=4))
    assert head.weight[:, 2].abs().max() == 0 and head.weight.isfinite().all()


def test_statistics_do_not_depend_on_how_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = scenes(10, seed=0)
    rows = torch.tensor([0, 3, 4, 8, 9])
    whole = input_statistics(features, rows)
    monkeypatch.setattr(dense_probe, "READ_AT_ONCE", 2)
    for parts, once in zip(input_statistics(features, rows), whole, strict=True):
        torch.testing.assert_close(parts, once)
    torch.testing.assert_close(whole[1][:6], features.patches[rows].flatten(0, 2).std(0, correction=0))
    torch.testing.assert_close(whole[1][6:], features.pooled[rows].std(0, correction=0), rtol=1e-4, atol=1e-4)


def test_a_batch_without_a_labelled_pixel_teaches_nothing() -> None:
    features, masks = scenes(8, seed=0)
    masks[:6] = IGNORED
    head = fit_dense_probe(features, masks, DenseSettings(CLASSES, rates=(0.1,), epochs=3, batch_size=1))
    assert head.weight.isfinite().all() and head.weight.abs().max() > 0


def test_masks_are_thinned_to_what_lies_nearest_to_the_centres() -> None:
    mask = torch.arange(36).view(1, 6, 6)
    assert thinned(mask, (2, 2), 1).tolist() == [[[7, 10], [25, 28]]]
    assert thinned(mask, (2, 3), 100).equal(mask), "never to more pixels than there are"
    assert thinned(mask, (1, 3), 2).tolist() == [[[6, 7, 8, 9, 10, 11], [24, 25, 26, 27, 28, 29]]]


def test_rates_that_diverge_drop_out() -> None:
    features, masks = scenes(20, seed=0)
    settings = DenseSettings(CLASSES, rates=(0.1, 1e37), epochs=3, batch_size=4)
    head = fit_dense_probe(features, masks, settings)
    assert head.rate == 0.1 and head.scores[1e37] is None
    broken = DenseFeatures(features.patches * torch.nan, features.pooled)
    with pytest.raises(ValueError, match="diverges at all rates"):
        fit_dense_probe(broken, masks, settings)


def test_what_cannot_be_fitted_is_named() -> None:
    features, masks = scenes(6, seed=0)
    with pytest.raises(ValueError, match="features of 6 images and 5 masks"):
        fit_dense_probe(features, masks[:5], SETTINGS)
    with pytest.raises(ValueError, match="every pixel of the 6 training masks is 255"):
        fit_dense_probe(features, torch.full_like(masks, IGNORED), SETTINGS)
    with pytest.raises(ValueError, match="the class 2 is in a mask, where classes are 0 to 1"):
        fit_dense_probe(features, masks, DenseSettings(2))
    with pytest.raises(ValueError, match="too few to hold some back"):
        fit_dense_probe(DenseFeatures(features.patches[:1], features.pooled[:1]), masks[:1], SETTINGS)
    with pytest.raises(ValueError, match="no held-out image"):
        head = DenseHead(torch.zeros(10), torch.ones(10), 6, CLASSES)
        dense_confusion(head, DenseFeatures(features.patches[:0], features.pooled[:0]), masks[:0])
    with pytest.raises(ValueError, match="fit_scale of the dense probe is 0"):
        DenseSettings(2, fit_scale=0)


def coloured(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (3, 3, size, size) of which each class has its colours, and masks that are wrong at some pixels."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(CLASSES, (3, size, size), generator=generator)
    images = torch.randint(60, (3, 3, size, size), generator=generator) + 60 * masks[:, None]
    wrong = torch.rand(masks.shape, generator=generator)
    masks[wrong < 0.2], masks[wrong > 0.9] = 1, IGNORED
    return images.to(torch.uint8), masks


@pytest.mark.parametrize("bins", [1, 3, 16])
def test_a_colour_table_predicts_the_class_most_frequent_at_a_colour(bins: int) -> None:
    (images, masks), (others, their_masks) = coloured(0), coloured(1)
    seen, everything = {}, [0] * CLASSES

    def code(image: torch.Tensor, y: int, x: int) -> tuple[int, ...]:
        return tuple(int(value * bins / 256) for value in image[:, y, x].tolist())

    pixels = [(n, y, x) for n in range(3) for y in range(8) for x in range(8)]
    for n, y, x in pixels:
        if (label := int(masks[n, y, x])) != IGNORED:
            seen.setdefault(code(images[n], y, x), [0] * CLASSES)[label] += 1
            everything[label] += 1
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for n, y, x in pixels:
        if (label := int(their_masks[n, y, x])) != IGNORED:
            counts = seen.get(code(others[n], y, x), everything)
            expected[label, counts.index(max(counts))] += 1
    train = [(images[:2], masks[:2]), (images[2:], masks[2:])]
    found = colour_table_confusion(train, [(others, their_masks)], CLASSES, bins)
    assert found.equal(expected)
    if bins == 1:
        assert found.equal(majority_confusion([masks], [their_masks], CLASSES))
        assert (found.sum(0) > 0).sum() == 1


def test_a_colour_table_says_what_it_cannot_take() -> None:
    images, masks = coloured(0)
    with pytest.raises(ValueError, match="choose 1 to 64"):
        colour_table_confusion([(images, masks)], [(images, masks)], CLASSES, bins=65)
    with pytest.raises(ValueError, match="before normalisation"):
        colour_table_confusion([(images.float(), masks)], [], CLASSES)
    with pytest.raises(ValueError, match="no pixel to learn from"):
        colour_table_confusion([(images, torch.full_like(masks, IGNORED))], [], CLASSES)
    with pytest.raises(ValueError, match="the class 2 is in a mask"):
        colour_table_confusion([(images, masks)], [], 2)
