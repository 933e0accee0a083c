"""The main job through the DeepSpeed launcher on two ranks: every stage under ZeRO 0 to 3, resume, export."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_run import read_tiny_val, write_tiny_recipe
from tiny_teacher import TINY_ARGS, build_tiny_teacher
from warm import run_until_step, train

from adala import load_student, load_task_model
from adala.checkpoint import complete_checkpoints
from adala.metrics import read_metrics

ROWS = ["teacher", "linearized", "stage 1", "stage 2", "stage 3"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def run_under(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Runs all three stages on two ranks under a configuration, once: the folder around the run, what was printed."""

    @functools.cache
    def run(ds_config: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(ds_config)
        recipe = write_tiny_recipe(folder, ds_config=ds_config)
        before = digest(folder / "teacher.safetensors")
        micro = "2" if ds_config == "zero2" else "4"
        done = train("--recipe", str(recipe), "--stage", "all", "--stage2.micro_batch_size", micro)
        assert done.returncode == 0, done.stdout
        assert digest(folder / "teacher.safetensors") == before
        return folder, done.stdout

    return run


@pytest.fixture(scope="module", params=["zero0", "zero1", "zero2", "zero3", "zero1_bf16"])
def finished_run(request: pytest.FixtureRequest, run_under) -> tuple[str, Path, str]:
    """A configuration's name, the folder around its run, what was printed."""
    return request.param, *run_under(request.param)


def losses_of(folder: Path) -> list[float]:
    run = folder / "runs" / "tiny-run"
    return [row["loss"] for n in (1, 2, 3) for row in read_metrics(run / f"stage{n}", "train")]


def test_three_stages_and_their_report(finished_run) -> None:
    name, folder, printed = finished_run
    run = folder / "runs" / "tiny-run"
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ROWS
    assert [set(row) for row in rows] == [{"model", "top1", "feature_cosine"}] * 5
    assert rows[0]["feature_cosine"] == pytest.approx(1.0, abs=1e-4)
    # Colour gives the classes away, so that a probe on any features finds them; the head has had four steps.
    assert [row["top1"] for row in rows[:4]] == [100.0] * 4
    images, labels = read_tiny_val(folder / "shards")
    right = load_task_model(run / "stage3")(images).argmax(-1) == labels
    # bf16 may round one of 14 images across the border.
    assert rows[4]["top1"] == pytest.approx(100 * right.float().mean().item(), abs=7.2 if "bf16" in name else 0.01)
    assert "feature cosine" in printed and "stage 3" in printed
    assert (run / "report.png").stat().st_size > 10_000
    for number in (1, 2, 3):
        stage = run / f"stage{number}"
        steps = [row["step"] for row in read_metrics(stage, "train")]
        assert steps == [1, 2, 3, 4]
        assert (stage / "config.yaml").is_file() and (stage / "finished.json").is_file()
    first = read_metrics(run / "stage1", "train")[0]
    assert {f"block0{i}_loss" for i in range(3)} <= set(first)
    # A process that has imported torch and holds a model: above 100 MiB, below this machine's memory in MiB.
    assert 100 < first["peak_memory_mib"] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    assert "dropped at its end" in printed


def test_every_configuration_trains_alike(finished_run, run_under) -> None:
    """The curves of ZeRO 0 to 3 are one curve (bf16 near it): none of them silently trains something else."""
    name, folder, _ = finished_run
    tolerance = 5e-2 if name.endswith("bf16") else 2e-4
    reference, _ = run_under("zero0")
    assert losses_of(folder) == pytest.approx(losses_of(reference), rel=tolerance)


def test_the_export_is_complete_and_scores_as_in_training(finished_run) -> None:
    name, folder, _ = finished_run
    tolerance = 2e-2 if name.endswith("bf16") else 1e-4
    run = folder / "runs" / "tiny-run"
    reference = build_tiny_teacher().state_dict()
    images = torch.randn(2, 3, 16, 16)
    for number in (1, 2, 3):
        state = load_file(run / f"stage{number}" / "student.safetensors")
        assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in reference.items()}
        student = load_student(run / f"stage{number}")
        assert student(images).shape == (2, 17, 32)
        moved = {key for key, value in state.items() if not torch.equal(value, reference[key])}
        if number == 1:
            assert moved == {f"blocks.{i}.attn.qkv.{kind}" for i in range(3) for kind in ("weight", "bias")}
        else:
            assert "patch_embed.proj.weight" in moved and "norm.weight" in moved
    # What the trainer measured last, before the export, is what the report measured on the reloaded student.
    cosine = json.loads((run / "stage2" / "finished.json").read_text())["metrics"]["feature_cosine"]
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert rows[3]["feature_cosine"] == pytest.approx(cosine, abs=tolerance)
    assert load_task_model(run / "stage3")(images).shape == (2, 3)


def test_a_softmax_student_loads_into_plain_timm(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, mechanism="softmax", ds_config="zero3")
    done = train("--recipe", str(recipe), "--stage", "2")
    assert done.returncode == 0, done.stdout
    assert "starting from the linearized teacher (no stage 1 in this run)" in done.stdout
    folder = tmp_path / "runs" / "tiny-run" / "stage2"
    plain = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, global_pool="", **TINY_ARGS).eval()
    plain.load_state_dict(load_file(folder / "student.safetensors"), strict=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(images), load_student(folder)(images))
    first = read_metrics(folder, "train")[0]
    assert first["loss"] == 0.0 and first["relative_error"] == 0.0


