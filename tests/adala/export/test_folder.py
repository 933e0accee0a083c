"""Exported students: what is read back must be what was trained."""

import dataclasses
import json
import os
import shutil
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import write_tiny_recipe
from tiny_teacher import TINY_ARGS, build_tiny_teacher

from adala import load_student, load_task_model
from adala.build import build_evaluation_loader, build_stage, build_teacher, prepare_student, unaligned_student
from adala.config import load_recipe
from adala.export import StudentDescription, read_description, save_student
from adala.files import write_json
from adala.pipeline import _write_student
from adala.plan import resolve_run
from adala.runs import StageFolder
from adala.students import linearize
from adala.tasks import Classification, describe_task, read_task

PERFORMER = {"mechanism": "performer", "mechanism_options": {"redraw_interval": 1}}


@pytest.fixture(params=["zero1", "zero1_bf16", "zero1_autocast"])
def export(request: pytest.FixtureRequest, tmp_path: Path):
    """Exports Stage 3 of a Performer after a redraw: called with a state, beside that of the trained stage."""
    recipe = load_recipe(str(write_tiny_recipe(tmp_path, ds_config=request.param, **PERFORMER)))
    (plan,) = resolve_run(recipe, (3,)).stages
    teacher = build_teacher(plan.model.teacher)
    student = unaligned_student(plan.model, teacher)
    prepare_student(plan, student)
    stage = build_stage(plan, student, teacher)
    stage.begin_step(1)
    state = {name: value.clone() for name, value in stage.state_dict().items()}
    stage.to(plan.model.precision.dtype).eval()
    batch = next(iter(build_evaluation_loader(plan.data, plan.held_out, 4, plan.task)))
    autocast = plan.model.precision.autocast_dtype
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        trained = stage(batch)
    folder = StageFolder(tmp_path / "stage3")
    return folder.path, state, partial(_write_student, plan, stage, folder, batch=batch, trained=trained)


