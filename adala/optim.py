"""Which parameters train, in which groups, at which rate."""

import fnmatch
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

# Embeddings are matrices by shape, but decaying them pulls positions, class token and frequencies towards nothing.
NO_DECAY_NAMES = ("pos_embed", "cls_token", "reg_token", "dist_token", "rope.freqs")


def freeze_except(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes all parameters of ``module`` but those whose name matches a pattern (fnmatch), whose names it returns.

    Raises:
        ValueError: Nothing matches.
    """
    names = []
    for name, parameter in module.named_parameters():
        trains = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(trains)
        if trains:
            names.append(name)
    if not names:
        raise ValueError(f"no parameter matches {', '.join(patterns)}: nothing would train")
    return names


def freeze_matching(module: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters of ``module`` whose names match a pattern (fnmatch).

    Raises:
        ValueError: A pattern that matches nothing, or nothing left that trains.
    """
    names = dict(module.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ValueError(f"freeze: no parameter matches {pattern!r}; names are like {next(iter(names))!r}")
        for name in matching:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ValueError(f"freeze: {', '.join(patterns)} leaves nothing to train")


def build_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
    lr_by_prefix: dict[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, matrices decayed and the rest not.

    Args:
        module: Frozen parameters are left out.
        lr: Peak rate.
        weight_decay: Of matrices.
        betas: Decay rates of the moments.
        lr_by_prefix: Other peak rates for parameters whose name begins with the key.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = next((r for prefix, r in (lr_by_prefix or {}).items() if name.startswith(prefix)), lr)
            decays = parameter.ndim > 1 and not name.endswith(NO_DECAY_NAMES)
            groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        betas=tuple(betas),
        # One kernel for all parameters of a group. On a CPU it would change results by rounding, for little.
        fused=True if on_gpu else None,
    )


def rate_factor(
    step: int, steps: int, warmup_steps: int, schedule: Literal["cosine", "constant"], floor: float = 0.0
) -> float:
    """The rate at ``step`` (from 0) as a share of its peak: linear warm-up, then a cosine to ``floor``, or flat."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def average_decay(step: int, decay: float) -> float:
    """How much of the average of the weights stays at ``step`` (from 0): ``decay``, and less of it at the start.

    A run's first weights would otherwise weigh for 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))
