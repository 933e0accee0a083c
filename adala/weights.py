"""Files of weights that people bring: what they hold as named tensors, or in one sentence why they hold none."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from adala.files import is_git_lfs_pointer

# Under which of these a checkpoint keeps the model beside what else it holds; averaged weights come first.
NESTED_UNDER = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "encoder", "module")
# What wrappers put before every name.
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.")
SAVE_TENSORS = "save its state_dict() with safetensors.torch.save_file or torch.save"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a safetensors or torch file, on the CPU; which of the two it is, its contents say.

    A model inside a training checkpoint is taken out, and the names that wrappers put before its own are removed. No
    code in the file is run.

    Raises:
        ValueError: There is no such file, or it does not hold named tensors; the message says what it is.
    """
    path = Path(path).expanduser()
    start = _first_bytes(path)
    try:
        content = load_file(path) if _looks_like_safetensors(start) else _torch_load(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged or incomplete safetensors file ({error}): copy it again") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other Python objects than tensors, or none: it is not opened, since that could run code; "
            f"where it holds a whole model, {SAVE_TENSORS}"
        ) from error
    except Exception as error:  # of torch's reader on other bytes, without a base of their own
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} is damaged, incomplete or no file of weights ({reason}): copy it again, or {SAVE_TENSORS}"
        ) from error
    return _unwrap(path, content)


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file of weights in it")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise ValueError(f"{path} is empty: copy it again")
    if is_git_lfs_pointer(start):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` where it is from"
        )
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not weights: download the file itself")
    return start


def _looks_like_safetensors(start: bytes) -> bool:
    # The length of the JSON header, and the header; torch's files are zip archives, tar archives or pickles.
    return len(start) > 8 and start[8:9] == b"{"


def _torch_load(path: Path) -> Any:
    # Training scripts keep their arguments beside the weights, and a Namespace can do no harm.
    # An open file, not its name, whose ending would decide how it is read.
    with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and "param_groups" in content and "state" in content:
        raise ValueError(f"{path} holds the state of an optimizer, not a model's weights")
    while isinstance(content, Mapping):
        nested = next((key for key in NESTED_UNDER if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = content[nested]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors: {SAVE_TENSORS}")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        held = f"only {', '.join(map(str, list(content)[:5]))}" if content else "nothing"
        raise ValueError(f"{path} holds no named tensors ({held}): {SAVE_TENSORS}")
    return _without_wrappers(tensors)


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(len(WRAPPERS)):
        prefix = next((prefix for prefix in WRAPPERS if f"{prefix}patch_embed.proj.weight" in tensors), None)
        prefix = prefix or next((p for p in WRAPPERS if all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def find_difference(module: nn.Module, state: Mapping[str, Tensor], optional: tuple[str, ...] = ()) -> str | None:
    """The first name or shape in which ``state`` is not what ``module`` takes, in words; None where it fits.

    Args:
        module: May lie on the meta device.
        state: Named tensors.
        optional: Names that begin so may be left over.
    """
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    wrong = [
        f"{key} is {tuple(state[key].shape)}, not {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    missing = [f"{key} is missing" for key in shapes if key not in state]
    surplus = [f"{key} is unknown" for key in state if key not in shapes and not key.startswith(optional)]
    differences = wrong + missing + surplus
    return f"{differences[0]} ({len(differences)} keys differ)" if differences else None


def in_float32(path: Path, state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """What ``module`` takes of the tensors from ``path``, its weights cast to float32.

    Raises:
        ValueError: Quantized or sparse weights, or such that are not finite; the message names the first.
    """
    found = {}
    for name, expected in module.state_dict().items():
        found[name] = value = state[name]
        if not expected.is_floating_point():
            continue
        if not value.is_floating_point() or value.layout != torch.strided:
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise ValueError(f"{path} holds {name} as {kind}: quantized and sparse weights are not supported")
        found[name] = value.float()
        if not found[name].isfinite().all():
            raise ValueError(f"{path} holds NaN or infinity in {name}: these weights are of no use, bring others")
    return found
