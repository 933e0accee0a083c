"""A linear probe: multinomial logistic regression on frozen features, to convergence, without augmentation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adala.evaluation.features import Features


def linear_probe_top1(train: Features, held_out: Features, l2: float = 1e-3, max_iterations: int = 200) -> float:
    """Top-1 in percent on ``held_out`` of a classifier fitted on ``train``.

    Features are standardised by the training set's statistics; L-BFGS minimises mean cross-entropy plus
    ``l2 / 2 |W|^2``. The problem is convex and started from zero, so there is no seed and no rate to tune.

    Args:
        train: Features (n, F) with labels.
        held_out: Features (m, F) with labels.
        l2: Penalty on the weights.
        max_iterations: Of L-BFGS.
    """
    num_classes = int(train.labels.max()) + 1
    weight, bias = fit_probe(train, num_classes, l2, max_iterations)
    predicted = F.linear(held_out.values, weight, bias).argmax(-1)
    return 100 * (predicted == held_out.labels).float().mean().item()


def fit_probe(train: Features, num_classes: int, l2: float = 1e-3, max_iterations: int = 200) -> tuple[Tensor, Tensor]:
    """Weight (classes, F) and bias (classes,) of a linear probe, to be applied to features as they are.

    Raises:
        ValueError: A label that is not among the classes.
    """
    smallest, largest = int(train.labels.min()), int(train.labels.max())
    if smallest < 0 or largest >= num_classes:
        found = smallest if smallest < 0 else largest
        raise ValueError(
            f"the label {found} is among the training samples, and num_classes {num_classes} has the labels 0 to "
            f"{num_classes - 1}: raise stage3.num_classes, or mend the labels"
        )
    mean, std = train.values.mean(0), train.values.std(0).clamp_min(1e-6)
    inputs = (train.values - mean) / std
    weight, bias = fit_logistic_regression(inputs, train.labels, num_classes, l2, max_iterations)
    return weight / std, bias - F.linear(mean / std, weight)


@torch.enable_grad()
def fit_logistic_regression(
    inputs: Tensor, labels: Tensor, num_classes: int, l2: float = 1e-3, max_iterations: int = 200
) -> tuple[Tensor, Tensor]:
    """Weight (classes, F) and bias (classes,) that minimise penalised cross-entropy on ``inputs`` (n, F)."""
    weight = torch.zeros(num_classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
