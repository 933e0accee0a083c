"""Teacher to student: each softmax attention of a timm ViT replaced by a shell around another token mixer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adala.attention import build_mixer
from adala.families import (
    Backbone,
    LinearizedModel,
    check_divisible,
    family_of,
    linearized_blocks,
    token_layout,
    usual_layout,
)

__all__ = ["LinearizedModel", "check_divisible", "check_supported", "linearize", "linearized_blocks", "token_layout"]


def linearize(
    model: Backbone,
    mechanism: str = "linear",
    keep: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LinearizedModel:
    """A copy of ``model`` whose attention is ``mechanism``; weights and parameter names stay timm's.

    Args:
        model: A timm ViT with global softmax attention (``docs/BACKBONES.md`` lists them); it is left as it is.
        mechanism: Name of a mechanism (see ``adala.attention.mechanism_names``).
        keep: Blocks, counted from 0, that stay timm's softmax attention (a hybrid).
        options: Options of the mechanism by field name.
        seed: Of the mechanism's own random parameters; the global generator is left as it was.

    Returns:
        The student, in training mode and with every parameter trainable.

    Raises:
        ValueError: An unknown mechanism or option, a block number that the model does not have, or a module whose
            attention is not supported (windowed, masked, with relative positions, ...), which is named.
    """
    check_supported(model)
    family, depth = family_of(model), len(model.blocks)
    outside = [index for index in keep if not 0 <= index < depth]
    if outside:
        raise ValueError(f"keep={list(keep)}: the model has the blocks 0 to {depth - 1}, not {outside[0]}")
    student = copy.deepcopy(model).train().requires_grad_(True)
    family.prepare_student(student)
    layout = usual_layout(student)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the accelerators' generators too, which nothing puts back.
        torch.default_generator.manual_seed(seed)
        for index, block in enumerate(student.blocks):
            if index not in keep:
                block.attn = family.wrap(block.attn, lambda shape: build_mixer(mechanism, shape, options), layout)
    return student


def check_supported(model: nn.Module) -> None:
    """Refuses what is not a ViT with global self-attention of a family that has an adapter.

    Raises:
        ValueError: Names the module that is in the way and what it is.
    """
    family_of(model).check(model)
