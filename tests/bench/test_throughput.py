"""Arithmetic of the throughput bench, each of its commands for real, and the Slurm script with a stand-in for srun."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from throughput import fill_in_efficiency, scaling_rows, steady_rate, stream_rate
from tiny_run import write_tiny_recipe

from adala.config import load_recipe

ROOT = Path(__file__).parents[2]


def test_the_first_third_of_the_steps_is_left_out():
    assert steady_rate([{"images_per_s": rate} for rate in (1, 2, 10, 11, 12, 13)]) == 11.5
    with pytest.raises(ValueError, match="no training step"):
        steady_rate([])


def test_efficiency_is_against_the_fewest_ranks_of_the_same_stage():
    rates = [(1, 1, 10.0), (1, 2, 15.0), (1, 4, None), (2, 2, 8.0), (2, 4, 16.0)]
    rows = [{"stage": s, "ranks": r, "images_per_s": rate, "efficiency": None} for s, r, rate in rates]
    fill_in_efficiency(rows)
    assert [row["efficiency"] for row in rows] == [1.0, 0.75, None, 1.0, 1.0]


def test_the_global_batch_stays_or_grows_with_the_ranks():
    recipe = load_recipe("tiny", ["--stage2.global_batch_size", "64"])
    assert {row["global_batch_size"] for row in scaling_rows(recipe, [1, 2, 4], [1, 2], grow=False)} == {64}
    assert [row["global_batch_size"] for row in scaling_rows(recipe, [1, 2, 4], [1], grow=True)] == [64, 128, 256]
    with pytest.raises(ValueError, match="does not divide over 3 ranks"):
        scaling_rows(recipe, [3], [1], grow=False)


COMMANDS = {
    "scaling": ["--ranks", "1", "--stages", "2", "--steps", "3"],
    "loader": ["--workers", "0", "--seconds", "0.1"],
    "overhead": ["--rounds", "1", "--steps", "2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_measures_and_writes_its_table(tmp_path, name):
    arguments = [name, "--recipe", str(write_tiny_recipe(tmp_path)), "--out", str(tmp_path / "out"), *COMMANDS[name]]
    command = [sys.executable, str(ROOT / "bench" / "throughput.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out" / f"{name}.json").read_text())["rows"]
    rates = [value for key, value in row.items() if key.endswith("_per_s") or key in ("ratio", "headroom")]
    assert rates and all(rate > 0 for rate in rates)
    assert (tmp_path / "out" / f"{name}.md").read_text().count("\n") == 3


def test_samples_are_counted_from_the_second_batch_on():
    now = iter([0.0, 5.0, 5.0, 6.0, 7.0, 7.0])
    batches = iter([{"id": ["x"] * 4}] * 10)
    assert stream_rate(batches, 2.0, lambda: next(now)) == (4.0, 5.0)


def test_the_slurm_script_starts_the_bench_once(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    # As Slurm does: a copy elsewhere, which finds the project by the folder of submission.
    script = shutil.copy(ROOT / "launchers" / "slurm" / "bench.sbatch", tmp_path / "slurm_script")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "4",
    }
    done = subprocess.run(
        ["bash", script, "--res", "64"], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(ROOT))
    assert done.stdout.rstrip().endswith("--cpus-per-task=4 python bench/run_all.py --res 64")
    environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "has no bench/run_all.py" in done.stderr
