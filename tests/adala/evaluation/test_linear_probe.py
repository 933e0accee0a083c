"""The probe solves its problem: by the conditions of its optimum, by scikit-learn, and rate by rate by plain torch."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, top_k_accuracy_score
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from adala.evaluation import Features, LbfgsSettings, SgdSettings, fit_probe, probe
from adala.evaluation.linear_probe import draw_batches, fit_grid, rank_rates, split_stratified, top_k

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
    assert probe(train, held_out, LbfgsSettings(L2)).top1 == pytest.approx(expected)


def test_labels_that_were_not_trained_on_are_wrong() -> None:
    values = torch.tensor([[-1.0], [1.0]]).repeat(10, 1)
    train = Features(values, torch.tensor([0, 1]).repeat(10))
    assert probe(train, Features(values[:4], torch.tensor([0, 1, 0, 2])), LbfgsSettings()).top1 == 75.0


@pytest.mark.parametrize(("labels", "found"), [([0, 1, 4], 4), ([0, -1, 1], -1)], ids=["beyond", "negative"])
def test_labels_that_are_no_classes_are_named(labels: list[int], found: int) -> None:
    features = Features(torch.randn(3, 4), torch.tensor(labels))
    sentence = f"the label {found} is among .* num_classes 3 .* raise stage3.task.num_classes"
    with pytest.raises(ValueError, match=sentence):
        fit_probe(features, num_classes=3)


def test_the_optimum_is_that_of_scikit_learn() -> None:
    """Which minimises C sum(cross-entropy) + 1/2 |W|^2: the same problem for C = 1 / (n l2)."""
    train, held_out = overlapping(300, seed=0), overlapping(200, seed=1)
    mean, std = train.values.mean(0), train.values.std(0)
    reference = LogisticRegression(C=1 / (300 * L2), tol=1e-8, max_iter=1000)
    reference.fit(((train.values - mean) / std).double(), train.labels)
    expected = torch.from_numpy(reference.predict_log_proba(((held_out.values - mean) / std).double())).float()
    result = probe(train, held_out, LbfgsSettings(l2=L2))
    torch.testing.assert_close(result.logits.log_softmax(-1), expected, atol=2e-3, rtol=0)
    assert result.top1 == pytest.approx(100 * reference.score(((held_out.values - mean) / std), held_out.labels))
    assert result.rate is None and result.scores == {}


def separable(count: int, seed: int, classes: int = 7) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    values = torch.randn(count, 10, generator=generator) * 0.8
    values[torch.arange(count), labels] += 2.0
    return Features(values, labels)


def trained_alone(train: Features, rows: torch.Tensor, rate: float, settings: SgdSettings) -> nn.Linear:
    """torch's own layer, optimizer and schedule over the same batches."""
    layer = nn.Linear(train.values.shape[1], int(train.labels.max()) + 1)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    batches = list(draw_batches(rows, settings.batch_size, settings.epochs, settings.seed))
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * len(batches[0]) / 256, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches), eta_min=0)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(layer(train.values[batch]), train.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return layer


GRID = SgdSettings(rates=(0.01, 3.0, 0.3), epochs=4, batch_size=32, weight_decay=0.01, seed=3)


def test_each_rate_of_a_grid_is_as_if_it_were_trained_alone() -> None:
    train, rows = separable(150, seed=0), torch.arange(10, 150)
    weights, biases = fit_grid(train, rows, 7, GRID.rates, GRID)
    assert weights.shape == (3, 7, 10) and biases.shape == (3, 7)
    for rate, weight, bias in zip(GRID.rates, weights, biases, strict=True):
        alone = trained_alone(train, rows, rate, GRID)
        torch.testing.assert_close(weight, alone.weight.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(bias, alone.bias.detach(), atol=1e-5, rtol=1e-4)


def test_the_rate_is_chosen_on_held_training_images_and_fitted_again_on_all() -> None:
    train, held_out = separable(150, seed=0), separable(80, seed=1)
    result = probe(train, held_out, GRID)
    fitted, held = split_stratified(train.labels, 0.1, GRID.seed)
    for rate, score in result.scores.items():
        predicted = trained_alone(train, fitted, rate, GRID)(train.values[held]).argmax(-1)
        assert score == pytest.approx(100 * (predicted == train.labels[held]).float().mean().item()), rate
    assert result.rate == min(rate for rate in GRID.rates if result.scores[rate] == max(result.scores.values()))
    logits = trained_alone(train, torch.arange(150), result.rate, GRID)(held_out.values).detach()
    torch.testing.assert_close(result.logits, logits, atol=1e-4, rtol=1e-4)
    expected = {k: 100 * top_k_accuracy_score(held_out.labels, logits, k=k, labels=range(7)) for k in (1, 5)}
    assert result.top1 == pytest.approx(expected[1]) and result.top5 == pytest.approx(expected[5])
    assert 50 < result.top1 < result.top5 < 100 or result.top5 == 100


def test_the_held_out_set_decides_nothing() -> None:
    train, held_out = separable(150, seed=0), separable(80, seed=1)
    shuffled = Features(held_out.values, held_out.labels.roll(1))
    assert probe(train, held_out, GRID).rate == probe(train, shuffled, GRID).rate


def test_of_equally_good_rates_the_smallest_is_chosen() -> None:
    assert rank_rates({0.3: 50.0, 0.1: 50.0, 1.0: 70.0, 9.0: None}) == [1.0, 0.1, 0.3]


def test_rates_that_diverge_drop_out() -> None:
    train, held_out = (Features(100 * part.values, part.labels) for part in (separable(150, 0), separable(80, 1)))
    huge = SgdSettings(rates=(1e38, 0.3), epochs=4, batch_size=32)
    result = probe(train, held_out, huge)
    assert result.scores[1e38] is None and result.rate == 0.3
    torch.testing.assert_close(
        result.logits, probe(train, held_out, SgdSettings(rates=(0.3,), epochs=4, batch_size=32)).logits
    )
    with pytest.raises(ValueError, match="diverges at all rates"):
        probe(train, held_out, SgdSettings(rates=(1e38, 2e38), epochs=4, batch_size=32))
    with pytest.raises(ValueError, match="diverges at all rates"):
        probe(Features(train.values * torch.nan, train.labels), held_out, GRID)


def test_standardised_features_may_have_any_scale() -> None:
    """To the optimum of the unpenalised problem, in which shift and scale of the features have no part."""
    train, held_out = overlapping(300, seed=0), overlapping(200, seed=1)
    settings = SgdSettings(rates=(2.0,), epochs=600, batch_size=300, standardise=True)
    result = probe(train, held_out, settings)
    expected = probe(train, held_out, LbfgsSettings(l2=0.0)).logits
    torch.testing.assert_close(result.logits.log_softmax(-1), expected.log_softmax(-1), atol=2e-2, rtol=0)


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_a_split_takes_of_each_class_alike_and_leaves_one(fraction: float) -> None:
    counts = {0: 200, 1: 80, 2: 40, 3: 1}
    labels = torch.cat([torch.full((count,), label) for label, count in counts.items()])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    fitted, held = split_stratified(labels, fraction, seed=0)
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert len(held) == round(fraction * len(labels))
    for label, count in counts.items():
        assert abs(int((labels[held] == label).sum()) - fraction * count) <= 1, label
        assert (labels[fitted] == label).any(), label
    assert held.equal(split_stratified(labels, fraction, seed=0)[1])
    assert not held.equal(split_stratified(labels, fraction, seed=1)[1])


def several_labels(count: int, seed: int) -> Features:
    """Five labels an image may have, the last of which none has."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 6, generator=generator)
    labels = (values[:, :5] + torch.randn(count, 5, generator=generator) > 0.5).float()
    labels[:, 4] = 0
    return Features(values, labels)


def test_several_labels_are_a_binary_problem_each() -> None:
    """Against scikit-learn's unpenalised regression of each label."""
    train, held_out = several_labels(200, seed=0), several_labels(100, seed=1)
    settings = SgdSettings(rates=(2.0,), epochs=400, batch_size=200)
    result = probe(train, held_out, settings)
    assert result.top1 is None and result.top5 is None and result.logits.shape == (100, 5)
    for label in range(4):
        reference = LogisticRegression(C=1e6).fit(train.values, train.labels[:, label])
        expected = torch.from_numpy(reference.decision_function(held_out.values)).float()
        torch.testing.assert_close(result.logits[:, label], expected, atol=2e-2, rtol=0)


def test_the_first_step_of_several_labels_is_each_labels_own() -> None:
    """From zero, where every probability is one half; a rate means the same however many labels there are."""
    train = several_labels(64, seed=0)
    settings = SgdSettings(rates=(1.0,), epochs=1, batch_size=64)
    weights, biases = fit_grid(train, torch.arange(64), 5, [1.0], settings)
    error = train.labels - 0.5
    torch.testing.assert_close(weights[0], 64 / 256 * error.T @ train.values / 64)
    torch.testing.assert_close(biases[0], 64 / 256 * error.mean(0))


def test_the_rate_for_several_labels_has_the_best_mean_average_precision() -> None:
    train = several_labels(200, seed=0)
    settings = SgdSettings(rates=(0.01, 2.0), epochs=3, batch_size=50, held_fraction=0.2)
    result = probe(train, several_labels(100, seed=1), settings)
    fitted, held = split_stratified(train.labels, 0.2, 0)
    weights, biases = fit_grid(train, fitted, 5, settings.rates, settings)
    for rate, weight, bias in zip(settings.rates, weights, biases, strict=True):
        scores = F.linear(train.values[held], weight, bias)
        expected = average_precision_score(train.labels[held, :4], scores[:, :4], average="macro")
        assert result.scores[rate] == pytest.approx(100 * expected, abs=1e-3)
    assert result.rate == max(settings.rates, key=result.scores.get)


def test_top_k_of_ties_is_the_first_and_of_few_classes_all() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    assert top_k(logits, torch.tensor([1, 1]), 1) == 50.0
    assert top_k(logits, torch.tensor([1, 0]), 2) == 50.0
    assert top_k(logits, torch.tensor([1, 9]), 5) == 50.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rates": ()}, "name at least one"),
        ({"rates": (0.1, 0.1)}, "only once"),
        ({"rates": (0.0,)}, "above 0"),
        ({"held_fraction": 1.0}, "between 0 and 1"),
        ({"epochs": 0}, "epochs of the linear probe is 0"),
        ({"batch_size": 0}, "batch_size of the linear probe is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_cannot_be_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SgdSettings(**values)


def test_data_that_cannot_be_probed_are_named() -> None:
    one = Features(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="too few to hold some back"):
        probe(one, one, GRID)
    with pytest.raises(ValueError, match="no held-out image"):
        probe(one, Features(torch.eye(3)[:0], torch.arange(0)), GRID)
    several = Features(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match="both must be of one task"):
        probe(several, one, GRID)


def test_several_labels_are_fitted_to_convergence_as_scikit_learn_fits_each() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(120, 5, generator=generator) * torch.tensor([1.0, 5.0, 0.2, 1.0, 1.0]) + 2
    noisy = values + torch.randn(120, 5, generator=generator) * values.std(0)
    labels = (noisy[:, :3] > values.mean(0)[:3]).float()
    found = probe(Features(values, labels), Features(values[:7], labels[:7]), LbfgsSettings(L2))
    assert found.top1 is None and found.rate is None
    standardised = ((values - values.mean(0)) / values.std(0)).numpy()
    for number in range(3):
        plain = LogisticRegression(C=1 / (120 * L2), tol=1e-6).fit(standardised, labels[:, number].int())
        expected = plain.decision_function(standardised[:7])
        assert found.logits[:, number].numpy() == pytest.approx(expected, abs=2e-3), number
