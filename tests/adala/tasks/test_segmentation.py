"""Segmentation: metrics against scikit-learn and torchmetrics, a loss however a batch is cut, ways to predict."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from sklearn.metrics import accuracy_score, jaccard_score
from tiny_teacher import build_tiny_teacher
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from adala.data import View
from adala.students import linearize
from adala.tasks import resolve_task

Segmentation = resolve_task("segmentation")
CLASSES, IGNORED = 5, 255
VIEW = View((16, 16), (0.5,) * 3, (0.5,) * 3, (4, 4))


def case(name: str, images: int = 7) -> tuple[Tensor, Tensor]:
    """Predicted and true masks (7, 6, 9) of which about half agree, and a fifth is ignored."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (images, 6, 9), generator=generator)
    decision = torch.where(
        torch.rand(target.shape, generator=generator) < 0.5,
        target,
        torch.randint(CLASSES, target.shape, generator=generator),
    )
    if name == "absent from both":
        target, decision = target.clamp(max=2), decision.clamp(max=2)
    if name == "absent from the masks":
        target = target.clamp(max=2)
    if name == "never predicted":
        decision = decision.clamp(max=2)
    if name == "one class":
        target, decision = torch.full_like(target, 3), torch.full_like(decision, 3)
    if name == "one class in the masks":
        target = torch.full_like(target, 3)
    if name == "nothing right":
        decision = (target + 1) % CLASSES
    ignored = torch.rand(target.shape, generator=generator) < 0.2
    if name == "predicted where ignored":  # a class that is found nowhere else
        target, decision = target.clamp(max=3), decision.clamp(max=3)
        decision[ignored] = 4
    if name == "images without labels":
        ignored[:3] = True
    return decision, target.masked_fill(ignored, IGNORED) if name != "nothing ignored" else target


CASES = [
    "random",
    "absent from both",
    "absent from the masks",
    "never predicted",
    "one class",
    "one class in the masks",
    "nothing right",
    "predicted where ignored",
    "images without labels",
    "nothing ignored",
]


def expected(decision: Tensor, target: Tensor) -> dict[str, float]:
    known = (target != IGNORED).numpy()
    truth, found = target.numpy()[known], decision.numpy()[known]
    occurring = np.union1d(truth, found)
    iou = jaccard_score(truth, found, labels=occurring, average="macro", zero_division=0)
    return {"miou": 100 * iou, "pixel_accuracy": 100 * accuracy_score(truth, found)}


def computed(decision: Tensor, target: Tensor, cuts: tuple[int, ...] = (1, 5, 7)) -> dict[str, float]:
    metrics = Segmentation(num_classes=CLASSES).build_metrics()
    for first, last in zip((0, *cuts), cuts, strict=False):
        for metric in metrics.values():
            metric.update(decision[first:last], target[first:last])
    return {name: metric.compute().item() for name, metric in metrics.items()}


@pytest.mark.parametrize("name", CASES)
def test_metrics_agree_with_scikit_learn(name: str) -> None:
    """Over batches of one, four and two images."""
    found = computed(*case(name))
    assert found == pytest.approx(expected(*case(name)), rel=1e-6)
    assert next(iter(found)) == Segmentation.score == "miou"


def test_metrics_agree_with_torchmetrics() -> None:
    decision, target = case("random")
    shape = {"num_classes": CLASSES, "ignore_index": IGNORED}
    found = computed(decision, target)
    assert found["miou"] == pytest.approx(100 * multiclass_jaccard_index(decision, target, **shape).item(), rel=1e-6)
    accuracy = multiclass_accuracy(decision, target, **shape, average="micro")
    assert found["pixel_accuracy"] == pytest.approx(100 * accuracy.item(), rel=1e-6)


def test_metrics_take_images_of_any_size() -> None:
    """As whole images come, one by one."""
    decision, target = case("random", 2)
    metric = Segmentation(num_classes=CLASSES).build_metrics()["miou"]
    for part in (slice(0, 2), slice(2, 9)):
        metric.update(decision[:, :, part], target[:, :, part])
    assert metric.compute().item() == pytest.approx(computed(decision, target, (2,))["miou"], rel=1e-6)


@pytest.mark.parametrize("ignore_index", [5, 254, 1000])
def test_any_number_above_the_classes_may_be_ignored(ignore_index: int) -> None:
    decision, target = case("random")
    metrics = Segmentation(num_classes=CLASSES, mask={"ignore_index": ignore_index}).build_metrics()
    for metric in metrics.values():
        metric.update(decision, target.masked_fill(target == IGNORED, ignore_index))
    assert {name: metric.compute().item() for name, metric in metrics.items()} == computed(decision, target)


def test_large_sums_are_exact() -> None:
    """Of 2^25 pixels and one more, float32 would lose the one."""
    metric = Segmentation(num_classes=2).build_metrics()["pixel_accuracy"]
    metric.update(torch.ones(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64))
    metric.confmat[0, 0] += 2**25
    assert metric.compute().item() == 100 * 2**25 / (2**25 + 1) < 100


NOTHING = "not one pixel of the held-out masks is labelled"


