"""Nearest neighbours on frozen features: a score without anything to fit or tune.

Shapes: n training images, m held-out images, F features, b rows of a chunk, k neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adala.distributed import device
from adala.evaluation.features import Features
from adala.preemption import end_if_asked

# Similarities that are held at a time: 256 MiB of float32.
CHUNK_ELEMENTS = 2**26


@torch.no_grad()
def knn_top1(
    train: Features, held_out: Features, ks: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07
) -> dict[int, float]:
    """Top-1 in percent of a weighted vote among the ``k`` nearest training images, by ``k``.

    A neighbour of cosine similarity s votes for its class with weight exp(s / temperature). The search is exact, in
    float32, on the accelerator where there is one. Of equally near neighbours those of smallest index count, of classes
    with equal votes the smallest wins. A ``k`` beyond ``n`` lets all training images vote.

    Args:
        train: Features (n, F) with labels.
        held_out: Features (m, F) with labels.
        ks: Numbers of neighbours.
        temperature: The smaller, the less far neighbours count.

    Raises:
        ValueError: No or wrong ``ks``, a set without images, features that are not finite, or labels that are not one
            class an image.

    Paper: arXiv 2104.14294 (DINO), its k-NN evaluation.
    """
    _check(train, held_out, ks)
    neighbours = {k: min(k, len(train.values)) for k in ks}
    similarities, labels = _nearest(train, held_out.values, max(neighbours.values()))
    # Not on a GPU: its sums by class are added in any order, which may turn equal votes into unequal ones.
    weights = (similarities.double() / temperature).exp()
    votes = torch.zeros(len(held_out.values), int(train.labels.max()) + 1, dtype=torch.float64)
    right, counted = {}, 0
    for k in sorted(set(neighbours.values())):
        votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
        right[k] = 100 * (votes.argmax(1) == held_out.labels).double().mean().item()
        counted = k
    return {k: right[number] for k, number in neighbours.items()}


def _check(train: Features, held_out: Features, ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"the numbers of neighbours are {list(ks)}: name at least one, each 1 or more")
    for name, features in (("training", train), ("held-out", held_out)):
        if not len(features.values):
            raise ValueError(f"there is no {name} image, which nearest neighbours need: name shards that have some")
        if features.labels.ndim != 1:
            raise ValueError("nearest neighbours vote for one class an image: of several labels use a linear probe")
        if not features.values.isfinite().all():
            raise ValueError(f"the features of the {name} images are not finite: the model has diverged; score another")
    if int(train.labels.min()) < 0:
        raise ValueError(f"the label {int(train.labels.min())} is among the training images: labels count from 0")


def _nearest(train: Features, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and labels, each (m, k) on the CPU, of the training images nearest to ``queries`` (m, F), sorted."""
    known = F.normalize(train.values.to(device()), dim=1)
    found = []
    for chunk in queries.split(max(1, CHUNK_ELEMENTS // len(known))):
        end_if_asked("while nearest neighbours were looked for")
        found.append([part.cpu() for part in _largest(F.normalize(chunk.to(device()), dim=1) @ known.T, k)])
    similarities, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    return similarities, train.labels[places]


def _largest(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row (b, n) and their places, descending; of equal ones the first.

    A stable sort of whole rows does the same and takes many times as long; here only rows pay for it in which equal
    values lie on both sides of the cut.
    """
    # One more than are wanted, to see whether it is as near as the last one.
    values, places = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    cut = values[:, k:].eq(values[:, k - 1 : k]).any(1)
    values, places = values[:, :k], places[:, :k]
    if cut.any():
        values[cut], places[cut] = (part[:, :k] for part in similarities[cut].sort(dim=1, descending=True, stable=True))
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)
