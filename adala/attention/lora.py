"""Low-rank adapters on the projections of an attention, under the names that the projections have without them.

Shapes: D_in and D_out a projection's width, S its parts (three for a packed qkv, one otherwise), r rank.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adala.attention.precision import full_precision

A_SUFFIX, B_SUFFIX = "lora_A", "lora_B"
SCALE_SUFFIX = "lora_scale"


class LoraLinear(nn.Linear):
    """A linear layer plus a low-rank term for each of its parts: y = x W^T + b + (alpha / r) x A^T B^T.

    ``weight`` and ``bias`` keep their names; ``lora_A`` (S, r, D_in), ``lora_B`` (S, D_out / S, r) and the buffer
    ``lora_scale`` lie beside them until :func:`merge_lora` adds the terms up.

    Paper: arXiv 2106.09685, eq. 3.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, num_parts: int = 1, parts: Sequence[int] = (0,)):
        """Takes over ``base``'s weights; B starts at zero, so that nothing changes at first.

        Args:
            base: The layer to adapt.
            rank: r.
            alpha: Numerator of the scale.
            num_parts: Equal parts that the output consists of (3 for a packed qkv).
            parts: Those that get an adapter, each one of its own.
        """
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.num_parts = num_parts
        self.scale = alpha / rank
        self.parts = tuple(parts)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        part_width = base.out_features // num_parts
        self.lora_A = nn.Parameter(torch.empty(len(self.parts), rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(len(self.parts), part_width, rank, **like))
        self.register_buffer(SCALE_SUFFIX, torch.tensor(_scales(self.scale, num_parts, self.parts), **like))
        for matrix in self.lora_A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) to (..., D_out)."""
        low = torch.einsum("...i,sri->...sr", x, self.lora_A)
        adapted = torch.einsum("...sr,sor->...so", low, self.lora_B)
        out = F.linear(x, self.weight, self.bias).unflatten(-1, (self.num_parts, -1))
        index = torch.tensor(self.parts, device=x.device)
        return out.index_add(-2, index, adapted, alpha=self.scale).flatten(-2)


def _scales(scale: float, num_parts: int, parts: Sequence[int]) -> list[float]:
    """The scale of each part's adapter, 0 for a part without one: it tells them apart in a state dict."""
    return [scale if part in parts else 0.0 for part in range(num_parts)]


def insert_lora(attention: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Puts adapters on an attention's projections: any of ``q``, ``k``, ``v`` (separate ones) and ``proj``.

    Whether the attention's own are packed into ``qkv`` or three (``q_proj``, ...) makes no difference.

    Raises:
        ValueError: An unknown target.
    """
    unknown = sorted(set(targets) - {"q", "k", "v", "proj"})
    if unknown:
        raise ValueError(f"LoRA target {unknown[0]!r}: known are q, k, v, proj")
    packed = [part for part, name in enumerate("qkv") if name in targets]
    if packed and attention.qkv is not None:
        attention.qkv = LoraLinear(attention.qkv, rank, alpha, num_parts=3, parts=packed)
    elif packed:
        for name in (f"{'qkv'[part]}_proj" for part in packed):
            setattr(attention, name, LoraLinear(getattr(attention, name), rank, alpha))
    if "proj" in targets:
        attention.proj = LoraLinear(attention.proj, rank, alpha)


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose adapters are added into their weights: W' = W + (alpha / r) B A, and the adapters gone."""
    merged = {name: value for name, value in state.items() if not name.endswith((A_SUFFIX, B_SUFFIX, SCALE_SUFFIX))}
    for name, low in state.items():
        if name.endswith(A_SUFFIX):
            prefix = name.removesuffix(A_SUFFIX)
            scale, weight = state[prefix + SCALE_SUFFIX], merged[prefix + "weight"]
            parts = scale.nonzero().flatten()
            update = torch.zeros_like(weight).unflatten(0, (len(scale), -1))
            with full_precision(weight):
                update[parts] = scale[parts, None, None] * (state[prefix + B_SUFFIX] @ low)
            merged[prefix + "weight"] = weight + update.flatten(0, 1)
    return merged
