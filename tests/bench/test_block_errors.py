"""The errors by block: none for a softmax student, and as computed by hand for a linear one."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_run import write_tiny_recipe
from torch import Tensor

from adala.build import build_teacher, describe_student, run_folder
from adala.config import Recipe, load_recipe
from adala.evaluation.features import compare_features
from adala.export import save_student
from adala.losses import mean_cosine, relative_error
from adala.students import linearize

SCRIPT = Path(__file__).parents[2] / "bench" / "block_errors.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("block_errors", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


block_errors = load_script()


def in_batches(images: Tensor) -> list[dict[str, Tensor]]:
    """Batches of different sizes, so that averages over batches would not be those over images."""
    return [{"image": images[:3]}, {"image": images[3:]}]


def measure_one(teacher: VisionTransformer, student: VisionTransformer, images: Tensor) -> dict:
    return block_errors.measure(teacher, {"student": student.eval()}, in_batches(images))


def export_disturbed_student(recipe: Recipe, folder: Path, noise: float = 0.05) -> None:
    """Writes a student whose weights are the linearized teacher's with noise on them."""
    teacher = build_teacher(recipe)
    student = linearize(teacher, recipe.mechanism, recipe.keep).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    save_student(folder, student.state_dict(), describe_student(recipe, student, teacher))


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


def test_a_softmax_student_has_no_error_anywhere(teacher: VisionTransformer, images: Tensor) -> None:
    found = measure_one(teacher, linearize(teacher, "softmax"), images)["models"]["student"]
    places = [block[part] for block in found["blocks"] for part in ("attention", "stream")] + [found["features"]]
    assert len(places) == 7
    for place in places:
        assert place["error"] < 1e-6
        assert place["patch_cosine"] == pytest.approx(1, abs=1e-9)
        assert place["cls_cosine"] == pytest.approx(1, abs=1e-9)


def test_one_block_agrees_with_a_computation_by_hand(teacher: VisionTransformer, images: Tensor) -> None:
    student = linearize(teacher, "linear").eval()
    result = measure_one(teacher, student, images)
    with torch.no_grad():
        streams = {}
        for name, model in (("teacher", teacher), ("student", student)):
            x = model.patch_embed(images)
            x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
            streams[name] = [x := block(x) for block in model.blocks]
        x = teacher.blocks[2].norm1(streams["teacher"][1])
        target, alone = teacher.blocks[2].attn(x), student.blocks[2].attn(x)

    block = result["models"]["student"]["blocks"][2]
    ours, theirs = streams["student"][2], streams["teacher"][2]
    assert result["images"] == 4
    assert block["block"] == 2
    assert block["attention"]["error"] == pytest.approx(relative_error(alone, target).item(), rel=1e-5)
    assert block["attention"]["cls_cosine"] == pytest.approx(mean_cosine(alone[:, 0], target[:, 0]).item(), rel=1e-5)
    assert block["stream"]["error"] == pytest.approx(relative_error(ours, theirs).item(), rel=1e-5)
    assert block["stream"]["patch_cosine"] == pytest.approx(mean_cosine(ours[:, 1:], theirs[:, 1:]).item(), rel=1e-5)
    assert block["stream"]["error"] > 0.01

    outliers = result["teacher"][2]["stream"]
    rms = theirs.double().square().mean((0, 1)).sqrt()
    assert outliers["channel"] == rms.argmax().item()
    assert outliers["channel_over_median"] == pytest.approx((rms.max() / rms.median()).item())
    overall = theirs.double().square().mean().sqrt()
    assert outliers["max_over_rms"] == pytest.approx((theirs.abs().max() / overall).item(), rel=1e-6)


def test_final_features_agree_with_the_trainers_evaluation(teacher: VisionTransformer, images: Tensor) -> None:
    student = linearize(teacher, "linear").eval()
    expected = compare_features(student, teacher, in_batches(images))
    found = measure_one(teacher, student, images)["models"]["student"]["features"]
    assert found["error"] == pytest.approx(expected["relative_error"], rel=1e-6)
    assert found["patch_cosine"] == pytest.approx(expected["patch_cosine"], rel=1e-6)
    assert found["cls_cosine"] == pytest.approx(expected["cls_cosine"], rel=1e-6)


def test_a_single_linear_block_errs_where_it_stands_and_from_there_on(
    teacher: VisionTransformer, images: Tensor
) -> None:
    found = measure_one(teacher, linearize(teacher, "linear", keep=[0, 2]), images)["models"]["student"]
    alone = [block["attention"]["error"] for block in found["blocks"]]
    accumulated = [block["stream"]["error"] for block in found["blocks"]]
    assert alone[0] < 1e-6 and alone[1] > 0.01 and alone[2] < 1e-6
    assert accumulated[0] < 1e-6 and min(accumulated[1:]) > 0.001


def test_an_outlier_channel_is_found() -> None:
    x = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    x[..., 4] *= 100
    outliers = block_errors.Outliers()
    outliers.add(x[:1])
    outliers.add(x[1:])
    metrics = outliers.metrics()
    assert metrics["channel"] == 4
    assert 50 < metrics["channel_over_median"] < 200


def test_the_command_reports_the_runs_students_at_every_size(recipe_path: Path, tmp_path: Path, capsys) -> None:
    recipe = load_recipe(str(recipe_path))
    for number in (1, 2):
        export_disturbed_student(recipe, run_folder(recipe).stage(number), noise=0.02 * number)
    export_disturbed_student(recipe, tmp_path / "other")
    out = tmp_path / "report"
    arguments = ["--recipe", str(recipe_path), "--sizes", "16", "24", "--images", "6", "--out", str(out)]
    assert block_errors.main([*arguments, "--student", f"other={tmp_path / 'other'}"]) == 0

    report = json.loads((out / "block_errors.json").read_text())
    students = ["linearized", "stage 1", "stage 2", "other"]
    assert [result["size"] for result in report["sizes"]] == [[16, 16], [24, 24]]
    assert [result["images"] for result in report["sizes"]] == [6, 6]
    assert [list(result["models"]) for result in report["sizes"]] == [students, ["teacher, resampled", *students]]
    assert report["sizes"][0]["models"]["stage 1"] != report["sizes"][0]["models"]["stage 2"]
    # The embedding of 16 px is all that the weights hold: to build for 24 px and to resample come to the same.
    assert report["sizes"][1]["models"]["teacher, resampled"]["features"]["error"] < 1e-6
    assert (out / "block_errors.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "errors by block, 16 x 16 px, 6 images" in printed and "final features" in printed


def test_without_a_run_the_linearized_teacher_is_measured(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    (result,) = block_errors.measure_sizes(recipe, [(16, 16)], 1000, {})["sizes"]
    assert list(result["models"]) == ["linearized"]
    assert result["images"] == 14


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
    export_disturbed_student(recipe, run_folder(recipe).stage(1))
    assert block_errors.main(["--recipe", str(recipe_path), *arguments]) == 1
    assert message in capsys.readouterr().err
