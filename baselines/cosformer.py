"""cosFormer: ReLU features re-weighted by the cosine of the distance between tokens.

Paper: "cosFormer: Rethinking Softmax in Attention", arXiv 2202.08791.

Shapes: B batch, H heads, N tokens, d head dim, M features (2d in one dimension, 4d in two).
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adala.attention import TokenLayout, TokenMixer, accumulation_dtype, full_precision
from adala.attention.linear import linear_attention
from adala.conversion import Conversion, ConversionStep

NATIVE = Conversion(name="native", steps=(ConversionStep("finetuning"),))


@dataclass(frozen=True)
class CosformerOptions:
    """Options of cosFormer.

    Attributes:
        prefix_position: ``first`` counts prefix tokens like the others, i = 1, 2, ...; ``middle`` puts each at i = N/2,
            from where no patch is further than half the way.
        two_dimensional: Rows and columns of the grid get angles of their own, (pi/2) row / height and
            (pi/2) column / width counted from 1, and the two cosines are added. Prefix tokens then are in the middle.
        den_min: Lower clamp of the denominator.
    """

    prefix_position: Literal["first", "middle"] = "first"
    two_dimensional: bool = False
    den_min: float = 1e-6

    def __post_init__(self) -> None:
        if self.prefix_position not in ("first", "middle"):
            raise ValueError(f"option prefix_position is {self.prefix_position!r}: it can be 'first' or 'middle'")


def token_angles(layout: TokenLayout, options: CosformerOptions) -> Tensor:
    """Angles of the tokens in radians, (axes, N) in float64 on the CPU, with one axis or two."""
    num_prefix, (height, width) = layout.num_prefix_tokens, layout.grid_size
    cpu = {"dtype": torch.float64, "device": "cpu"}
    if options.two_dimensional:
        rows = torch.arange(1, height + 1, **cpu).repeat_interleave(width) / height
        columns = torch.arange(1, width + 1, **cpu).repeat(height) / width
        prefix = torch.full((2, num_prefix), 0.5, **cpu)
        return math.pi / 2 * torch.cat((prefix, torch.stack((rows, columns))), dim=1)
    fraction = torch.arange(1, layout.num_tokens + 1, **cpu) / layout.num_tokens
    if options.prefix_position == "middle":
        fraction[:num_prefix] = 0.5
    return math.pi / 2 * fraction[None]


@functools.lru_cache(maxsize=32)
def _sines_and_cosines(
    layout: TokenLayout, options: CosformerOptions, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """sin and cos of every axis, (2 axes, N, 1), shared by all layers of the same device."""
    # A cache filled during an evaluation under inference mode must still serve a training step.
    with torch.inference_mode(False):
        angles = token_angles(layout, options)
        table = torch.stack((angles.sin(), angles.cos()), dim=1).flatten(0, 1)
        return table[..., None].to(device=device, dtype=dtype)


class CosformerMixer(TokenMixer):
    """Linear attention over relu(x) times (sin, cos) of the token's angle. 4 N D d MACs, no parameters.

    N in the angles is the current number of tokens. A query without a positive entry comes out as exactly zero.

    Paper: arXiv 2202.08791, the decomposed cosine re-weighting.
    Differs: the options are ours; the paper treats images as plain sequences.
    """

    Options = CosformerOptions
    native_conversion: ClassVar[Conversion] = NATIVE

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        dtype = accumulation_dtype(v)
        with full_precision(v):
            table = _sines_and_cosines(layout, self.options, dtype, v.device)
            query_features, key_features = (
                torch.cat([x.to(dtype).relu() * factor for factor in table], dim=-1) for x in (q, k)
            )
            return linear_attention(query_features, key_features, v, den_min=self.options.den_min)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        return cosformer_reference(q, k, v, layout, self.options)


def cosformer_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, options: CosformerOptions = CosformerOptions()
) -> Tensor:
    """cosFormer's output by way of its N x N matrix of weights, (B, H, N, d) in and out."""
    angles = token_angles(layout, options).to(q)
    nearness = (angles[:, :, None] - angles[:, None, :]).cos().sum(dim=0)
    weights = (q.relu() @ k.relu().transpose(-2, -1)) * nearness
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(options.den_min) @ v
