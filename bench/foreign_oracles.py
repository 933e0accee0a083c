"""Translates conformance cases of another format into that of ``bench/conformance.py``: tables of their names and ours.

Their metadata has a ``method``, a ``case`` and its options under ``hyper``, of which an absent one has a default. What
is in no table is refused, and so is an option that contradicts the tensors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Options = Mapping[str, Any]
Tensors = Mapping[str, Tensor]

REQUIRED = object()

# How q and k were drawn and fed to the authors' code: they are stored as they enter the mechanism.
SHARED = dict.fromkeys(("B", "H", "N", "d", "qk_scale", "seed", "qk_prescale"))
FEATURES = {
    "feature_dim_W": ("feature_dim", REQUIRED),
    "activation": ("activation", "softmax_dim"),
    "negated_half": ("half", True),
    "tied_qk": ("tied", False),
    "clamp_min": ("clamp_min", 1e-12),
    "den_eps_added": ("den_added", 1e-12),
} | dict.fromkeys(("feature_dim_total", "W_init"))
# For each method our name, and its options beside those of SHARED: our name and their default, or None where an option
# is only checked or describes how the case was made.
METHODS: dict[str, tuple[str, dict[str, tuple[str, Any] | None]]] = {
    "softmax": ("softmax", {"scale": ("scale", None)}),
    "linear_elu": ("linear", {"den_eps_added": ("den_added", 1e-6), "phi": None}),
    "linformer": (
        "linformer",
        {"k": ("num_landmarks", REQUIRED), "max_len": ("max_tokens", REQUIRED), "scale": ("scale", None)}
        | dict.fromkeys(("resize", "share_heads", "share_kv", "init")),
    ),
    "cosformer": ("cosformer", {"den_clamp_min": ("den_min", 1e-6), "act": None, "index": None, "angle": None}),
    "performer": (
        "performer",
        {"m": ("num_features", REQUIRED), "kernel": ("mode", "softmax"), "feature_eps": ("feature_eps", 1e-4)}
        | {"kernel_eps": ("kernel_eps", 1e-3), "den_eps": None, "ortho_scaling": None},
    ),
    "nystromformer": (
        "nystromformer",
        {"m": ("num_landmarks", REQUIRED), "pinv_iters": ("pinv_iterations", 6)}
        | {"pinv_init": ("pinv_init", "per-matrix"), "conv_kernel": ("conv_kernel", None)}
        | dict.fromkeys(("conv", "scale", "segments")),
    ),
    "monarch": (
        "monarch",
        {"block_size": ("block_size", REQUIRED), "steps": ("num_steps", REQUIRED), "pad": ("padding_side", "pre")}
        | {"eps": ("eps", 1e-12), "pad_tokens": None, "blocks": None},
    ),
    "hedgehog": ("hedgehog", FEATURES),
    "lolcats": ("lolcats", FEATURES),
    "lolcats lora": (
        "lolcats",
        {"r": ("rank", REQUIRED), "alpha": ("alpha", REQUIRED)}
        | dict.fromkeys(("scaling", "dropout", "D", "dim", "in", "out", "d_in", "d_out", "bias", "init"))
        | dict.fromkeys(("in_features", "out_features")),
    ),
}
# Of these options only the values given are known, with what each is here.
VALUES: dict[str, dict[Any, Any]] = {
    "kernel": {"softmax": "max", "relu": "relu"},
    "activation": {"softmax_dim": "softmax", "exp_dim": "exp"},
    "negated_half": {True: False, False: True},
    "tied_qk": {True: True, False: False},
    "share_kv": {True: True, False: False},
    "share_heads": {True: True},
    "resize": {"slice": "slice", None: None},
    "phi": {"elu(x)+1": "elu(x)+1"},
    "act": {"relu": "relu"},
    "den_eps": {0: 0, None: 0},
    "dropout": {0: 0, None: 0},
}
# Of these only texts that match a pattern, the first that does.
TEXTS = {
    "pinv_init": {r"(?is).*over all batches and heads": "global", "per-matrix": "per_matrix"},
    "pad": {"pre": "left", "post": "right"},
}

TENSORS = {name: name for name in ("q", "k", "v", "out", "out_eps0", "out_exact", "projection", "conv_weight")}
TENSORS |= {name: name for name in ("x", "weight", "bias", "lora_A", "lora_B", "loss_xent", "loss_mse")}
TENSORS |= {"E": "key_projection", "F": "value_projection", "W_q": "query_weight", "W_k": "key_weight"}
TENSORS |= {f"grad_W_{x[0]}_{loss}": f"grad_{x}_weight_{loss}" for x in ("query", "key") for loss in ("xent", "mse")}
OUTPUTS = {"out_eps0": {"mode": "stable"}, "out_exact": {"eps": None}}

# The options that are sizes of tensors.
SIZES = {"B": ("q", 0), "H": ("q", 1), "N": ("q", 2), "d": ("q", 3), "k": ("E", 1), "max_len": ("E", 0)}
SIZES |= {"m": ("projection", 0), "conv_kernel": ("conv_weight", 2), "feature_dim_W": ("W_q", 2), "r": ("lora_A", 0)}


def translate(meta: Options, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a case in our format; no number is changed.

    Raises:
        ValueError: A method, option, value or tensor that is not known, is missing or contradicts the others.
    """
    method = "lolcats lora" if meta["method"] == "lolcats" and "lora_A" in tensors else meta["method"]
    refuse_unknown("method", [method], METHODS)
    mechanism, known = METHODS[method]
    refuse_unknown("option", meta["hyper"], known | SHARED)
    refuse_unknown("tensor", tensors, TENSORS)
    hyper, tensors = complete(method, meta["hyper"], tensors)
    defaults = {key: entry[1] for key, entry in known.items() if entry is not None}
    values = {key: read_value(key, value) for key, value in (defaults | hyper).items()}
    ours = {key: meta[key] for key in ("case", "source", "official_fp32_max_abs_err") if key in meta}
    ours |= {"mechanism": mechanism, "outputs": {name: others for name, others in OUTPUTS.items() if name in tensors}}
    ours["options"] = {entry[0]: values[key] for key, entry in known.items() if entry is not None}
    ours["max_tokens"] = ours["options"].pop("max_tokens", None)
    return ours, {TENSORS[name]: tensor for name, tensor in tensors.items()}


