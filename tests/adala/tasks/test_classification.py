"""Classification against scikit-learn and torchmetrics, and against values that are known."""

import math

import numpy as np
import pytest
import torch
from ranks import on_ranks
from sklearn.metrics import top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_accuracy

from adala.tasks import Classification, Task, describe_task, read_task

LABELS = torch.tensor([0, 0, 0, 2])
# Right, right, wrong, right: three of four. Class by class it would be two thirds, none and all.
PREDICTION = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])


def test_top1_is_the_share_of_right_images_in_percent() -> None:
    task = Classification(num_classes=3)
    assert task.batch_metrics(PREDICTION, LABELS)["top1"].item() == 75.0
    (metric,) = task.build_metrics().values()
    assert list(task.build_metrics()) == [task.score] == ["top1"]
    for prediction, labels in zip(PREDICTION.split([1, 3]), LABELS.split([1, 3]), strict=True):
        metric.update(prediction, labels)
    assert metric.compute().item() == 75.0


def test_top1_agrees_with_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(200, 5, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    task = Classification(num_classes=5)
    expected = 100 * multiclass_accuracy(prediction, labels, num_classes=5, average="micro").item()
    metric = task.build_metrics()["top1"]
    metric.update(prediction, labels)
    assert metric.compute().item() == pytest.approx(expected)
    assert task.batch_metrics(prediction, labels)["top1"].item() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [range(8), (1, 6), (3,)], ids=["all", "two", "one"])
def test_top1_and_top5_agree_with_scikit_learn(labels) -> None:
    """Over batches of unequal sizes, also where most classes have no image."""
    generator = np.random.default_rng(0)
    prediction, label = generator.normal(size=(90, 8)), generator.choice(labels, 90)
    metrics = Classification(num_classes=8).build_metrics()
    assert set(metrics) == {"top1", "top5"}
    for part in (slice(0, 1), slice(1, 70), slice(70, 90)):
        for metric in metrics.values():
            metric.update(torch.from_numpy(prediction[part]), torch.from_numpy(label[part]))
    for k in (1, 5):
        expected = 100 * top_k_accuracy_score(label, prediction, k=k, labels=range(8))
        assert metrics[f"top{k}"].compute().item() == pytest.approx(expected)


@pytest.mark.parametrize(("num_classes", "names"), [(5, {"top1"}), (6, {"top1", "top5"})])
def test_of_five_classes_all_are_among_the_first_five(num_classes: int, names: set[str]) -> None:
    assert set(Classification(num_classes=num_classes).build_metrics()) == names


def test_of_equal_logits_the_first_decides() -> None:
    metrics = Classification(num_classes=6).build_metrics()
    prediction, labels = torch.zeros(2, 6), torch.tensor([0, 1])
    for metric in metrics.values():
        metric.update(prediction, labels)
    assert metrics["top1"].compute().item() == 50.0
    assert Classification(num_classes=6).batch_metrics(prediction, labels)["top1"].item() == 50.0


def top1_of_own_part(first: int) -> float:
    import torch.distributed as dist

    metric = Classification(num_classes=3).build_metrics()["top1"]
    own = slice(0, first) if dist.get_rank() == 0 else slice(first, 4)
    if len(LABELS[own]):
        metric.update(PREDICTION[own], LABELS[own])
    return metric.compute().item()


@pytest.mark.parametrize("first", [1, 0])
def test_top1_counts_images_of_all_ranks(first: int) -> None:
    """One image on rank 0, three on rank 1: the mean of both ranks' shares would be 83; or none on rank 0."""
    assert on_ranks(2, top1_of_own_part, first) == [75.0, 75.0]


def test_labels_are_smoothed_in_training_only() -> None:
    task = Classification(num_classes=3, label_smoothing=0.3)
    log_probability = PREDICTION - PREDICTION.exp().sum(-1, keepdim=True).log()
    plain = -log_probability[torch.arange(4), LABELS].mean()
    smoothed = 0.7 * plain - 0.3 * log_probability.mean()
    torch.testing.assert_close(task.loss(PREDICTION, LABELS, training=False), plain)
    torch.testing.assert_close(task.loss(PREDICTION, LABELS, training=True), smoothed)
    assert abs(smoothed.item() - plain.item()) > 0.1
    assert Classification(num_classes=3).loss(PREDICTION, LABELS, training=True).item() == pytest.approx(plain.item())


def test_the_loss_of_bf16_predictions_is_computed_in_float32() -> None:
    prediction = torch.zeros(1, 1000, dtype=torch.bfloat16)
    loss = Classification(num_classes=1000).loss(prediction, torch.tensor([3]), training=True)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_a_task_survives_its_description() -> None:
    task = Classification(num_classes=3, pooling="patch", label_smoothing=0.3)
    assert read_task(describe_task(task)) == task
    with pytest.raises(ValueError, match="unknown task 'detection': known are classification"):
        read_task({"name": "detection"})
    with pytest.raises(ValueError, match=r"task classification: .*num_boxes"):
        read_task({"name": "classification", "num_classes": 3, "num_boxes": 2})


@pytest.mark.parametrize("pooling", ["cls", "patch", "cls_patch"])
def test_the_head_is_built_as_the_task_says(teacher, pooling: str) -> None:
    head = Classification(num_classes=5, pooling=pooling).build_head(teacher)
    assert head.linear.out_features == 5 and head.linear.in_features == (64 if pooling == "cls_patch" else 32)
    assert (head.pooling, head.num_prefix_tokens, head.has_class_token) == (pooling, 1, True)


def test_a_task_without_metrics_of_a_batch_logs_none_and_says_what_it_lacks(teacher) -> None:
    task = Task()
    assert task.batch_metrics(PREDICTION, LABELS) == {}
    for call in (
        lambda: task.build_head(teacher),
        lambda: task.target({}, torch.device("cpu")),
        lambda: task.loss(PREDICTION, LABELS, True),
        task.build_metrics,
    ):
        with pytest.raises(NotImplementedError, match="Task does not implement"):
            call()
