"""Runs that are killed, asked to end and hung, at moments that nobody chose."""

import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
from launch import PATIENCE_S, free_port, launch
from launch import train as train_by_launcher
from tiny_run import write_tiny_recipe
from warm import kill, start_ranks, train

from adala.metrics import read_metrics
from adala.preemption import REQUEUE

pytestmark = pytest.mark.faults

STAGE = {"steps": 120, "global_batch_size": 8, "log_every": 1, "warmup_steps": 1, "augmentation": "crop"}
# Saved after every step or two, a run is in the middle of it most of the time.
OFTEN = {"save_every": 2, "evaluate_every": 7}


def curve_of(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder, "train")]


def last_step(folder: Path) -> int:
    return max((row["step"] for row in read_metrics(folder, "train")), default=0)


def disturb(recipe: Path, folder: Path, generator: random.Random, number: signal.Signals) -> tuple[int, ...]:
    """Starts the command on two ranks, and sends a signal some moments after the run has got further; exit codes."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output"
        before, deadline = last_step(folder), time.monotonic() + PATIENCE_S
        processes = start_ranks(["--recipe", str(recipe), "--stage", "2"], 2, free_port(), output)
        while last_step(folder) <= before and all(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.01)
        time.sleep(generator.random() * 0.5)
        told = generator.choice([[0, 1], [0], [1]])
        for rank in told:
            if processes[rank].is_alive():
                os.kill(processes[rank].pid, number)
        for process in processes:
            process.join(PATIENCE_S)
        assert not any(process.is_alive() for process in processes), output.read_text()
        kill(processes)
        return tuple(process.exitcode for process in processes)


@pytest.mark.parametrize(
    ("workers", "zero", "number", "times"),
    [
        (0, "zero1", signal.SIGKILL, 7),
        (2, "zero3", signal.SIGKILL, 7),
        (2, "zero1_bf16", signal.SIGKILL, 6),
        (0, "zero2", signal.SIGTERM, 3),
        (2, "zero3", signal.SIGUSR2, 3),
    ],
    ids=["kill", "kill-zero3-workers", "kill-bf16-workers", "term", "usr2-zero3-workers"],
)
def test_at_random_moments_it_goes_on_to_the_same_result(tmp_path: Path, workers, zero, number, times: int) -> None:
    """To the bit: the curve, and the student that is exported."""
    students, curves, generator = [], [], random.Random(f"{workers}{zero}{number}")
    for name in ("whole", "disturbed"):
        (tmp_path / name).mkdir()
        stage = STAGE | (OFTEN if number == signal.SIGKILL else {"evaluate_every": 3})
        recipe = write_tiny_recipe(tmp_path / name, stage2=stage, ds_config=zero)
        values = json.loads(recipe.read_text())
        values["data"]["num_workers"] = workers
        recipe.write_text(json.dumps(values))
        folder = tmp_path / name / "runs" / "tiny-run" / "stage2"
        disturbed = 0
        while name == "disturbed" and disturbed < times:
            codes = disturb(recipe, folder, generator, number)
            if codes == (0, 0):
                break  # it was through before the signal came
            disturbed += 1
            assert number == signal.SIGKILL or codes == (REQUEUE, REQUEUE)
        assert name == "whole" or disturbed >= times - 1
        done = train("--recipe", str(recipe), "--stage", "2")
        assert done.returncode == 0, done.stdout
        curves.append(curve_of(folder))
        students.append((folder / "student.safetensors").read_bytes())
    assert len(curves[0]) == STAGE["steps"]
    assert curves[1] == curves[0] and students[1] == students[0]


HANGING = """
import os, time
from adala.attention.linear import LinearMixer

class HangingMixer(LinearMixer):
    calls = 0
    def forward(self, *arguments, **options):
        type(self).calls += 1
        if os.environ["RANK"] == "1" and type(self).calls > 60:
            self.wait_for_ever()
        return super().forward(*arguments, **options)

    def wait_for_ever(self):
        time.sleep(10**6)
"""


def test_a_hung_run_ends_with_the_stacks_of_all_ranks(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hanging-1.dist-info").mkdir()
    (tmp_path / "hanging-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging\nVersion: 1\n")
    entry = "[adala.mechanisms]\nhanging = hanging:HangingMixer\n"
    (tmp_path / "hanging-1.dist-info" / "entry_points.txt").write_text(entry)
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = write_tiny_recipe(tmp_path, mechanism="hanging", stage2=STAGE, hang_minutes=0.5)
    done = train_by_launcher("--recipe", str(recipe), "--stage", "2", "--data.num_workers", "1")
    assert done.returncode != 0
    assert done.stdout.count("error: the run hangs: rank ") == 1, done.stdout
    run = tmp_path / "runs" / "tiny-run"
    assert "wait_for_ever" in (run / "stacks-rank1.txt").read_text()
    assert "train_step" in (run / "stacks-rank0.txt").read_text()


def test_a_run_that_gets_no_further_is_not_queued_again(tmp_path: Path) -> None:
    """Asked to end before its first step each time, as with a limit that is shorter than its start."""
    recipe = write_tiny_recipe(tmp_path, stage2=STAGE)
    attempt = tmp_path / "runs" / "tiny-run" / "stage2" / "attempt.json"
    codes = []
    for _ in range(3):
        attempt.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "output"
            (process,) = start_ranks(
                ["--recipe", str(recipe), "--stage", "2", "--evaluation.monitor_samples", "14"], 1, free_port(), output
            )
            deadline = time.monotonic() + PATIENCE_S
            while not attempt.exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGTERM)
            process.join(PATIENCE_S)
            codes.append(process.exitcode)
            said = output.read_text()
    assert codes == [REQUEUE, REQUEUE, 1], said
    assert "was asked to end 3 times in a row and got no further between them: give its jobs more time" in said


def test_two_separate_folders_are_one_sentence_on_both(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, runs_dir="runs")
    done = launch(Path(__file__).with_name("apart_worker.py"), str(tmp_path), str(recipe))
    assert done.returncode != 0
    assert done.stdout.count("does not see what rank 0 writes, runs") == 1 and "Traceback" not in done.stdout
