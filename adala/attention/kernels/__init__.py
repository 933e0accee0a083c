"""Fused kernels, and where they can run. Imports nothing of Triton before one of them runs."""

from adala.attention.kernels.elu import Launch, fused_elu_attention, fused_elu_attention_packed, packed_launches
from adala.attention.kernels.support import is_interpreted, unsupported_reason

__all__ = [
    "Launch",
    "fused_elu_attention",
    "fused_elu_attention_packed",
    "is_interpreted",
    "packed_launches",
    "unsupported_reason",
]
