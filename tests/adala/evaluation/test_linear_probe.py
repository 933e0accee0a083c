"""The probe solves its problem: the conditions of its optimum hold, which know nothing of how it was found."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from adala.evaluation import Features, fit_probe
from adala.evaluation.linear_probe import linear_probe_top1

L2 = 0.02


def overlapping(count: int, seed: int) -> Features:
    """Three classes that no line tells apart entirely, in features of very unequal means and scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    noise = torch.randn(count, 4, generator=generator)
    values = F.one_hot(labels, 4) * 1.5 + noise
    return Features(values * torch.tensor([1.0, 20.0, 0.1, 3.0]) + torch.tensor([100.0, -30.0, 5.0, 0.0]), labels)


def test_the_probe_is_at_the_optimum_of_its_problem() -> None:
    """Zero gradient: of the bias, predicted frequencies are the labels'; of the weights, the penalty balances."""
    train = overlapping(300, seed=0)
    weight, bias = fit_probe(train, 3, L2)
    assert weight.shape == (3, 4) and bias.shape == (3,)
    predicted = F.linear(train.values, weight, bias).softmax(-1)
    excess = predicted - F.one_hot(train.labels, 3)
    torch.testing.assert_close(excess.mean(0), torch.zeros(3), atol=2e-4, rtol=0)
    standardised = (train.values - train.values.mean(0)) / train.values.std(0)
    penalty = L2 * weight * train.values.std(0)
    torch.testing.assert_close(-excess.T @ standardised / 300, penalty, atol=2e-4, rtol=0)
    assert penalty.abs().max() > 0.01


def test_a_feature_that_never_changes_is_no_division_by_zero() -> None:
    train = overlapping(60, seed=0)
    train.values[:, 2] = 7.0
    weight, bias = fit_probe(train, 3, L2)
    assert weight.isfinite().all() and bias.isfinite().all()
    torch.testing.assert_close(
        F.linear(train.values, weight, bias).softmax(-1).mean(0),
        torch.bincount(train.labels, minlength=3) / 60,
        atol=2e-3,
        rtol=0,
    )


def test_the_score_is_the_share_of_right_held_out_samples() -> None:
    train, held_out = overlapping(300, seed=0), overlapping(200, seed=1)
    prediction = F.linear(held_out.values, *fit_probe(train, 3, L2))
    expected = 100 * multiclass_accuracy(prediction, held_out.labels, num_classes=3, average="micro").item()
    assert 60 < expected < 95, "neither chance nor trivial"
    assert linear_probe_top1(train, held_out, L2) == pytest.approx(expected)


def test_labels_that_were_not_trained_on_are_wrong() -> None:
    values = torch.tensor([[-1.0], [1.0]]).repeat(10, 1)
    train = Features(values, torch.tensor([0, 1]).repeat(10))
    assert linear_probe_top1(train, Features(values[:4], torch.tensor([0, 1, 0, 2]))) == 75.0


@pytest.mark.parametrize(("labels", "found"), [([0, 1, 4], 4), ([0, -1, 1], -1)], ids=["beyond", "negative"])
def test_labels_that_are_no_classes_are_named(labels: list[int], found: int) -> None:
    features = Features(torch.randn(3, 4), torch.tensor(labels))
    with pytest.raises(ValueError, match=f"the label {found} is among .* num_classes 3 .* raise stage3.num_classes"):
        fit_probe(features, num_classes=3)
