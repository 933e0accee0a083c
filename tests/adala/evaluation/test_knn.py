"""Nearest neighbours against scikit-learn's, and against a plain loop where there are ties."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from adala.evaluation import Features, knn, knn_top1

TEMPERATURE = 0.07


def random_features(count: int, seed: int, classes: int = 4) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    values = torch.randn(count, 12, generator=generator)
    values[torch.arange(count), labels] += 1.0
    return Features(values, labels)


def of_scikit_learn(train: Features, held_out: Features, k: int) -> float:
    classifier = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / TEMPERATURE), metric="cosine")
    classifier.fit(train.values.double().numpy(), train.labels.numpy())
    return 100 * classifier.score(held_out.values.double().numpy(), held_out.labels.numpy())


def by_hand(train: Features, held_out: Features, k: int) -> float:
    """By a sort of (similarity, index) pairs; votes in a dict; the smallest class of those with most."""
    known = train.values / train.values.norm(dim=1, keepdim=True)
    right = 0
    for query, label in zip(held_out.values, held_out.labels.tolist(), strict=True):
        similarities = (known @ (query / query.norm())).tolist()
        nearest = sorted(range(len(similarities)), key=lambda index: (-similarities[index], index))[:k]
        votes = {}
        for index in nearest:
            of = int(train.labels[index])
            votes[of] = votes.get(of, 0.0) + np.exp(similarities[index] / TEMPERATURE)
        right += min(votes, key=lambda one: (-votes[one], one)) == label
    return 100 * right / len(held_out.labels)


@pytest.mark.parametrize("chunk", [2**26, 7 * 150], ids=["one chunk", "many chunks"])
def test_scores_are_those_of_scikit_learn(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", chunk)
    train, held_out = random_features(150, seed=0), random_features(90, seed=1)
    scores = knn_top1(train, held_out, ks=(20, 1, 5, 100))
    assert list(scores) == [20, 1, 5, 100] and 30 < scores[20] < 95
    for k, score in scores.items():
        assert score == pytest.approx(of_scikit_learn(train, held_out, k)), k


def test_of_ties_the_smallest_index_and_the_smallest_class_win() -> None:
    """Axis vectors, whose similarities are 0 or 1 exactly: nearly everything is tied."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(3)
    train = Features(axes[torch.randint(3, (40,), generator=generator)], torch.randint(5, (40,), generator=generator))
    held_out = Features(
        axes[torch.randint(3, (30,), generator=generator)], torch.randint(5, (30,), generator=generator)
    )
    scores = knn_top1(train, held_out, ks=(1, 2, 4, 7, 15, 20, 40))
    for k, score in scores.items():
        assert score == pytest.approx(by_hand(train, held_out, k)), k


def test_the_order_of_neighbours_is_by_similarity_then_by_index() -> None:
    similarities = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.9, 0.1], [0.1, 0.2, 0.3, 0.3, 0.3, 0.3]])
    values, places = knn._largest(similarities, 3)
    assert places.tolist() == [[1, 4, 0], [2, 3, 4]]
    assert values.equal(similarities.gather(1, places))


def test_more_neighbours_than_images_are_all_images() -> None:
    train, held_out = random_features(15, seed=0), random_features(20, seed=1)
    scores = knn_top1(train, held_out, ks=(15, 200))
    assert scores[200] == scores[15] == pytest.approx(by_hand(train, held_out, 15))


def test_a_class_that_was_never_seen_is_wrong() -> None:
    values = torch.eye(2)
    scores = knn_top1(Features(values, torch.tensor([0, 1])), Features(values, torch.tensor([0, 7])), ks=[1])
    assert scores == {1: 50.0}


def test_a_vector_of_zeros_is_near_to_nothing() -> None:
    train = Features(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    assert knn_top1(train, Features(torch.tensor([[3.0, 0.0]]), torch.tensor([1])), ks=[1]) == {1: 100.0}


@pytest.mark.parametrize(
    ("values", "labels", "ks", "message"),
    [
        (torch.eye(2), torch.tensor([0, 1]), [], "name at least one"),
        (torch.eye(2), torch.tensor([0, 1]), [0], "each 1 or more"),
        (torch.eye(2)[:0], torch.tensor([], dtype=torch.int64), [1], "no training image"),
        (torch.eye(2) * torch.inf, torch.tensor([0, 1]), [1], "training images are not finite"),
        (torch.eye(2), torch.eye(2), [1], "one class an image"),
        (torch.eye(2), torch.tensor([0, -1]), [1], "the label -1"),
    ],
    ids=["no k", "k of zero", "empty", "not finite", "multi-label", "negative"],
)
def test_what_cannot_be_scored_is_said(values, labels, ks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn_top1(Features(values, labels), Features(torch.eye(2), torch.tensor([0, 1])), ks)
