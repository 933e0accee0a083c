"""The conformance program on the stored cases, on generated ones for every option, and on planted errors.

The generated cases are evaluated here by the formula, densely and in float64, with nothing from the packages under
test. Each is also offered with its option withheld, which must fail: a reader that passed over the option would not
notice.
"""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "data" / "oracles"
METHODS = (
    "softmax",
    "linear_elu",
    "hedgehog",
    "lolcats",
    "linformer",
    "performer",
    "cosformer",
    "nystromformer",
    "monarch",
)


def run_conformance(*paths: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / "conformance.py"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["meta"]), {name: file.get_tensor(name) for name in file.keys()}


def store(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"meta": json.dumps(meta)})
    return path


@dataclass
class Generated:
    """A case made here.

    Attributes:
        name: The case's name.
        method: Its method.
        hyper: Its options.
        tensors: Inputs and weights in float32; outputs, losses and gradients in float64.
        withheld: The option whose absence must be noticed, or None where the tensors already tell.
    """

    name: str
    method: str
    hyper: dict[str, Any]
    tensors: dict[str, Tensor]
    withheld: str | None
    meta: dict[str, Any] = field(default_factory=dict)


def softmax_map(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    return torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5), -1)


def normalised(weights: Tensor, added: float = 0.0) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + added)


def weight_features(x, weight, exp, half, clamp_min):
    z = torch.einsum("bhnd,hdf->bhnf", x, weight)
    if exp:
        parts = [torch.exp(z - z.max(-1, keepdim=True).values), torch.exp(-z + z.min(-1, keepdim=True).values)]
    else:
        parts = [torch.softmax(z, -1), torch.softmax(-z, -1)]
    return torch.cat(parts[: 1 if half else 2], -1).clamp(min=clamp_min)


