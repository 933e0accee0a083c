"""Teacher to student: each softmax attention of a plain timm ViT replaced by a shell around another token mixer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from adala.attention import AttentionShape, AttentionShell, LayoutTracker, TokenLayout, build_mixer


def linearize(
    model: VisionTransformer,
    mechanism: str = "linear",
    keep: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> VisionTransformer:
    """A copy of ``model`` whose attention is ``mechanism``; weights and parameter names stay timm's.

    Args:
        model: A plain timm ViT; it is left as it is.
        mechanism: Name of a mechanism (see ``adala.attention.mechanism_names``).
        keep: Blocks, counted from 0, that stay timm's softmax attention (a hybrid).
        options: Options of the mechanism by field name.
        seed: Of the mechanism's own random parameters; the global generator is left as it was.

    Returns:
        The student, in training mode and with every parameter trainable.

    Raises:
        ValueError: An unknown mechanism or option, a block number that the model does not have, or a module whose
            attention is not supported (windowed, masked, rotary, ...), which is named.
    """
    check_supported(model)
    depth = len(model.blocks)
    outside = [index for index in keep if not 0 <= index < depth]
    if outside:
        raise ValueError(f"keep={list(keep)}: the model has the blocks 0 to {depth - 1}, not {outside[0]}")
    student = copy.deepcopy(model).train().requires_grad_(True)
    tracker = LayoutTracker(token_layout(student), student.patch_embed.patch_size)
    tracker.attach(student.patch_embed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, block in enumerate(student.blocks):
            if index not in keep:
                shape = AttentionShape(block.attn.num_heads, block.attn.head_dim, tracker.current)
                mixer = build_mixer(mechanism, shape, options).to(block.attn.qkv.weight)
                block.attn = AttentionShell(block.attn, mixer, tracker)
    return student


def token_layout(model: VisionTransformer) -> TokenLayout:
    """The token layout of ``model`` at the image size that it was built for."""
    return TokenLayout(tuple(model.patch_embed.grid_size), model.num_prefix_tokens)


def linearized_blocks(student: VisionTransformer) -> dict[int, AttentionShell]:
    """The attention shells of a student by block number; blocks that were kept are left out."""
    return {i: block.attn for i, block in enumerate(student.blocks) if isinstance(block.attn, AttentionShell)}


def check_supported(model: nn.Module) -> None:
    """Refuses what is not a plain ViT with global self-attention.

    Raises:
        ValueError: Names the module that is in the way and what it is.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"{type(model).__name__} is not a plain timm ViT (timm.models.vision_transformer.VisionTransformer): "
            "windowed, rotary and hierarchical models are not supported"
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("patch_drop: models that drop patches are not supported; build it with patch_drop_rate=0")
    for index, block in enumerate(model.blocks):
        # Exact types: a subclass may mean another attention (windows, differences of two maps, a shared projection).
        if type(block) is not Block:
            raise ValueError(f"blocks.{index} is a {type(block).__name__}; only timm's plain Block is supported")
        if type(block.attn) is not Attention:
            raise ValueError(
                f"blocks.{index}.attn is a {type(block.attn).__name__}; only timm's plain global Attention is supported"
            )
        if block.attn.attn_drop.p > 0:
            raise ValueError(
                f"blocks.{index}.attn.attn_drop: dropout of attention weights is not supported; set it to 0"
            )
