"""Fused kernels, and where they can run. Imports nothing of Triton before one of them runs."""

from adala.attention.kernels.choice import Kernel, chosen_kernel, describe_kernel, set_kernel, uses_kernel
from adala.attention.kernels.elu import Launch, fused_elu_attention, fused_elu_attention_packed, packed_launches
from adala.attention.kernels.support import is_interpreted, unsupported_reason

__all__ = [
    "Kernel",
    "Launch",
    "chosen_kernel",
    "describe_kernel",
    "fused_elu_attention",
    "fused_elu_attention_packed",
    "is_interpreted",
    "packed_launches",
    "set_kernel",
    "unsupported_reason",
    "uses_kernel",
]
