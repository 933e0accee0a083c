"""Attention as a shell with timm's parameter names around a token mixer chosen by name."""

from adala.attention.base import (
    AttentionShape,
    AttentionShell,
    NoOptions,
    TokenMixer,
)
from adala.attention.kernels import chosen_kernel, set_kernel
from adala.attention.layout import TokenLayout, layout_of_image
from adala.attention.lora import LoraLinear, insert_lora, merge_lora
from adala.attention.precision import accumulation_dtype, full_precision
from adala.attention.registry import build_mixer, mechanism_name, mechanism_names, resolve_mechanism

__all__ = [
    "AttentionShape",
    "AttentionShell",
    "LoraLinear",
    "NoOptions",
    "TokenLayout",
    "TokenMixer",
    "accumulation_dtype",
    "build_mixer",
    "chosen_kernel",
    "full_precision",
    "insert_lora",
    "layout_of_image",
    "mechanism_name",
    "mechanism_names",
    "merge_lora",
    "resolve_mechanism",
    "set_kernel",
]
