"""PyTorch's counter against formulas, against a count by hand, and the paper's network."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import run_all
import torch
from cases import MECHANISMS, PAPER_OPTIONS, UNFUSED, Case, build_model
from cost import measure_cost, measure_model_cost
from results import read_results
from torch import nn
from torch.overrides import TorchFunctionMode

from adala.attention import resolve_mechanism
from adala.attention.linear import LinearMixer
from adala.students import linearize

TINY = Case("test_vit", {"depth": 2})
PUBLISHED = Path(__file__).parents[2] / "docs" / "bench" / "cpu" / "results.json"
LARGE = Case("vit_large_patch16_224", {"init_values": 1e-5}, image_size=(512, 512))


@dataclass(frozen=True)
class Mixing:
    """MACs of one layer's mixing by formula, a method for each mechanism.

    Attributes:
        tokens: N.
        heads: H.
        head_dim: d.
        grid_width: Columns of the patch grid.
        options: Of the mechanism.
        num_prefix_tokens: Tokens that are no patches.
        block: Number of the layer.
    """

    tokens: int
    heads: int
    head_dim: int
    grid_width: int
    options: Any = None
    num_prefix_tokens: int = 0
    block: int = 0

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def linear_form(self, features: int) -> int:
        """a (b^T v) and the normaliser a . sum b: 2 N M D + N M H."""
        return self.tokens * features * (2 * self.dim + self.heads)

    def none(self) -> int:
        return 0

    def softmax(self) -> int:
        """Scores and weighted values."""
        return 2 * self.tokens**2 * self.dim

    def linear(self) -> int:
        return self.linear_form(self.head_dim)

    def hedgehog(self) -> int:
        """2 N D f for the feature maps; 2f features."""
        columns = self.options.feature_dim or max(1, self.head_dim // 2)
        features = columns if self.options.half else 2 * columns
        return 2 * self.tokens * self.dim * columns + self.linear_form(features)

    lolcats = hedgehog

    def linformer(self) -> int:
        """Projected keys and values, scores, weighted values."""
        return 4 * self.tokens * min(self.options.num_landmarks, self.tokens) * self.dim

    def performer(self) -> int:
        """2 N D M for the projections."""
        features = self.options.num_features
        return 2 * self.tokens * self.dim * features + self.linear_form(features)

    def cosformer(self) -> int:
        """2d features, 4d in two dimensions."""
        return self.linear_form(self.head_dim * (4 if self.options.two_dimensional else 2))

    def nystromformer(self) -> int:
        """4 M^3 H for each step of the pseudo-inverse; the convolution's N D kernel; means are free."""
        tokens, landmarks = self.tokens, self.options.num_landmarks
        convolution = tokens * self.dim * (self.options.conv_kernel or 0)
        if tokens <= landmarks:
            return self.softmax() + convolution
        inverse = 4 * self.options.pinv_iterations * landmarks**3 * self.heads
        return 4 * tokens * landmarks * self.dim + 2 * landmarks**2 * self.dim + inverse + convolution

    def monarch(self) -> int:
        """M b D ((2T + 1) b + 2 T M) for T steps, M blocks of b tokens, padding included."""
        block, steps = self.options.block_size or self.grid_width, self.options.num_steps
        blocks = -(-self.tokens // block)
        return blocks * block * self.dim * ((2 * steps + 1) * block + 2 * steps * blocks)

    def window(self) -> int:
        """Pairs of patches in a window, patches with prefix tokens, and prefix tokens with all."""
        side, shift = self.options.window, self.options.window // 2 * (self.block % 2)
        prefix, patches = self.num_prefix_tokens, self.tokens - self.num_prefix_tokens
        pairs = 1
        for length in (patches // self.grid_width, self.grid_width):
            sizes = Counter((place - shift) // side for place in range(length)).values()
            pairs *= length**2 if length <= side else sum(size**2 for size in sizes)
        return 2 * (pairs + patches * prefix + prefix * self.tokens) * self.dim


def formula(case: Case, model: nn.Module) -> int:
    """MACs of one image: patch embedding, every linear layer of the blocks, and the mixing."""
    rows, columns = (size // patch for size, patch in zip(case.image_size, model.patch_embed.patch_size, strict=True))
    tokens = rows * columns + model.num_prefix_tokens
    layers = sum(m.in_features * m.out_features for m in model.blocks.modules() if isinstance(m, nn.Linear))
    options = None if case.mechanism == "none" else resolve_mechanism(case.mechanism).Options(**case.options)
    mixing = [
        Mixing(tokens, b.attn.num_heads, b.attn.head_dim, columns, options, model.num_prefix_tokens, number)
        for number, b in enumerate(model.blocks)
    ]
    mixed = sum(getattr(layer, case.mechanism)() for layer in mixing)
    return rows * columns * model.patch_embed.proj.weight.numel() + tokens * layers + mixed


class BruteCount(TorchFunctionMode):
    """Adds up rows x inner x columns of every matrix product and convolution that is really called on real tensors."""

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in ("matmul", "__matmul__"):
            self.macs += out.numel() * args[0].shape[-1]
        elif name == "linear":
            self.macs += out.numel() * args[1].shape[-1]
        elif name == "conv2d":
            self.macs += out.numel() * args[1][0].numel()
        elif name == "einsum":
            assert args[0] == "nm,bhnd->bhmd", "teach the test this sum"
            self.macs += out.numel() * args[1].shape[0]
        elif name == "scaled_dot_product_attention":
            self.macs += 2 * args[0].numel() * args[1].shape[-2]
        return out


@pytest.mark.parametrize("options", ["default", "paper", "small"])
@pytest.mark.parametrize("mechanism", (*MECHANISMS, "window"))
def test_the_counter_agrees_with_formula_and_brute_force(mechanism, options, monkeypatch):
    """On 35 tokens (5 x 7 patches would not fit a square) and with landmarks below and above that."""
    # The products inside a kernel cannot be seen; that it is counted like plain operations, the second line looks at.
    monkeypatch.setattr("adala.attention.kernels.choice._chosen", "reference")
    small = {"linformer": {"num_landmarks": 5}, "nystromformer": {"num_landmarks": 6, "conv_kernel": 3}}
    small |= {"hedgehog": {"half": True, "feature_dim": 5}, "cosformer": {"two_dimensional": True}}
    small |= {"window": {"window": 2}, "performer": {"num_features": 9}, "monarch": {"block_size": 4, "num_steps": 3}}
    chosen = {"default": {}, "paper": PAPER_OPTIONS.get(mechanism, {}), "small": small.get(mechanism, {})}[options]
    case = replace(TINY, mechanism=mechanism, image_size=(80, 112), options=chosen, softmax=UNFUSED)
    model = build_model(case)
    with torch.no_grad(), BruteCount() as brute:
        model(torch.randn(1, 3, *case.image_size))
    assert formula(case, model) == brute.macs
    monkeypatch.undo()
    assert measure_cost(case).macs == brute.macs


@pytest.mark.parametrize("mechanism", (*MECHANISMS, "window"))
def test_the_counter_agrees_with_the_formula_in_the_papers_network(mechanism):
    case = replace(LARGE, mechanism=mechanism, options=PAPER_OPTIONS.get(mechanism, {}))
    with torch.device("meta"):
        expected = formula(case, build_model(case))
    assert measure_cost(case).macs == pytest.approx(expected, rel=0.01)


def test_a_student_of_several_mechanisms_costs_what_its_blocks_do():
    case = replace(TINY, mechanism="linear", image_size=(512, 512))
    with torch.device("meta"):
        teacher = case.build_backbone()
        student = linearize(teacher, "linear", block_mechanisms={1: "window"}).eval()
    attention = student.blocks[1].attn
    layer = Mixing(32 * 32 + 1, attention.num_heads, attention.head_dim, 32, attention.token_mixer.options, 1, block=1)
    difference = measure_model_cost(student, case.image_size).macs - measure_cost(case).macs
    assert difference == layer.window() - layer.linear()


def test_a_mixer_that_does_more_than_its_formula_is_counted(monkeypatch):
    case = replace(TINY, mechanism="linear", image_size=(512, 512))
    before, forward = measure_cost(case).macs, LinearMixer.forward
    monkeypatch.setattr(LinearMixer, "forward", lambda self, q, k, v, t: forward(self, q, k, v, t) + 0 * (q @ k.mT) @ v)
    model = build_model(replace(TINY, mechanism="linear"))
    attention = model.blocks[0].attn
    twice = Mixing(32 * 32 + model.num_prefix_tokens, attention.num_heads, attention.head_dim, 32).softmax()
    assert measure_cost(case).macs == before + len(model.blocks) * twice


def test_the_papers_network_at_512_px():
    costs = {
        m: measure_cost(replace(LARGE, mechanism=m, options=PAPER_OPTIONS.get(m, {}))) for m in ("softmax", "linear")
    }
    assert costs["softmax"].tokens == 1025
    assert costs["softmax"].parameters == costs["linear"].parameters == 304_198_656
    assert costs["softmax"].macs / 1e9 == pytest.approx(361.99, rel=1e-3)
    assert costs["linear"].macs / 1e9 == pytest.approx(313.57, rel=1e-3)
    assert (costs["softmax"].macs - costs["linear"].macs) / 1e9 == pytest.approx(48.4, abs=0.05)


def test_the_published_table_of_the_papers_network():
    published = {row["mechanism"]: row for row in read_results(PUBLISHED).paper}
    assert {row["mechanism"]: row for row in run_all.paper_table()} == published


@pytest.mark.parametrize(
    "mechanism, added",
    [
        ("hedgehog", 24 * 2 * 16 * 64 * 32),
        ("lolcats", 24 * 2 * 16 * 64 * 32),
        ("linformer", 24 * 2 * 1025 * 32),
        ("performer", 0),
        ("cosformer", 0),
        ("nystromformer", 0),
        ("monarch", 0),
        ("none", 0),
    ],
)
def test_the_papers_additional_parameters(mechanism, added):
    cost = measure_cost(replace(LARGE, mechanism=mechanism, options=PAPER_OPTIONS.get(mechanism, {})))
    assert cost.parameters == 304_198_656 + added


def test_monarch_with_the_papers_options_by_hand():
    """1025 tokens in 33 blocks of 32, three steps: M b D ((2T + 1) b + 2 T M)."""
    options = resolve_mechanism("monarch").Options(**PAPER_OPTIONS["monarch"])
    size = Mixing(tokens=1025, heads=16, head_dim=64, grid_width=32, options=options)
    assert size.monarch() == 33 * 32 * 1024 * (7 * 32 + 6 * 33)
