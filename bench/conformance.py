"""Checks the token mixers against stored inputs and outputs: ``python bench/conformance.py PATH...``

PATH is a ``.safetensors`` file or a folder of them. A file holds q, k, v and weights in float32 and ``out`` in float64;
the JSON under its metadata key ``meta`` has the fields of :class:`Case`, or is in the format that
``foreign_oracles.py`` translates. The mixers that users get are run, in float64 and in float32, with one line a file.
The exit code is 1 if a file fails or is not understood: a mechanism, option or tensor that is not known is never passed
over.

Tolerances: in float64 an absolute error below 1e-9; in float32, for ``out``, below the largest of 5 times the error of
the authors' own float32 run (``official_fp32_max_abs_err``, where stored), 2e-6 times the largest output, and 1e-6;
losses and their gradients, in float64, a relative error below 1e-9. The further outputs ``out_eps0`` and ``out_exact``
are held to float64's alone: no float32 run of their authors says how far rounding carries where scores are large. Rows
that are exactly zero in the file, as cosFormer's are for queries without a positive entry, must be so here.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import foreign_oracles
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from adala.attention import AttentionShape, LoraLinear, TokenLayout, TokenMixer, build_mixer, merge_lora
from adala.attention.softmax import softmax_attention_reference
from adala.losses import attention_map_cross_entropy, mse

FLOAT64_TOLERANCE = 1e-9
RELATIVE_TOLERANCE = 1e-9
FLOAT32_FLOOR = 1e-6
FLOAT32_PER_OUTPUT = 2e-6
FLOAT32_PER_OFFICIAL = 5.0


@dataclass(frozen=True)
class Case:
    """One file: its tensors, and its metadata.

    Attributes:
        options: Of the mixer; of :class:`LoraLinear` where the file holds an adapted layer and its input x.
        tensors: Inputs (q, k, v or x), ``out`` and the other ``outputs``; ``loss_xent``, ``loss_mse`` and gradients
            (``grad_PARAMETER_xent``, ...); the rest is the state dict.
        outputs: Outputs beside ``out`` by tensor, with the options that are others for them.
        max_tokens: Tokens that the mixer is built for; None is as many as q has.
        official_fp32_max_abs_err: Error of the authors' own float32 run.
        source: Whose numbers they are.
    """

    mechanism: str
    case: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_tokens: int | None = None
    official_fp32_max_abs_err: float | None = None
    source: str = ""

    def losses(self) -> list[str]:
        return [name for name in self.tensors if name.startswith(("loss_", "grad_"))]

    def weights(self) -> dict[str, Tensor]:
        others = {*("x" if "x" in self.tensors else "qkv"), "out", *self.outputs, *self.losses()}
        return {name: tensor for name, tensor in self.tensors.items() if name not in others}


def load_case(path: Path) -> Case:
    """Reads a file of either format."""
    if path.is_dir():
        raise ValueError("a folder without .safetensors files")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "meta" not in metadata:
        raise ValueError("no metadata key 'meta'")
    meta = json.loads(metadata["meta"])
    if "mechanism" not in meta:
        meta, tensors = foreign_oracles.translate(meta, tensors)
    return Case(**meta, tensors=tensors)


def attention_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, TokenLayout]:
    q, k, v = (case.tensors[name].to(dtype) for name in "qkv")
    # One row of patches: none of the options that cases have makes a mechanism look at the grid.
    return q, k, v, TokenLayout((1, q.shape[2]), 0)


def load_mixer(case: Case, dtype: torch.dtype, others: Mapping[str, Any] = {}) -> TokenMixer:
    _, num_heads, num_tokens, head_dim = case.tensors["q"].shape
    shape = AttentionShape(num_heads, head_dim, TokenLayout((1, case.max_tokens or num_tokens), 0))
    mixer = build_mixer(case.mechanism, shape, {**case.options, **others}).to(dtype).eval()
    mixer.load_state_dict(case.weights())
    return mixer


@torch.no_grad()
def run(case: Case, dtype: torch.dtype, others: Mapping[str, Any] = {}) -> list[Tensor]:
    """The output by each way there is to it, with ``others`` in place of some options."""
    if "x" not in case.tensors:
        return [load_mixer(case, dtype, others)(*attention_inputs(case, dtype))]
    x, weights = case.tensors["x"].to(dtype), case.weights()
    out_features, in_features = weights["weight"].shape
    base = torch.nn.Linear(in_features, out_features, "bias" in weights, dtype=dtype)
    layer = LoraLinear(base, **{**case.options, **others})
    layer.load_state_dict(weights | {"lora_scale": layer.lora_scale})
    return [layer(x), F.linear(x, **merge_lora(layer.state_dict()))]


def loss_or_gradient(case: Case, name: str) -> Tensor:
    """What is stored as ``loss_xent``, ``loss_mse`` or ``grad_PARAMETER_xent``, ..., in float64."""
    mixer = load_mixer(case, torch.float64)
    q, k, v, layout = attention_inputs(case, torch.float64)
    subject, _, kind = name.rpartition("_")
    if kind == "xent":
        value = attention_map_cross_entropy(*mixer.feature_maps(q, k), q, k, clamp_min=mixer.options.clamp_min)
    elif kind == "mse":
        value = mse(mixer(q, k, v, layout), softmax_attention_reference(q, k, v))
    else:
        raise ValueError(f"unknown tensor {name!r}")
    if subject == "loss":
        return value.detach().reshape(1)
    parameter = getattr(mixer, subject.removeprefix("grad_"))
    # Tied maps have no key weight: the queries' is both.
    return torch.autograd.grad(value, mixer.query_weight if parameter is None else parameter)[0]


class Comparison(NamedTuple):
    """One tensor held to one tolerance."""

    tensor: str
    measure: str
    error: float
    tolerance: float

    @property
    def failed(self) -> bool:
        return not self.error < self.tolerance  # NaN is below no tolerance


def max_error(ours: Tensor, stored: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ, or a row that is stored as zero is not zero."""
    if ours.shape != stored.shape or (ours[(stored == 0).all(-1)] != 0).any():
        return float("inf")
    return float((ours.double() - stored.double()).abs().max())


