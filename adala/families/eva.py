"""timm's Eva: DINOv3, EVA and EVA-02, Perception Encoder, ROPE-ViT, Sapiens2 and others with rotary embeddings.

Shapes: B batch, H heads, N tokens, P patches, d head dim, D embed dim.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, ClassVar

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models._manipulate import checkpoint
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm, checkpoint_filter_fn
from torch import Tensor, nn

from adala.attention import AttentionShell, TokenLayout, TokenMixer
from adala.families.base import Family, LinearizedModel, refuse_mask


class RotaryAttentionShell(AttentionShell):
    """The shell of attention with a rotary embedding: timm's ``EvaAttention`` and ``AttentionRope``.

    Queries and keys of the patches are rotated exactly where softmax has it: after ``q_norm`` and ``k_norm`` and before
    the token mixer, so that a mechanism's feature map sees the rotated vectors; prefix tokens are left alone. The
    projections may be packed (``qkv``) or three (``q_proj``, ``k_proj``, ``v_proj``), have their biases beside them
    (``q_bias``, ``v_bias``; keys have none), and be of fewer keys and values than queries, which then share them.

    Paper: arXiv 2104.09864, eq. 34, over the two axes of an image as in arXiv 2403.13298.
    Differs: RoFormer's own linear attention rotates what comes out of the feature map, and leaves the normaliser
        unrotated, since a rotated feature can be negative. Rotated before it, softmax and every mechanism see the same
        queries and keys, weights stay positive, and a softmax shell computes what timm does. Scores of a linear
        mechanism then depend on where two patches lie, and no longer on their distance alone.
    """

    def __init__(self, attention: nn.Module, token_mixer: TokenMixer):
        """Wraps the submodules of ``attention``, whose weights are shared, not copied."""
        super().__init__(attention, token_mixer)
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.q_bias, self.v_bias = getattr(attention, "q_bias", None), getattr(attention, "v_bias", None)
        self.num_prefix_tokens = attention.num_prefix_tokens
        self.rotate_half = attention.rotate_half

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x`` (B, N, D), each (B, H, N, d), normalised and rotated where the model does.

        Args:
            x: Tokens.
            rope: Sines and cosines of the patches, (P, 2 d) or (H, P, 2 d); None rotates nothing.
        """
        q, k, v = (part.transpose(1, 2) for part in RotaryAttentionShell._project(self, x))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (_rotate_patches(part, rope, self.num_prefix_tokens, self.rotate_half).type_as(v) for part in (q, k))
        shared = self.num_heads // k.shape[1]
        return (q, k, v) if shared == 1 else (q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, N, heads, d), keys and values of as many heads as there are weights for."""
        if self.qkv is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return tuple(projection(x).unflatten(-1, (-1, self.head_dim)) for projection in projections)
        return RotaryAttentionShell._pack(self, x).unbind(2)

    def _pack(self, x: Tensor) -> Tensor:
        """(B, N, 3, H, d) of a packed projection."""
        qkv, q_bias = self.qkv(x), getattr(self, "q_bias", None)
        if q_bias is not None:
            qkv = qkv + torch.cat((q_bias, torch.zeros_like(q_bias), self.v_bias))
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim))

    def forward(
        self,
        x: Tensor,
        attn_mask: TokenLayout | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``x`` over itself, (B, N, D) in and out, see :class:`AttentionShell`; ``rope`` as in `project`.

        Raises:
            ValueError: A mask is given; no mechanism here is defined under one.
        """
        layout = self.check_layout(x, attn_mask, is_causal)
        has_norms = not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))
        if self.qkv is None or rope is not None or has_norms:
            # What reads the packed projection as it lies in memory would have to rotate it there.
            return self.finish(self.mix(*self.project(x, rope), layout).transpose(1, 2).flatten(2), x)
        return self.finish(self.token_mixer.mix_packed(self._pack(x), layout), x)


def _rotate_patches(x: Tensor, rope: Tensor, num_prefix_tokens: int, half: bool) -> Tensor:
    """(B, H, N, d) in and out; ``half``: whether channels i and i + d/2 make a pair, not 2 i and 2 i + 1."""
    prefix, patches = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=half)], dim=2)


