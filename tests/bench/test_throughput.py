"""Arithmetic of the throughput bench, its three commands on a tiny recipe, and the Slurm script with a fake srun."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from launch import PROJECT
from throughput import fill_in_efficiency, main, scaling_rows, steady_rate, stream_rate
from tiny_run import write_tiny_recipe

from adala.config import load_recipe
from adala.metrics import read_metrics


def test_the_first_third_of_the_steps_is_left_out():
    assert steady_rate([{"images_per_s": rate} for rate in (1, 2, 10, 11, 12, 13)]) == 11.5
    with pytest.raises(ValueError, match="no training step"):
        steady_rate([])


def test_efficiency_is_against_the_fewest_ranks_of_the_same_stage():
    measured = [(1, 1, 10.0), (1, 2, 15.0), (1, 4, None), (2, 2, 8.0), (2, 4, 16.0)]
    rows = [{"stage": s, "ranks": n, "images_per_s": rate, "efficiency": None} for s, n, rate in measured]
    fill_in_efficiency(rows)
    assert [row["efficiency"] for row in rows] == [1.0, 0.75, None, 1.0, 1.0]


def test_the_global_batch_stays_or_grows_with_the_ranks():
    recipe = load_recipe("tiny", ["--stage2.global_batch_size", "64"])
    assert {row["global_batch_size"] for row in scaling_rows(recipe, [1, 2, 4], [1, 2], grow=False)} == {64}
    assert [row["global_batch_size"] for row in scaling_rows(recipe, [1, 2, 4], [1], grow=True)] == [64, 128, 256]
    with pytest.raises(ValueError, match="does not divide over 3 ranks"):
        scaling_rows(recipe, [3], [1], grow=False)


def test_samples_are_counted_from_the_second_batch_on():
    now = iter([0.0, 5.0, 5.0, 6.0, 7.0, 7.0])
    batches = iter([{"id": ["x"] * 4}] * 10)
    assert stream_rate(batches, 2.0, lambda: next(now)) == (4.0, 5.0)


def measured(tmp_path: Path, monkeypatch, *arguments: str) -> list[dict]:
    """The rows of one command on the tiny recipe."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = write_tiny_recipe(tmp_path)
    out = tmp_path / "out"
    assert main([*arguments, "--recipe", str(recipe), "--out", str(out), "--data.shuffle_buffer", "5"]) == 0
    found = json.loads((out / f"{arguments[0]}.json").read_text())
    assert found["conditions"]["overrides"] == ["--data.shuffle_buffer", "5"]
    assert (out / f"{arguments[0]}.md").read_text().count("\n") == 2 + len(found["rows"])
    return found["rows"]


def test_ranks_are_compared_on_runs_of_the_training_command(tmp_path, monkeypatch):
    rows = measured(tmp_path, monkeypatch, "scaling", "--ranks", "1", "2", "--stages", "2", "--steps", "3")
    assert [(row["ranks"], row["global_batch_size"]) for row in rows] == [(1, 8), (2, 8)]
    speeds = []
    for row in rows:
        metrics = read_metrics(tmp_path / "out" / f"stage2-{row['ranks']}-ranks" / "stage2", "train")
        # Of three steps the first is not yet steady.
        speeds.append(sum(line["images_per_s"] for line in metrics[1:]) / 2)
        assert row["images_per_s"] == pytest.approx(speeds[-1]) and row["error"] is None
    assert [row["efficiency"] for row in rows] == pytest.approx([1.0, speeds[1] / 2 / speeds[0]])
    config = (tmp_path / "out" / "stage2-2-ranks" / "stage2" / "config.yaml").read_text()
    assert "shuffle_buffer: 5" in config and "steps: 3" in config


def test_the_loader_is_compared_with_a_run(tmp_path, monkeypatch):
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    lines = [json.dumps({"split": "train", "step": step, "images_per_s": 0.5}) for step in (1, 2, 3)]
    (tmp_path / "run" / "stage1" / "metrics.jsonl").write_text("\n".join(lines))
    arguments = ("--workers", "0", "--seconds", "0.2", "--run", str(tmp_path / "run"))
    (row,) = measured(tmp_path, monkeypatch, "loader", *arguments)
    assert row["headroom"] == pytest.approx(row["samples_per_s"] / 0.5)


def test_the_loader_is_compared_with_a_bare_step(tmp_path, monkeypatch):
    rows = measured(tmp_path, monkeypatch, "loader", "--workers", "0", "1", "--seconds", "0.2", "--stage", "3")
    assert [row["workers"] for row in rows] == [0, 1] and min(row["headroom"] for row in rows) > 0


@pytest.mark.parametrize("stage", [1, 3])
def test_the_trainer_is_compared_with_a_bare_loop(tmp_path, stage):
    """In a process of its own, since it makes a process group; micro-batches are accumulated on both sides."""
    arguments = ["--recipe", write_tiny_recipe(tmp_path), "--out", tmp_path / "out", "--rounds", "3", "--steps", "2"]
    command = [sys.executable, PROJECT / "bench" / "throughput.py", "overhead", *arguments, "--stage", str(stage)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, f"--stage{stage}.micro_batch_size", "4"], env=environment, cwd=PROJECT, check=True)
    (row,) = json.loads((tmp_path / "out" / "overhead.json").read_text())["rows"]
    assert row["stage"] == stage and 0 < row["lowest"] <= row["ratio"] <= row["highest"]


def test_the_slurm_script_starts_the_bench_once(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    # As Slurm does: a copy elsewhere, which finds the project by the folder of submission.
    script = shutil.copy(PROJECT / "launchers" / "slurm" / "bench.sbatch", tmp_path / "slurm_script")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(PROJECT),
        "SLURM_CPUS_PER_TASK": "4",
    }
    done = subprocess.run(
        ["bash", script, "--res", "64"], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(PROJECT))
    assert done.stdout.rstrip().endswith("--cpus-per-task=4 python bench/run_all.py --res 64")
    environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "has no bench/run_all.py" in done.stderr