def refuse_unknown(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown {kind} {', '.join(map(repr, unknown))}: known are {', '.join(known)}")


def complete(method: str, hyper: Options, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Adds the options and tensors that follow from the others, and refuses those that contradict them."""
    hyper, tensors = dict(hyper), dict(tensors)
    implied = {key: tensors[name].shape[dim] for key, (name, dim) in SIZES.items() if name in tensors}
    if "block_size" in hyper:
        implied["pad_tokens"] = -implied["N"] % hyper["block_size"]
        implied["blocks"] = (implied["N"] + implied["pad_tokens"]) // hyper["block_size"]
        if implied["pad_tokens"] == 0:
            hyper["pad"] = "pre"  # whatever it says: nothing is padded
    if "W_q" in tensors:
        implied["feature_dim_total"] = implied["feature_dim_W"] * (2 if hyper.get("negated_half", True) else 1)
    for key, value in implied.items():
        if hyper.get(key) not in (None, value):
            raise ValueError(f"option {key!r} is {hyper[key]!r}: the rest of the case makes it {value}")
    if method == "nystromformer":
        scale = hyper.get("scale")
        if isinstance(scale, (int, float)) and abs(scale - implied["d"] ** -0.5) > 1e-12:
            raise ValueError(f"option 'scale' is {scale!r}: d^-1/2 alone is known")
        if hyper.get("conv") and "conv_weight" not in tensors:
            raise ValueError(f"option 'conv' is {hyper['conv']!r}, but tensor 'conv_weight' is missing")
    if hyper.get("share_kv"):
        tensors.setdefault("F", tensors["E"].clone())  # a copy: memory that tensors share cannot be stored
    if hyper.get("tied_qk") and not torch.equal(tensors.pop("W_k", tensors["W_q"]), tensors["W_q"]):
        raise ValueError("option 'tied_qk' is true, but tensors 'W_q' and 'W_k' differ")
    if method == "lolcats lora":
        if "scaling" in hyper:
            hyper["alpha"] = hyper["scaling"] * implied["r"]
        # Our layers have an adapter for each part of their output; here there is one part.
        tensors |= {name: tensors[name][None] for name in ("lora_A", "lora_B")}
    return hyper | implied, tensors


def read_value(key: str, value: Any) -> Any:
    """What the value of one of their options is here."""
    if value is REQUIRED:
        raise ValueError(f"option {key!r} is missing")
    known = VALUES.get(key) or TEXTS.get(key)
    if known is None:
        return value
    for theirs, ours in known.items():
        if value == theirs or (key in TEXTS and re.match(theirs, str(value))):
            return ours
    raise ValueError(f"option {key!r} is {value!r}: known are {', '.join(map(repr, known))}")
