"""Classification on pooled tokens.

Shapes: B batch, N tokens, D embed dim.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from adala.attention import TokenLayout

Pooling = Literal["cls", "patch", "cls_patch"]


def pool_tokens(features: Tensor, num_prefix_tokens: int, pooling: Pooling, has_class_token: bool = True) -> Tensor:
    """One vector an image out of its tokens.

    Args:
        features: (B, N, D), prefix tokens first.
        num_prefix_tokens: Class token and registers together.
        pooling: ``cls`` the class token, ``patch`` the mean over patches, ``cls_patch`` both side by side (DINOv2's
            linear protocol). A model without a class token (SigLIP) gives the mean over patches for all three.
        has_class_token: Whether token 0 is a class token.

    Returns:
        (B, D), or (B, 2 D) for ``cls_patch`` with a class token.

    Raises:
        ValueError: An unknown pooling.
    """
    patches = features[:, num_prefix_tokens:].mean(dim=1)
    if pooling not in ("cls", "patch", "cls_patch"):
        raise ValueError(f"unknown pooling {pooling!r}: known are cls, patch, cls_patch")
    if pooling == "patch" or not has_class_token:
        return patches
    if pooling == "cls":
        return features[:, 0]
    return torch.cat([features[:, 0], patches], dim=-1)


class ClassificationHead(nn.Module):
    """A linear classifier on pooled tokens."""

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        num_prefix_tokens: int,
        pooling: Pooling = "cls_patch",
        has_class_token: bool = True,
    ):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.pooling = pooling
        self.has_class_token = has_class_token
        width = 2 * embed_dim if pooling == "cls_patch" and has_class_token else embed_dim
        # DINOv2's and CLIP's features have unequal scales; a norm without parameters lets one rate serve all.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, num_classes)
        nn.init.zeros_(self.linear.bias)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)

    def forward(self, features: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Logits (B, num_classes) of the features (B, N, D) of all tokens, however their patches lie."""
        pooled = pool_tokens(features, self.num_prefix_tokens, self.pooling, self.has_class_token)
        return self.linear(self.norm(pooled))
