"""What can be compared: the models that they are, and what their features depend on."""

import dataclasses
import hashlib
import inspect
from pathlib import Path

import pytest
import torch
from tiny_run import write_tiny_recipe

from adala import load_student, load_task_model
from adala.attention import linear, window
from adala.config import load_recipe
from adala.contenders import build_teacher_contender, linearize_contender, load_contender
from adala.export import HEAD_WEIGHTS, WEIGHTS, save_student
from adala.plan import RunPlan, resolve_run
from adala.students import linearize
from adala.tasks import describe_task, read_task

TASK = {"name": "classification", "num_classes": 3}


def plan_of(folder: Path, *overrides: str) -> RunPlan:
    return resolve_run(load_recipe(str(folder / "recipe.yaml"), list(overrides)), ())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_recipe(folder)
    return folder


def export(plan: RunPlan, folder: Path, task: dict | None = None, shift: float = 0.0) -> Path:
    student = linearize_contender(plan.model, build_teacher_contender(plan.model)).model
    with torch.no_grad():
        student.norm.bias += shift
    head = None if task is None else read_task(task).build_head(student).state_dict()
    described = None if task is None else describe_task(read_task(task))
    save_student(folder, student.state_dict(), dataclasses.replace(plan.model.student, task=described), head)
    return folder


def sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def test_the_three_kinds_give_the_features_of_their_models(tiny: Path, tmp_path: Path, teacher, images) -> None:
    plan = plan_of(tiny)
    own = build_teacher_contender(plan.model)
    linearized = linearize_contender(plan.model, own)
    student = load_contender(export(plan, tmp_path / "student", shift=0.5))
    assert own.model(images).equal(teacher(images)) and own.mechanism == "softmax"
    expected = linearize(teacher, "linear").eval()(images)
    assert linearized.model(images).equal(expected) and linearized.mechanism == student.mechanism == "linear"
    assert student.model(images).equal(load_student(tmp_path / "student")(images))
    assert not student.model(images).equal(expected)
    for one in (own, linearized, student):
        assert (one.head, one.task) == (None, None) and not one.model.training
    assert own.identity["weights"] == sha256(tiny / "teacher.safetensors")
    assert student.identity["weights"] == sha256(tmp_path / "student" / WEIGHTS)
    assert str(tmp_path / "student") in student.origin and student.identity["weights"] in student.origin


@torch.no_grad()
def test_a_student_brings_its_head(tiny: Path, tmp_path: Path, images) -> None:
    folder = export(plan_of(tiny), tmp_path, TASK)
    one = load_contender(folder)
    found = one.head(one.model(images), one.model.token_layout(images))
    assert found.equal(load_task_model(folder)(images)) and one.task == read_task(TASK)
    without = load_contender(folder, with_head=False)
    assert without.head is None and without.model(images).equal(one.model(images))


def test_features_depend_on_weights_and_make_and_not_on_heads(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny)
    plain = load_contender(export(plan, tmp_path / "plain")).identity
    for name, task in {"head": TASK, "other head": {**TASK, "num_classes": 7}}.items():
        assert load_contender(export(plan, tmp_path / name, task)).identity == plain
    assert load_contender(export(plan, tmp_path / "moved", shift=0.5)).identity["weights"] != plain["weights"]
    kept = load_contender(export(plan_of(tiny, "--keep=[1]"), tmp_path / "kept")).identity
    assert kept["model"] != plain["model"]


@pytest.mark.parametrize(
    "override", ["--mechanism_options.den_added=0.5", "--keep=[1]", "--seed=1", "--block_mechanisms={1: window}"]
)
def test_a_linearization_depends_on_all_that_makes_it(tiny: Path, override: str) -> None:
    one, other = (plan_of(tiny, *overrides).model for overrides in ([], [override]))
    teacher = build_teacher_contender(one)
    assert build_teacher_contender(other).identity == teacher.identity
    identities = [linearize_contender(plan, teacher).identity for plan in (one, other)]
    assert identities[0] != identities[1] and identities[0]["weights"] == teacher.identity["weights"]


def test_features_depend_on_the_code_of_the_mechanism(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """Of one that somebody is at work on, the weights stay."""
    plan, source = plan_of(tiny).model, tmp_path / "mine.py"
    teacher = build_teacher_contender(plan)
    known = linearize_contender(plan, teacher).identity
    assert known["code"] == sha256(Path(linear.__file__)) != teacher.identity["code"]
    monkeypatch.setattr(inspect, "getsourcefile", lambda _: str(source))
    codes = []
    for text in ("one", "two"):
        source.write_text(text)
        codes.append(linearize_contender(plan, teacher).identity)
    assert len({one["code"] for one in (known, *codes)}) == 3
    monkeypatch.setattr(inspect, "getsourcefile", lambda _: None)
    assert linearize_contender(plan, teacher).identity["code"] == "LinearMixer"


@torch.no_grad()
def test_features_depend_on_the_code_of_every_mechanism(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny, "--block_mechanisms={0: window, 2: window}", "--block_mechanism_options.window.window=2")
    linearized = linearize_contender(plan.model, build_teacher_contender(plan.model))
    code = f"{sha256(Path(linear.__file__))} {sha256(Path(window.__file__))}"
    assert linearized.identity["code"] == code and linearized.mechanism == "linear + window"
    read = load_contender(export(plan, tmp_path))
    assert (read.identity["code"], read.mechanism) == (code, "linear + window")
    images = torch.randn(2, 3, 16, 16)
    assert read.model(images).equal(linearized.model(images))


def test_what_is_no_student_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere holds no exported student: there is no such folder"):
        load_contender(tmp_path / "nowhere")
    folder = export(plan_of(tiny), tmp_path / "student", TASK)
    (folder / HEAD_WEIGHTS).unlink()
    with pytest.raises(ValueError, match=HEAD_WEIGHTS):
        load_contender(folder)
    load_contender(folder, with_head=False)
