"""Teacher to student: each softmax attention of a plain timm ViT replaced by a shell around another token mixer.

Shapes: B batch, N tokens, D embed dim.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, to_2tuple
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from adala.attention import AttentionShape, AttentionShell, TokenLayout, build_mixer, layout_of_image


class LayoutBlock(Block):
    """timm's block, which hands the layout of its tokens to a linearized attention, and none to a softmax one.

    Gradient checkpointing happens here: the layout is an argument of what is computed again, so that several image
    sizes may pass before one backward pass.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor, attn_mask: TokenLayout | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) in and out; ``attn_mask`` is the layout of the tokens, see :class:`AttentionShell`."""
        _refuse_mask(None, is_causal)
        layout = attn_mask if isinstance(self.attn, AttentionShell) else None
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, layout)
        return self.compute(x, layout)

    def compute(self, x: Tensor, layout: TokenLayout | None) -> Tensor:
        """What is computed, and with gradient checkpointing computed again."""
        return super().forward(x, attn_mask=layout)


class LinearizedVisionTransformer(VisionTransformer):
    """A timm ViT that tells its blocks how the tokens of each image lie; in all else timm's own.

    timm's blocks get tokens only. What they pass on untouched is ``attn_mask``, which linearized attention has no use
    for: the layout travels under that name.
    """

    def token_layout(self, images: Tensor) -> TokenLayout:
        """The layout of the tokens of ``images`` (B, 3, height, width)."""
        return token_layout(self, images)

    def forward_features(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """The final norm's output for all tokens, (B, N, D), of images (B, 3, height, width).

        Raises:
            ValueError: A mask is given.
        """
        _refuse_mask(attn_mask, is_causal)
        return super().forward_features(x, attn_mask=self.token_layout(x))

    def forward_intermediates(
        self, x: Tensor, *args: Any, attn_mask: None = None, is_causal: bool = False, **kwargs: Any
    ) -> Any:
        """timm's, over all its options but masks.

        Raises:
            ValueError: A mask is given.
        """
        _refuse_mask(attn_mask, is_causal)
        return super().forward_intermediates(x, *args, attn_mask=self.token_layout(x), **kwargs)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """timm's; the mixers are told of the new grid, too, and what they hold for each token is resampled to it.

        Raises:
            ValueError: An image size that the patch size does not divide.
        """
        size, patch = img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size
        check_divisible(to_2tuple(size), to_2tuple(patch))
        super().set_input_size(None if img_size is None else to_2tuple(img_size), patch_size)
        layout = TokenLayout(tuple(self.patch_embed.grid_size), self.num_prefix_tokens)
        for attention in linearized_blocks(self).values():
            if attention.token_mixer.shape.layout != layout:
                attention.token_mixer.resize(layout)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        for block in self.blocks:
            block.grad_checkpointing = enable


def token_layout(model: VisionTransformer, images: Tensor) -> TokenLayout:
    """The layout of the tokens that ``model`` makes of ``images`` (B, 3, height, width)."""
    height, width = images.shape[-2:]
    return layout_of_image(height, width, tuple(model.patch_embed.patch_size), model.num_prefix_tokens)


def _refuse_mask(attn_mask: Any, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("masked or causal attention is not supported by linearized models: pass no attn_mask")


def linearize(
    model: VisionTransformer,
    mechanism: str = "linear",
    keep: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LinearizedVisionTransformer:
    """A copy of ``model`` whose attention is ``mechanism``; weights and parameter names stay timm's.

    Args:
        model: A plain timm ViT with softmax attention; it is left as it is.
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
    student.__class__ = LinearizedVisionTransformer
    layout = TokenLayout(tuple(student.patch_embed.grid_size), student.num_prefix_tokens)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the accelerators' generators too, which nothing puts back.
        torch.default_generator.manual_seed(seed)
        for index, block in enumerate(student.blocks):
            block.__class__ = LayoutBlock
            block.grad_checkpointing = model.grad_checkpointing
            if index not in keep:
                shape = AttentionShape(block.attn.num_heads, block.attn.head_dim, layout)
                mixer = build_mixer(mechanism, shape, options).to(block.attn.qkv.weight)
                block.attn = AttentionShell(block.attn, mixer)
    return student


def linearized_blocks(student: LinearizedVisionTransformer) -> dict[int, AttentionShell]:
    """The attention shells of a student by block number; blocks that were kept are left out."""
    return {i: block.attn for i, block in enumerate(student.blocks) if isinstance(block.attn, AttentionShell)}


def check_divisible(image_size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Refuses an image size (height, width) that the patch size does not divide, with a ValueError."""
    if any(size % patch for size, patch in zip(image_size, patch_size, strict=True)):
        nearest = [max(patch, size // patch * patch) for size, patch in zip(image_size, patch_size, strict=True)]
        raise ValueError(
            f"image size {image_size[0]} x {image_size[1]} is not divisible by the patch size {patch_size[0]} x "
            f"{patch_size[1]}: {nearest[0]} x {nearest[1]} would be"
        )


def check_supported(model: nn.Module) -> None:
    """Refuses what is not a plain ViT with global self-attention.

    Raises:
        ValueError: Names the module that is in the way and what it is.
    """
    if isinstance(model, LinearizedVisionTransformer):
        raise ValueError("this model is linearized already: linearize its teacher")
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"{type(model).__name__} is not a plain timm ViT (timm.models.vision_transformer.VisionTransformer): "
            "windowed, rotary and hierarchical models are not supported"
        )
    # Exact types, here and below: a subclass may mean other tokens, another output or another attention (a
    # distillation token and head, a convolutional stem, windows, differences of two maps, a shared projection).
    if type(model) is not VisionTransformer:
        raise ValueError(
            f"the model is a {type(model).__name__}; only timm's plain VisionTransformer is supported, whose prefix "
            "tokens are a class token and registers"
        )
    if type(model.patch_embed) is not PatchEmbed:
        raise ValueError(
            f"patch_embed is a {type(model.patch_embed).__name__}; only timm's plain PatchEmbed, one convolution, is "
            "supported"
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("patch_drop: models that drop patches are not supported; build it with patch_drop_rate=0")
    if len(model.blocks) == 0:
        raise ValueError("blocks: the model has none; build it with a depth of at least 1")
    for index, block in enumerate(model.blocks):
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