# Its projections are drawn anew every four steps, and so must be found by a resumed run and by the export.
PERFORMER = {"mechanism": "performer", "mechanism_options": {"num_features": 16, "redraw_interval": 4}}


@pytest.mark.parametrize("ds_config", ["zero1", "zero3"])
def test_an_interrupted_run_continues_to_the_same_curve(tmp_path: Path, ds_config: str) -> None:
    """Killed in the middle of an epoch; steps 5 an epoch, saved every 3, so that the resumed run crosses epochs too."""
    stage = {"steps": 60, "global_batch_size": 8, "log_every": 1, "warmup_steps": 1, "save_every": 3}
    stage |= {"augmentation": "crop"}
    curves = {}
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
        recipe = write_tiny_recipe(tmp_path / name, stage2=stage, ds_config=ds_config, **PERFORMER)
        folder = tmp_path / name / "runs" / "tiny-run" / "stage2"
        if name == "interrupted":
            run_until_step(recipe, ["--stage", "2"], folder, 8)
            assert not (folder / "finished.json").exists(), "it was too fast to be interrupted"
            kept = complete_checkpoints(folder / "checkpoints")
            assert kept, "nothing was saved before the interruption"
        done = train("--recipe", str(recipe), "--stage", "2")
        assert done.returncode == 0, done.stdout
        if name == "interrupted":
            assert f"resuming from {kept[-1]}" in done.stdout
        curves[name] = [row["loss"] for row in read_metrics(folder, "train")]
    assert len(curves["whole"]) == 60
    assert curves["interrupted"] == curves["whole"]


def test_a_native_conversion_merges_its_adapters(tmp_path: Path) -> None:
    """LoLCATS as its authors convert: attention transfer, then LoRA; there is no Stage 2, and no adapter afterwards."""
    recipe = write_tiny_recipe(tmp_path, mechanism="lolcats", conversion="native", ds_config="zero1")
    done = train("--recipe", str(recipe), "--stage", "all")
    assert done.returncode == 0, done.stdout
    assert "stage 2 is no part of lolcats's native conversion: left out" in done.stdout
    run = tmp_path / "runs" / "tiny-run"
    after_transfer, after_lora = (load_file(run / f"stage{n}" / "student.safetensors") for n in (1, 3))
    assert set(after_lora) == set(after_transfer)
    moved = {key for key in after_lora if not torch.equal(after_lora[key], after_transfer[key])}
    assert moved == {f"blocks.{i}.attn.{name}.weight" for i in range(3) for name in ("qkv", "proj")}
    assert not (run / "stage2").exists()


def test_a_checkpoint_cut_short_is_not_read(tmp_path: Path) -> None:
    """What lies under a checkpoint's name without the marker, or under a partial name, is passed over."""
    for name, marker in (("step-00000002", True), ("step-00000004", False), ("partial-step-00000006", True)):
        (tmp_path / name).mkdir()
        if marker:
            (tmp_path / name / "COMPLETE").touch()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000002"]


def test_finished_stages_are_not_run_again_unasked(tmp_path: Path) -> None:
    recipe = str(write_tiny_recipe(tmp_path, ds_config="zero1"))
    stage = tmp_path / "runs" / "tiny-run" / "stage1"
    assert train("--recipe", recipe, "--stage", "1", ranks=1).returncode == 0
    first = digest(stage / "student.safetensors")
    again = train("--recipe", recipe, "--stage", "1", ranks=1)
    # A loop that starts a command until it succeeds has to end.
    assert again.returncode == 0 and "is finished already, and nothing was done: add --overwrite" in again.stdout
    refused = train("--recipe", recipe, "--stage", "1", "--stage1.lr", "0.1", ranks=1)
    assert refused.returncode != 0
    assert "was finished with stage1.lr 0.001, this run has 0.1: set it back" in refused.stdout
    assert digest(stage / "student.safetensors") == first
    again = train("--recipe", recipe, "--stage", "1", "--stage1.lr", "0.1", "--overwrite", ranks=1)
    assert again.returncode == 0, again.stdout
    assert digest(stage / "student.safetensors") != first
    assert not (stage.parent / "stage1.new").exists() and not (stage.parent / "overwrite.json").exists()
    ablation = train("--recipe", recipe, "--stage", "3", "--stage3.freeze_backbone", "true", ranks=1)
    assert ablation.returncode == 0, ablation.stdout
    assert f"starting from the student in {stage}" in ablation.stdout
    assert digest(tmp_path / "runs" / "tiny-run" / "stage3" / "student.safetensors") == digest(
        stage / "student.safetensors"
    )
    qkv = train(
        "--recipe", recipe, "--stage", "2", "--stage2.trainable", "qkv", "--stage2.start_from", "linearized", ranks=1
    )
    assert qkv.returncode == 0, qkv.stdout
    state, reference = (
        load_file(tmp_path / "runs/tiny-run/stage2/student.safetensors"),
        build_tiny_teacher().state_dict(),
    )
    assert all(".attn.qkv." in key for key, value in state.items() if not torch.equal(value, reference[key]))
