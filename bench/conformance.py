"""Checks the token mixers against stored inputs and outputs: ``python bench/conformance.py PATH...``

PATH is a ``.safetensors`` file or a folder of them. A file holds q, k, v and weights in float32 and ``out`` in float64;
the JSON under its metadata key ``meta`` names the ``method``, the ``case`` and the options (``hyper``). The mixers that
users get are run, in float64 and in float32, with one line a file. The exit code is 1 if a file fails or is not
understood: a method, option or tensor that this program does not know is never passed over.

Tolerances: in float64 an absolute error below 1e-9; in float32, for ``out``, below the largest of 5 times the error of
the authors' own float32 run (``official_fp32_max_abs_err``, where stored), 2e-6 times the largest output, and 1e-6;
losses and their gradients, in float64, a relative error below 1e-9. The further outputs ``out_eps0`` and ``out_exact``
are held to float64's alone: no float32 run of their authors says how far rounding carries where scores are large.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adala.attention import AttentionShape, LoraLinear, TokenLayout, TokenMixer, build_mixer, merge_lora
from adala.attention.softmax import softmax_attention_reference
from adala.losses import attention_map_cross_entropy, mse

FLOAT64_TOLERANCE = 1e-9
RELATIVE_TOLERANCE = 1e-9
FLOAT32_FLOOR = 1e-6
FLOAT32_PER_OUTPUT = 2e-6
FLOAT32_PER_OFFICIAL = 5.0

REQUIRED = object()


class NotUnderstood(ValueError):
    """A case that uses something this program has no answer to."""


class Ledger:
    """A mapping that keeps account of what was read, so that nothing in a case is passed over."""

    def __init__(self, kind: str, entries: Mapping[str, Any]):
        self.kind = kind
        self.entries = dict(entries)
        self.unread = set(entries)

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The entry, or ``default`` where it is absent; without a default it must be there."""
        if key not in self.entries and default is REQUIRED:
            raise NotUnderstood(f"{self.kind} {key!r} is missing")
        self.unread.discard(key)
        return self.entries.get(key, default)

    def describes(self, *keys: str) -> None:
        """Marks entries as read that say how a case was made and change nothing here."""
        self.unread.difference_update(keys)

    def expect(self, key: str, *values: Any) -> None:
        """Reads an entry of which only ``values`` are supported."""
        if key in self.entries and self.take(key) not in values:
            raise NotUnderstood(f"{self.kind} {key!r} is {self.entries[key]!r}: known are {list(values)}")

    def close(self) -> None:
        if self.unread:
            raise NotUnderstood(f"unknown {self.kind} {', '.join(repr(key) for key in sorted(self.unread))}")


@dataclass(frozen=True)
class Answer:
    """What one stored tensor is to be compared with.

    Attributes:
        tensor: Name of the stored tensor.
        compute: Our value of it, in the dtype given.
        kind: ``out`` is held to both tolerances, an ``extra`` output to float64's, a ``loss`` or gradient to the
            relative one.
    """

    tensor: str
    compute: Callable[[torch.dtype], Tensor]
    kind: Literal["out", "extra", "loss"] = "out"


@dataclass(frozen=True)
class Case:
    """One file: where it lies, its metadata, and ledgers of its options and tensors."""

    path: Path
    meta: dict[str, Any]
    hyper: Ledger
    tensors: Ledger

    @property
    def name(self) -> str:
        return f"{self.meta['method']} {self.meta['case']}"


