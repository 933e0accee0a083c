"""Formulas of parameters and MACs: against PyTorch's counter, against a count by hand, and the paper's network."""

import pytest
import torch
from cases import MECHANISMS, PAPER_OPTIONS, UNFUSED, Backbone, Case, build_model, mechanism_options
from cost import (
    MixerSize,
    analytic_macs,
    build_meta_model,
    counted_macs,
    measure_cost,
    monarch_macs,
    num_parameters,
    resolved_options,
)
from torch.overrides import TorchFunctionMode

TINY = Backbone("test_vit", {"depth": 2})
LARGE = Backbone("vit_large_patch16_224", {"init_values": 1e-5})


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
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_formula_agrees_with_two_counts(mechanism, options):
    """On 35 tokens (5 x 7 patches would not fit a square) and with landmarks below and above that."""
    small = {"linformer": {"num_landmarks": 5}, "nystromformer": {"num_landmarks": 6, "conv_kernel": 3}}
    small |= {"hedgehog": {"half": True, "feature_dim": 5}, "cosformer": {"two_dimensional": True}}
    small |= {"performer": {"num_features": 9}, "monarch": {"block_size": 4, "num_steps": 3}}
    chosen = {"default": {}, "paper": PAPER_OPTIONS.get(mechanism, {}), "small": small.get(mechanism, {})}[options]
    case = Case(TINY, mechanism, (80, 112), chosen, softmax=UNFUSED)
    model = build_model(case)
    with torch.no_grad(), BruteCount() as brute:
        model(torch.randn(1, 3, *case.image_size))
    assert analytic_macs(case, model) == brute.macs
    assert counted_macs(case, build_meta_model(case)) == brute.macs


def test_a_mixer_that_does_more_than_its_formula_is_noticed(monkeypatch):
    from adala.attention.linear import LinearMixer

    forward = LinearMixer.forward
    monkeypatch.setattr(LinearMixer, "forward", lambda self, q, k, v, t: forward(self, q, k, v, t) + 0 * (q @ k.mT) @ v)
    cost = measure_cost(Case(TINY, "linear", (512, 512), {}))
    assert cost.disagreement > 0.01


def test_the_papers_network_at_512_px():
    costs = {m: measure_cost(Case(LARGE, m, (512, 512), mechanism_options(m, "paper"))) for m in ("softmax", "linear")}
    assert costs["softmax"].tokens == 1025
    assert costs["softmax"].parameters == costs["linear"].parameters == 304_198_656
    assert costs["softmax"].macs / 1e9 == pytest.approx(361.99, rel=1e-3)
    assert costs["linear"].macs / 1e9 == pytest.approx(313.57, rel=1e-3)
    assert (costs["softmax"].macs - costs["linear"].macs) / 1e9 == pytest.approx(48.4, abs=0.05)


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
    model = build_meta_model(Case(LARGE, mechanism, (512, 512), mechanism_options(mechanism, "paper")))
    assert num_parameters(model) == 304_198_656 + added


def test_monarch_with_the_papers_options_by_hand():
    """1025 tokens in 33 blocks of 32, three steps: M b D ((2T + 1) b + 2 T M)."""
    size = MixerSize(num_tokens=1025, num_heads=16, head_dim=64, grid_width=32)
    options = resolved_options("monarch", PAPER_OPTIONS["monarch"])
    assert monarch_macs(size, options) == 33 * 32 * 1024 * (7 * 32 + 6 * 33)
