"""Linear probes on frozen features, without augmentation: to convergence by L-BFGS, or SGD at a grid of rates at once.

Shapes: n training images, m held-out images, F features, C classes, G rates, B batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from adala.distributed import device
from adala.evaluation.features import Features
from adala.preemption import end_if_asked

# Rates of DINOv2's linear evaluation, for a batch of 256 (arXiv 2304.07193).
DINOV2_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
# Rates are stated for a batch of so many, and scaled to the batch there is.
RATE_BATCH = 256
# Images whose scores are computed at a time.
SCORED_AT_ONCE = 4096


@dataclass(frozen=True)
class LbfgsSettings:
    """A probe to convergence.

    Attributes:
        l2: Penalty ``l2 / 2 |W|^2`` on the weights for standardised features.
        max_iterations: Of L-BFGS.
    """

    l2: float = 1e-3
    max_iterations: int = 200


@dataclass(frozen=True)
class SgdSettings:
    """A probe by SGD with momentum, its rate annealed to zero along a cosine, at a grid of rates at once.

    Attributes:
        rates: Learning rates for a batch of 256; scaled by batch / 256.
        epochs: Passes over the training set.
        batch_size: Images of a step; a last, smaller batch of an epoch is left out.
        momentum: Of SGD.
        weight_decay: On weights and biases alike, as torch's SGD has it.
        held_fraction: Part of the training set on which the rate is chosen, where there are several.
        standardise: Whether features are shifted and scaled to mean 0 and standard deviation 1 over the training set.
        seed: Of the held part and of the order of images.

    Raises:
        ValueError: A value that cannot be.
    """

    rates: Sequence[float] = DINOV2_RATES
    epochs: int = 10
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    held_fraction: float = 0.1
    standardise: bool = False
    seed: int = 0

    def __post_init__(self):
        check_rates(self.rates, self.held_fraction)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the linear probe is {getattr(self, name)}: it must be 1 or more")


@dataclass(frozen=True)
class ProbeResult:
    """What a linear probe scored.

    Attributes:
        top1: In percent, on the held-out set; None where images have several labels.
        top5: Likewise; the label is among the five best, or among all classes where there are fewer.
        logits: (m, C) of the held-out images, of which a caller computes what else it wants.
        rate: The one that was chosen; None without a grid.
        scores: In percent by rate, on the held part of the *training* set: top-1, or mean average precision where
            images have several labels. None at rates that diverged. Empty without a grid.
    """

    top1: float | None
    top5: float | None
    logits: Tensor
    rate: float | None = None
    scores: dict[float, float | None] = field(default_factory=dict)


def check_rates(rates: Sequence[float], held_fraction: float) -> None:
    """Refuses a grid that is none.

    Raises:
        ValueError: No rates, one that is not above 0, one that is there twice, or no part to choose on.
    """
    if not rates or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"the probe's rates are {list(rates)}: name at least one, each above 0 and only once")
    if not 0 < held_fraction < 1:
        raise ValueError(f"held_fraction of the probe is {held_fraction}: it must lie between 0 and 1")


def probe(train: Features, held_out: Features, settings: SgdSettings | LbfgsSettings) -> ProbeResult:
    """Fits a linear classifier on ``train`` and scores it on ``held_out``.

    A grid's rate is chosen on a part of the training set that the grid was not fitted on, so that the held-out set
    decides nothing. The chosen rate is then fitted again on the whole training set, as published numbers are fitted on
    it whole; one rate costs little beside the grid. Rates that diverge drop out.

    Args:
        train: Features (n, F); labels (n,), or (n, C) of zeros and ones where images have several, which makes it one
            binary problem a class.
        held_out: Features (m, F), labels as in ``train``; a label that was not trained on counts as wrong.
        settings: How to fit.

    Raises:
        ValueError: A set without images, labels that are no classes, too few images to choose a rate on, or no rate
            that does not diverge.

    Paper: arXiv 2304.07193 (DINOv2), its linear evaluation.
    Differs: DINOv2 chooses the rate on the very images that it reports, draws first weights at random (here zero: the
        problem is convex), and augments.
    """
    num_classes = _checked_classes(train, held_out)
    rate, scores = None, {}
    if isinstance(settings, LbfgsSettings):
        weight, bias = fit_probe(train, num_classes, settings.l2, settings.max_iterations)
    else:
        weight, bias, rate, scores = _fit_best(train, num_classes, settings)
    logits = torch.cat([F.linear(chunk.float(), weight, bias) for chunk in held_out.values.split(SCORED_AT_ONCE)])
    if train.labels.ndim == 2:
        return ProbeResult(None, None, logits, rate, scores)
    return ProbeResult(top_k(logits, held_out.labels, 1), top_k(logits, held_out.labels, 5), logits, rate, scores)


def _checked_classes(train: Features, held_out: Features) -> int:
    for name, features in (("training", train), ("held-out", held_out)):
        if not len(features.values):
            raise ValueError(f"there is no {name} image, which a linear probe needs: name shards that have some")
    if train.labels.shape[1:] != held_out.labels.shape[1:]:
        raise ValueError(
            f"training images have labels of the shape {tuple(train.labels.shape[1:])}, held-out ones of "
            f"{tuple(held_out.labels.shape[1:])}: both must be of one task"
        )
    if train.labels.ndim == 2:
        return train.labels.shape[1]
    num_classes = int(train.labels.max()) + 1
    _check_labels(train.labels, num_classes)
    return num_classes


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """In percent, how often the label (m,) is among the ``k`` largest of ``logits`` (m, C); of equal ones the first.

    A ``k`` beyond C is C; a label beyond C is never among them.
    """
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return 100 * (best == labels[:, None].to(best.device)).any(1).double().mean().item()


def _fit_best(
    train: Features, num_classes: int, settings: SgdSettings
) -> tuple[Tensor, Tensor, float, dict[float, float | None]]:
    """Weight (C, F) and bias (C,) at the best rate, for features as they are; that rate; what each scored."""
    everything = torch.arange(len(train.values))
    ranked, scores = list(settings.rates), {}
    if len(settings.rates) > 1:
        fitted, held = split_stratified(train.labels, settings.held_fraction, settings.seed)
        weights, biases = fit_grid(train, fitted, num_classes, settings.rates, settings)
        values = [
            _score(train, held, weight, bias) if finite(weight, bias) else None
            for weight, bias in zip(weights, biases, strict=True)
        ]
        scores = dict(zip(settings.rates, values, strict=True))
        ranked = rank_rates(scores)
    # What converged on most of the images may yet diverge on all of them.
    for rate in ranked:
        (weight,), (bias,) = fit_grid(train, everything, num_classes, [rate], settings)
        if finite(weight, bias):
            return weight, bias, rate, scores
    raise ValueError(
        f"the linear probe diverges at all rates ({', '.join(f'{rate:g}' for rate in settings.rates)}): add smaller "
        "ones, or look whether the features are finite"
    )


def finite(weight: Tensor, bias: Tensor) -> bool:
    return bool(weight.isfinite().all() and bias.isfinite().all())


def rank_rates(scores: dict[float, float | None]) -> list[float]:
    """Rates that have a score, the best first, of equal ones the smallest."""
    return sorted((rate for rate, score in scores.items() if score is not None), key=lambda rate: (-scores[rate], rate))


def _score(train: Features, held: Tensor, weight: Tensor, bias: Tensor) -> float:
    logits, labels = F.linear(train.values[held].float(), weight, bias), train.labels[held]
    if labels.ndim == 1:
        return top_k(logits, labels, 1)
    # Where it is needed: importing torchmetrics takes seconds.
    from torchmetrics.functional.classification import multilabel_average_precision

    present = labels.sum(0) > 0  # precision and recall of a class without a positive image are nothing
    if not present.any():
        raise ValueError("no image on which the probe's rate is chosen has a label: raise held_fraction, or mend them")
    logits, labels = logits[:, present], labels[:, present].long()
    return 100 * multilabel_average_precision(logits, labels, labels.shape[1]).item()


def split_stratified(labels: Tensor, held_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of images to fit on and of those held back, ascending; each class alike, of each at least one fitted.

    Args:
        labels: (n,) classes; anything of another shape is split without regard to it.
        held_fraction: Part that is held back, at least one image.
        seed: Of the choice.

    Raises:
        ValueError: No image can be held back.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    spare = order[1:]
    if labels.ndim == 1:
        # Sorted by class and at random within, so that every tenth image is a tenth of every class.
        order = order[labels[order].argsort(stable=True)]
        by_class = labels[order]
        spare = order[1:][by_class[1:] == by_class[:-1]]
    if not len(spare):
        raise ValueError(
            f"{len(labels)} training images are too few to hold some back, on which the probe's rate would be chosen: "
            "name more, or a single rate"
        )
    count = min(len(spare), max(1, round(held_fraction * len(labels))))
    held = spare[torch.arange(count) * len(spare) // count].sort().values
    fitted = torch.ones(len(labels), dtype=torch.bool)
    fitted[held] = False
    return fitted.nonzero().squeeze(1), held


def draw_batches(rows: Tensor, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Whole batches of ``rows`` in an order that only the seed decides; all rows at once where they fill no batch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(rows))
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for number in range(len(rows) // size):
            end_if_asked("while a probe was fitted")
            yield order[number * size : (number + 1) * size]


@torch.enable_grad()
def fit_grid(
    train: Features, rows: Tensor, num_classes: int, rates: Sequence[float], settings: SgdSettings
) -> tuple[Tensor, Tensor]:
    """Weights (G, C, F) and biases (G, C) on the CPU, each as if its rate had been trained alone.

    Features stay on the CPU and go over in batches, once for all rates.

    Args:
        train: Features (n, F) with labels.
        rows: Indices of the images to fit on.
        num_classes: C.
        rates: G rates; ``settings.rates`` is not looked at.
        settings: All else.
    """
    shift, scale = _standardisation(train.values[rows]) if settings.standardise else (torch.zeros(1), torch.ones(1))
    shape = (num_classes, train.values.shape[1])
    weights = [torch.zeros(shape, device=device(), requires_grad=True) for _ in rates]
    biases = [torch.zeros(num_classes, device=device(), requires_grad=True) for _ in rates]
    size = min(settings.batch_size, len(rows))
    steps = settings.epochs * (len(rows) // size)
    groups = [
        {"params": [weight, bias], "lr": rate * size / RATE_BATCH}
        for weight, bias, rate in zip(weights, biases, rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
    schedule = annealed(optimizer, steps)
    for batch in draw_batches(rows, settings.batch_size, settings.epochs, settings.seed):
        inputs = ((train.values[batch].float() - shift) / scale).to(device())
        labels = train.labels[batch].to(device())
        logits = F.linear(inputs, torch.cat(weights), torch.cat(biases)).unflatten(1, (len(rates), num_classes))
        # Summed over rates: none of them has a part in another's gradient.
        loss = sum(_loss(logits[:, number], labels) for number in range(len(rates)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weight, bias = (torch.stack(parts).detach().cpu() for parts in (weights, biases))
    weight = weight / scale
    return weight, bias - (weight * shift).sum(-1)


def annealed(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Takes every rate to zero along half a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits (B, C): cross-entropy of a class (B,), or binary ones summed over the classes of (B, C)."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(1).mean()


def _standardisation(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) of each feature; 1e-6 at least, since it is divided by."""
    return values.mean(0), values.std(0).clamp_min(1e-6)


