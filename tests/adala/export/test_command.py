"""``python -m adala.export``, from its command line to what it leaves and prints."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from tiny_teacher import TINY_ARGS, build_tiny_teacher

import adala
from adala.export import StudentDescription, save_student
from adala.export.__main__ import main
from adala.students import linearize
from adala.tasks import describe_task, resolve_task

DESCRIPTION = StudentDescription(
    backbone="vit_tiny_patch16_224", model_args=TINY_ARGS, image_size=[16, 16], mechanism="linear",
    mechanism_options={}, keep=[], mean=[0.4] * 3, std=[0.2] * 3,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a student without a head."""
    student = linearize(build_tiny_teacher(), "linear")
    save_student(tmp_path / "stage2", student.state_dict(), DESCRIPTION)
    return tmp_path / "stage2"


@pytest.fixture
def softmax_folder(tmp_path: Path) -> Path:
    """Of a softmax student with a head."""
    student, task = linearize(build_tiny_teacher(), "softmax"), resolve_task("classification")(3)
    described = dataclasses.replace(DESCRIPTION, mechanism="softmax", task=describe_task(task))
    save_student(tmp_path / "stage3", student.state_dict(), described, task.build_head(student).state_dict())
    return tmp_path / "stage3"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_command_writes_and_says_what_it_compared(folder: Path, tmp_path: Path, capsys) -> None:
    Image.effect_noise((30, 30), 64).convert("RGB").save(tmp_path / "photo.jpg")
    assert main([str(folder), "--to", "torch", "--size", "24", "12", "--images", str(tmp_path / "photo.jpg")]) == 0
    path = folder / "student-24x12.pt2"
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {path} takes images of 24 x 12 and gives features; against PyTorch on real images")
    assert "in batches of 2, 1, 3: worst cosine 1.0000" in said and "largest absolute difference" in said
    images = torch.randn(5, 3, 24, 12)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(path).module()(images), adala.load_student(folder)(images), atol=1e-4)


def test_the_command_writes_where_it_is_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "somewhere" / "else.onnx"
    assert main([str(folder), "--to", "onnx", "--out", str(out), "--batch", "2"]) == 0
    assert out.is_file() and names(folder) == {"student.safetensors", "model.json"}


def test_a_head_goes_to_torch_and_not_to_timm(softmax_folder: Path) -> None:
    for form in ("torch", "timm"):
        assert main([str(softmax_folder), "--to", form]) == 0
    images = torch.randn(2, 3, 16, 16)
    scores = torch.export.load(softmax_folder / "student-16x16.pt2").module()(images)
    plain = timm.create_model(f"local-dir:{softmax_folder / 'timm-16x16'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(scores, adala.load_task_model(softmax_folder)(images), atol=1e-5)
        assert torch.allclose(plain(images), adala.load_student(softmax_folder)(images), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "timm"], "error: blocks.0.attn is linear attention"),
        (["--to", "torch", "--size", "15"], "error: image size 15 x 15 is not divisible"),
        (["--to", "torch", "--size", "1", "2", "3"], "error: --size is 1 2 3: it is one number of pixels, or height"),
        (["--to", "torch", "--batch", "x"], "error: batch is 'x'"),
        (["--to", "onnx", "--compile"], "error: only a program of torch can be compiled"),
        (["--to", "torch", "--images", "nowhere.jpg"], "error: nowhere.jpg cannot be read as an image"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(folder: Path, arguments: list[str], message: str, capsys) -> None:
    before = names(folder)
    assert main([str(folder), *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1
    assert names(folder) == before


def test_a_folder_without_a_student_is_called_what_it_is(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "nowhere"), "--to", "onnx"]) == 1
    assert "nowhere holds no exported student: there is no such folder" in capsys.readouterr().err


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "adala.export", "--help"], capture_output=True, text=True, check=True)
    assert "--to {onnx,torch,timm,hf}" in done.stdout and not done.stderr
