"""How processes come together: launchers, processes that no launcher told of each other, and ranks that do not meet."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from launch import PATIENCE_S, PROJECT, environment, free_port, launch
from tiny_run import write_tiny_recipe

from adala import distributed

TRAIN = PROJECT / "launchers" / "train.py"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *distributed.STARTED_BY)


@pytest.fixture
def plain(monkeypatch) -> None:
    """The environment of a process that nothing has launched."""
    for name in (*LAUNCHED, *distributed.STARTED_BY.values()):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", [*distributed.STARTED_BY, "WORLD_SIZE"])
def test_processes_that_do_not_know_of_each_other_are_refused(plain, monkeypatch, variable: str) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ValueError, match=rf"2 processes were started \({variable}\), and none was told its rank"):
        distributed.init_distributed()
    for count in ("1", "", "2(x3)"):
        monkeypatch.setenv(variable, count)
        distributed._check_alone()


def test_a_launcher_below_one_task_a_node_is_not_refused(plain, monkeypatch) -> None:
    launched = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1", "MASTER_PORT": "20001"}
    for name, value in {**launched, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    distributed._check_launched()
    # Refused only after what is there has been taken for a launcher's.
    monkeypatch.setattr(distributed, "_timeout", None)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(distributed.dist, name, lambda *_, **__: None)
    distributed.init_distributed()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"WORLD_SIZE": None}, "RANK is '0', and WORLD_SIZE not set: start through deepspeed or torchrun"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT not set: start through"),
        ({"RANK": "2"}, "RANK is '2' in the environment: .* 0 or more and below 2"),
        ({"RANK": "-1"}, "RANK is '-1' in the environment: it must be a whole number"),
        ({"RANK": "first"}, "RANK is 'first' in the environment: it must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment: it must be a whole number, 1 or more"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment: it must be a whole number, 1 or more"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2' in the environment: .* below 2"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0' in the environment: .* 1 or more and below 65536"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http' in the environment"),
    ],
    ids=str,
)
def test_half_a_launchers_environment_is_refused(plain, monkeypatch, changes: dict, sentence: str) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**whole, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        distributed.init_distributed(timeout_minutes=0.02)


@pytest.mark.parametrize("tasks", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_two_tasks_of_srun_or_mpirun_say_it_once_and_write_nothing(tmp_path: Path, tasks: str) -> None:
    recipe = write_tiny_recipe(tmp_path)
    command = [sys.executable, str(TRAIN), "--recipe", str(recipe), "--stage", "1"]
    settings = [environment(**{tasks: "2", distributed.STARTED_BY[tasks]: rank}) for rank in ("0", "1")]
    started = [subprocess.Popen(command, cwd=PROJECT, env=env, text=True, stderr=subprocess.PIPE) for env in settings]
    said = [process.communicate(timeout=PATIENCE_S)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1]
    assert [text.count("none was told its rank") for text in said] == [1, 0]
    assert not any("Traceback" in text for text in said)
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_is_missing_is_waited_for_until_the_time_is_over(plain, monkeypatch) -> None:
    port = str(free_port())
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"the 2 ranks did not all meet at .*, port {port}, within 0.02 minutes"):
        distributed.init_distributed(timeout_minutes=0.02)
    # The same for a rank whose first one is not there.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(ValueError, match="the 2 ranks did not all meet at"):
        distributed.init_distributed(timeout_minutes=0.02)
    assert not distributed.dist.is_initialized()


def run_launcher(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=PROJECT, env=environment(**variables), timeout=PATIENCE_S, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip


def test_a_port_that_is_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # Whoever listens there hangs up, so that the second rank does not wait for an answer.
        threading.Thread(target=lambda: [taken.accept()[0].close() for _ in range(3)], daemon=True).start()
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
        done = run_launcher([*launcher, str(TRAIN), "--recipe", str(write_tiny_recipe(tmp_path)), "--stage", "1"])
    assert done.returncode != 0
    said = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert f"port {port} of this machine, at which the ranks meet, is in use" in said[0], done.stdout
    assert "--master_port" in said[0] and "Traceback" not in done.stdout


def test_torchrun_trains(tmp_path: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    done = run_launcher([*launcher, str(TRAIN), "--recipe", str(write_tiny_recipe(tmp_path)), "--stage", "1"])
    assert done.returncode == 0, done.stdout
    (state,) = (tmp_path / "runs" / "tiny-run" / "stage1" / "checkpoints").glob("step-*/trainer.json")
    assert '"world_size": 2' in state.read_text()


def test_a_hostfile_of_this_machine_alone_trains_without_ssh(tmp_path: Path) -> None:
    """As launchers/slurm/README.md says; without --no_ssh DeepSpeed calls ssh, for its own machine, too."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--num_gpus", "2"]
    alone = ["--no_ssh", "--node_rank", "0", "--master_addr", "localhost", "--master_port", str(free_port())]
    done = run_launcher([*launcher, *alone, str(TRAIN), "--recipe", str(write_tiny_recipe(tmp_path)), "--stage", "1"])
    assert done.returncode == 0, done.stdout
    (state,) = (tmp_path / "runs" / "tiny-run" / "stage1" / "checkpoints").glob("step-*/trainer.json")
    assert '"world_size": 2' in state.read_text()


def test_launched_processes_import_the_tree_of_these_tests(tmp_path: Path, monkeypatch) -> None:
    """From wherever they are started, and whatever is installed; what was on the path stays there."""
    script, before = tmp_path / "where.py", tmp_path / "before"
    script.write_text("import adala, baselines, kept, launch\nprint('FROM', adala.__file__, baselines.__file__)\n")
    (before / "adala").mkdir(parents=True)
    for name in ("kept.py", "adala/__init__.py", "baselines.py"):
        (before / name).touch()
    monkeypatch.setenv("PYTHONPATH", str(before))
    done = launch(script, ranks=1)
    ours = [str(PROJECT / name / "__init__.py") for name in ("adala", "baselines")]
    assert f"FROM {' '.join(ours)}" in done.stdout, done.stdout
    assert distributed.__file__ == str(PROJECT / "adala" / "distributed.py")