class _LayoutBlock:
    """See :class:`adala.families.vision_transformer.LayoutBlock`; the rotary embedding travels like the layout."""

    grad_checkpointing = False

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: TokenLayout | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(B, N, D) in and out; ``attn_mask`` is the layout of the tokens, see :class:`RotaryAttentionShell`."""
        refuse_mask(None, is_causal)
        layout = attn_mask if isinstance(self.attn, AttentionShell) else None
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, rope, layout)
        return self.compute(x, rope, layout)

    def compute(self, x: Tensor, rope: Tensor | None, layout: TokenLayout | None) -> Tensor:
        """What is computed, and with gradient checkpointing computed again."""
        return super().forward(x, rope=rope, attn_mask=layout)


class LayoutEvaBlock(_LayoutBlock, EvaBlock):
    """timm's block with norms before attention and MLP."""


class LayoutEvaBlockPostNorm(_LayoutBlock, EvaBlockPostNorm):
    """timm's block with norms behind them."""


class LinearizedEva(LinearizedModel, Eva):
    """timm's Eva that tells its blocks how the tokens of each image lie; in all else timm's own.

    The rotary table is a function of each image's own size, as timm's is.
    """

    def positions(self, images: Tensor) -> list[dict[str, Any]]:
        """The rotary embedding of each block's attention, as :meth:`forward_features` hands it on."""
        if self.rope is None:
            return super().positions(images)
        if self.dynamic_img_size:
            table = self.rope.get_embed(shape=self.token_layout(images).grid_size)
        elif hasattr(self.rope, "feat_shape"):
            table = self.rope.get_embed()
        else:
            table = self.rope.get_embed(shape=self.patch_embed.grid_size)
        return [{"rope": table[index] if self.rope_mixed else table} for index in range(len(self.blocks))]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch. The blocks do it, and timm's model must not do it around them."""
        super().set_grad_checkpointing(enable)
        self.grad_checkpointing = False


class EvaFamily(Family):
    """Adapter of timm's ``Eva``.

    Differs: coordinates that timm shifts and scales at random while a model trains (``rope_rescale_coords`` of
        Sapiens2) stay as they are in a student, whose teacher is always in eval mode.
    """

    model_class = Eva
    student_class = LinearizedEva
    modules = ("eva",)
    blocks: ClassVar = {EvaBlock: LayoutEvaBlock, EvaBlockPostNorm: LayoutEvaBlockPostNorm}
    shells: ClassVar = {EvaAttention: RotaryAttentionShell, AttentionRope: RotaryAttentionShell}

    def make_backbone(self, model: Eva, image_size: Sequence[int]) -> None:
        super().make_backbone(model, image_size)
        model.has_class_token = model.cls_token is not None

    def read_state(self, tensors: Mapping[str, Tensor], model: Eva) -> dict[str, Tensor]:
        """timm's names, or those of DINOv3, EVA, EVA-02, OpenCLIP, Perception Encoder and Sapiens2 themselves.

        Raises:
            ValueError: The query or value biases of a DINOv3 that are not zero, for a model without.
        """
        _check_biases(tensors, model)
        # For a model without biases timm prints an error for each that it leaves out.
        with redirect_stdout(io.StringIO()):
            return checkpoint_filter_fn(dict(tensors), model)

    def prepare_student(self, student: Eva) -> None:
        super().prepare_student(student)
        student.has_class_token = student.cls_token is not None
        if student.rope is not None:
            student.rope.aug_active = False

    def prepare_attention(self, attention: nn.Module) -> None:
        # Else timm reads the weights of `qkv` past the module, and with it past an adapter.
        attention.qkv_bias_separate = True


def _check_biases(tensors: Mapping[str, Tensor], model: Eva) -> None:
    """DINOv3's files hold biases also where all of them are zero, and timm has models for both."""
    if getattr(model.blocks[0].attn, "q_bias", None) is not None:
        return
    for name, bias in tensors.items():
        if name.endswith("attn.qkv.bias") and "storage_tokens" in tensors:
            queries, _, values = bias.chunk(3)
            if queries.any() or values.any():
                raise ValueError(f"{name} is not zero, and the model has no such bias: name the teacher ..._qkvb")
