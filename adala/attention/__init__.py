"""Attention as a shell with timm's parameter names around a token mixer chosen by name."""

from adala.attention.base import (
    AttentionShape,
    AttentionShell,
    NoOptions,
    TokenMixer,
)
from adala.attention.layout import LayoutTracker, TokenLayout
from adala.attention.precision import accumulation_dtype, full_precision
from adala.attention.registry import build_mixer, mechanism_names, resolve_mechanism

__all__ = [
    "AttentionShape",
    "AttentionShell",
    "LayoutTracker",
    "NoOptions",
    "TokenLayout",
    "TokenMixer",
    "accumulation_dtype",
    "build_mixer",
    "full_precision",
    "mechanism_names",
    "resolve_mechanism",
]