def _check_labels(labels: Tensor, num_classes: int) -> None:
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest >= num_classes:
        found = smallest if smallest < 0 else largest
        raise ValueError(
            f"the label {found} is among the training samples, and num_classes {num_classes} has the labels 0 to "
            f"{num_classes - 1}: raise stage3.task.num_classes, or mend the labels"
        )


def fit_probe(train: Features, num_classes: int, l2: float = 1e-3, max_iterations: int = 200) -> tuple[Tensor, Tensor]:
    """Weight (classes, F) and bias (classes,) of a linear probe, to be applied to features as they are.

    Raises:
        ValueError: A label that is not among the classes.
    """
    if train.labels.ndim == 1:
        _check_labels(train.labels, num_classes)
    mean, std = _standardisation(train.values)
    inputs = (train.values - mean) / std
    weight, bias = fit_logistic_regression(inputs, train.labels, num_classes, l2, max_iterations)
    return weight / std, bias - F.linear(mean / std, weight)


@torch.enable_grad()
def fit_logistic_regression(
    inputs: Tensor, labels: Tensor, num_classes: int, l2: float = 1e-3, max_iterations: int = 200
) -> tuple[Tensor, Tensor]:
    """Weight (classes, F) and bias (classes,) that minimise penalised cross-entropy on ``inputs`` (n, F).

    Of labels (n, classes) it is that of one binary problem a class, none of which has a part in another.
    """
    inputs, labels = inputs.to(device()), labels.to(device())
    weight = torch.zeros(num_classes, inputs.shape[1], device=device(), requires_grad=True)
    bias = torch.zeros(num_classes, device=device(), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        end_if_asked("while a probe was fitted")
        optimizer.zero_grad()
        loss = _loss(F.linear(inputs, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().cpu(), bias.detach().cpu()
