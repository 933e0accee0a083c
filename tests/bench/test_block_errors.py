"""The command: a run's students at every size, what it writes, and mistakes."""

import json
from pathlib import Path

import block_errors
import pytest
import torch
from tiny_run import write_tiny_recipe

from adala.build import build_teacher, unaligned_student
from adala.config import Recipe, load_recipe
from adala.export import save_student
from adala.plan import resolve_run, run_folder


def export_disturbed_student(recipe: Recipe, folder: Path, noise: float = 0.05) -> None:
    """Writes a student whose weights are the linearized teacher's with noise on them."""
    model = resolve_run(recipe, ()).model
    student = unaligned_student(model, build_teacher(model.teacher))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    save_student(folder, student.state_dict(), model.student)


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


def test_the_command_reports_the_runs_students_at_every_size(recipe_path: Path, tmp_path: Path, capsys) -> None:
    recipe = load_recipe(str(recipe_path))
    for number in (1, 2):
        export_disturbed_student(recipe, run_folder(recipe).stage(number).path, noise=0.02 * number)
    export_disturbed_student(recipe, tmp_path / "other")
    out = tmp_path / "report"
    arguments = ["--recipe", str(recipe_path), "--sizes", "16", "24", "--images", "6", "--out", str(out)]
    assert block_errors.main([*arguments, "--student", f"other={tmp_path / 'other'}"]) == 0

    report = json.loads((out / "block_errors.json").read_text())
    students = ["linearized", "stage 1", "stage 2", "other"]
    assert [result["size"] for result in report["sizes"]] == [[16, 16], [24, 24]]
    assert [result["images"] for result in report["sizes"]] == [6, 6]
    assert [list(result["students"]) for result in report["sizes"]] == [students, ["teacher, resampled", *students]]
    assert report["sizes"][0]["students"]["stage 1"] != report["sizes"][0]["students"]["stage 2"]
    # The embedding of 16 px is all that the weights hold: to build for 24 px and to resample come to the same.
    assert report["sizes"][1]["students"]["teacher, resampled"]["features"]["relative_error"] < 1e-6
    assert (out / "block_errors.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "errors by block, 16 x 16 px, 6 images" in printed and "final features" in printed


def test_without_a_run_the_linearized_teacher_is_measured(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    report = block_errors.measure_sizes(recipe, [(16, 16)], 1000, {})[16, 16]
    assert list(report.students) == ["linearized"]
    assert report.images == 14


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "18"], "not divisible by the patch size"),
        (["--student", "x=nowhere"], "no exported student"),
        (["--teacher.model_args", '{"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}'], "name the recipe"),
        (["--no_such_key", "1"], "no_such_key"),
    ],
    ids=["size", "student", "backbone", "key"],
)
def test_mistakes_are_explained(recipe_path: Path, capsys, arguments: list[str], message: str) -> None:
    recipe = load_recipe(str(recipe_path))
    export_disturbed_student(recipe, run_folder(recipe).stage(1).path)
    assert block_errors.main(["--recipe", str(recipe_path), *arguments]) == 1
    assert message in capsys.readouterr().err