def test_of_masks_without_a_labelled_pixel_there_is_no_score() -> None:
    ignored = torch.full((2, 4, 4), IGNORED)
    metric = Segmentation(num_classes=CLASSES).build_metrics()["miou"]
    metric.update(torch.zeros_like(ignored), ignored)
    with pytest.raises(ValueError, match=NOTHING):
        metric.compute()


def metrics_of_own_part(name: str, first: int) -> dict[str, float] | str:
    import torch.distributed as dist

    from adala.distributed import SharedError

    decision, target = case(name)
    if name == "nothing":
        target = torch.full_like(target, IGNORED)
    own = slice(0, first) if dist.get_rank() == 0 else slice(first, len(target))
    try:
        return computed(decision[own], target[own], (len(target[own]),) if len(target[own]) else ())
    except SharedError as error:
        return str(error)


@pytest.mark.parametrize(("name", "first"), [("random", 1), ("images without labels", 3), ("never predicted", 0)])
def test_metrics_are_those_of_all_ranks_pixels(name: str, first: int) -> None:
    """One image of seven on rank 0; three on rank 0 of which nothing is known; none on rank 0."""
    for found in on_ranks(2, metrics_of_own_part, name, first):
        assert found == pytest.approx(expected(*case(name)), rel=1e-6)


def test_all_ranks_find_together_that_nothing_is_labelled() -> None:
    """With an error that is said once."""
    assert all(said.startswith(NOTHING) for said in on_ranks(2, metrics_of_own_part, "nothing", 2))


def logits_and_masks() -> tuple[Tensor, Tensor]:
    """(8, 5, 3, 4) and masks (8, 12, 16), of which between nothing and everything is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, CLASSES, 3, 4, generator=generator)
    target = torch.randint(CLASSES, (8, 12, 16), generator=generator)
    for image in range(3):
        target[image, : 3 * image] = IGNORED
    target[4:6] = IGNORED
    target[6:, 1:] = IGNORED
    return logits, target


def test_the_loss_is_over_all_pixels_also_those_ignored() -> None:
    task, (logits, target) = Segmentation(num_classes=CLASSES), logits_and_masks()
    pixels = F.interpolate(logits.double(), (12, 16), mode="bilinear", align_corners=False)
    log_probability = pixels - pixels.exp().sum(1, keepdim=True).log()
    total = 0.0
    for image, row, column in (target != IGNORED).nonzero().tolist():
        total -= log_probability[image, target[image, row, column], row, column].item()
    for training in (True, False):
        assert task.loss(logits, target, training).item() == pytest.approx(total / target.numel(), rel=1e-5)
    assert task.loss(logits.bfloat16(), target, True).dtype == torch.float32
    other = Segmentation(num_classes=CLASSES, mask={"ignore_index": 9})
    renamed = target.masked_fill(target == IGNORED, 9)
    assert torch.equal(other.loss(logits, renamed, True), task.loss(logits, target, True))


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(micro_batches: int) -> None:
    """Although micro-batches have from none to all of their pixels labelled: every labelled pixel counts alike."""
    task, (logits, target) = Segmentation(num_classes=CLASSES), logits_and_masks()
    shares = [(part != IGNORED).float().mean().item() for part in target.chunk(micro_batches)]
    assert max(shares) - min(shares) > 0.2
    logits.requires_grad_()
    loss = task.loss(logits, target, True)
    parts = zip(logits.chunk(micro_batches), target.chunk(micro_batches), strict=True)
    losses = torch.stack([task.loss(*part, True) for part in parts])
    torch.testing.assert_close(losses.mean(), loss)
    (whole,), (cut,) = torch.autograd.grad(loss, logits), torch.autograd.grad(losses.mean(), logits)
    torch.testing.assert_close(cut, whole)
    assert cut[4].eq(0).all() and cut[3].abs().max() > 0


@pytest.mark.parametrize("value", [0.0, 1e30])
def test_a_batch_of_which_nothing_is_known_costs_nothing(value: float) -> None:
    """Not NaN, as a mean over no pixels is; whatever the logits are."""
    task, logits = Segmentation(num_classes=CLASSES), torch.full((2, CLASSES, 3, 4), value, requires_grad=True)
    target = torch.full((2, 12, 16), IGNORED)
    loss = task.loss(logits, target, True)
    loss.backward()
    assert loss.item() == 0.0 and logits.grad.eq(0).all()
    metrics = task.batch_metrics(logits.detach(), target)
    assert {name: metric.item() for name, metric in metrics.items()} == {"pixel_accuracy": 0.0, "labelled": 0.0}


def test_metrics_of_a_batch_are_about_labelled_pixels() -> None:
    task, (logits, target) = Segmentation(num_classes=CLASSES), logits_and_masks()
    decision = task.decision(logits, (12, 16))
    known = target != IGNORED
    metrics = task.batch_metrics(logits, target)
    assert metrics["labelled"].item() == pytest.approx(known.float().mean().item())
    assert metrics["pixel_accuracy"].item() == pytest.approx(100 * (decision == target)[known].float().mean().item())
    assert not any(metric.requires_grad for metric in task.batch_metrics(logits.requires_grad_(), target).values())


def predictions() -> Iterator:
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(3, CLASSES, 4, 4, generator=generator)
    classes, masks = (torch.randn(3, 6, *shape, generator=generator) for shape in ((CLASSES + 1,), (8, 8)))
    # The last layer's prediction counts, not what came before it.
    yield {
        "class_logits": classes,
        "mask_logits": masks,
        "auxiliary": [{"class_logits": -classes, "mask_logits": -masks}],
    }


@pytest.mark.parametrize("prediction", list(predictions()), ids=["dense", "masks"])
def test_a_decision_is_the_class_of_the_largest_score(prediction) -> None:
    task = Segmentation(num_classes=CLASSES)
    scores, decision = task.scores(prediction, (16, 12)), task.decision(prediction, (16, 12))
    assert scores.shape == (3, CLASSES, 16, 12)
    assert decision.dtype == torch.int64 and torch.equal(decision, scores.argmax(1))


def test_of_equal_scores_the_first_class_is_taken() -> None:
    assert Segmentation(num_classes=3).decision(torch.zeros(1, 3, 2, 2), (4, 4)).eq(0).all()


class Model:
    """A tiny student with a linear head, which notes the sizes that it sees."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student = linearize(build_tiny_teacher(), "linear").eval()
        self.head = Segmentation(num_classes=CLASSES).build_head(self.student).eval()
        torch.nn.init.normal_(self.head.classifier.weight)
        self.seen: list[tuple[int, ...]] = []

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return self.head(self.student(images), self.student.token_layout(images))


