"""A mask decoder on a plain ViT: queries beside patches, in time linear in the number of tokens.

Shapes: B batch, H heads, N tokens, d head dim, D embed dim, Q queries, K classes, M mask channels, h x w patch grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mode
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn

from adala.attention import AttentionShape, AttentionShell, TokenLayout, TokenMixer, build_mixer
from adala.families import Backbone
from adala.heads.dense import patch_map


@dataclass(frozen=True)
class PmtOptions:
    """Options of the head ``pmt``.

    Attributes:
        num_queries: Q.
        num_blocks: Decoder blocks.
        mlp_ratio: Hidden width of their MLPs as a multiple of D.
        mask_width: M, at most D.
        masked_attention: Whether a query attends only to patches that it takes for its segment so far.
        patch_attention: Mechanism by which the tokens attend to each other; ``student`` is that of the student's
            linearized blocks with its options, of most of them where they differ, and softmax where there are none.
        patch_attention_options: Options of a mechanism that ``patch_attention`` names.
    """

    num_queries: int = 100
    num_blocks: int = 6
    mlp_ratio: float = 1.0
    mask_width: int = 256
    masked_attention: bool = True
    patch_attention: str = "student"
    patch_attention_options: dict[str, Any] = field(default_factory=dict)


def build_patch_mixer(
    student: Backbone, mechanism: str = "student", options: Mapping[str, Any] | None = None
) -> TokenMixer:
    """A fresh mixer over the student's tokens, see :class:`PmtOptions`.

    Raises:
        ValueError: An unknown mechanism or option, or options beside ``student``.
    """
    attention = student.blocks[0].attn
    layout = TokenLayout(tuple(student.patch_embed.grid_size), student.num_prefix_tokens)
    shape = AttentionShape(attention.num_heads, attention.head_dim, layout)
    if mechanism != "student":
        return build_mixer(mechanism, shape, options)
    if options:
        raise ValueError("head pmt: patch_attention_options belong to a mechanism: name it in patch_attention")
    mixers = [block.attn.token_mixer for block in student.blocks if isinstance(block.attn, AttentionShell)]
    if not mixers:
        return build_mixer("softmax", shape)
    usual = mode(type(mixer) for mixer in mixers)
    return usual(shape, next(mixer.options for mixer in mixers if type(mixer) is usual))


class QueryAttention(nn.Module):
    """Attention of queries by softmax over queries and tokens, of tokens among themselves by a token mixer."""

    def __init__(self, embed_dim: int, num_heads: int, token_mixer: TokenMixer):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.token_mixer = token_mixer

    def forward(self, x: Tensor, num_queries: int, layout: TokenLayout, mask: Tensor | None = None) -> Tensor:
        """(B, Q + N, D) in and out, queries first.

        Args:
            x: Queries and tokens.
            num_queries: Q.
            layout: Of the N tokens.
            mask: Where queries attend, bool (B, 1, Q, Q + N); None is everywhere.
        """
        packed = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        queries = F.scaled_dot_product_attention(q[:, :, :num_queries], k, v, attn_mask=mask)
        tokens = self.token_mixer(*(part[:, :, num_queries:] for part in (q, k, v)), layout)
        return self.proj(torch.cat([queries, tokens], dim=2).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """A transformer block over queries and tokens."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, token_mixer: TokenMixer):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = QueryAttention(embed_dim, num_heads, token_mixer)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(mlp_ratio * embed_dim))

    def forward(self, x: Tensor, num_queries: int, layout: TokenLayout, mask: Tensor | None = None) -> Tensor:
        """(B, Q + N, D) in and out, see :class:`QueryAttention`."""
        x = x + self.attention(self.norm1(x), num_queries, layout, mask)
        return x + self.mlp(self.norm2(x))


class Upscaling(nn.Module):
    """Doubles the resolution of a map: transposed convolution, GELU, depthwise 3 x 3 convolution, norm."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        self.smooth = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, groups=out_channels, bias=False)
        self.norm = LayerNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, out_channels, 2 h, 2 w) of ``x`` (B, in_channels, h, w)."""
        return self.norm(self.smooth(F.gelu(self.up(x))))


