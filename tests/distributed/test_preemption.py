"""Runs that are asked to end: they save at the end of the step, on all ranks, and go on to the same curve."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from launch import PATIENCE_S, PROJECT, environment, free_port
from tiny_run import write_tiny_recipe
from warm import kill, start_ranks, train

from adala.checkpoint import complete_checkpoints
from adala.metrics import read_metrics
from adala.preemption import REQUEUE

STEPS = 60
STAGE = {"steps": STEPS, "global_batch_size": 8, "log_every": 1, "warmup_steps": 1, "augmentation": "crop"}


def wait_for_step(folder: Path, step: int, alive) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not any(row["step"] >= step for row in read_metrics(folder, "train")):
        assert alive() and time.monotonic() < deadline
        time.sleep(0.02)


def run_and_signal(recipe: Path, folder: Path, step: int, number: signal.Signals, ranks: list[int]) -> str:
    """Starts the command on two ranks and sends the signal to some; gives back what they said."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output"
        processes = start_ranks(["--recipe", str(recipe), "--stage", "2"], 2, free_port(), output)
        wait_for_step(folder, step, lambda: all(process.is_alive() for process in processes))
        for rank in ranks:
            os.kill(processes[rank].pid, number)
        for process in processes:
            process.join(PATIENCE_S)
        codes = [process.exitcode for process in processes]
        kill(processes)
        assert codes == [REQUEUE] * 2, (codes, output.read_text())
        return output.read_text()


@pytest.mark.parametrize(
    ("number", "ranks", "ds_config"),
    [(signal.SIGTERM, [0, 1], "zero1"), (signal.SIGUSR2, [1], "zero3")],
    ids=["all ranks", "one rank"],
)
def test_it_saves_and_goes_on_to_the_same_curve(tmp_path: Path, number, ranks: list[int], ds_config: str) -> None:
    """Nothing but the signal has it save: ``save_every`` is 0."""
    curves = {}
    for name in ("whole", "asked"):
        (tmp_path / name).mkdir()
        recipe = write_tiny_recipe(tmp_path / name, stage2=STAGE, ds_config=ds_config)
        folder = tmp_path / name / "runs" / "tiny-run" / "stage2"
        if name == "asked":
            for step in (7, 20):
                said = run_and_signal(recipe, folder, step, number, ranks)
                (saved,) = complete_checkpoints(folder / "checkpoints")[-1:]
                assert said.count("asked to end (") == 1 and f" of {STEPS}, saved after " in said
                assert "error:" not in said and not (folder / "finished.json").exists()
        done = train("--recipe", str(recipe), "--stage", "2")
        assert done.returncode == 0, done.stdout
        if name == "asked":
            assert f"resuming from {saved}" in done.stdout
        curves[name] = [(row["step"], row["loss"]) for row in read_metrics(folder, "train")]
    assert len(curves["whole"]) == STEPS
    assert curves["asked"] == curves["whole"]


def test_asked_before_its_first_step_it_ends_without_a_checkpoint(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, stage2=STAGE)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output"
        (process,) = start_ranks(["--recipe", str(recipe), "--stage", "2"], 1, free_port(), output)
        folder = tmp_path / "runs" / "tiny-run" / "stage2"
        deadline = time.monotonic() + PATIENCE_S
        while not (folder / "attempt.json").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
        process.join(PATIENCE_S)
        assert process.exitcode == REQUEUE, output.read_text()
    assert not complete_checkpoints(folder / "checkpoints") or len(read_metrics(folder, "train")) <= 2


def test_ranks_whose_launcher_is_gone_save_and_end(tmp_path: Path) -> None:
    """Killed, the launcher can tell nobody."""
    recipe = write_tiny_recipe(tmp_path, stage2={**STAGE, "steps": 2000})
    folder = tmp_path / "runs" / "tiny-run" / "stage2"
    program = (
        "import subprocess, sys; "
        "sys.exit(subprocess.Popen([sys.executable, 'launchers/train.py', *sys.argv[1:]]).wait())"
    )
    place = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-c", program, "--recipe", str(recipe), "--stage", "2"],
            cwd=PROJECT, env=environment(**place, MASTER_PORT=str(free_port())), stdout=output, stderr=output,
        )  # fmt: skip
        wait_for_step(folder, 5, lambda: launcher.poll() is None)
        launcher.kill()
        launcher.wait()
    deadline = time.monotonic() + PATIENCE_S
    while "asked to end" not in (tmp_path / "output").read_text():
        assert time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.05)
    assert "asked to end (its launcher has ended: at step" in (tmp_path / "output").read_text()
    assert complete_checkpoints(folder / "checkpoints")


@pytest.mark.parametrize("asked", ["a rank", "the launcher"])
def test_through_deepspeeds_launcher(tmp_path: Path, asked: str) -> None:
    """Its code is that of the ranks; asked itself, it asks them, waits half a minute, and has a code of its own."""
    recipe = write_tiny_recipe(tmp_path, stage2={**STAGE, "steps": 5000})
    folder = tmp_path / "runs" / "tiny-run" / "stage2"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    with (tmp_path / "output").open("w") as output:
        runner = subprocess.Popen(
            [*command, "launchers/train.py", "--recipe", str(recipe), "--stage", "2"],
            cwd=PROJECT, env=environment(), stdout=output, stderr=output,
        )  # fmt: skip
        wait_for_step(folder, 5, lambda: runner.poll() is None)
        below = psutil.Process(runner.pid).children(recursive=True)
        ranks = [process for process in below if "launchers/train.py" in process.cmdline()[1:4]]
        launchers = [
            process for process in below if process not in ranks and "deepspeed.launcher.launch" in process.cmdline()
        ]
        os.kill((ranks if asked == "a rank" else launchers)[0].pid, signal.SIGTERM)
        code = runner.wait(PATIENCE_S)
    said = (tmp_path / "output").read_text()
    assert code == (REQUEUE if asked == "a rank" else 1), said
    assert "asked to end (SIGTERM: at step" in said and complete_checkpoints(folder / "checkpoints")
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks)
