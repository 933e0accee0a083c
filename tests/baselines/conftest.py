"""Inputs as an attention shell makes them, small options, and mixers whose parameters have left their start."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adala.attention import AttentionShape, TokenLayout, TokenMixer, build_mixer

# Options under which every mechanism approximates something at a few dozen tokens.
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "linformer": {"num_landmarks": 6},
    "performer": {"num_features": 24},
    "nystromformer": {"num_landmarks": 8},
}

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def packed_qkv() -> Callable[..., Inputs]:
    """Makes q, k, v as strided views of one packed projection (B, N, 3, H, d), as an attention shell does."""

    def make(layout: TokenLayout, batch: int = 2, num_heads: int = 3, head_dim: int = 8, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        packed = torch.randn(batch, layout.num_tokens, 3, num_heads, head_dim, generator=generator, dtype=torch.float64)
        return packed.permute(2, 0, 3, 1, 4).unbind(0)

    return make


@pytest.fixture
def small_mixer() -> Callable[..., TokenMixer]:
    """Builds a float64 mixer with small options, whose parameters are moved away from their start."""

    def make(
        name: str, layout: TokenLayout, num_heads: int = 3, head_dim: int = 8, options: dict[str, Any] | None = None
    ) -> TokenMixer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            shape = AttentionShape(num_heads, head_dim, layout)
            mixer = build_mixer(name, shape, SMALL_OPTIONS.get(name, {}) | (options or {})).double()
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return mixer

    return make
