"""The attention interface: a shell with timm's parameter names around an exchangeable token mixer.

Shapes: B batch, H heads, N tokens, d head dim, D embed dim (D = H d for every plain ViT).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adala.attention.absent import OF_SOFTMAX, OfSoftmax
from adala.attention.layout import TokenLayout, layout_of_tokens


@dataclass(frozen=True)
class AttentionShape:
    """What a token mixer is built for.

    Attributes:
        num_heads: H.
        head_dim: d.
        layout: Token layout at the model's own image size; a mechanism whose parameters depend on the number of
            tokens (Linformer) sizes them by it, the others ignore it.
        block: Number of the block that it is in, counted from 0.
    """

    num_heads: int
    head_dim: int
    layout: TokenLayout
    block: int = 0


@dataclass(frozen=True)
class NoOptions:
    """The options of a mechanism that has none."""


class TokenMixer(nn.Module):
    """Mixes values over tokens: the part of attention in which the mechanisms differ.

    A subclass sets ``Options`` (a frozen dataclass, every field with a default) and implements ``forward`` and
    ``reference``. Both take q, k, v as they leave the packed projection: no scale applied, possibly strided views.
    Feature maps, normalisers and sums over tokens are computed in float32 (float64 for float64 input) with autocast
    off.

    Attributes:
        Options: Class of the options.
        rows_are_independent: Whether a row of the output depends on its own query alone, so that ``reference`` may be
            given some of the queries and then returns their rows.
    """

    Options: ClassVar[type] = NoOptions
    rows_are_independent: ClassVar[bool] = False

    def __init__(self, shape: AttentionShape, options: Any = None):
        super().__init__()
        self.shape = shape
        self.options = self.Options() if options is None else options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """Mixes ``v`` over tokens.

        Args:
            q: Queries, (B, H, N, d).
            k: Keys, (B, H, N, d).
            v: Values, (B, H, N, d).
            layout: Layout of the N tokens.

        Returns:
            (B, H, N, d) in the dtype of ``v``, before the output projection.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def mix_packed(self, qkv: Tensor, layout: TokenLayout) -> Tensor:
        """The same from the packed projection: overridden where something reads that as it lies in memory.

        Args:
            qkv: Queries, keys and values, (B, N, 3, H, d).
            layout: Layout of the N tokens.

        Returns:
            (B, N, H d).
        """
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self(q, k, v, layout).transpose(1, 2).flatten(2)

    def describe_kernel(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """In words, what it is computed by for values of this kind; None where there is but one way."""
        return None

    def begin_step(self, step: int) -> None:
        """Called by the trainer before optimizer step ``step``, counted from 0; most mechanisms have nothing to do.

        What changes in the course of training changes here, as a function of the step alone: forward passes are more
        or fewer depending on micro-batches and recomputation.
        """

    def resize(self, layout: TokenLayout) -> None:
        """Called when the model is set to another image size; what is held for each token changes with it.

        Args:
            layout: The layout at the model's own image size from now on.
        """
        self.shape = replace(self.shape, layout=layout)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        """What ``forward`` has to give, by way of the N x N matrix: for tests, and before a mechanism is timed.

        The mixer's own weights are converted to the dtype and device of ``q``; gradients reach them.

        Args:
            q: Queries of the chosen heads, (B, heads, N, d), float64 to compare with; fewer of them where
                ``rows_are_independent``.
            k: Their keys, (B, heads, N, d).
            v: Their values, (B, heads, N, d).
            layout: Layout of the N tokens.
            heads: Which of the mixer's heads these are.

        Returns:
            The shape of ``q``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reference: what it computes cannot be checked")

    @property
    def reference_width(self) -> int:
        """Entries that ``reference`` holds for each pair of tokens: 1 where an N x N matrix is its largest tensor."""
        return 1

    def extra_repr(self) -> str:
        return repr(self.options)


class AttentionShell(nn.Module):
    """Multi-head self-attention under timm's parameter names, whose token mixing is exchangeable.

    Holds the very submodules of the timm attention it replaces (``qkv``, ``q_norm``, ``k_norm``, ``norm``, ``gate``,
    ``proj``), so that a teacher's state dict loads unchanged; the mechanism's own parameters lie under
    ``token_mixer``. Of what timm computes softmax with (``fused_attn``, ``scale``, ``attn_drop``), it has things that
    refuse to be used: see :class:`adala.attention.absent.OfSoftmax`.
    """

    def __init__(self, attention: nn.Module, token_mixer: TokenMixer):
        """Wraps the submodules of ``attention`` (timm's ``Attention``, whose weights are shared, not copied)."""
        super().__init__()
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.qkv = attention.qkv
        self.q_norm = attention.q_norm
        self.k_norm = attention.k_norm
        self.token_mixer = token_mixer
        self.norm = getattr(attention, "norm", nn.Identity())
        self.gate = getattr(attention, "gate", None)
        self.proj = attention.proj
        self.proj_drop = attention.proj_drop
        for name in OF_SOFTMAX:
            setattr(self, name, OfSoftmax(name))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x`` (B, N, D), each (B, H, N, d), normalised where the model does."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Mixes over tokens, (B, H, N, d) in and out.

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            layout: Of the N tokens; None is the layout that the model was built for, or a square grid.

        Raises:
            ValueError: The tokens are not those of the layout.
        """
        return self.token_mixer(q, k, v, self._layout_of(q.shape[-2], layout))

    def _layout_of(self, num_tokens: int, layout: TokenLayout | None) -> TokenLayout:
        if layout is None:
            return layout_of_tokens(num_tokens, self.token_mixer.shape.layout)
        if num_tokens != layout.num_tokens:
            raise ValueError(
                f"{num_tokens} tokens reached an attention layer, but a {layout.grid_size[0]} x {layout.grid_size[1]} "
                f"patch grid with {layout.num_prefix_tokens} prefix tokens has {layout.num_tokens}"
            )
        return layout

    def forward(self, x: Tensor, attn_mask: TokenLayout | None = None, is_causal: bool = False) -> Tensor:
        """Attention of ``x`` over itself, (B, N, D) in and out.

        Args:
            x: Tokens.
            attn_mask: No mask: the layout of the tokens, which timm's blocks hand on under this name; None as in
                :meth:`mix`.
            is_causal: Must be false.

        Raises:
            ValueError: A mask is given; no mechanism here is defined under one.
        """
        layout = self.check_layout(x, attn_mask, is_causal)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            return self.finish(self.token_mixer.mix_packed(qkv, layout), x)
        return self.finish(self.mix(*self.project(x), layout).transpose(1, 2).flatten(2), x)

    def check_layout(self, x: Tensor, attn_mask: TokenLayout | None, is_causal: bool) -> TokenLayout:
        """The layout of tokens (B, N, D), see :meth:`forward`.

        Raises:
            ValueError: A mask is given, or the tokens are not those of the layout.
        """
        if is_causal or not (attn_mask is None or isinstance(attn_mask, TokenLayout)):
            raise ValueError("masked or causal attention is not supported by linearized models: pass no attn_mask")
        return self._layout_of(x.shape[1], attn_mask)

    def finish(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What comes after the mixing: inner norm, gate by the input ``x``, output projection; (B, N, D) in and out."""
        mixed = self.norm(mixed)
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(mixed))
