"""Segmentation through the training command on two ranks: every head, ZeRO 1 and 3, the table, export, resume."""

import functools
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import environment
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from tiny_scenes import IGNORED, NUM_CLASSES, SIDE, write_scene_recipe
from torch import Tensor
from warm import run_until_step, train

from adala import load_task_model
from adala.checkpoint import complete_checkpoints
from adala.metrics import read_metrics

TASKS: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear"},
    "pmt": {"head": "pmt", "head_options": {"num_queries": 6, "num_blocks": 1}},
    "mask2former": {
        "head": "mask2former",
        "head_options": {
            "num_queries": 6,
            "width": 32,
            "num_heads": 2,
            "pixel_decoder_layers": 1,
            "pixel_decoder_mlp_width": 32,
            "decoder_layers": 1,
            "decoder_mlp_width": 32,
        },
    },
}
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
NEEDS_IT = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="the head mask2former needs the extra mask2former")
HEADS = ["linear", "pmt", pytest.param("mask2former", marks=NEEDS_IT)]
# ZeRO-3 is enough where nothing is special about the head: deformable attention's modules are called as any others.
COMPARED = ["linear", "pmt"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Fine-tunes a head on two ranks under a configuration, once: the folder of Stage 3."""

    @functools.cache
    def run(head: str, ds_config: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{head}-{ds_config}")
        recipe = write_scene_recipe(folder, TASKS[head], ds_config=ds_config)
        done = train("--recipe", str(recipe), "--stage", "3")
        assert done.returncode == 0, done.stdout
        return folder / "runs" / "tiny-run" / "stage3"

    return run


def read_val(folder: Path) -> tuple[Tensor, np.ndarray]:
    """Images, normalised as the teacher's recipe says, and masks of the held-out scenes, read without the project."""
    images, masks = [], []
    for path in sorted((folder / "scenes").glob("val-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                pixels = np.array(Image.open(io.BytesIO(tar.extractfile(member).read())))
                (masks if member.name.endswith(".seg.png") else images).append(pixels)
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, np.stack(masks)


def miou_of(model: torch.nn.Module, folder: Path) -> float:
    """By scikit-learn."""
    images, masks = read_val(folder)
    known = masks != IGNORED
    truth, found = masks[known], model.predict(images).numpy()[known]
    return 100 * jaccard_score(truth, found, labels=np.union1d(truth, found), average="macro", zero_division=0)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_fine_tuned_and_scored(tuned, head: str) -> None:
    stage = tuned(head, "zero1")
    rows = read_metrics(stage, "train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row["labelled"] < 1 and 0 <= row["pixel_accuracy"] <= 100 for row in rows)
    first, last = read_metrics(stage, "val")
    assert last["loss"] < first["loss"]
    # Nine images on two ranks; of the exported model, scored alone.
    model = load_task_model(stage)
    assert last["miou"] == pytest.approx(miou_of(model, stage.parents[2]), abs=0.01)
    assert json.loads((stage / "finished.json").read_text())["metrics"]["miou"] == last["miou"]
    assert (model.task.name, model.task.head, model.task.num_classes) == ("segmentation", head, NUM_CLASSES)
    assert model.task.head_options == TASKS[head].get("head_options", {})


@pytest.mark.parametrize("head", COMPARED)
def test_zero_3_trains_what_zero_1_trains(tuned, head: str) -> None:
    first, second = (tuned(head, ds_config) for ds_config in ("zero1", "zero3"))
    for key in ("loss", "gradient_norm"):
        one, other = ([row[key] for row in read_metrics(stage, "train")] for stage in (first, second))
        assert other == pytest.approx(one, rel=1e-4), key
    one, other = (read_metrics(stage, "val")[-1] for stage in (first, second))
    # A batch norm takes away what the bias of the norm before it adds: AdamW moves that by noise, seen in evaluations.
    assert other["loss"] == pytest.approx(one["loss"], rel=2e-3)
    assert other["miou"] == pytest.approx(one["miou"], abs=0.5)


FRESH = """
import sys
import torch
import adala
images, *folders = torch.load(sys.argv[1])
with torch.no_grad():
    found = [(model(images), model.predict(images)) for model in map(adala.load_task_model, folders)]
torch.save(found, sys.argv[2])
"""


def test_an_exported_model_gives_the_same_masks_in_a_fresh_process(tuned, tmp_path: Path) -> None:
    """And when it is loaded again in this one; in batches or one by one."""
    folders = [
        tuned("linear", "zero3"),
        *(tuned(name, "zero1") for name in TASKS if name != "mask2former" or HAS_TRANSFORMERS),
    ]
    images, _ = read_val(folders[0].parents[2])
    images = images[:3]
    torch.save([images, *map(str, folders)], tmp_path / "given.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "given.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder, (scores, masks) in zip(folders, torch.load(tmp_path / "found.pt"), strict=True):
        assert scores.shape == (3, NUM_CLASSES, SIDE, SIDE) and scores.dtype == torch.float32
        assert masks.shape == (3, SIDE, SIDE) and masks.dtype == torch.int64
        assert torch.equal(masks, scores.argmax(1)) and scores.std(dim=(0, 2, 3)).min() > 0
        model = load_task_model(folder)
        with torch.no_grad():
            assert torch.equal(model(images), scores), folder
        for again in (model, load_task_model(folder)):
            assert torch.equal(again.predict(images), masks), folder
        alone = torch.cat([model.predict(image[None]) for image in images])
        assert (alone == masks).float().mean() > 0.999
        # Of another size, too.
        assert model.predict(images[:, :, :40, :48]).shape == (3, 40, 48)


def test_the_table_of_a_whole_run_is_of_mean_intersections_over_unions(tmp_path: Path) -> None:
    recipe = write_scene_recipe(tmp_path)
    done = train("--recipe", str(recipe), "--stage", "all")
    assert done.returncode == 0, done.stdout
    run = tmp_path / "runs" / "tiny-run"
    report = json.loads((run / "report.json").read_text())
    assert (report["score"], report["score_title"]) == ("miou", "mIoU (%)")
    rows = {row["model"]: row for row in report["rows"]}
    assert list(rows) == ["teacher", "linearized", "stage 1", "stage 2", "stage 3"]
    assert all(set(row) == {"model", "miou", "feature_cosine"} and 0 < row["miou"] < 100 for row in rows.values())
    assert rows["stage 3"]["miou"] == pytest.approx(miou_of(load_task_model(run / "stage3"), tmp_path), abs=0.01)
    assert rows["teacher"]["feature_cosine"] == pytest.approx(1.0, abs=1e-4)
    head = next(line for line in done.stdout.splitlines() if "feature cosine" in line and "model" in line)
    assert "mIoU (%)" in head
    assert (run / "report.png").stat().st_size > 10_000


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    """Of losses, weights and the running statistics of the head's batch norm, which no loss of training shows."""
    stage = {"steps": 24, "global_batch_size": 8, "log_every": 1, "warmup_steps": 1, "save_every": 3}
    stage |= {"augmentation": "scale", "task": {"name": "segmentation", "num_classes": NUM_CLASSES}}
    curves, weights, scores = {}, {}, {}
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
        recipe = write_scene_recipe(tmp_path / name, stage3=stage)
        folder = tmp_path / name / "runs" / "tiny-run" / "stage3"
        if name == "interrupted":
            run_until_step(recipe, ["--stage", "3"], folder, 7)
            assert not (folder / "finished.json").exists(), "it was too fast to be interrupted"
            kept = complete_checkpoints(folder / "checkpoints")
            assert kept, "nothing was saved before the interruption"
        done = train("--recipe", str(recipe), "--stage", "3")
        assert done.returncode == 0, done.stdout
        if name == "interrupted":
            assert f"resuming from {kept[-1]}" in done.stdout
        curves[name] = [row["loss"] for row in read_metrics(folder, "train")]
        weights[name] = load_file(folder / "student.safetensors") | load_file(folder / "head.safetensors")
        scores[name] = [row["miou"] for row in read_metrics(folder, "val")]
    assert len(curves["whole"]) == 24
    assert curves["interrupted"] == curves["whole"] and scores["interrupted"] == scores["whole"]
    assert weights["whole"]["norm.num_batches"] == 24 and weights["whole"]["norm.running_mean"].abs().max() > 0
    for key, value in weights["whole"].items():
        assert torch.equal(weights["interrupted"][key], value), key
