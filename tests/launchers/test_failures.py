"""What ends the training command is one sentence and a status; the traceback of a bug goes into a file."""

import errno
import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import PATIENCE_S, PROJECT, environment
from tiny_run import write_tiny_recipe
from torch.utils.data import DataLoader, Dataset

from adala import commands, failures, pipeline
from adala.attention import registry

TRAIN = PROJECT / "launchers" / "train.py"


@pytest.fixture
def train():
    """The module of the command, in this process."""
    spec = importlib.util.spec_from_file_location("train_command", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fail(train, tmp_path: Path, monkeypatch, capfd):
    """Has the run raise an error: the command's status and the one line that it says."""
    monkeypatch.setattr(commands, "init_distributed", lambda: None)
    temporary = functools.partial(tempfile.mkstemp, dir=tmp_path / "temporary")
    monkeypatch.setattr(failures.tempfile, "mkstemp", temporary)
    (tmp_path / "temporary").mkdir()

    def run(error: BaseException | None, *arguments: str) -> tuple[int, str]:
        def raise_it(*_):
            raise error

        if error is not None:
            monkeypatch.setattr(pipeline, "run_stages", raise_it)
        status = train.main(["--runs_dir", str(tmp_path), "--run_name", "run", *arguments])
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1, said
        return status, said[0]

    return run


class Dying(Dataset):
    """Its data worker kills itself, as the system does where memory is short."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def error_of(action) -> BaseException:
    """What torch really raises."""
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


class Failing(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "train-00001.tar")


def through_worker(dataset: Dataset) -> BaseException:
    return error_of(lambda: list(DataLoader(dataset, num_workers=1, multiprocessing_context="fork")))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/x"), "No space left on device: '/full/x'"),
        (lambda: OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), "/gone/x"), "not connected: '/gone/x'"),
        (lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"), "Permission denied: '/x'"),
        (lambda: OSError(), "error: OSError"),
        (lambda: ValueError("data.val is\n  wrong"), "error: data.val is wrong"),
        (lambda: MemoryError(), "not enough memory: lower stageN.micro_batch_size"),
        (lambda: error_of(lambda: np.empty(2**50)), "not enough memory"),
        (lambda: error_of(lambda: torch.empty(2**60)), "not enough memory"),
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (lambda: through_worker(Dying()), "a data worker died.*num_workers.*DataLoader worker"),
        (lambda: through_worker(Failing()), r"^error: \[Errno 2\] No such file or directory: 'train-00001.tar'$"),
        (lambda: RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "/dev/shm is full"),
        (lambda: RuntimeError("received 0 items of ancdata"), "too many open files"),
        (lambda: RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos"), "disk is full"),
        (lambda: RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), "did not answer in time"),
        (lambda: RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors"), "a GPU .* failed"),
        (lambda: RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), "^rank 0: another rank has"),
        (lambda: ModuleNotFoundError("No module named 'webdataset'"), "'webdataset': the installation lacks it"),
    ],
)  # fmt: skip
def test_mistakes_and_faults_of_the_machine(fail, tmp_path: Path, make, sentence: str) -> None:
    status, said = fail(make())
    assert status == 1
    assert re.search(sentence, said), said
    assert not list(tmp_path.rglob("*error-rank*"))


def test_an_interruption(fail) -> None:
    status, said = fail(KeyboardInterrupt())
    assert status == 130
    assert said.startswith("error: interrupted; the same command goes on")


def bug() -> BaseException:
    return error_of(lambda: {"a": 1}["bö"])


def test_a_bug_keeps_its_traceback_in_the_run_or_beside(fail, tmp_path: Path, monkeypatch) -> None:
    status, said = fail(bug())
    (path,) = (tmp_path / "temporary").glob("adala-error-rank0-*.txt")
    assert status == 1
    assert said.startswith("error: this is a bug of the program, not your mistake: KeyError: 'bö'; ")
    assert said.endswith(f"the traceback in {path}")
    (tmp_path / "run" / "error-rank0.txt").mkdir(parents=True)
    _, said = fail(bug())
    assert "temporary/adala-error-rank0-" in said
    (tmp_path / "run" / "error-rank0.txt").rmdir()
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: None)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        _, said = fail(bug())
        path = tmp_path / "run" / f"error-rank{rank}.txt"
        assert said.endswith(f"the traceback in {path}")
        text = path.read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" in text and "in error_of" in text and "KeyError: 'bö'" in text


def test_a_traceback_that_cannot_be_written_is_printed(tmp_path: Path, monkeypatch, capfd) -> None:
    nowhere = functools.partial(tempfile.mkstemp, dir=tmp_path / "nowhere")
    monkeypatch.setattr(failures.tempfile, "mkstemp", nowhere)
    assert failures.report_failure(bug()) == 1
    said = capfd.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("error: this is a bug of the program, not your mistake: KeyError: 'bö'; ")


def test_a_plugin_that_cannot_be_imported(fail, tmp_path: Path, monkeypatch) -> None:
    """Whatever its module does, the sentence names the mechanism and where it comes from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = {"import nowhere_to_be_found": "nowhere_to_be_found", "1 / 0": "division", "Other = 3": "Mixer"}
    for number, (text, named) in enumerate(modules.items()):
        (tmp_path / f"plugin{number}.py").write_text(text)
        targets = {"mine": f"plugin{number}:Mixer", "other": f"plugin{number}:Mixer"}
        monkeypatch.setattr(registry, "_targets", lambda targets=targets: targets)
        status, said = fail(None, "--mechanism", "mine")
        assert status == 1
        assert said.startswith(f"error: mechanism 'mine' cannot be imported from plugin{number}:Mixer (")
        assert named in said


def test_help_is_no_failure(train, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0


def test_the_other_ranks_of_a_machine_leave_a_mistake_to_the_first(train, monkeypatch, capfd) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--stage2.lrr", "1"]) == 1
    assert capfd.readouterr().err == ""


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


def run_alone(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TRAIN), *arguments], cwd=PROJECT, env=environment(**variables), timeout=PATIENCE_S,
        capture_output=True, check=False,
    )  # fmt: skip


