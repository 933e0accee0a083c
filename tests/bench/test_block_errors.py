"""The errors by block: none for a softmax student, and as computed by hand for a linear one."""

import json
from pathlib import Path

import block_errors
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_run import write_tiny_recipe
from torch import Tensor

from adala.build import build_teacher, unaligned_student
from adala.config import Recipe, load_recipe
from adala.evaluation import BlockErrors, BlockReport, evaluate, measure_block_errors
from adala.export import save_student
from adala.plan import resolve_run, run_folder
from adala.similarity import comparison_metrics, comparison_sums
from adala.students import linearize


def in_batches(images: Tensor) -> list[dict]:
    """Batches of different sizes, so that averages over batches would not be those over images."""
    return [{"image": part, "id": ["x"] * len(part)} for part in (images[:3], images[3:])]


def measure_one(
    teacher: VisionTransformer, student: VisionTransformer, images: Tensor
) -> tuple[BlockReport, BlockErrors]:
    report = measure_block_errors(teacher, {"student": student.eval()}, in_batches(images))
    return report, report.students["student"]


def export_disturbed_student(recipe: Recipe, folder: Path, noise: float = 0.05) -> None:
    """Writes a student whose weights are the linearized teacher's with noise on them."""
    model = resolve_run(recipe, ()).model
    student = unaligned_student(model, build_teacher(model.teacher)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    save_student(folder, student.state_dict(), model.student)


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


def test_a_softmax_student_has_no_error_anywhere(teacher: VisionTransformer, images: Tensor) -> None:
    _, found = measure_one(teacher, linearize(teacher, "softmax"), images)
    places = [*found.attention, *found.stream, found.features]
    assert len(places) == 7
    for place in places:
        assert place["relative_error"] < 1e-6
        assert place["patch_cosine"] == pytest.approx(1, abs=1e-6)
        assert place["cls_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mechanism", ["linear", "monarch"])
def test_one_block_agrees_with_a_computation_by_hand(teacher: VisionTransformer, mechanism: str) -> None:
    # Not square: Monarch's blocks are image rows, and a 2 x 8 grid has as many tokens as the model's own.
    images = torch.randn(4, 3, 8, 32, generator=torch.Generator().manual_seed(1))
    student = linearize(teacher, mechanism).eval()
    report, found = measure_one(teacher, student, images)
    layout = student.token_layout(images)
    with torch.no_grad():
        streams = {}
        for name, model, arguments in (("teacher", teacher, {}), ("student", student, {"attn_mask": layout})):
            x = model.patch_embed(images)
            x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
            streams[name] = [x := block(x, **arguments) for block in model.blocks]
        x = teacher.blocks[2].norm1(streams["teacher"][1])
        target, alone = teacher.blocks[2].attn(x), student.blocks[2].attn(x, attn_mask=layout)

    def by_hand(ours: Tensor, theirs: Tensor) -> dict[str, float]:
        metrics = comparison_metrics(comparison_sums(ours, theirs, 1), has_class_token=True)
        return pytest.approx({name: value.item() for name, value in metrics.items()}, rel=1e-5)

    ours, theirs = streams["student"][2], streams["teacher"][2]
    assert report.images == 4
    assert found.attention[2] == by_hand(alone, target)
    assert found.stream[2] == by_hand(ours, theirs)
    assert found.stream[2]["relative_error"] > 0.01

    outliers = report.outliers[2]
    rms = theirs.double().square().mean((0, 1)).sqrt()
    assert outliers["channel"] == rms.argmax().item()
    assert outliers["channel_over_median"] == pytest.approx((rms.max() / rms.median()).item())
    overall = theirs.double().square().mean().sqrt()
    assert outliers["max_over_rms"] == pytest.approx((theirs.abs().max() / overall).item(), rel=1e-6)


def test_final_features_agree_with_the_evaluator(teacher: VisionTransformer, images: Tensor) -> None:
    student = linearize(teacher, "linear").eval()
    _, found = measure_one(teacher, student, images)
    assert found.features == pytest.approx(evaluate(student, teacher, in_batches(images)), rel=1e-6)


def test_a_single_linear_block_errs_where_it_stands_and_from_there_on(
    teacher: VisionTransformer, images: Tensor
) -> None:
    _, found = measure_one(teacher, linearize(teacher, "linear", keep=[0, 2]), images)
    alone, accumulated = ([place["relative_error"] for place in of] for of in (found.attention, found.stream))
    assert alone[0] < 1e-6 and alone[1] > 0.01 and alone[2] < 1e-6
    assert accumulated[0] < 1e-6 and min(accumulated[1:]) > 0.001


def test_an_outlier_channel_is_found(teacher: VisionTransformer, images: Tensor) -> None:
    with torch.no_grad():
        teacher.pos_embed[..., 4] += 1000
    report, _ = measure_one(teacher, linearize(teacher, "linear"), images)
    assert [block["channel"] for block in report.outliers] == [4, 4, 4]
    assert all(block["channel_over_median"] > 50 for block in report.outliers)


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
    (report,) = block_errors.measure_sizes(recipe, [(16, 16)], 1000, {}).values()
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
