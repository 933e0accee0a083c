"""The Slurm scripts against stand-ins for srun and scontrol, whose "nodes" are process groups on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adala.data import write_shards

STANDINS = Path(__file__).parent
PROJECT = STANDINS.parents[1]
FAILURE = 7
# Prints what the launcher gives a rank, and what it was called with.
SHOWING_TRAIN = (
    f"FAILURE = {FAILURE}"
    + """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
surroundings = {name: os.environ[name] for name in names}
os.write(1, (json.dumps({**surroundings, "arguments": sys.argv[2:]}) + "\\n").encode())
sys.exit(FAILURE if os.environ["RANK"] == os.environ.get("FAILING_RANK") else 0)
"""
)


def free_job_id() -> int:
    """A job id whose rendezvous port, which launch.sh derives from it, is free."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) != 0:
                return 7_000_000 + port - 20000
    raise AssertionError("no free port between 20000 and 30000")


def submit(
    stage: int,
    *arguments: str,
    folder: Path,
    project: Path = PROJECT,
    nodes: int = 1,
    script: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Runs a stage's script as Slurm would: a copy in the spool ``folder``, under the variables that sbatch sets."""
    if script is None:
        spool = folder / "spool" / "job"
        spool.mkdir(parents=True, exist_ok=True)
        script = Path(shutil.copy(PROJECT / "launchers" / "slurm" / f"stage{stage}.sbatch", spool / "slurm_script"))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ADALA_"))}
    path = os.pathsep.join([str(STANDINS), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {
        "SLURM_JOB_ID": str(free_job_id()),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["localhost", "second"][:nodes]),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(project),
    }
    # GPUs that are not there, so that both "nodes" of a machine with one train on its CPU instead of sharing it.
    settings = {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "STANDIN_GPUS": "98;99"}
    return subprocess.run(
        ["timeout", "300", "bash", str(script), *arguments],
        cwd=folder, env={**inherited, **settings, **slurm, **variables},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny shards."""
    folder = tmp_path_factory.mktemp("slurm")
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        images = [Image.fromarray(draw.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(count)]
        samples = [{"png": image, "cls": number % 10} for number, image in enumerate(images)]
        write_shards(samples, folder / "shards", split, samples_per_shard=20)
    return folder


@pytest.fixture(scope="module")
def options(folder: Path) -> list[str]:
    """A run of seconds."""
    return [
        "--runs_dir", str(folder / "runs"), "--run_name", "r", "--tensorboard", "false",
        "--teacher.checkpoint", "random",
        "--teacher.model_args", "{patch_size: 14, embed_dim: 32, depth: 2, num_heads: 2}",
        "--data.train", json.dumps([str(folder / "shards" / "train-*.tar")]),
        "--data.val", json.dumps([str(folder / "shards" / "val-*.tar")]),
        "--stage1.steps", "2", "--stage1.global_batch_size", "8",
        "--stage2.steps", "2", "--stage2.global_batch_size", "8",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def stage1(folder: Path, options: list[str]) -> subprocess.CompletedProcess:
    return submit(1, *options, folder=folder, nodes=2)


@pytest.fixture
def showing_project(tmp_path: Path) -> Path:
    """A project without a .venv, whose train.py shows its surroundings."""
    project = tmp_path / "a project"
    shutil.copytree(PROJECT / "launchers" / "slurm", project / "launchers" / "slurm")
    (project / "launchers" / "train.py").write_text(SHOWING_TRAIN)
    return project


def assert_finished(run_stage: Path, world_size: int) -> None:
    (state,) = run_stage.glob("checkpoints/step-*/trainer.json")
    assert json.loads(state.read_text())["world_size"] == world_size
    assert (run_stage / "finished.json").is_file()
    assert (run_stage / "student.safetensors").is_file()


def test_two_nodes_train_stage_1_together(folder: Path, stage1: subprocess.CompletedProcess) -> None:
    assert stage1.returncode == 0, stage1.stdout
    assert_finished(folder / "runs" / "r" / "stage1", world_size=2)


def test_one_node_goes_on_with_stage_2(folder: Path, options: list[str], stage1: subprocess.CompletedProcess) -> None:
    assert stage1.returncode == 0, stage1.stdout
    finished = submit(2, *options, folder=folder, ADALA_RANKS_PER_NODE="2", STANDIN_GPUS="98,99")
    assert finished.returncode == 0, finished.stdout
    assert f"starting from the student in {folder / 'runs' / 'r' / 'stage1'}" in finished.stdout
    assert_finished(folder / "runs" / "r" / "stage2", world_size=2)


def test_failed_training_fails_the_job_with_one_line(folder: Path, options: list[str]) -> None:
    finished = submit(1, *options, "--run_name", "failing", "--mechanism", "nonsense", folder=folder)
    assert finished.returncode != 0
    (error,) = [line for line in finished.stdout.splitlines() if line.startswith("error: ")]
    assert "nonsense" in error
    assert "Traceback" not in finished.stdout


def test_failure_on_the_second_node_alone_fails_the_job(tmp_path: Path, showing_project: Path) -> None:
    """On the way, the failing rank shows that it got its job's GPUs, rendezvous and arguments."""
    finished = submit(
        3, "--runs_dir", "a b", "--data.val", '["x*", "$HOME"]', folder=tmp_path, project=showing_project,
        nodes=2, SLURM_JOB_ID="71234567", SLURM_GPUS_ON_NODE="2", STANDIN_GPUS="0,1;4,6", FAILING_RANK="3",
    )  # fmt: skip
    assert finished.returncode != 0
    assert f"exits with return code = {FAILURE}" in finished.stdout
    (shown,) = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"RANK": "3"')]
    assert shown == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "24567", "CUDA_VISIBLE_DEVICES": "4,6",
        "arguments": ["--stage", "3", "--runs_dir", "a b", "--data.val", '["x*", "$HOME"]'],
    }  # fmt: skip


ASKED_TRAIN = """
import os, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(int(os.environ["CODE_WHEN_ASKED"])))
if os.environ["RANK"] == "0":
    # As Slurm does: every process of the step, srun's stand-in beside it.
    os.killpg(os.getpgid(0), signal.SIGUSR2)
time.sleep(60)
"""


@pytest.mark.parametrize(("code", "is_requeued"), [(75, True), (1, False)])
def test_notice_of_the_limit_reaches_the_ranks_alone_and_has_the_job_queued_again(
    tmp_path: Path, showing_project: Path, code: int, is_requeued: bool
) -> None:
    (showing_project / "launchers" / "train.py").write_text(ASKED_TRAIN)
    finished = submit(
        2, folder=tmp_path, project=showing_project, SLURM_JOB_ID="71234567", SLURM_GPUS_ON_NODE="2",
        STANDIN_GPUS="0,1", CODE_WHEN_ASKED=str(code),
    )  # fmt: skip
    assert finished.returncode == code, finished.stdout
    assert ("requeued 71234567" in finished.stdout.splitlines()) == is_requeued


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ADALA_RANKS_PER_NODE": "0"}, "must be 1 or more, not 0"),
        (
            {"SLURM_GPUS_ON_NODE": "3", "STANDIN_GPUS": "4,6"},
            "localhost has GPUs 4,6, fewer than the 3 ranks of each node",
        ),
    ],
    ids=["no_ranks", "fewer_gpus_than_ranks"],
)
def test_impossible_ranks_are_refused(tmp_path: Path, variables: dict[str, str], sentence: str) -> None:
    finished = submit(1, folder=tmp_path, **variables)
    assert finished.returncode == 1
    assert finished.stdout.startswith("error: ") and finished.stdout.rstrip().endswith(sentence)


def test_a_folder_without_the_project_is_named(tmp_path: Path) -> None:
    finished = submit(1, folder=tmp_path, project=tmp_path)
    assert finished.returncode == 1
    (line,) = finished.stdout.splitlines()
    assert line.startswith(f"error: {tmp_path} has no launchers/train.py: ")


def test_script_in_place_finds_the_project_from_any_folder(tmp_path: Path, showing_project: Path) -> None:
    """In an interactive allocation Slurm copies nothing, and salloc may have been called anywhere."""
    script = showing_project / "launchers" / "slurm" / "stage1.sbatch"
    finished = submit(1, folder=tmp_path, project=tmp_path, script=script, ADALA_RANKS_PER_NODE="0")
    assert "must be 1 or more" in finished.stdout


def test_outside_of_slurm_the_way_in_is_named(tmp_path: Path) -> None:
    finished = submit(1, folder=tmp_path, SLURM_JOB_ID="")
    assert finished.returncode == 1
    assert finished.stdout == "error: this is no Slurm job: start it with sbatch, or inside salloc\n"