def feature_case(name, method, withheld, exp=False, half=False, tied=False, clamp_min=1e-12, added=1e-12, losses=()):
    q, k, v = qkv(31)
    weight_q, weight_k = random(32, 2, 8, 5), random(33, 2, 8, 5)
    leaf_q = weight_q.double().requires_grad_()
    leaf_k = leaf_q if tied else weight_k.double().requires_grad_()
    maps = [weight_features(x.double(), w, exp, half, clamp_min) for x, w in ((q, leaf_q), (k, leaf_k))]
    weights = normalised(torch.einsum("bhnf,bhmf->bhnm", *maps), added)
    out, target = weights @ v.double(), softmax_map(q.double(), k.double())
    values = {
        "xent": -(target * weights.clamp(min=clamp_min).log()).sum(-1).mean(),
        "mse": (out - target @ v.double()).pow(2).mean(),
    }
    tensors = {"q": q, "k": k, "v": v, "W_q": weight_q, "out": out.detach()}
    if not tied:
        tensors["W_k"] = weight_k
    for loss in losses:
        tensors[f"loss_{loss}"] = values[loss].detach().reshape(1)
        leaves = {"q": leaf_q} if tied else {"q": leaf_q, "k": leaf_k}
        for side, leaf in leaves.items():
            tensors[f"grad_W_{side}_{loss}"] = torch.autograd.grad(values[loss], leaf, retain_graph=True)[0]
    hyper = {
        "feature_dim_W": 5,
        "feature_dim_total": 5 if half else 10,
        "activation": "exp_dim" if exp else "softmax_dim",
        "negated_half": not half,
        "tied_qk": tied,
        "clamp_min": clamp_min,
        "den_eps_added": added,
    }
    return Generated(name, method, hyper, tensors, withheld)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(seed: int, num_tokens: int = 29, head_dim: int = 8, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = random(seed, 3, 2, 2, num_tokens, head_dim)
    return scale * q, scale * k, v


def linformer_case(name, withheld, scale, hyper):
    (q, k, v), e, f = qkv(3), random(4, 40, 6), random(5, 40, 6)
    keys = torch.einsum("nr,bhnd->bhrd", e[:29].double(), k.double())
    out = softmax_map(q.double(), keys, scale) @ torch.einsum("nr,bhnd->bhrd", f[:29].double(), v.double())
    hyper = {"k": 6, "max_len": 40, "resize": "slice"} | hyper
    return Generated(name, "linformer", hyper, {"q": q, "k": k, "v": v, "E": e, "F": f, "out": out}, withheld)


def cosformer_case(name, withheld, den_min, dead):
    q, k, v = qkv(6)
    if dead:
        q[0, 1, 3] = -q[0, 1, 3].abs()
        q[1, :, 7] = 0
    angle = math.pi / 2 * torch.arange(1, 30).double() / 29
    weights = q.double().relu() @ k.double().relu().mT * (angle[:, None] - angle).cos()
    out = weights / weights.sum(-1, keepdim=True).clamp(min=den_min) @ v.double()
    return Generated(name, "cosformer", {"den_clamp_min": den_min}, {"q": q, "k": k, "v": v, "out": out}, withheld)


def performer_case(name, withheld, hyper, scale=1.0):
    (q, k, v), projection = qkv(7, scale=scale), random(8, 12, 8)
    exponents = []
    for x in (q, k):
        x = x.double() / 8**0.25
        exponents.append((x @ projection.double().T, x.pow(2).sum(-1, keepdim=True) / 2))
    (query_w, query_h), (key_w, key_h) = exponents
    tensors = {"q": q, "k": k, "v": v, "projection": projection}
    if hyper.get("kernel") == "relu":
        a, b = (w.relu() + hyper.get("kernel_eps", 1e-3) for w in (query_w, key_w))
    else:
        eps = hyper.get("feature_eps", 1e-4)
        a = (query_w - query_h - query_w.max(-1, keepdim=True).values).exp() + eps
        b = (key_w - key_h - key_w.amax((-2, -1), keepdim=True)).exp() + eps
        log_weights = torch.logsumexp(query_w[..., :, None, :] + (key_w - key_h)[..., None, :, :], -1)
        tensors["out_eps0"] = torch.softmax(log_weights, -1) @ v.double()
    tensors["out"] = normalised(a @ b.mT) @ v.double()
    return Generated(name, "performer", {"m": 12} | hyper, tensors, withheld)


def nystromformer_case(name, withheld, hyper, num_tokens=29):
    q, k, v = qkv(9, num_tokens)
    num_landmarks, length = 6, num_tokens // 6
    lengths = [length + (i >= 6 * (length + 1) - num_tokens) for i in range(num_landmarks)]
    means = [torch.stack([part.mean(-2) for part in x.double().split(lengths, -2)], -2) for x in (q, k)]
    middle = softmax_map(*means)
    largest = middle.sum(-2).max() if "ALL" in hyper.get("pinv_init", "") else middle.sum(-2).amax(-1)[..., None, None]
    inverse, identity = middle.mT / largest, torch.eye(num_landmarks).double()
    for _ in range(hyper.get("pinv_iters", 6)):
        a = middle @ inverse
        inverse = inverse @ (13 * identity - a @ (15 * identity - a @ (7 * identity - a))) / 4
    out = softmax_map(q.double(), means[1]) @ inverse @ softmax_map(means[0], k.double()) @ v.double()
    tensors = {"q": q, "k": k, "v": v}
    if "conv_kernel" in hyper:
        tensors["conv_weight"] = random(10, 2, 1, 5, 1)
        for offset in range(-2, 3):
            for token in range(max(0, -offset), min(num_tokens, num_tokens - offset)):
                out[:, :, token] += tensors["conv_weight"][:, 0, offset + 2].double() * v[:, :, token + offset].double()
    return Generated(name, "nystromformer", {"m": 6} | hyper, tensors | {"out": out}, withheld)


def monarch_case(name, withheld, hyper, num_tokens=29, scale=1.0, exact=False):
    """Tokens one by one: the factors as dictionaries over (block, position), no tensors of blocks."""
    q, k, v = qkv(11, num_tokens, scale=scale)
    block_size, steps = hyper["block_size"], hyper["steps"]
    missing = -num_tokens % block_size
    offset = 0 if str(hyper.get("pad", "pre")).startswith("post") else missing
    num_blocks = (num_tokens + missing) // block_size
    padded = [torch.zeros(2, 2, num_blocks * block_size, 8).double() for _ in range(3)]
    for target, x in zip(padded, (q, k, v), strict=True):
        target[:, :, offset : offset + num_tokens] = x.double()
    tensors = {"q": q, "k": k, "v": v}
    for output, eps in (("out", hyper.get("eps", 1e-12)), *([("out_exact", None)] if exact else [])):
        out = monarch_dense(*padded, range(offset, offset + num_tokens), block_size, steps, eps)
        tensors[output] = out[:, :, offset : offset + num_tokens]
    return Generated(name, "monarch", hyper, tensors, withheld)


def monarch_dense(q, k, v, real, block_size, steps, eps):
    num_blocks, scale = q.shape[-2] // block_size, 8**-0.5
    block = [range(b * block_size, (b + 1) * block_size) for b in range(num_blocks)]
    guard = 0.0 if eps is None else eps
    asked = {
        (kk, j): (q[:, :, block[kk][j]], torch.ones(2, 2, 1).double())
        for kk in range(num_blocks)
        for j in range(block_size)
    }
    for step in range(steps):
        right, key_mean, entropy = {}, {}, {}
        for (kk, j), (vector, mass) in asked.items():
            keys = [i for i in block[kk] if i in real]
            r = scale * (k[:, :, keys] @ vector[..., None])[..., 0] / (mass + guard)
            top = r.max(-1, keepdim=True).values
            e = (r - (top if eps is None else top.clamp(min=eps))).exp()
            right[kk, j] = e / (e.sum(-1, keepdim=True) + guard)
            entropy[kk, j] = (right[kk, j] * right[kk, j].log()).sum(-1)
            key_mean[kk, j] = scale * (right[kk, j][..., None] * k[:, :, keys]).sum(-2)
        left = {}
        for n in real:
            j = n % block_size
            logits = [(q[:, :, n] * key_mean[kk, j]).sum(-1) - entropy[kk, j] for kk in range(num_blocks)]
            left[n] = torch.stack(logits, -1).softmax(-1)
        if step + 1 < steps:
            for kk, j in asked:
                column = [n for n in real if n % block_size == j]
                mass = sum(left[n][..., kk, None] for n in column)
                asked[kk, j] = (sum(left[n][..., kk, None] * q[:, :, n] for n in column), mass)
    out = torch.zeros_like(v)
    for n in real:
        for kk in range(num_blocks):
            keys = [i for i in block[kk] if i in real]
            mixed = (right[kk, n % block_size][..., None] * v[:, :, keys]).sum(-2)
            out[:, :, n] += left[n][..., kk, None] * mixed
    return out


def softmax_case():
    q, k, v = qkv(1)
    out = softmax_map(q.double(), k.double(), 0.7) @ v.double()
    return Generated("softmax-scale", "softmax", {"scale": 0.7}, {"q": q, "k": k, "v": v, "out": out}, "scale")


def linear_case():
    q, k, v = qkv(2)
    a, b = (torch.nn.functional.elu(x.double()) + 1 for x in (q, k))
    tensors = {"q": q, "k": k, "v": v, "out": normalised(a @ b.mT, 0.5) @ v.double()}
    return Generated("linear-den", "linear_elu", {"den_eps_added": 0.5}, tensors, "den_eps_added")


def lora_case():
    x, weight, bias = random(41, 2, 7, 12), random(42, 10, 12), random(43, 10)
    lora_a, lora_b = random(44, 3, 12), random(45, 10, 3)
    out = x.double() @ (weight.double() + 1.5 * lora_b.double() @ lora_a.double()).T + bias.double()
    tensors = {"x": x, "weight": weight, "bias": bias, "lora_A": lora_a, "lora_B": lora_b, "out": out}
    return Generated("lora", "lolcats", {"r": 3, "alpha": 6, "scaling": 1.5}, tensors, "scaling")


def generate() -> list[Generated]:
    both = ("xent", "mse")
    return [
        softmax_case(),
        linear_case(),
        linformer_case("linformer-slice", None, None, {}),
        linformer_case("linformer-scale", "scale", 0.9, {"scale": 0.9}),
        cosformer_case("cosformer-dead", None, 1e-6, dead=True),
        cosformer_case("cosformer-den", "den_clamp_min", 60.0, dead=True),
        performer_case("performer-eps", "feature_eps", {"feature_eps": 0.02}),
        performer_case("performer-large", None, {}, scale=8.0),
        performer_case("performer-relu", "kernel", {"kernel": "relu"}),
        performer_case("performer-relu-eps", "kernel_eps", {"kernel": "relu", "kernel_eps": 0.3}),
        nystromformer_case("nystromformer-global", "pinv_init", {"pinv_init": "maximum over ALL batches and heads"}),
        nystromformer_case("nystromformer-iterations", "pinv_iters", {"pinv_iters": 2}),
        nystromformer_case("nystromformer-even", None, {"pinv_init": "per-matrix"}, num_tokens=30),
        nystromformer_case("nystromformer-conv", None, {"conv_kernel": 5}),
        monarch_case("monarch-post", "pad", {"block_size": 6, "steps": 2, "pad": "post (right)", "pad_tokens": 1}),
        monarch_case("monarch-even", None, {"block_size": 6, "steps": 3, "pad_tokens": 0}, num_tokens=30),
        monarch_case("monarch-eps", "eps", {"block_size": 7, "steps": 2, "eps": 0.03}, exact=True),
        monarch_case("monarch-large", None, {"block_size": 7, "steps": 2}, scale=3.0, exact=True),
        feature_case("hedgehog-exp", "hedgehog", "activation", exp=True, losses=("xent",)),
        feature_case("hedgehog-half", "hedgehog", "negated_half", half=True, losses=both),
        feature_case("hedgehog-tied", "hedgehog", "tied_qk", tied=True, losses=both),
        feature_case("hedgehog-clamp", "hedgehog", "clamp_min", clamp_min=0.15),
        feature_case("lolcats-den", "lolcats", "den_eps_added", added=0.5),
        feature_case("lolcats-losses", "lolcats", None, losses=both),
        lora_case(),
    ]


CASES = generate()


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[str, str]:
    """What the program says of each generated case, and of each with its option withheld, by file name."""
    folder = tmp_path_factory.mktemp("generated")
    for case in CASES:
        meta = {"method": case.method, "case": case.name, "hyper": case.hyper}
        store(folder / f"{case.name}.safetensors", meta, case.tensors)
        if case.withheld is not None:
            hyper = {key: value for key, value in case.hyper.items() if key != case.withheld}
            meta = meta | {"case": f"{case.name}-withheld", "hyper": hyper}
            store(folder / f"{case.name}-withheld.safetensors", meta, case.tensors)
    result = run_conformance(folder)
    assert result.returncode == 1, result.stderr
    assert result.stderr == ""
    said = {}
    for line in result.stdout.splitlines():
        name = re.match(r"(?:\S+/)?(?:\w+ )?(\S+?)(?:\.safetensors:)? ", line).group(1)
        said[name] = line
    return said


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_option_is_answered(case, lines):
    assert lines[case.name].endswith(" ok"), lines[case.name]
    has_losses = any(name.startswith("loss_") for name in case.tensors)
    assert ("losses, gradients" in lines[case.name]) == has_losses


@pytest.mark.parametrize("case", [case for case in CASES if case.withheld], ids=lambda case: case.name)
def test_a_withheld_option_is_noticed(case, lines):
    line = lines[f"{case.name}-withheld"]
    assert "FAILED: " in line or "not understood: " in line, line


def test_float32_is_checked_on_its_own_and_takes_the_authors_error_into_account(tmp_path):
    """Scores of 1e5 that differ by a few units: float64 has digits left for them, float32 has not."""
    q, k, v = qkv(51)
    q, k = 1000 * q, 100 * k[:, :, :1] + 0.003 * k
    meta = {"method": "softmax", "case": "near ties", "hyper": {}}
    tensors = {"q": q, "k": k, "v": v, "out": softmax_map(q.double(), k.double()) @ v.double()}
    strict = store(tmp_path / "0.safetensors", meta, tensors)
    tolerant = store(tmp_path / "1.safetensors", meta | {"official_fp32_max_abs_err": 1.0}, tensors)
    result = run_conformance(strict, tolerant)
    assert result.returncode == 1
    strict_line, tolerant_line = result.stdout.splitlines()
    assert strict_line.endswith("FAILED: out")
    assert tolerant_line.endswith(" ok")
    assert "float32" in tolerant_line and "(below 5.0e+00)" in tolerant_line


def test_stored_cases_of_all_methods_pass():
    result = run_conformance(STORED)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout.splitlines()
    assert len(said) == len(METHODS)
    for method in METHODS:
        (line,) = (line for line in said if line.startswith(f"{method} "))
        assert line.endswith(" ok")


def test_stored_cases_are_small():
    assert sum(path.stat().st_size for path in STORED.iterdir()) < 3 * 2**20


def plant(kind: str, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if kind == "off by 1e-8":
        tensors["out"][0, 0, 5, 3] += 1e-8
    elif kind == "not a number":
        tensors["out"][0, 0, 5, 3] = math.nan
    elif kind == "another shape":
        tensors["out"] = tensors["out"][:, :, 1:]
    elif kind == "unknown option":
        meta["hyper"]["temperature"] = 2.0
    elif kind == "unknown option value":
        meta["hyper"]["pad"] = "both sides"
    elif kind == "unknown tensor":
        tensors["mask"] = torch.ones(3)
    elif kind == "unknown method":
        meta["method"] = "reformer"
    elif kind == "contradiction":
        meta["hyper"]["N"] = 11
    elif kind == "missing option":
        del meta["hyper"]["block_size"]


PLANTED = {
    "off by 1e-8": "FAILED: out",
    "not a number": "FAILED: out",
    "another shape": "FAILED: out",
    "unknown option": "not understood: unknown option 'temperature'",
    "unknown option value": "not understood: option 'pad' is 'both sides'",
    "unknown tensor": "not understood: unknown tensor 'mask'",
    "unknown method": "not understood: unknown method 'reformer'",
    "contradiction": "not understood: option 'N' is 11",
    "missing option": "not understood: option 'block_size' is missing",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, str]:
    """What the program says of a stored case in which one thing was spoilt, by what was."""
    folder = tmp_path_factory.mktemp("planted")
    paths = []
    for index, kind in enumerate(PLANTED):
        meta, tensors = load(STORED / "monarch_n257.safetensors")
        plant(kind, meta, tensors)
        paths.append(store(folder / f"{index}.safetensors", meta, tensors))
    result = run_conformance(*paths)
    assert result.returncode == 1
    assert result.stderr == ""
    return dict(zip(PLANTED, result.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_errors_are_reported(kind, planted):
    assert PLANTED[kind] in planted[kind], planted[kind]


def test_one_wrong_output_among_right_ones_makes_the_program_fail(tmp_path):
    for path in STORED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta, tensors = load(STORED / "hedgehog_n257.safetensors")
    tensors["out"][0, 1, 100, 7] += 1e-6
    store(tmp_path / "hedgehog_n257.safetensors", meta, tensors)
    result = run_conformance(tmp_path)
    assert result.returncode == 1
    assert [line.split()[0] for line in result.stdout.splitlines() if not line.endswith(" ok")] == ["hedgehog"]


def test_paths_without_cases_are_not_passed_over(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"q": torch.ones(1)}, tmp_path / "bare.safetensors")
    names = ("empty", "text.safetensors", "bare.safetensors", "absent.safetensors")
    result = run_conformance(*(tmp_path / name for name in names))
    assert result.returncode == 1
    assert result.stderr == ""
    said = result.stdout.splitlines()
    assert len(said) == len(names)
    reasons = (
        "a folder without",
        "not a readable safetensors file",
        "no metadata key 'meta'",
        "no such file or folder",
    )
    for line, reason in zip(said, reasons, strict=True):
        assert f"not understood: {reason}" in line


def test_reducing_keeps_the_numbers_and_drops_what_they_no_longer_are(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    case = next(case for case in CASES if case.name == "lolcats-losses")
    meta = {"method": "lolcats", "case": "whole", "hyper": case.hyper | {"B": 2, "H": 2}, "out_abs_max": 1.0}
    store(source / "lolcats_whole.safetensors", meta, case.tensors)
    command = [sys.executable, str(ROOT / "bench" / "reduce_oracles.py"), str(source), str(tmp_path / "reduced")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    reduced_meta, reduced = load(tmp_path / "reduced" / "lolcats_whole.safetensors")
    assert set(reduced) == {"q", "k", "v", "out", "W_q", "W_k"}
    assert torch.equal(reduced["out"], case.tensors["out"][:1])
    assert reduced_meta["hyper"]["B"] == 1
    assert "out_abs_max" not in reduced_meta
    assert run_conformance(tmp_path / "reduced").returncode == 0