def load_case(path: Path) -> Case:
    """Reads a file.

    Raises:
        NotUnderstood: No safetensors file, or one without the metadata.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise NotUnderstood(f"not a readable safetensors file ({error})") from error
    if "meta" not in metadata:
        raise NotUnderstood("no metadata key 'meta'")
    try:
        meta = json.loads(metadata["meta"])
    except json.JSONDecodeError as error:
        raise NotUnderstood(f"its metadata is not JSON ({error})") from error
    absent = {"method", "case", "hyper"} - set(meta)
    if absent:
        raise NotUnderstood(f"its metadata lacks {', '.join(sorted(absent))}")
    return Case(path, meta, Ledger("option", meta["hyper"]), Ledger("tensor", tensors))


@dataclass(frozen=True)
class Attention:
    """q, k and v of a case, with the mixer that is to be run over them."""

    q: Tensor
    k: Tensor
    v: Tensor
    mechanism: str
    options: dict[str, Any]
    weights: dict[str, Tensor]
    max_tokens: int

    def mixer(self, dtype: torch.dtype) -> TokenMixer:
        # One row of patches: none of the options that cases have makes a mechanism look at the grid.
        shape = AttentionShape(self.q.shape[1], self.q.shape[3], TokenLayout((1, self.max_tokens), 0))
        mixer = build_mixer(self.mechanism, shape, self.options).to(dtype).eval()
        mixer.load_state_dict(self.weights)
        return mixer

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, TokenLayout]:
        layout = TokenLayout((1, self.q.shape[2]), 0)
        return self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), layout

    @torch.no_grad()
    def output(self, dtype: torch.dtype) -> Tensor:
        return self.mixer(dtype)(*self.inputs(dtype))


def read_attention(
    case: Case,
    mechanism: str,
    options: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
    max_tokens: int | None = None,
) -> Attention:
    q, k, v = (case.tensors.take(name) for name in "qkv")
    for key, size in zip(("B", "H", "N", "d"), q.shape, strict=True):
        case.hyper.expect(key, size)
    # How q and k were drawn, and how the authors' code was fed: q and k are stored as they enter the mechanism.
    case.hyper.describes("qk_scale", "seed", "qk_prescale")
    return Attention(q, k, v, mechanism, options, weights or {}, q.shape[2] if max_tokens is None else max_tokens)


def read_softmax(case: Case) -> list[Answer]:
    options = {"scale": case.hyper.take("scale", None)}
    return [Answer("out", read_attention(case, "softmax", options).output)]


def read_linear_elu(case: Case) -> list[Answer]:
    case.hyper.expect("phi", "elu(x)+1")
    options = {"den_added": case.hyper.take("den_eps_added", 1e-6)}
    return [Answer("out", read_attention(case, "linear", options).output)]


def read_linformer(case: Case) -> list[Answer]:
    hyper = case.hyper
    hyper.expect("share_heads", True)
    hyper.expect("resize", "slice", None)
    hyper.describes("init")
    key_projection = case.tensors.take("E")
    shared = hyper.take("share_kv", False) and "F" not in case.tensors
    value_projection = key_projection if shared else case.tensors.take("F")
    num_rows, num_landmarks = key_projection.shape
    hyper.expect("k", num_landmarks)
    hyper.expect("max_len", num_rows, None)
    options = {"num_landmarks": num_landmarks, "scale": hyper.take("scale", None)}
    weights = {"key_projection": key_projection, "value_projection": value_projection}
    return [Answer("out", read_attention(case, "linformer", options, weights, max_tokens=num_rows).output)]


def read_cosformer(case: Case) -> list[Answer]:
    case.hyper.expect("act", "relu")
    case.hyper.describes("index", "angle")
    options = {"den_min": case.hyper.take("den_clamp_min", 1e-6)}
    attention = read_attention(case, "cosformer", options)
    dead = ~(attention.q > 0).any(dim=-1)

    def compute(dtype: torch.dtype) -> Tensor:
        out = attention.output(dtype)
        # NaN fails every comparison: rows of dead queries are exactly zero or the case fails.
        return torch.where((dead[..., None]) & (out != 0), torch.nan, out)

    return [Answer("out", compute)]


def read_performer(case: Case) -> list[Answer]:
    hyper, projection = case.hyper, case.tensors.take("projection")
    hyper.expect("m", projection.shape[0])
    hyper.expect("den_eps", 0, None)
    hyper.describes("ortho_scaling")
    hyper.expect("kernel", "softmax", "relu")
    options = {
        "num_features": projection.shape[0],
        "mode": "relu" if hyper.take("kernel", "softmax") == "relu" else "max",
        "feature_eps": hyper.take("feature_eps", 1e-4),
        "kernel_eps": hyper.take("kernel_eps", 1e-3),
    }
    weights = {"projection": projection}
    answers = [Answer("out", read_attention(case, "performer", options, weights).output)]
    if "out_eps0" in case.tensors:
        if options["mode"] == "relu":
            raise NotUnderstood("tensor 'out_eps0' belongs to the softmax kernel, but option 'kernel' is 'relu'")
        stable = read_attention(case, "performer", options | {"mode": "stable"}, weights)
        answers.append(Answer("out_eps0", stable.output, kind="extra"))
    return answers


def read_nystromformer(case: Case) -> list[Answer]:
    hyper = case.hyper
    hyper.describes("segments")
    scale, head_dim = hyper.take("scale", None), case.tensors.take("q").shape[-1]
    if isinstance(scale, float) and abs(scale - head_dim**-0.5) > 1e-12:
        raise NotUnderstood(f"option 'scale' is {scale!r}: d^-1/2 alone is known")
    pinv_init = str(hyper.take("pinv_init", "per-matrix"))
    if "over all batches and heads" in pinv_init.lower():
        init = "global"
    elif pinv_init.startswith("per-matrix"):
        init = "per_matrix"
    else:
        raise NotUnderstood(f"option 'pinv_init' is {pinv_init!r}: it neither begins with 'per-matrix' nor is global")
    weights = {}
    kernel, described = hyper.take("conv_kernel", None), hyper.take("conv", None)
    if "conv_weight" in case.tensors:
        weights["conv_weight"] = case.tensors.take("conv_weight")
        if kernel not in (None, weights["conv_weight"].shape[2]):
            raise NotUnderstood(f"option 'conv_kernel' is {kernel}, tensor 'conv_weight' has another length")
        kernel = weights["conv_weight"].shape[2]
    elif kernel or described:
        raise NotUnderstood("a convolution without the tensor 'conv_weight'")
    options = {
        "num_landmarks": hyper.take("m"),
        "pinv_iterations": hyper.take("pinv_iters", 6),
        "pinv_init": init,
        "conv_kernel": kernel,
    }
    return [Answer("out", read_attention(case, "nystromformer", options, weights).output)]


def read_monarch(case: Case) -> list[Answer]:
    hyper = case.hyper
    num_tokens, block_size = case.tensors.take("q").shape[2], hyper.take("block_size")
    hyper.expect("blocks", -(-num_tokens // block_size))
    hyper.expect("pad_tokens", -num_tokens % block_size)
    pad = str(hyper.take("pad", "pre"))
    side = next((side for text, side in (("pre", "left"), ("post", "right")) if pad.startswith(text)), None)
    if side is None and num_tokens % block_size:
        raise NotUnderstood(f"option 'pad' is {pad!r}: it begins with neither 'pre' nor 'post'")
    options = {
        "block_size": block_size,
        "num_steps": hyper.take("steps"),
        "padding_side": side or "left",
        "eps": hyper.take("eps", 1e-12),
    }
    answers = [Answer("out", read_attention(case, "monarch", options).output)]
    if "out_exact" in case.tensors:
        exact = read_attention(case, "monarch", options | {"eps": None})
        answers.append(Answer("out_exact", exact.output, kind="extra"))
    return answers


def read_hedgehog(case: Case) -> list[Answer]:
    hyper, tensors = case.hyper, case.tensors
    query_weight = tensors.take("W_q")
    hyper.describes("W_init")
    hyper.expect("feature_dim_W", query_weight.shape[-1])
    hyper.expect("activation", "softmax_dim", "exp_dim")
    negated_half, tied = hyper.take("negated_half", True), hyper.take("tied_qk", False)
    hyper.expect("feature_dim_total", query_weight.shape[-1] * (2 if negated_half else 1))
    options = {
        "feature_dim": query_weight.shape[-1],
        "activation": hyper.take("activation", "softmax_dim").removesuffix("_dim"),
        "half": not negated_half,
        "tied": tied,
        "clamp_min": hyper.take("clamp_min", 1e-12),
        "den_added": hyper.take("den_eps_added", 1e-12),
    }
    weights = {"query_weight": query_weight}
    if not tied:
        weights["key_weight"] = tensors.take("W_k")
    elif not torch.equal(tensors.take("W_k", query_weight), query_weight):
        raise NotUnderstood("option 'tied_qk' is true, but tensors 'W_q' and 'W_k' differ")
    attention = read_attention(case, case.meta["method"], options, weights)
    answers = [Answer("out", attention.output)]

    def loss(mixer: TokenMixer, name: str) -> Tensor:
        q, k, v, layout = attention.inputs(torch.float64)
        if name == "xent":
            return attention_map_cross_entropy(*mixer.feature_maps(q, k), q, k, clamp_min=options["clamp_min"])
        return mse(mixer(q, k, v, layout), softmax_attention_reference(q, k, v))

    def compute_loss(name: str, weight: str | None = None) -> Callable[[torch.dtype], Tensor]:
        def compute(dtype: torch.dtype) -> Tensor:
            mixer = attention.mixer(dtype)
            value = loss(mixer, name)
            if weight is None:
                return value.detach().reshape(1)
            return torch.autograd.grad(value, getattr(mixer, weight))[0]

        return compute

    for name in ("xent", "mse"):
        sources = {f"loss_{name}": None, f"grad_W_q_{name}": "query_weight", f"grad_W_k_{name}": "key_weight"}
        if tied:
            sources[f"grad_W_k_{name}"] = "query_weight"
        for tensor, weight in sources.items():
            if tensor in tensors:
                answers.append(Answer(tensor, compute_loss(name, weight), kind="loss"))
    return answers


def read_lolcats(case: Case) -> list[Answer]:
    return read_lora(case) if "lora_A" in case.tensors else read_hedgehog(case)


def read_lora(case: Case) -> list[Answer]:
    """A linear layer with a low-rank adapter, through the layer that fine-tuning uses, and merged."""
    hyper, tensors = case.hyper, case.tensors
    x, weight, bias = tensors.take("x"), tensors.take("weight"), tensors.take("bias", None)
    lora_a, lora_b = tensors.take("lora_A"), tensors.take("lora_B")
    hyper.expect("r", lora_a.shape[0])
    hyper.expect("dropout", 0, None)
    hyper.describes("B", "H", "N", "d", "D", "dim", "in", "out", "d_in", "d_out", "in_features", "out_features")
    hyper.describes("seed", "qk_scale", "bias", "init", "alpha")
    scaling = hyper.take("scaling") if "scaling" in hyper else hyper.take("alpha") / lora_a.shape[0]

    def compute(dtype: torch.dtype) -> Tensor:
        layer = adapted_layer(dtype)
        with torch.no_grad():
            return layer(x.to(dtype))

    def compute_merged(dtype: torch.dtype) -> Tensor:
        state = merge_lora(adapted_layer(dtype).state_dict())
        return torch.nn.functional.linear(x.to(dtype), state["weight"], state.get("bias"))

    def adapted_layer(dtype: torch.dtype) -> LoraLinear:
        base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
        layer = LoraLinear(base, rank=lora_a.shape[0], alpha=scaling * lora_a.shape[0])
        values = {"weight": weight, "lora_A": lora_a[None], "lora_B": lora_b[None]}
        values |= {} if bias is None else {"bias": bias}
        layer.load_state_dict({k: v.to(dtype) for k, v in values.items()} | {"lora_scale": layer.lora_scale})
        return layer

    return [Answer("out", compute), Answer("out", compute_merged)]


READERS: dict[str, Callable[[Case], list[Answer]]] = {
    "softmax": read_softmax,
    "linear_elu": read_linear_elu,
    "linformer": read_linformer,
    "cosformer": read_cosformer,
    "performer": read_performer,
    "nystromformer": read_nystromformer,
    "monarch": read_monarch,
    "hedgehog": read_hedgehog,
    "lolcats": read_lolcats,
}


@dataclass
class Verdict:
    """The largest errors of a case (float32's and its tolerance are those of ``out``), and the tensors that failed."""

    float64_error: float = 0.0
    float32_error: float = 0.0
    float32_tolerance: float = 0.0
    relative_error: float | None = None
    failed: tuple[str, ...] = ()


def max_error(ours: Tensor, stored: Tensor) -> float:
    """Largest absolute difference in float64; infinite where the shapes differ."""
    if ours.shape != stored.shape:
        return float("inf")
    return float((ours.double() - stored.double()).abs().max())


def check_case(case: Case) -> Verdict:
    """Runs the mixers of a case.

    Raises:
        NotUnderstood: It uses a method, option or tensor that is not known here.
    """
    method = case.meta["method"]
    if method not in READERS:
        raise NotUnderstood(f"unknown method {method!r}: known are {', '.join(READERS)}")
    answers = READERS[method](case)
    stored = {answer.tensor: case.tensors.take(answer.tensor) for answer in answers}
    case.hyper.close()
    case.tensors.close()
    official = FLOAT32_PER_OFFICIAL * (case.meta.get("official_fp32_max_abs_err") or 0.0)
    verdict = Verdict()
    for answer in answers:
        expected = stored[answer.tensor]
        error = max_error(answer.compute(torch.float64), expected)
        if answer.kind == "loss":
            error /= float(expected.abs().max())
            verdict.relative_error = worst(verdict.relative_error or 0.0, error)
            passed = error < RELATIVE_TOLERANCE
        else:
            verdict.float64_error = worst(verdict.float64_error, error)
            passed = error < FLOAT64_TOLERANCE
        if answer.kind == "out":
            verdict.float32_error = max_error(answer.compute(torch.float32), expected)
            verdict.float32_tolerance = max(official, FLOAT32_PER_OUTPUT * float(expected.abs().max()), FLOAT32_FLOOR)
            passed = passed and verdict.float32_error < verdict.float32_tolerance
        if not passed:
            verdict.failed += (answer.tensor,)
    return verdict


def worst(first: float, second: float) -> float:
    """The larger of two errors, of which NaN is the largest."""
    return second if not second <= first else first


def report_line(name: str, verdict: Verdict) -> str:
    line = (
        f"{name:24s} float64 {verdict.float64_error:.1e} (below {FLOAT64_TOLERANCE:.0e})  "
        f"float32 {verdict.float32_error:.1e} (below {verdict.float32_tolerance:.1e})  "
    )
    if verdict.relative_error is not None:
        line += f"losses, gradients {verdict.relative_error:.1e} (below {RELATIVE_TOLERANCE:.0e})  "
    return line + (f"FAILED: {', '.join(verdict.failed)}" if verdict.failed else "ok")


def case_paths(path: Path) -> list[Path]:
    """The files that a path stands for.

    Raises:
        NotUnderstood: Nothing lies there.
    """
    if not path.exists():
        raise NotUnderstood("no such file or folder")
    paths = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if not paths:
        raise NotUnderstood("a folder without .safetensors files")
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Checks all files under the paths given; 0 if all are ok, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a .safetensors file or a folder of them")
    all_ok = True
    for given in parser.parse_args(arguments).paths:
        try:
            paths = case_paths(given)
        except NotUnderstood as reason:
            print(f"{given}: not understood: {reason}", flush=True)
            all_ok = False
            continue
        for path in paths:
            try:
                case = load_case(path)
                verdict = check_case(case)
            except NotUnderstood as reason:
                print(f"{path}: not understood: {reason}", flush=True)
                all_ok = False
                continue
            print(report_line(case.name, verdict), flush=True)
            all_ok = all_ok and not verdict.failed
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
