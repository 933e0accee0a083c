"""What several ranks agree upon: nobody waits for a rank that has given up, and all come to one answer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks

from adala import distributed, resident
from adala.distributed import (
    SharedError,
    all_reduce_sum,
    any_rank,
    broadcast_object,
    from_rank_0,
    gather_objects,
    raise_together,
    rank,
    say,
    world_size,
)
from adala.failures import has_lost_peer, report_error
from adala.resident import forget_peak, resident_mib

MISTAKE = "rank 1 has no data"


def raises_on_rank(number: int | None) -> str:
    try:
        raise_together(OSError(MISTAKE) if rank() == number else None)
    except SharedError as error:
        cause = "OSError" if isinstance(error.__cause__, OSError) else "none"
        # A collective more: a rank that had not raised would be somewhere else by now, and this would hang.
        return f"{error} (cause {cause}, seen by {len(gather_objects(0))})"
    return "nothing"


@pytest.mark.parametrize("number", [0, 1])
def test_the_mistake_of_one_rank_is_raised_by_all(number: int) -> None:
    said = on_ranks(2, raises_on_rank, number)
    assert said[number] == f"{MISTAKE} (cause OSError, seen by 2)"
    assert said[1 - number] == f"{MISTAKE} (cause none, seen by 2)"


def test_nothing_is_raised_where_nothing_is_wrong() -> None:
    assert on_ranks(2, raises_on_rank, None) == ["nothing", "nothing"]
    assert raises_on_rank(None) == "nothing"
    with pytest.raises(SharedError, match=MISTAKE):
        raise_together(ValueError(MISTAKE))


def both_are_wrong() -> str:
    try:
        raise_together(ValueError(f"rank {rank()} is wrong"))
    except SharedError as error:
        return str(error)


def test_of_two_mistakes_the_first_ranks_is_told_by_both() -> None:
    assert on_ranks(2, both_are_wrong) == ["rank 0 is wrong"] * 2


def on_rank_0_alone(folder: Path, fails: bool) -> object:
    def action() -> Path:
        (folder / f"rank{rank()}").touch()
        if fails:
            raise OSError("no room")
        return folder

    try:
        return from_rank_0(action)
    except SharedError as error:
        return str(error)


@pytest.mark.parametrize("fails", [False, True])
def test_rank_0_acts_and_all_know(tmp_path: Path, fails: bool) -> None:
    assert on_ranks(2, on_rank_0_alone, tmp_path, fails) == ["no room" if fails else tmp_path] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["rank0"]


def collectives() -> dict[str, object]:
    own = torch.tensor([1.0 + rank(), 10.0])
    say(f"rank {rank()} says")
    return {
        "place": (rank(), world_size()),
        "sum": all_reduce_sum(own).tolist(),
        "any": (any_rank(rank() == 1), any_rank(False), any_rank(True)),
        "gathered": gather_objects(f"from {rank()}"),
        "broadcast": broadcast_object(f"from {rank()}"),
    }


def test_collectives(capfd: pytest.CaptureFixture) -> None:
    found = on_ranks(2, collectives)
    assert [answer.pop("place") for answer in found] == [(0, 2), (1, 2)]
    expected = {"sum": [3.0, 20.0], "any": (True, False, True), "gathered": ["from 0", "from 1"], "broadcast": "from 0"}
    assert found == [expected, expected]
    assert capfd.readouterr().out == "rank 0 says\n"


def test_one_process_is_a_world_of_one() -> None:
    found = collectives()
    assert found == {
        "place": (0, 1), "sum": [1.0, 10.0], "any": (False, False, True), "gathered": ["from 0"], "broadcast": "from 0",
    }  # fmt: skip


def test_the_place_on_a_node_is_what_the_launcher_says(monkeypatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.local_rank(), distributed.local_world_size()) == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert (distributed.local_rank(), distributed.local_world_size()) == (2, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert distributed.local_world_size() == 8


@pytest.mark.parametrize(
    ("own_rank", "error", "said"),
    [
        ("0", SharedError("two\n lines"), "error: two lines\n"),
        ("0", ValueError("mine"), "error: mine\n"),
        ("1", SharedError("all know"), ""),
        ("1", ValueError("mine"), "error: mine\n"),
        ("0", ValueError("Caught ValueError in worker.\nTraceback:\n  x\nValueError: bad shard"), "error: bad shard\n"),
    ],
    ids=["shared_on_0", "own_on_0", "shared_on_1", "own_on_1", "worker"],
)
def test_a_mistake_is_told_once_in_one_sentence(monkeypatch, capsys, own_rank: str, error, said: str) -> None:
    monkeypatch.setenv("RANK", own_rank)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    report_error(error)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[rank 1] Connection closed by peer [127.0.0.1]:3"), True),
        (torch.distributed.DistBackendError("NCCL"), True),
        (RuntimeError("shapes do not match"), False),
    ],
    ids=["gloo", "nccl", "own"],
)
def test_a_lost_peer_is_told_from_an_own_mistake(error: Exception, lost: bool) -> None:
    assert has_lost_peer(error) is lost


def test_peak_memory_is_in_mib() -> None:
    """This process has imported torch: some hundred MiB, and less than the machine has."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert distributed.peak_memory_mib() == pytest.approx(int(line.split()[1]) / 1024, rel=0.1)
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_what_a_process_held_that_starts_another_is_not_that_ones_peak() -> None:
    """As getrusage has it: a launcher of 600 MiB would have given them to each of its ranks."""
    # The module alone: the package around it holds hundreds of MiB by itself.
    code = f"import runpy; print(runpy.run_path({resident.__file__!r})['resident_mib']('VmHWM'))"
    held = np.ones(600 * 2**20, np.uint8)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) < 100 and held.all()


@pytest.mark.parametrize("content", [None, "Name:\tpython\nVmRSS:\t 2048 kB\n"], ids=["no /proc", "no peak in it"])
def test_a_system_that_names_no_peak_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path, content) -> None:
    """gVisor has a /proc, and no VmHWM there."""
    monkeypatch.setattr(resident, "STATUS", tmp_path / "status")
    if content is not None:
        resident.STATUS.write_text(content)
        assert resident_mib("VmRSS") == 2
    assert resident_mib("VmHWM") > 100


def test_a_peak_is_forgotten() -> None:
    held = np.ones(200 * 2**20, np.uint8)
    del held
    before = resident_mib("VmHWM")
    assert forget_peak() and resident_mib("VmHWM") < before - 150 and resident_mib("VmRSS") <= resident_mib("VmHWM")


def quantiles() -> float:
    """By MKL, which asks OpenMP for as many threads as there are."""
    return torch.linspace(-0.9, 0.9, 300_001).erfinv_().sum().item()


def test_ranks_are_forked_from_a_process_that_has_had_several_threads() -> None:
    torch.set_num_threads(2)
    here = quantiles()
    assert on_ranks(2, quantiles) == [pytest.approx(here, abs=1.0)] * 2


@pytest.mark.parametrize(("on_gpu", "named"), [(True, [3]), (False, None)], ids=["gpu", "cpu"])
def test_a_barrier_names_its_gpu(monkeypatch: pytest.MonkeyPatch, on_gpu: bool, named: list[int] | None) -> None:
    """NCCL guesses it by the global rank, which is another one wherever nodes have other numbers of GPUs."""
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(distributed, "uses_gpu", lambda: on_gpu)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "barrier", lambda device_ids: asked.append(device_ids))
    distributed.barrier()
    assert asked == [named]
