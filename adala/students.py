"""Teacher to student: each softmax attention of a timm ViT replaced by a shell around another token mixer."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from adala.attention import AttentionShape, TokenMixer, build_mixer
from adala.families import (
    Backbone,
    LinearizedModel,
    check_divisible,
    family_of,
    linearized_blocks,
    token_layout,
    usual_layout,
)
from adala.rules import check_block_mechanisms

__all__ = [
    "LinearizedModel",
    "check_divisible",
    "check_supported",
    "linearize",
    "linearized_blocks",
    "restore_softmax",
    "softmax_attention",
    "token_layout",
]


def linearize(
    model: Backbone,
    mechanism: str = "linear",
    keep: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    block_mechanisms: Mapping[int, str] | None = None,
    block_mechanism_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> LinearizedModel:
    """A copy of ``model`` whose attention is ``mechanism``; weights and parameter names stay timm's.

    Args:
        model: A timm ViT with global softmax attention (``docs/BACKBONES.md`` lists them); it is left as it is.
        mechanism: Name of a mechanism (see ``adala.attention.mechanism_names``).
        keep: Blocks, counted from 0, that stay timm's softmax attention (a hybrid).
        options: Options of the mechanism by field name.
        seed: Of the mechanisms' own random parameters; the global generator is left as it was.
        block_mechanisms: Blocks with another mechanism, by number.
        block_mechanism_options: Options of these other mechanisms by name.

    Returns:
        The student, in training mode and with every parameter trainable.

    Raises:
        ValueError: An unknown mechanism or option, a block number that the model does not have, a block with two
            mechanisms, or a module whose attention is not supported (windowed, masked, with relative positions, ...),
            which is named.
    """
    check_supported(model)
    others = block_mechanisms or {}
    check_block_mechanisms(mechanism, keep, others, block_mechanism_options or {})
    options_of = {mechanism: options, **(block_mechanism_options or {})}
    family, depth = family_of(model), len(model.blocks)
    for said, numbers in ((f"keep={list(keep)}", keep), (f"block_mechanisms={dict(others)}", others)):
        outside = [index for index in numbers if not 0 <= index < depth]
        if outside:
            raise ValueError(f"{said}: the model has the blocks 0 to {depth - 1}, not {outside[0]}")
    student = copy.deepcopy(model).train().requires_grad_(True)
    family.prepare_student(student)
    layout = usual_layout(student)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the accelerators' generators too, which nothing puts back.
        torch.default_generator.manual_seed(seed)
        for index, block in enumerate(student.blocks):
            if index not in keep:
                name = others.get(index, mechanism)
                build = partial(_build_in_block, index, name, options_of.get(name))
                block.attn = family.wrap(block.attn, build, layout)
    return student


def _build_in_block(index: int, name: str, options: Mapping[str, Any] | None, shape: AttentionShape) -> TokenMixer:
    return build_mixer(name, replace(shape, block=index), options)


def restore_softmax(student: LinearizedModel, teacher: Backbone, blocks: Sequence[int]) -> None:
    """Puts the teacher's softmax attention, with copies of its weights, into blocks of a student (a hybrid).

    All else of the student stays as it is, so that a student that has been aligned is aligned in its other blocks.

    Args:
        student: Of the teacher's shape; changed in place.
        teacher: Its softmax counterpart; it is left as it is.
        blocks: Numbers of blocks, counted from 0.

    Raises:
        ValueError: A block number that the student does not have.
    """
    depth = len(student.blocks)
    outside = [index for index in blocks if not 0 <= index < depth]
    if outside:
        raise ValueError(f"blocks={list(blocks)}: the student has the blocks 0 to {depth - 1}, not {outside[0]}")
    for index in blocks:
        student.blocks[index].attn = softmax_attention(teacher, index).train(student.training)


def softmax_attention(teacher: Backbone, index: int) -> nn.Module:
    """A copy of the attention of a teacher's block, trainable, as a student has it in a block that keeps it."""
    attention = copy.deepcopy(teacher.blocks[index].attn).requires_grad_(True)
    family_of(teacher).prepare_attention(attention)
    return attention


def check_supported(model: nn.Module) -> None:
    """Refuses what is not a ViT with global self-attention of a family that has an adapter.

    Raises:
        ValueError: Names the module that is in the way and what it is.
    """
    family_of(model).check(model)