def test_crop_predicts_on_what_it_is_given() -> None:
    task, model = Segmentation(num_classes=CLASSES), Model()
    images = torch.randn(2, 3, 16, 16)
    assert task.prepare_scoring(VIEW) is None
    found = task.predict(model, images, (16, 16), VIEW)
    assert found.shape == (2, 16, 16) and torch.equal(found, task.decision(model(images), (16, 16)))
    assert len(found.unique()) > 1


@pytest.mark.parametrize("target_size", [(24, 16), (37, 25), (11, 8)], ids=str)
def test_whole_predicts_once_at_the_size_of_the_mask(target_size: tuple[int, int]) -> None:
    task, model = Segmentation(num_classes=CLASSES, inference="whole"), Model()
    images = torch.randn(1, 3, 24, 16)
    found = task.predict(model, images, target_size, VIEW)
    assert model.seen == [(1, 3, 24, 16)]
    logits = F.interpolate(model(images), target_size, mode="bilinear", align_corners=False)
    assert torch.equal(found, logits.argmax(1)) and len(found.unique()) > 1


@pytest.mark.parametrize("target_size", [(24, 16), (37, 25), (11, 8)], ids=str)
def test_slide_averages_the_scores_of_windows(target_size: tuple[int, int]) -> None:
    """Three windows of 16 x 16, four pixels apart, over 24 x 16."""
    task, model = Segmentation(num_classes=CLASSES, inference="slide", window_overlap=0.75), Model()
    images = torch.randn(1, 3, 24, 16)
    found = task.predict(model, images, target_size, VIEW)
    assert model.seen == [(1, 3, 16, 16)] * 3
    total, count = torch.zeros(1, CLASSES, 24, 16), torch.zeros(24, 1)
    for top in (0, 4, 8):
        window = model(images[:, :, top : top + 16])
        total[:, :, top : top + 16] += F.interpolate(window, (16, 16), mode="bilinear", align_corners=False)
        count[top : top + 16] += 1
    scores = F.interpolate(total / count, target_size, mode="bilinear", align_corners=False)
    assert torch.equal(found, scores.argmax(1)) and len(found.unique()) > 1


@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_mask_heads_predict_in_every_way(inference: str) -> None:
    """Over what is smaller than the window, too; of a dictionary of tensors, image by image."""
    task = Segmentation(num_classes=CLASSES, head="pmt", head_options={"num_queries": 4, "num_blocks": 1})
    scoring = Segmentation(num_classes=CLASSES, inference=inference)
    model = Model()
    model.head = task.build_head(model.student).eval()
    images = torch.randn(2, 3, 12, 8)
    found = scoring.predict(model, images, (13, 9), VIEW)
    assert found.shape == (2, 13, 9) and found.dtype == torch.int64
    alone = scoring.predict(model, images[1:], (13, 9), VIEW)
    assert torch.equal(found[1:], alone)


def test_a_mask_reads_as_the_options_say() -> None:
    task = Segmentation(num_classes=CLASSES)
    known, ignored = np.array([[0, 4], [255, 1]]), np.full((2, 2), 255)
    assert task.is_labelled(known) and not task.is_labelled(ignored)
    assert not Segmentation(num_classes=CLASSES, mask={"ignore_index": 9}).is_labelled(np.full((2, 2), 9))
    target = task.target({"mask": torch.from_numpy(known).int()}, torch.device("cpu"))
    assert target.dtype == torch.int64 and target.tolist() == known.tolist()
    with pytest.raises(ValueError, match="segmentation needs masks: the batch has none"):
        task.target({}, torch.device("cpu"))
