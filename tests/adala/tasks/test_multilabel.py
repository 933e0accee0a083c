"""Multi-label classification against scikit-learn, and how its labels are read."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from adala.data import View
from adala.data.images import DecodeError
from adala.tasks import resolve_task

Multilabel = resolve_task("multilabel")
CLASSES = 6
CUTS = (1, 17, 40)


def case(name: str) -> tuple[Tensor, Tensor]:
    """Logits and labels (40, 6) of zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, CLASSES, generator=generator)
    labels = (torch.rand(40, CLASSES, generator=generator) < 0.3).float()
    # A classifier that is worth something.
    logits += 2 * labels
    if name == "ties":
        logits = (logits / 3).round()
    if name == "absent":
        labels[:, [1, 4]] = 0
    if name == "one class":
        labels[:, 1:] = 0
    if name == "all of a class":
        labels[:, 2] = 1
    if name == "from 0 to 1":  # which torchmetrics would take for probabilities
        logits = logits.sigmoid()
    if name == "saturated":  # whose sigmoids in float32 are all 1
        logits = logits.abs() + 17
    return logits, labels


def expected(logits: Tensor, labels: Tensor) -> dict[str, float]:
    truth, scores = labels.numpy(), logits.double().numpy()
    occurring = [k for k in range(CLASSES) if truth[:, k].any()]
    precision = [average_precision_score(truth[:, k], scores[:, k]) for k in occurring]
    return {"map": 100 * np.mean(precision), "micro_f1": 100 * f1_score(truth, scores > 0, average="micro")}


def computed(logits: Tensor, labels: Tensor, cuts: tuple[int, ...] = CUTS) -> dict[str, float]:
    task = Multilabel(num_classes=CLASSES)
    metrics = task.build_metrics()
    for first, last in zip((0, *cuts), cuts, strict=False):
        for metric in metrics.values():
            metric.update(task.decision(logits[first:last], (16, 16)), labels[first:last])
    return {name: metric.compute().item() for name, metric in metrics.items()}


@pytest.mark.parametrize(
    "name", ["random", "ties", "absent", "one class", "all of a class", "from 0 to 1", "saturated"]
)
def test_metrics_agree_with_scikit_learn(name: str) -> None:
    """Over batches of 1, 16 and 23 images."""
    logits, labels = case(name)
    found = computed(logits, labels)
    assert found == pytest.approx(expected(logits, labels), rel=1e-5) and 0 < found["map"] <= 100


def test_without_any_positive_both_are_0() -> None:
    assert computed(case("random")[0] - 20, torch.zeros(40, CLASSES)) == {"map": 0.0, "micro_f1": 0.0}


def metrics_of_own_part(first: int) -> dict[str, float]:
    import torch.distributed as dist

    logits, labels = (part[:first] if dist.get_rank() == 0 else part[first:] for part in case("ties"))
    return computed(logits, labels, (len(logits),) if len(logits) else ())


@pytest.mark.parametrize("first", [3, 0])
def test_metrics_are_those_of_all_ranks_images(first: int) -> None:
    """Three of 40 images on rank 0, or none."""
    for found in on_ranks(2, metrics_of_own_part, first):
        assert found == pytest.approx(expected(*case("ties")), rel=1e-5)


def test_the_loss_is_the_mean_over_images_and_labels() -> None:
    task, (logits, labels) = Multilabel(num_classes=CLASSES), case("random")
    share = logits.double().sigmoid()
    by_hand = -(labels * share.log() + (1 - labels) * (1 - share).log()).mean()
    for training in (False, True):
        loss = task.loss(logits, labels, training)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    halves = torch.stack([task.loss(*parts, True) for parts in zip(logits.chunk(2), labels.chunk(2), strict=True)])
    torch.testing.assert_close(halves.mean(), task.loss(logits, labels, True))
    assert task.loss(logits.bfloat16(), labels, True).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"json": [3, 0, 3]}, (0, 3)),
        ({"json": {"labels": ["dog"], "caption": "5"}}, (1,)),
        ({"json": []}, ()),
        ({"cls": "2"}, (2,)),
        ({"txt": "cat, dog"}, (0, 1)),
        ({"labels": ""}, ()),
    ],
    ids=str,
)
def test_labels_become_a_row_of_zeros_and_ones(fields: dict[str, Any], labels: tuple[int, ...]) -> None:
    task = Multilabel(num_classes=4)
    content = {
        "png": b"",
        **{key: json.dumps(v).encode() if key == "json" else v.encode() for key, v in fields.items()},
    }
    found = task.read_target(content, ("cat", "dog", "cow", "owl"), (8, 8))
    assert found == labels
    preparation = task.prepare(View((8, 8), (0.5,) * 3, (0.5,) * 3, (4, 4)), None)
    from PIL import Image

    tensors = preparation.transform(Image.new("RGB", (9, 8)), found)
    assert tensors["image"].shape == (3, 8, 8)
    assert tensors["labels"].tolist() == [float(number in labels) for number in range(4)]
    batch = {"labels": tensors["labels"][None]}
    assert task.target(batch, torch.device("cpu")).dtype == torch.float32


def test_labels_that_cannot_be() -> None:
    task = Multilabel(num_classes=4)
    with pytest.raises(ValueError, match=r"it has the label 4, but stage3.task.num_classes is 4: labels are 0 to 3"):
        task.read_target({"json": b"[4, 1]"}, None, (8, 8))
    with pytest.raises(DecodeError, match="it has no labels"):
        task.read_target({"png": b""}, None, (8, 8))
    with pytest.raises(ValueError, match="multilabel needs labels: the batch has none"):
        task.target({}, torch.device("cpu"))