def test_a_run_in_a_folder_that_the_locale_cannot_print(tmp_path: Path) -> None:
    """A sentence about it, then a whole run, with its name in what it says and in its report."""
    folder = tmp_path / "größe"
    folder.mkdir()
    recipe = write_tiny_recipe(folder)
    done = run_alone("--recipe", str(recipe), "--stage", "1", "--teacher.checkpoint", str(folder / "fehlt"), **C_LOCALE)
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith(b"error: ")]
    assert b"does not exist" in said and b"Traceback" not in done.stderr
    done = run_alone("--recipe", str(recipe), **C_LOCALE)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"feature cosine" in done.stdout
    assert (folder / "runs" / "tiny-run" / "report.png").is_file()


def heed_ctrl_c() -> None:
    """What a shell starts in the background, these tests perhaps, is deaf to it, and so are its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_while_it_trains(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    command = [sys.executable, str(TRAIN), "--recipe", str(recipe), "--stage", "1", "--stage1.steps", "100000"]
    process = subprocess.Popen(
        command, cwd=PROJECT, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    metrics, deadline = tmp_path / "runs" / "tiny-run" / "stage1" / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not metrics.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        "error: interrupted; the same command goes on from what was saved last"
    ]
    assert "Traceback" not in said


def test_an_output_that_cannot_take_a_name_does_not_end_the_run(tmp_path: Path) -> None:
    """As where the standard output's encoding is set by hand: the name is escaped."""
    folder = tmp_path / "größe"
    folder.mkdir()
    done = run_alone(
        "--recipe", str(write_tiny_recipe(folder)), "--stage", "1", PYTHONUTF8="1", PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0, done.stderr
    assert rb"gr\xf6\xdfe" in done.stdout
