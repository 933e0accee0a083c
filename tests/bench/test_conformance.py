"""The conformance program on the stored cases, on one of the foreign format for every option, and on planted errors.

The generated cases are evaluated densely and in float64, by the options as the foreign format names them. Each is also
offered with its option withheld, which must fail: a translation that passed over the option would not notice.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance
import foreign_oracles
import pytest
import reduce_oracles
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adala.attention import TokenLayout, mechanism_names
from adala.attention.linear import elu_attention_reference, linear_attention_reference
from adala.attention.softmax import softmax_attention_reference
from baselines.cosformer import CosformerOptions, cosformer_reference
from baselines.linformer import linformer_reference
from baselines.monarch import MonarchOptions, monarch_reference

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "data" / "oracles"

Hyper = dict[str, Any]
Tensors = dict[str, Tensor]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(num_tokens: int = 29, scale: float = 1.0) -> Tensors:
    q, k, v = random(num_tokens, 3, 2, 2, num_tokens, 8)
    return {"q": scale * q, "k": scale * k, "v": v}


def softmax(hyper: Hyper, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    return {"out": softmax_attention_reference(q, k, v, hyper.get("scale"))}


def linear_elu(hyper: Hyper, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    return {"out": elu_attention_reference(q, k, v, hyper.get("den_eps_added", 1e-6))}


def linformer(hyper: Hyper, q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor | None = None) -> Tensors:
    return {"out": linformer_reference(q, k, v, E, E if F is None else F, hyper.get("scale"))}


def cosformer(hyper: Hyper, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    options = CosformerOptions(den_min=hyper.get("den_clamp_min", 1e-6))
    return {"out": cosformer_reference(q, k, v, TokenLayout((1, q.shape[2]), 0), options)}


def performer(hyper: Hyper, q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensors:
    query_w, key_w = (x / 8**0.25 @ projection.T for x in (q, k))
    query_h, key_h = (x.square().sum(-1, keepdim=True) / 2 / 8**0.5 for x in (q, k))
    if hyper.get("kernel") == "relu":
        features = (w.relu() + hyper.get("kernel_eps", 1e-3) for w in (query_w, key_w))
        return {"out": linear_attention_reference(*features, v)}
    eps, key_max = hyper.get("feature_eps", 1e-4), key_w.amax((-2, -1), keepdim=True)
    query_features = (query_w - query_h - query_w.amax(-1, keepdim=True)).exp() + eps
    out = linear_attention_reference(query_features, (key_w - key_h - key_max).exp() + eps, v)
    log_weights = torch.logsumexp(query_w[..., :, None, :] + (key_w - key_h)[..., None, :, :], -1)
    return {"out": out, "out_eps0": log_weights.softmax(-1) @ v}


def nystromformer(hyper: Hyper, q: Tensor, k: Tensor, v: Tensor, conv_weight: Tensor | None = None) -> Tensors:
    num_landmarks, num_tokens, scale = hyper["m"], q.shape[2], 8**-0.5
    length = num_tokens // num_landmarks
    num_short = num_landmarks * (length + 1) - num_tokens
    lengths = [length + (segment >= num_short) for segment in range(num_landmarks)]
    q_means, k_means = (torch.stack([part.mean(-2) for part in x.split(lengths, -2)], -2) for x in (q, k))
    middle, identity = (scale * q_means @ k_means.mT).softmax(-1), torch.eye(num_landmarks, dtype=q.dtype)
    largest = middle.sum(-2, keepdim=True).amax(-1, keepdim=True)
    inverse = middle.mT / (largest.max() if "ALL" in hyper.get("pinv_init", "") else largest)
    for _ in range(hyper.get("pinv_iters", 6)):
        a = middle @ inverse
        inverse = inverse @ (13 * identity - a @ (15 * identity - a @ (7 * identity - a))) / 4
    out = (scale * q @ k_means.mT).softmax(-1) @ inverse @ (scale * q_means @ k.mT).softmax(-1) @ v
    if conv_weight is not None:
        kernel = conv_weight.shape[2]
        shifted = torch.nn.functional.pad(v, (0, 0, kernel // 2, kernel // 2)).unfold(2, kernel, 1)
        out = out + torch.einsum("bhndk,hk->bhnd", shifted, conv_weight[:, 0, :, 0])
    return {"out": out}


def monarch(hyper: Hyper, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    side = "right" if str(hyper.get("pad")).startswith("post") else "left"
    guards = {"out": hyper.get("eps", 1e-12), "out_exact": None}
    block_size, steps = hyper["block_size"], hyper["steps"]
    return {
        name: monarch_reference(q, k, v, block_size, MonarchOptions(None, steps, side, eps))
        for name, eps in guards.items()
    }


def hedgehog(hyper: Hyper, q: Tensor, k: Tensor, v: Tensor, W_q: Tensor, W_k: Tensor | None = None) -> Tensors:
    tied, clamp_min = hyper.get("tied_qk", False), hyper.get("clamp_min", 1e-12)
    leaves = {"q": W_q.requires_grad_()} | ({} if tied else {"k": W_k.requires_grad_()})

    def features(x: Tensor, weight: Tensor) -> Tensor:
        z = x @ weight
        parts = [z, -z] if hyper.get("negated_half", True) else [z]
        if hyper.get("activation") == "exp_dim":
            maps = [(part - part.max(-1, keepdim=True).values).exp() for part in parts]
        else:
            maps = [part.exp() / part.exp().sum(-1, keepdim=True) for part in parts]
        return torch.cat(maps, -1).clamp(min=clamp_min)

    weights = features(q, W_q) @ features(k, W_q if tied else W_k).mT
    weights = weights / (weights.sum(-1, keepdim=True) + hyper.get("den_eps_added", 1e-12))
    target = (q @ k.mT / 8**0.5).softmax(-1)
    losses = {
        "xent": -(target * weights.clamp(min=clamp_min).log()).sum(-1).mean(),
        "mse": (weights @ v - target @ v).square().mean(),
    }
    found = {"out": (weights @ v).detach()}
    # The loss that is in our package divides by the sum alone.
    for name, value in {} if hyper.get("den_eps_added", 0) > 1e-9 else losses.items():
        found[f"loss_{name}"] = value.detach().reshape(1)
        gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        found |= {f"grad_W_{side}_{name}": gradient for side, gradient in zip(leaves, gradients, strict=True)}
        if tied and W_k is not None:
            found[f"grad_W_k_{name}"] = gradients[0].clone()
    return found


def lora(
    hyper: Hyper, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None
) -> Tensors:
    scaling = hyper.get("scaling", hyper.get("alpha", 0) / hyper["r"])
    out = x @ (weight + scaling * lora_B @ lora_A).T
    return {"out": out if bias is None else out + bias}


def dead(inputs: Tensors) -> Tensors:
    """Queries without a positive entry."""
    inputs["q"][0, 1, 3] = -inputs["q"][0, 1, 3].abs()
    inputs["q"][1, :, 7] = 0
    return inputs


E, F = random(4, 40, 6), random(5, 40, 6)
SLICE = {"k": 6, "max_len": 40, "resize": "slice"}
PROJECTION = {"projection": random(8, 12, 8)}
CONVOLUTION = {"conv_weight": random(10, 2, 1, 5, 1)}
W_Q, W_K = random(32, 2, 8, 5), random(33, 2, 8, 5)
BOTH = {"W_q": W_Q, "W_k": W_K}
LAYER = {
    "x": random(41, 2, 7, 12),
    "weight": random(42, 10, 12),
    "lora_A": random(44, 3, 12),
    "lora_B": random(45, 10, 3),
}
GLOBAL = "K2^T / maximum over ALL batches and heads"

# Name, method, options, option whose absence must be noticed (None where the tensors tell), inputs and weights.
CASES: list[tuple[str, Callable[..., Tensors], Hyper, str | None, Tensors]] = [
    ("softmax-defaults", softmax, {}, None, qkv()),
    ("softmax-scale", softmax, {"scale": 0.7}, "scale", qkv()),
    ("linear-defaults", linear_elu, {}, None, qkv()),
    ("linear-den", linear_elu, {"den_eps_added": 0.5}, "den_eps_added", qkv()),
    ("linformer-defaults", linformer, {}, None, qkv() | {"E": E[:29], "F": F[:29]}),
    ("linformer-slice", linformer, SLICE, None, qkv() | {"E": E, "F": F}),
    ("linformer-scale", linformer, SLICE | {"scale": 0.9}, "scale", qkv() | {"E": E, "F": F}),
    ("linformer-shared", linformer, SLICE | {"share_kv": True}, "share_kv", qkv() | {"E": E}),
    ("cosformer-dead", cosformer, {}, None, dead(qkv())),
    ("cosformer-small", cosformer, {}, None, qkv(scale=1e-4)),
    ("cosformer-den", cosformer, {"den_clamp_min": 60.0}, "den_clamp_min", dead(qkv())),
    ("performer-defaults", performer, {"m": 12}, None, qkv() | PROJECTION),
    ("performer-eps", performer, {"feature_eps": 0.02}, "feature_eps", qkv() | PROJECTION),
    ("performer-large", performer, {"kernel": "softmax"}, None, qkv(scale=8.0) | PROJECTION),
    ("performer-relu", performer, {"kernel": "relu"}, "kernel", qkv() | PROJECTION),
    ("performer-relu-eps", performer, {"kernel": "relu", "kernel_eps": 0.3}, "kernel_eps", qkv() | PROJECTION),
    ("nystromformer-defaults", nystromformer, {"m": 6}, "m", qkv()),
    ("nystromformer-global", nystromformer, {"m": 6, "pinv_init": GLOBAL}, "pinv_init", qkv()),
    ("nystromformer-iterations", nystromformer, {"m": 6, "pinv_iters": 2}, "pinv_iters", qkv()),
    ("nystromformer-even", nystromformer, {"m": 6, "pinv_init": "per-matrix: its own"}, None, qkv(30)),
    ("nystromformer-conv", nystromformer, {"m": 6, "conv_kernel": 5, "conv": "on v"}, None, qkv() | CONVOLUTION),
    ("monarch-defaults", monarch, {"block_size": 6, "steps": 2}, "block_size", qkv()),
    ("monarch-steps", monarch, {"block_size": 6, "steps": 3, "pad": "pre (left)", "pad_tokens": 1}, "steps", qkv()),
    ("monarch-post", monarch, {"block_size": 6, "steps": 2, "pad": "post (right)"}, "pad", qkv()),
    ("monarch-even", monarch, {"block_size": 6, "steps": 3, "pad": "none", "pad_tokens": 0}, None, qkv(30)),
    ("monarch-eps", monarch, {"block_size": 7, "steps": 2, "eps": 0.03}, "eps", qkv()),
    ("monarch-large", monarch, {"block_size": 7, "steps": 2, "blocks": 5}, None, qkv(scale=3.0)),
    ("hedgehog-defaults", hedgehog, {}, None, qkv() | BOTH),
    ("hedgehog-large", hedgehog, {}, None, qkv(scale=5.0) | BOTH),
    ("hedgehog-exp", hedgehog, {"activation": "exp_dim"}, "activation", qkv() | BOTH),
    ("hedgehog-half", hedgehog, {"negated_half": False, "feature_dim_total": 5}, "negated_half", qkv() | BOTH),
    ("hedgehog-tied", hedgehog, {"tied_qk": True}, "tied_qk", qkv() | {"W_q": W_Q}),
    ("hedgehog-tied-twice", hedgehog, {"tied_qk": True}, "tied_qk", qkv() | {"W_q": W_Q, "W_k": W_Q.clone()}),
    ("hedgehog-clamp", hedgehog, {"clamp_min": 0.15}, "clamp_min", qkv() | BOTH),
    ("lolcats-den", hedgehog, {"den_eps_added": 0.5}, "den_eps_added", qkv() | BOTH),
    ("lolcats-losses", hedgehog, {"feature_dim_W": 5, "activation": "softmax_dim"}, None, qkv() | BOTH),
    ("lolcats-lora", lora, {"r": 3, "alpha": 6, "scaling": 1.5}, "scaling", LAYER | {"bias": random(43, 10)}),
    ("lolcats-lora-alpha", lora, {"r": 3, "alpha": 4}, "alpha", LAYER),
]
NAMES = [name for name, *_ in CASES]


def build(name: str) -> tuple[dict[str, Any], Tensors, str | None]:
    """Metadata and tensors of a case of the foreign format, and its option to be withheld."""
    _, dense, hyper, withheld, given = CASES[NAMES.index(name)]
    method = "lolcats" if name.startswith("lolcats") else dense.__name__
    outputs = dense(hyper, **{key: tensor.double() for key, tensor in given.items()})
    return {"method": method, "case": name, "hyper": dict(hyper)}, given | outputs, withheld


def load(path: Path) -> tuple[dict[str, Any], Tensors]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["meta"]), {name: file.get_tensor(name) for name in file.keys()}


def store(path: Path, meta: dict[str, Any], tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"meta": json.dumps(meta)})
    return path


@pytest.fixture
def check(tmp_path, capsys) -> Callable[[dict[str, Any], Tensors], str]:
    """What the program says of a case; its exit code is 0 exactly where that is ok."""

    def check(meta: dict[str, Any], tensors: Tensors) -> str:
        code = conformance.main([str(store(tmp_path / "case.safetensors", meta, tensors))])
        line, end = capsys.readouterr().out.split("\n")
        assert end == "" and code == (0 if line.endswith(" ok") else 1)
        return line

    return check


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_answered(name, check):
    meta, tensors, _ = build(name)
    line = check(meta, tensors)
    assert line.endswith(" ok") and f" {name} " in line, line
    assert ("losses, gradients" in line) == ("loss_xent" in tensors)


@pytest.mark.parametrize("name", [name for name, _, _, withheld, _ in CASES if withheld])
def test_a_withheld_option_is_noticed(name, check):
    meta, tensors, withheld = build(name)
    del meta["hyper"][withheld]
    line = check(meta, tensors)
    assert "FAILED: " in line or "not understood: " in line, line


ABSENT = object()

# A generated case (of the foreign format) or stored file (of ours), what is spoilt in it (metadata's key, its options'
# key or a tensor), its value or a function of the one it had, and what must be said of it.
SPOILT = [
    ("monarch", "out", lambda out: out + 1e-8, "FAILED: out"),
    ("monarch", "out", lambda out: out * torch.where(out == out.max(), math.nan, 1), "FAILED: out"),
    ("monarch", "out", lambda out: out[:, :, 1:], "FAILED: out"),
    ("monarch", "out", ABSENT, "not understood: KeyError: 'out'"),
    ("monarch", "q", ABSENT, "not understood: KeyError: 'q'"),
    ("monarch", "mask", torch.ones(3), "not understood: RuntimeError: Error(s) in loading state_dict for MonarchMixer"),
    ("monarch", "loss_l1", torch.ones(1), "not understood: unknown tensor 'loss_l1'"),
    ("monarch", "options.temperature", 2.0, "not understood: mechanism 'monarch' has no option 'temperature'"),
    ("monarch", "options.padding_side", "both", "not understood: option padding_side is 'both'"),
    ("monarch", "mechanism", "reformer", "not understood: unknown mechanism 'reformer'"),
    ("monarch", "outptus", {}, "unexpected keyword argument 'outptus'"),
    ("monarch", "options", ABSENT, "missing 1 required positional argument: 'options'"),
    ("performer", "out_eps0", lambda out: out + 1e-8, "FAILED: out_eps0"),
    ("performer", "outputs", {}, "not understood: RuntimeError: Error(s) in loading state_dict for PerformerMixer"),
    (
        "hedgehog",
        "key_weight",
        ABSENT,
        "not understood: RuntimeError: Error(s) in loading state_dict for HedgehogMixer",
    ),
    ("linformer", "max_tokens", 300, "not understood: RuntimeError: Error(s) in loading state_dict for LinformerMixer"),
    ("monarch-large", "out_exact", lambda out: out + 1e-8, "FAILED: out_exact"),
    ("lolcats-lora", "out", lambda out: out + 1e-8, "FAILED: out"),
    ("lolcats-lora", "q", torch.ones(1, 1, 1, 1), "RuntimeError: Error(s) in loading state_dict for LoraLinear"),
    ("lolcats-lora", "out_exact", torch.ones(3), "got an unexpected keyword argument 'eps'"),
    ("lolcats-lora", "hyper.dropout", 0.1, "not understood: option 'dropout' is 0.1"),
    ("linear-den", "hyper.phi", "relu(x)", "not understood: option 'phi' is 'relu(x)'"),
    ("cosformer-den", "hyper.act", "elu", "not understood: option 'act' is 'elu'"),
    ("lolcats-losses", "loss_xent", lambda loss: loss * (1 + 1e-8), "FAILED: loss_xent"),
    ("lolcats-losses", "grad_W_k_mse", lambda gradient: gradient * (1 + 1e-8), "FAILED: grad_key_weight_mse"),
    ("hedgehog-tied", "grad_W_q_xent", lambda gradient: gradient / 2, "FAILED: grad_query_weight_xent"),
    ("hedgehog-tied-twice", "W_k", W_K, "not understood: option 'tied_qk' is true, but"),
    ("hedgehog-half", "hyper.feature_dim_total", 10, "not understood: option 'feature_dim_total' is 10"),
    ("hedgehog-defaults", "hyper.activation", "relu", "not understood: option 'activation' is 'relu'"),
    ("hedgehog-defaults", "hyper.feature_dim_W", 4, "not understood: option 'feature_dim_W' is 4"),
    ("performer-relu", "out_eps0", random(1, 2, 2, 29, 8).double(), "FAILED: out_eps0"),
    ("performer-relu", "hyper.den_eps", 0.1, "not understood: option 'den_eps' is 0.1"),
    ("performer-relu", "hyper.kernel", "elu", "not understood: option 'kernel' is 'elu'"),
    ("linformer-slice", "hyper.resize", "bilinear", "not understood: option 'resize' is 'bilinear'"),
    ("linformer-slice", "hyper.max_len", 41, "not understood: option 'max_len' is 41"),
    ("linformer-slice", "hyper.share_heads", False, "not understood: option 'share_heads' is False"),
    ("nystromformer-defaults", "hyper.scale", 1, "not understood: option 'scale' is 1"),
    ("nystromformer-defaults", "hyper.conv", "on v", "not understood: option 'conv' is 'on v'"),
    ("nystromformer-defaults", "hyper.conv_kernel", 5, "RuntimeError: Error(s) in loading state_dict"),
    ("nystromformer-defaults", "hyper.pinv_init", "ones", "not understood: option 'pinv_init' is 'ones'"),
    ("monarch-post", "hyper.pad", "both sides", "not understood: option 'pad' is 'both sides'"),
    ("monarch-post", "hyper.pad_tokens", 2, "not understood: option 'pad_tokens' is 2"),
    ("monarch-post", "hyper.N", 11, "not understood: option 'N' is 11"),
    ("monarch-post", "hyper.block_size", ABSENT, "not understood: option 'block_size' is missing"),
    ("monarch-post", "hyper.temperature", 2.0, "not understood: unknown option 'temperature'"),
    ("monarch-post", "mask", torch.ones(3), "not understood: unknown tensor 'mask'"),
    ("monarch-post", "method", "reformer", "not understood: unknown method 'reformer'"),
    ("monarch-post", "hyper", ABSENT, "not understood: KeyError: 'hyper'"),
]


@pytest.mark.parametrize(
    ("name", "spoilt", "value", "said"),
    SPOILT,
    ids=[f"{name}-{spoilt}-{i}" for i, (name, spoilt, *_) in enumerate(SPOILT)],
)
def test_what_is_spoilt_is_reported(name, spoilt, value, said, check):
    meta, tensors, _ = build(name) if name in NAMES else (*load(STORED / f"{name}_n257.safetensors"), None)
    *group, key = spoilt.split(".")
    in_metadata = key in ("method", "mechanism", "hyper", "options", "outputs", "outptus", "max_tokens")
    place = meta[group[0]] if group else meta if in_metadata else tensors
    if value is ABSENT:
        del place[key]
    else:
        place[key] = value(place[key]) if callable(value) else value
    assert said in check(meta, tensors)


def test_rows_stored_as_zero_must_be_zero_exactly(check):
    """A query too small for the clamped denominator to matter: 1e-14 is far within the tolerance of other rows."""
    meta, tensors, _ = build("cosformer-dead")
    tensors["q"][1, 0, 7] = 1e-20
    assert check(meta, tensors).endswith("FAILED: out")


def test_an_adapter_is_also_checked_merged(check, monkeypatch):
    meta, tensors, _ = build("lolcats-lora")
    monkeypatch.setattr(conformance, "merge_lora", lambda state: {"weight": state["weight"], "bias": state["bias"]})
    assert check(meta, tensors).endswith("FAILED: out")


def test_float32_is_checked_on_its_own_and_takes_the_authors_error_into_account(check):
    """Scores of 1e5 that differ by a few units: float64 has digits left for them, float32 has not."""
    inputs = qkv()
    inputs |= {"q": 1000 * inputs["q"], "k": 100 * inputs["k"][:, :, :1] + 0.003 * inputs["k"]}
    tensors = inputs | softmax({}, **{name: tensor.double() for name, tensor in inputs.items()})
    meta = {"method": "softmax", "case": "near ties", "hyper": {}}
    assert check(meta, tensors).endswith("FAILED: out")
    tolerant_line = check(meta | {"official_fp32_max_abs_err": 1.0}, tensors)
    assert tolerant_line.endswith(" ok") and "(below 5.0e+00)" in tolerant_line


def test_stored_cases_of_all_mechanisms_pass_and_are_small():
    command = [sys.executable, "bench/conformance.py", str(STORED)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout.splitlines()
    # Windows on a grid with prefix tokens are nobody else's: there are no authors' numbers to hold them to.
    assert sorted(line.split()[0] for line in said) == sorted(set(mechanism_names()) - {"window"})
    assert all(line.endswith(" ok") for line in said)
    assert sum(path.stat().st_size for path in STORED.iterdir()) < 3 * 2**20


def test_stored_cases_need_no_translation(monkeypatch):
    monkeypatch.delattr(foreign_oracles, "translate")
    assert conformance.main([str(STORED)]) == 0


def test_one_wrong_output_among_right_ones_makes_the_program_fail(tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    for path in STORED.iterdir():
        meta, tensors = load(path)
        tensors["out"][..., 100, 7] += 1e-6 * (path.stem == "hedgehog_n257")
        store(tmp_path / "inner" / path.name, meta, tensors)
    assert conformance.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if not line.endswith(" ok")] == ["hedgehog"]


def test_paths_without_cases_are_not_passed_over(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"q": torch.ones(1)}, tmp_path / "bare.safetensors")
    reasons = {
        "empty": "a folder without",
        "text.safetensors": "SafetensorError",
        "bare.safetensors": "no metadata key 'meta'",
        "absent.safetensors": "FileNotFoundError: No such file",
    }
    assert conformance.main([str(tmp_path / name) for name in reasons]) == 1
    for line, reason in zip(capsys.readouterr().out.splitlines(), reasons.values(), strict=True):
        assert f"not understood: {reason}" in line


def reduce(name: str, tmp_path: Path) -> tuple[dict[str, Any], Tensors]:
    meta, tensors, _ = build(name)
    (tmp_path / "whole").mkdir()
    store(tmp_path / "whole" / "case.safetensors", meta | {"out_abs_max": 1.0}, tensors)
    assert reduce_oracles.main([str(tmp_path / "whole"), str(tmp_path / "reduced")]) == 0
    return load(tmp_path / "reduced" / "case.safetensors")


@pytest.mark.parametrize(
    ("name", "num_heads", "weights"),
    [
        ("lolcats-losses", 2, {"query_weight": W_Q, "key_weight": W_K}),
        ("linformer-shared", 1, {"key_projection": E, "value_projection": E}),
        ("performer-large", 1, PROJECTION),
    ],
)
def test_reducing_keeps_the_numbers_and_drops_what_they_no_longer_are(name, num_heads, weights, tmp_path):
    meta, reduced = reduce(name, tmp_path)
    _, whole, _ = build(name)
    expected = {key: whole[key][:1, :num_heads] for key in ("q", "k", "v", "out", *meta["outputs"])} | weights
    assert set(reduced) == set(expected)
    assert all(torch.equal(reduced[key], expected[key]) for key in expected)
    assert "out_abs_max" not in meta
    assert conformance.main([str(tmp_path / "reduced")]) == 0


def test_a_case_that_depends_on_its_batch_is_not_reduced(tmp_path):
    with pytest.raises(ValueError, match="cannot be cut: out"):
        reduce("nystromformer-global", tmp_path)


def test_the_case_with_the_smallest_heads_is_reduced(tmp_path):
    for num_tokens in (29, 30, 28):
        inputs = qkv(num_tokens)
        meta = {"method": "softmax", "case": str(num_tokens), "hyper": {}}
        store(
            tmp_path / f"{num_tokens}.safetensors",
            meta,
            inputs | softmax({}, **{n: t.double() for n, t in inputs.items()}),
        )
    reduce_oracles.main([str(tmp_path), str(tmp_path / "reduced")])
    assert [path.name for path in (tmp_path / "reduced").iterdir()] == ["28.safetensors"]