def check_case(case: Case) -> list[Comparison]:
    """Runs the mixers of a case on all that it holds."""
    found = []
    for name, others in {"out": {}, **case.outputs}.items():
        for ours in run(case, torch.float64, others):
            found.append(Comparison(name, "float64", max_error(ours, case.tensors[name]), FLOAT64_TOLERANCE))
    out = case.tensors["out"]
    official = FLOAT32_PER_OFFICIAL * (case.official_fp32_max_abs_err or 0.0)
    tolerance = max(official, FLOAT32_PER_OUTPUT * float(out.abs().max()), FLOAT32_FLOOR)
    found += [Comparison("out", "float32", max_error(ours, out), tolerance) for ours in run(case, torch.float32)]
    for name in case.losses():
        stored = case.tensors[name]
        # A gradient can be zero throughout, where all weights are clamped.
        scale = max(float(stored.abs().max()), sys.float_info.min)
        error = max_error(loss_or_gradient(case, name), stored) / scale
        found.append(Comparison(name, "losses, gradients", error, RELATIVE_TOLERANCE))
    return found


def report_line(case: Case, comparisons: list[Comparison]) -> str:
    line = f"{f'{case.mechanism} {case.case}':24s} "
    for measure in dict.fromkeys(comparison.measure for comparison in comparisons):
        errors, tolerances = zip(*((c.error, c.tolerance) for c in comparisons if c.measure == measure), strict=True)
        # Of torch, since Python's max passes over NaN.
        line += f"{measure} {float(torch.tensor(errors).max()):.1e} (below {tolerances[0]:.1e})  "
    failed = dict.fromkeys(comparison.tensor for comparison in comparisons if comparison.failed)
    return line + (f"FAILED: {', '.join(failed)}" if failed else "ok")


def check_file(path: Path) -> bool:
    """Prints the line of one file; whether it is ok."""
    try:
        case = load_case(path)
        comparisons = check_case(case)
    except Exception as error:  # Whatever a file makes fail is said of it, and the others are still checked.
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        print(f"{path}: not understood: {' '.join(reason.split())}", flush=True)
        return False
    print(report_line(case, comparisons), flush=True)
    return not any(comparison.failed for comparison in comparisons)


def main(arguments: list[str] | None = None) -> int:
    """Checks all files under the paths given; 0 if all are ok, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a .safetensors file or a folder of them")
    given = parser.parse_args(arguments).paths
    # A folder without files stands for itself, and then is not understood.
    paths = [path for one in given for path in (one.is_dir() and sorted(one.rglob("*.safetensors"))) or [one]]
    return 0 if all([check_file(path) for path in paths]) else 1


if __name__ == "__main__":
    sys.exit(main())
