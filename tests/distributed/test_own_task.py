"""A task from outside the package, in sixty lines: trained on two ranks, scored by its own metric, exported, loaded."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import depth_task
import numpy as np
import pytest
import torch
from launch import FIXTURES, PROJECT, environment
from PIL import Image
from tiny_run import write_tiny_recipe
from torch import Tensor
from warm import train

from adala import load_task_model
from adala.data import write_shards
from adala.metrics import read_metrics
from adala.tasks import describe_task, registry

SIDE = 16
SAMPLES = {"train": 40, "val": 9}
LINES = 60


def test_a_task_takes_at_most_sixty_lines() -> None:
    lines = Path(depth_task.__file__).read_text().splitlines()
    assert len(lines) <= LINES
    assert all(len(line) <= 120 for line in lines)


def write_scenes(folder: Path) -> None:
    """A slope towards a random side, brighter where it is near, from 1 to 5 metres; one of each split has no depths."""
    rng = np.random.default_rng(0)
    for split, count in SAMPLES.items():
        samples = []
        for number in range(count):
            across, down = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
            share = rng.uniform()
            depth = 1 + 4 * (share * across + (1 - share) * down)
            pixels = 255 * (1 - depth / 6)[..., None] + rng.normal(0, 5, (SIDE, SIDE, 3))
            sample = {"png": Image.fromarray(pixels.clip(0, 255).astype(np.uint8))}
            if number != 4:
                stream = io.BytesIO()
                np.save(stream, depth.astype(np.float32))
                sample["depth.npy"] = stream.getvalue()
            samples.append(sample)
        write_shards(samples, folder, split, samples_per_shard=20)


def read_val(folder: Path) -> tuple[Tensor, Tensor]:
    """Images, normalised as the teacher's recipe says, and depths of the held-out samples that have both."""
    images, depths = {}, {}
    for path in sorted((folder / "scenes").glob("val-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, extension = member.name.partition(".")
                content = io.BytesIO(tar.extractfile(member).read())
                if extension == "png":
                    images[key] = np.array(Image.open(content))
                else:
                    depths[key] = np.load(content)
    pixels = torch.from_numpy(np.stack([images[key] for key in depths])).permute(0, 3, 1, 2)
    return (pixels / 255 - 0.5) / 0.5, torch.from_numpy(np.stack(list(depths.values())))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the package is installed that offers the task."""
    site = tmp_path / "site"
    folder = site / "depths-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: depths\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[adala.tasks]\ndepth = depth_task:Depth\n")
    # Ranks are forked with the path of this process.
    monkeypatch.syspath_prepend(site)
    registry._targets.cache_clear()
    yield site
    registry._targets.cache_clear()


def test_depth_is_trained_scored_exported_and_loaded(installed: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes")
    scenes = tmp_path / "scenes"
    data = {"train": [str(scenes / "train-*.tar")], "val": [str(scenes / "val-*.tar")], "image_size": [SIDE, SIDE]}
    stage = {"steps": 4, "global_batch_size": 8, "log_every": 1, "warmup_steps": 1, "augmentation": "none"}
    tuning = {**stage, "steps": 12, "lr": 0.003, "head_lr": 0.1, "task": {"name": "depth", "largest": 20.0}}
    recipe = write_tiny_recipe(tmp_path, data=data, stage3=tuning)
    done = train("--recipe", str(recipe), "--stage", "all")
    assert done.returncode == 0, done.stdout
    run = tmp_path / "runs" / "tiny-run"

    images, depths = read_val(tmp_path)
    model = load_task_model(run / "stage3")
    with torch.no_grad():
        rmse = (model(images) - depths).square().mean().sqrt().item()
    spread = (depths - depths.mean()).square().mean().sqrt().item()
    first, last = (read_metrics(run / "stage3", "val")[place]["rmse"] for place in (0, -1))
    assert last == pytest.approx(rmse, rel=1e-4) and last < spread < first

    report = json.loads((run / "report.json").read_text())
    assert (report["score"], report["score_title"]) == ("rmse", "RMSE (m)")
    scores = {row["model"]: row["rmse"] for row in report["rows"]}
    assert list(scores) == ["teacher", "linearized", "stage 1", "stage 2", "stage 3"]
    # Nobody knows how a backbone alone is scored.
    assert [scores.pop(name) for name in list(scores)[:4]] == [None] * 4
    assert scores["stage 3"] == pytest.approx(rmse, abs=0.006)
    assert all(row["feature_cosine"] > 0.1 for row in report["rows"])
    assert report["unusable_samples"] == 1
    printed = {
        name: line
        for line in done.stdout.splitlines()
        for name in ("model", "teacher", "stage 3")
        if is_row(line, name)
    }
    assert "RMSE (m)" in printed["model"]
    assert " - " in printed["teacher"] and f" {rmse:.2f} " in printed["stage 3"]
    assert (run / "report.png").stat().st_size > 10_000

    found = load_in_a_fresh_process(tmp_path, images, run / "stage3", [installed, FIXTURES])
    assert torch.equal(found["scores"], model(images).detach()) and torch.equal(
        found["decision"], model.predict(images)
    )
    assert found["task"] == describe_task(model.task) == {"name": "depth", "largest": 20.0}
    with pytest.raises(subprocess.CalledProcessError) as failed:
        load_in_a_fresh_process(tmp_path, images, run / "stage3", [FIXTURES])
    assert "model.json: unknown task 'depth': known are classification, multilabel, segmentation" in failed.value.stderr


FRESH = """
import sys
import torch
import adala
from adala.tasks import describe_task
images, folder = torch.load(sys.argv[1])
model = adala.load_task_model(folder)
found = {"scores": model(images).detach(), "decision": model.predict(images), "task": describe_task(model.task)}
torch.save(found, sys.argv[2])
"""


def load_in_a_fresh_process(folder: Path, images: Tensor, student: Path, path: list[Path]) -> dict:
    """What an exported model says of images where these folders are on the path."""
    given, found = folder / "given.pt", folder / "found.pt"
    torch.save([images, str(student)], given)
    variables = environment(PYTHONPATH=os.pathsep.join(map(str, [PROJECT, *path])))
    command = [sys.executable, "-c", FRESH, str(given), str(found)]
    subprocess.run(command, env=variables, text=True, capture_output=True, check=True, cwd=folder)
    return torch.load(found)


def is_row(line: str, name: str) -> bool:
    """Whether a line of the printed table is this row; borders part its cells."""
    cells = [cell.strip() for cell in re.split("[│┃]", line)]
    return len(cells) == 5 and cells[1] == name
