"""Exported students: what is read back must be what was trained."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_run import write_tiny_recipe

from adala import load_classifier, load_student
from adala.build import build_evaluation_loader, build_stage, build_teacher, prepare_student, unaligned_student
from adala.config import load_recipe
from adala.export import read_description
from adala.pipeline import _write_student
from adala.plan import resolve_run
from adala.runs import StageFolder
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
    batch = next(iter(build_evaluation_loader(plan.data, plan.held_out, 4, labelled=True)))
    autocast = plan.model.precision.autocast_dtype
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        features = stage(batch)["features"]
    folder = StageFolder(tmp_path / "stage3")
    return folder.path, state, partial(_write_student, plan, stage, folder, batch=batch, trained=features)


def test_what_was_trained_is_read_back(export) -> None:
    folder, state, write = export
    write(state)
    student = load_student(folder)
    key = "blocks.0.attn.token_mixer.projection"
    assert torch.equal(student.state_dict()[key], state[f"student.{key}"])
    assert load_classifier(folder)(torch.randn(2, 3, 16, 16)).shape == (2, 3)
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
