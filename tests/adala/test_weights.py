"""Files of weights that people bring: read where they hold weights, else one sentence that says what they hold."""

import argparse
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from tiny_teacher import TINY_ARGS, build_tiny_teacher
from torch import nn

from adala.backbones import load_teacher, read_checkpoint

STATE = dict(build_tiny_teacher().state_dict())
KEY = "blocks.1.mlp.fc1.weight"


def load(path: Path):
    return load_teacher("vit_tiny_patch16_224", [16, 16], checkpoint=path, model_args=TINY_ARGS)


def torch_file(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def raw_file(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def with_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**STATE, KEY: change(STATE[KEY])}


def optimizer_state() -> dict:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


WHOLE = save(STATE)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut": ("w.safetensors", raw_file(WHOLE[:-100]), "damaged or incomplete safetensors file .*copy it again"),
    "cut_in_header": ("w.safetensors", raw_file(WHOLE[:500]), "damaged or incomplete safetensors file"),
    "garbage_header": ("w.safetensors", raw_file(WHOLE[:9] + b"x" * 500), "damaged or incomplete safetensors file"),
    "garbage": ("w.safetensors", raw_file(bytes(range(1, 256)) * 9), "damaged, incomplete or no file|other Python"),
    "lfs": ("w.safetensors", raw_file(POINTER), "LFS pointer.*git lfs pull"),
    "lfs_pth": ("w.pth", raw_file(POINTER), "LFS pointer.*git lfs pull"),
    "html": ("w.safetensors", raw_file(b"<!DOCTYPE html><html>404</html>"), "web page"),
    "html_pth": ("w.pth", raw_file(b"\n <html><body></body></html>"), "web page"),
    "text": ("w.pth", raw_file(b"404: not found"), "damaged, incomplete or no file|other Python objects"),
    "empty": ("w.pth", raw_file(b""), "is empty"),
    "folder": ("w.pth", lambda path: path.mkdir(), "is a folder: name the file"),
    "module": ("w.pth", torch_file(nn.Linear(2, 2)), "other Python objects than tensors.*state_dict"),
    "pickle": ("w.pkl", raw_file(pickle.dumps({"a": Path("b")})), "other Python objects than tensors"),
    "cut_pth": (
        "w.pth",
        lambda path: (torch.save(STATE, path), path.write_bytes(path.read_bytes()[:-900])),
        "damaged, incomplete",
    ),
    "optimizer": ("w.pth", torch_file(optimizer_state()), "state of an optimizer"),
    "list": ("w.pth", torch_file([torch.ones(2)]), "holds a list, not named tensors"),
    "tensor": ("w.pth", torch_file(torch.ones(2)), "holds a Tensor, not named tensors"),
    "empty_dict": ("w.pth", torch_file({}), r"no named tensors \(nothing\)"),
    "empty_safetensors": ("w.safetensors", lambda path: save_file({}, path), r"no named tensors \(nothing\)"),
    "no_tensors": ("w.pth", torch_file({"epoch": 3, "name": "x"}), r"no named tensors \(only epoch, name\)"),
    "numbers_as_keys": ("w.pth", torch_file({0: torch.ones(2)}), r"no named tensors \(only 0\)"),
    "nan": ("w.pth", torch_file(with_weight(lambda weight: weight * float("nan"))), f"NaN or infinity in {KEY}"),
    "infinity": (
        "w.safetensors",
        lambda path: save_file(with_weight(lambda weight: weight / 0), path),
        f"NaN or infinity in {KEY}",
    ),
    "half_overflow": (
        "w.pth",
        torch_file(with_weight(lambda weight: (weight + 1e6).half())),
        f"NaN or infinity in {KEY}",
    ),
    "integers": ("w.pth", torch_file(with_weight(lambda weight: weight.to(torch.int8))), f"{KEY} as torch.int8"),
    "sparse": ("w.pth", torch_file(with_weight(torch.Tensor.to_sparse)), f"{KEY} as torch.sparse_coo"),
    "script": (
        "w.pt",
        lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        "damaged, incomplete or no file|other Python",
    ),
    "foreign": ("w.pth", torch_file({"conv1.weight": torch.ones(2, 3, 7, 7)}), "another architecture than"),
    "odd_position": (
        "w.pth",
        torch_file({**STATE, "pos_embed": torch.ones(3)}),
        "could not be read as a ViT's weights|another architecture",
    ),
}


@pytest.mark.parametrize(("name", "write", "message"), REFUSED.values(), ids=REFUSED)
def test_what_holds_no_weights_is_refused_in_one_sentence(tmp_path: Path, name: str, write, message: str) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


READ = {
    "bin": ("w.bin", STATE),
    "pt": ("w.pt", STATE),
    "ckpt": ("w.ckpt", STATE),
    "no_extension": ("w", STATE),
    "torch_as_safetensors": ("w.safetensors", STATE),
    "model": ("w.pth", {"model": STATE, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}),
    "state_dict": ("w.pth", {"state_dict": {f"module.{key}": value for key, value in STATE.items()}}),
    "arguments": ("w.pth", {"model": STATE, "args": argparse.Namespace(lr=1)}),
    "deepspeed": ("w.pt", {"module": STATE, "ds_version": "0.17"}),
    "compiled": ("w.pth", {f"_orig_mod.{key}": value for key, value in STATE.items()}),
    "dino": (
        "w.pth",
        {
            "teacher": {
                **{f"module.backbone.{key}": value for key, value in STATE.items()},
                "module.head.x": torch.ones(2),
            }
        },
    ),
    "ema": ("w.pth", {"model": {key: value * 0 for key, value in STATE.items()}, "model_ema": STATE}),
}


@pytest.mark.parametrize(("name", "content"), READ.values(), ids=READ)
def test_a_models_weights_are_found_in_whatever_lies_around_them(tmp_path: Path, name: str, content) -> None:
    torch.save(content, tmp_path / name)
    assert same_weights(load(tmp_path / name))


def same_weights(model: nn.Module) -> bool:
    return all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())


def test_safetensors_are_read_under_another_ending(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(WHOLE)
    assert same_weights(load(tmp_path / "weights.bin"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({key: value.to(dtype) for key, value in STATE.items()}, tmp_path / "w.safetensors")
    found = read_checkpoint(build_tiny_teacher(), tmp_path / "w.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(found[key], value.to(dtype).float()) for key, value in STATE.items())


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    with pytest.raises(ValueError, match="could run code"):
        load(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_file_without_permission_is_one_sentence(tmp_path: Path) -> None:
    """As another user where this one may read everything."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(WHOLE)
    path.chmod(0)
    code = (
        "import os, sys; from adala.weights import read_weights\n"
        "if os.getuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "read_weights(sys.argv[1])"
    )
    # pytest keeps its folders from others; how many there are depends on how the tests are run.
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_mode & 0o777 == 0o700:
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path)],
        cwd=Path(__file__).parents[2], text=True, capture_output=True,
    )  # fmt: skip
    assert done.stderr.strip().splitlines()[-1] == f"ValueError: {path} cannot be read: Permission denied"