class PmtHead(nn.Module):
    """A few decoder blocks over learned queries and the ViT's tokens; masks are products of queries and patches.

    Q N + N instead of (Q + N)^2 pairs of softmax attention: with a linear mechanism all of it is linear in N.

    Paper: arXiv 2603.25398 (Plain Mask Transformer).
    Differs: tokens mix by the student's own mechanism, and do not see the queries, for which such a mechanism has no
        place; one map of features comes in, the final norm's, so that a head is a function of what every other head
        gets too: no lateral connections from inner blocks, and a layer norm in place of their batch norms; no rotary
        position embedding, since the ViT's features know their places; masked attention stays on in evaluation,
        as in Mask2Former, because a head does not know how far training has come and cannot anneal it; mask features
        have M channels, not D, whose upscaling alone would cost a ViT-L 21 GMACs a prediction at 512 px, seven
        predictions a step.
    """

    Options = PmtOptions

    def __init__(self, student: Backbone, num_classes: int, options: PmtOptions):
        """Builds the head for the features of ``student``.

        Raises:
            ValueError: An unknown mechanism, or an option that it does not have.
        """
        super().__init__()
        width, mask_width = student.embed_dim, min(options.mask_width, student.embed_dim)
        self.masked_attention = options.masked_attention
        self.input_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(options.num_queries, width))
        self.blocks = nn.ModuleList(
            DecoderBlock(
                width,
                student.blocks[0].attn.num_heads,
                options.mlp_ratio,
                build_patch_mixer(student, options.patch_attention, options.patch_attention_options),
            )
            for _ in range(options.num_blocks)
        )
        self.norm = nn.LayerNorm(width)
        # To a stride of 4 pixels: twice for patches of 16; once for 14, which gives 7.
        doublings = max(1, int(math.log2(max(student.patch_embed.patch_size))) - 2)
        self.upscale = nn.Sequential(
            *(Upscaling(width if index == 0 else mask_width, mask_width) for index in range(doublings))
        )
        self.mask_mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, mask_width)
        )
        self.classifier = nn.Linear(width, num_classes + 1)

    def forward(self, features: Tensor, layout: TokenLayout) -> dict[str, Any]:
        """Classes and masks of the queries.

        Args:
            features: Of all tokens, (B, N, D).
            layout: How they lie.

        Returns:
            ``class_logits`` (B, Q, K + 1), whose last class is "no object", and ``mask_logits`` (B, Q, s h, s w), where
            s is 4 for patches of 16 and 2 for less; ``auxiliary``, the same before each block, in training mode,
            else empty.
        """
        # Not len(features), which torch.export would take for a constant.
        queries = self.queries.expand(features.shape[0], -1, -1)
        x = torch.cat([queries, self.input_norm(features)], dim=1)
        auxiliary = []
        for block in self.blocks:
            mask = None
            if self.training or self.masked_attention:
                auxiliary.append(self._predict(x, layout))
            if self.masked_attention:
                mask = attention_mask(auxiliary[-1]["mask_logits"], layout)
            x = block(x, len(self.queries), layout, mask)
        return {**self._predict(x, layout), "auxiliary": auxiliary if self.training else []}

    def _predict(self, x: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
        queries, tokens = self.norm(x).split([len(self.queries), layout.num_tokens], dim=1)
        pixels = self.upscale(patch_map(tokens, layout))
        mask_logits = torch.einsum("bqm,bmhw->bqhw", self.mask_mlp(queries), pixels)
        return {"class_logits": self.classifier(queries), "mask_logits": mask_logits}


def attention_mask(mask_logits: Tensor, layout: TokenLayout) -> Tensor:
    """Where queries attend: to all queries and prefix tokens, and to the patches on their side of a mask.

    Args:
        mask_logits: (B, Q, height, width).
        layout: Of the tokens.

    Returns:
        Bool (B, 1, Q, Q + N). A query whose mask is empty attends everywhere.
    """
    logits = F.interpolate(mask_logits.float(), layout.grid_size, mode="bilinear", align_corners=False)
    inside = logits.flatten(2) > 0
    inside = inside | ~inside.any(dim=2, keepdim=True)
    everywhere = inside.new_ones(*inside.shape[:2], inside.shape[1] + layout.num_prefix_tokens)
    return torch.cat([everywhere, inside], dim=2).unsqueeze(1)
