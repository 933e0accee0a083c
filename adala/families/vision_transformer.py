"""timm's plain ViT: DINOv2, CLIP, SigLIP, DeiT III, AugReg and others.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from adala.attention import AttentionShell, TokenLayout
from adala.families.base import Family, LinearizedModel, refuse_mask


class LayoutBlock(Block):
    """timm's block, which hands the layout of its tokens to a linearized attention, and none to a softmax one.

    Gradient checkpointing happens here: the layout is an argument of what is computed again, so that several image
    sizes may pass before one backward pass.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor, attn_mask: TokenLayout | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) in and out; ``attn_mask`` is the layout of the tokens, see :class:`AttentionShell`."""
        refuse_mask(None, is_causal)
        layout = attn_mask if isinstance(self.attn, AttentionShell) else None
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, layout)
        return self.compute(x, layout)

    def compute(self, x: Tensor, layout: TokenLayout | None) -> Tensor:
        """What is computed, and with gradient checkpointing computed again."""
        return super().forward(x, attn_mask=layout)


class LinearizedVisionTransformer(LinearizedModel, VisionTransformer):
    """A timm ViT that tells its blocks how the tokens of each image lie; in all else timm's own."""


class VisionTransformerFamily(Family):
    model_class = VisionTransformer
    student_class = LinearizedVisionTransformer
    modules = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")
    blocks: ClassVar = {Block: LayoutBlock}
    shells: ClassVar = {Attention: AttentionShell}

    def read_state(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """timm's names, DINOv2's or OpenAI CLIP's, and what else timm's filter knows."""
        return checkpoint_filter_fn(dict(tensors), model)
