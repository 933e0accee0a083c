"""The two mechanisms of the package, each against its formula written out row by row."""

import math

import pytest
import torch

from adala.attention import AttentionShape, TokenLayout, build_mixer
from adala.attention.linear import linear_attention, linear_attention_reference

LAYOUT = TokenLayout((1, 3), 1)
SHAPE = AttentionShape(num_heads=2, head_dim=5, layout=LAYOUT)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    """(1, 2, 4, 5) each."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, 4, 5, dtype=torch.float64, generator=generator) for _ in range(3))


def row_by_row(weight, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, den_added: float) -> torch.Tensor:
    """Sums over keys in Python, for every head and query."""
    out = torch.zeros_like(v)
    for head in range(2):
        for query in range(4):
            weights = [weight(q[0, head, query], k[0, head, key]) for key in range(4)]
            total = sum(weights) + den_added
            out[0, head, query] = sum(w / total * v[0, head, key] for key, w in enumerate(weights))
    return out


def elu_plus_one(x: torch.Tensor) -> list[float]:
    return [value + 1 if value > 0 else math.exp(value) for value in x.tolist()]


@pytest.mark.parametrize("den_added", [None, 0.5])
def test_linear(qkv, den_added: float | None) -> None:
    mixer = build_mixer("linear", SHAPE, {} if den_added is None else {"den_added": den_added})

    def weight(query: torch.Tensor, key: torch.Tensor) -> float:
        return sum(a * b for a, b in zip(elu_plus_one(query), elu_plus_one(key), strict=True))

    expected = row_by_row(weight, *qkv, 1e-6 if den_added is None else den_added)
    torch.testing.assert_close(mixer(*qkv, LAYOUT), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mixer.reference(*qkv, LAYOUT), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [None, 0.1])
def test_softmax(qkv, scale: float | None) -> None:
    mixer = build_mixer("softmax", SHAPE, {"scale": scale})

    def weight(query: torch.Tensor, key: torch.Tensor) -> float:
        return math.exp((5**-0.5 if scale is None else scale) * float(query @ key))

    expected = row_by_row(weight, *qkv, 0.0)
    torch.testing.assert_close(mixer(*qkv, LAYOUT), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mixer.reference(*qkv, LAYOUT), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("attention", [linear_attention, linear_attention_reference])
def test_a_clamped_denominator(attention) -> None:
    """One query whose weights sum to 0.75: raised to 2 by the clamp, then it divides 0.25 * 4 + 0.5 * 8."""
    features = torch.tensor([[[[0.5], [1.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[4.0], [8.0]]]], dtype=torch.float64)
    assert attention(features[:, :, :1], features, v, den_min=2.0).item() == 2.5
    assert attention(features[:, :, :1], features, v, den_added=0.25).item() == 5.0