def test_what_was_trained_is_read_back(export) -> None:
    folder, state, write = export
    write(state)
    student = load_student(folder)
    key = "blocks.0.attn.token_mixer.projection"
    assert torch.equal(student.state_dict()[key], state[f"student.{key}"])
    assert load_task_model(folder)(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert read_task(read_description(folder).task) == Classification(3)


@pytest.mark.parametrize("name", ["blocks.0.attn.token_mixer.projection", "norm.weight", "blocks.2.attn.proj.weight"])
def test_a_student_that_is_not_what_was_trained_is_no_result(export, name: str) -> None:
    """As with buffers that were read before training changed them."""
    _, state, write = export
    state[f"student.{name}"] = state[f"student.{name}"].roll(1, 0) * 1.2
    with pytest.raises(ValueError, match="does not give the features of the one that was trained"):
        write(state)


def test_tasks_are_read_as_they_were_written() -> None:
    task = Classification(7, "cls", 0.1)
    assert read_task(describe_task(task)) == task
    with pytest.raises(ValueError, match="unknown task 'detection': known are classification"):
        read_task({"name": "detection"})
    with pytest.raises(ValueError, match=r"task classification: .*classes"):
        read_task({"name": "classification", "classes": 3})


DESCRIPTION = StudentDescription(
    backbone="vit_tiny_patch16_224", model_args=TINY_ARGS, image_size=[16, 16], mechanism="linear",
    mechanism_options={}, keep=[], mean=[0.5] * 3, std=[0.5] * 3,
)  # fmt: skip


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The folder of a student with a head."""
    student = linearize(build_tiny_teacher(), "linear")
    task = Classification(3)
    description = dataclasses.replace(DESCRIPTION, task=describe_task(task))
    head = task.build_head(student).state_dict()
    save_student(tmp_path / "stage2", student.state_dict(), description, head)
    return tmp_path / "stage2"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002], ids=oct)
def test_files_and_folders_have_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    student = linearize(build_tiny_teacher(), "linear")
    before = os.umask(umask)
    try:
        for _ in range(2):  # again over the first
            save_student(tmp_path / "s" / "t", student.state_dict(), DESCRIPTION, {"weight": torch.ones(2)})
            write_json(tmp_path / "s" / "record.json", {})
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "s").rglob("*")}
    files = dict.fromkeys(("student.safetensors", "head.safetensors", "model.json", "record.json"), 0o666 & ~umask)
    assert found == {**files, "t": 0o777 & ~umask}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'; known are backbone"),
        ({"keep": None}, "keep cannot be None"),
        ({"image_size": [16]}, r"image_size cannot be \[16\]"),
        ({"image_size": "16"}, "image_size cannot be '16'"),
        ({"mean": [0.5, "x", 0.5]}, "mean cannot be"),
        ({"model_args": []}, r"model_args cannot be \[\]"),
        ({"backbone": 3}, "backbone cannot be 3"),
        ({"task": "classification"}, "task cannot be 'classification'"),
        ({"block_mechanisms": {"one": "window"}}, "block_mechanisms cannot be {'one': 'window'}"),
        ({"block_mechanisms": ["window"]}, r"block_mechanisms cannot be \['window'\]"),
        ({"block_mechanism_options": {"window": 2}}, "block_mechanism_options cannot be {'window': 2}"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_description_of_another_kind_is_refused(exported: Path, change: dict, message: str) -> None:
    path = exported / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"model.json is not a student's description: {message}"):
        load_student(exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "vit_tini_patch16_224"}, "timm knows no model"),
        ({"model_args": {"depth": -1}}, "model_args.depth is -1"),
        ({"image_size": [18, 16]}, "image size 18 x 16 is not divisible"),
        ({"mechanism": "quadratic"}, "unknown mechanism 'quadratic'"),
        ({"mechanism_options": {"colour": 1}}, "no option 'colour'"),
        ({"keep": [9]}, "keep="),
        ({"block_mechanisms": {"9": "window"}}, "block_mechanisms="),
        ({"block_mechanisms": {"1": "quadratic"}}, "unknown mechanism 'quadratic'"),
        ({"task": {"name": "detection"}}, "unknown task 'detection'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_description_cannot_mean_is_said_with_its_file(exported: Path, change: dict, message: str) -> None:
    path = exported / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        load_task_model(exported)


def test_a_student_of_several_mechanisms_is_read_back(tmp_path: Path) -> None:
    mixed = dataclasses.replace(
        DESCRIPTION, block_mechanisms={0: "window", 2: "window"}, block_mechanism_options={"window": {"window": 2}}
    )
    student = mixed.linearize(build_tiny_teacher()).eval()
    save_student(tmp_path, student.state_dict(), mixed)
    assert json.loads((tmp_path / "model.json").read_text())["block_mechanisms"] == {"0": "window", "2": "window"}
    assert read_description(tmp_path) == mixed and mixed.mechanisms == ("linear", "window")
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(load_student(tmp_path)(images), student(images))
    assert not torch.equal(DESCRIPTION.linearize(build_tiny_teacher()).eval()(images), student(images))


def test_a_student_from_before_there_were_several_mechanisms_is_read(exported: Path) -> None:
    path, images = exported / "model.json", torch.randn(2, 3, 16, 16)
    before, features = read_description(exported), load_student(exported)(images)
    values = json.loads(path.read_text())
    assert values.pop("block_mechanisms") == values.pop("block_mechanism_options") == {}
    path.write_text(json.dumps(values))
    assert read_description(exported) == before and torch.equal(load_student(exported)(images), features)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "it holds a list"),
        (b"null", "it holds a NoneType"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "can't decode byte"),
        (b"{}", "backbone is missing"),
    ],
    ids=str,
)
def test_a_description_that_is_none_is_refused(exported: Path, content: bytes, message: str) -> None:
    (exported / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.json is not a student's description: .*{message}"):
        load_student(exported)


def test_a_folder_without_a_student_is_called_what_it_is(exported: Path, tmp_path: Path) -> None:
    made = {
        "step-00000004": "COMPLETE", "stage1": "attempt.json", "timm": "config.json", "empty": "notes.txt"
    }  # fmt: skip
    for folder, file in made.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}", encoding="utf-8")
    for folder, message in {
        tmp_path: "its folders stage2 do; name one of them",
        tmp_path / "nowhere": "there is no such folder",
        exported / "model.json": "it is a file",
        tmp_path / "step-00000004": "it is a checkpoint of training",
        tmp_path / "stage1": "its stage is not finished",
        tmp_path / "timm": "local-dir:",
        tmp_path / "empty": "there is no model.json",
    }.items():
        with pytest.raises(ValueError, match=f"{folder} holds no exported student: .*{message}"):
            load_student(folder)


@pytest.mark.parametrize("name", ["student.safetensors", "head.safetensors"])
def test_damaged_weights_of_a_student_are_one_sentence(exported: Path, name: str) -> None:
    path, state = exported / name, load_file(exported / name)
    key = sorted(state)[-1]

    def refuses(message: str) -> None:
        with pytest.raises(ValueError, match=message) as raised:
            load_task_model(exported)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)

    save_file({**state, key: state[key] * float("nan")}, path)
    refuses(f"NaN or infinity in {key}")
    save_file({k: value for k, value in state.items() if k != key}, path)
    refuses(rf"does not fit its description: {key} is missing \(1 keys differ\)")
    save_file({**state, "more": torch.ones(1)}, path)
    refuses("does not fit its description: more is unknown")
    path.write_bytes(path.read_bytes()[:-10])
    refuses("damaged or incomplete safetensors file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuses("Git LFS pointer")
    path.unlink()
    refuses("does not exist")


def test_a_student_is_found_below_the_home_folder(exported: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(exported, tmp_path / "my student")
    assert load_task_model("~/my student")(torch.randn(1, 3, 16, 16)).shape == (1, 3)
