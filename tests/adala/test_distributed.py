"""Devices as DeepSpeed's switch says, and the shared memory that its CPU communication leaves behind."""

import mmap
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import free_port
from ranks import on_ranks

from adala import distributed


@pytest.mark.parametrize(
    ("available", "switch", "expected"),
    [(True, None, "cuda"), (True, "cuda", "cuda"), (True, "cpu", "cpu"), (False, None, "cpu"), (False, "cuda", "cpu")],
)
def test_the_device_is_that_of_deepspeed(monkeypatch, available: bool, switch: str | None, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if switch is not None:
        monkeypatch.setenv("DS_ACCELERATOR", switch)
    assert distributed.device().type == expected
    assert distributed.uses_gpu() == (expected == "cuda")


def test_more_ranks_than_gpus_are_told_how_many_there_are(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    launched = {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "WORLD_SIZE": "2"}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 ranks on this machine, which has 1 GPUs: start as many ranks"):
        distributed.init_distributed()


def test_buffers_that_nobody_maps_are_removed(tmp_path: Path, monkeypatch) -> None:
    """What killed runs left goes; what is mapped, young, or somebody else's stays."""
    monkeypatch.setattr(distributed, "SHARED_MEMORY", tmp_path)
    names = {name: tmp_path / f"deepspeed_allreduce_buffer_0_{name}" for name in ("left", "mapped", "young")}
    names["other"] = tmp_path / "psm_of_another_program"
    for path in names.values():
        path.write_bytes(bytes(4096))
        if path != names["young"]:
            os.utime(path, (time.time() - 3600,) * 2)
    with names["mapped"].open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        distributed.remove_orphaned_buffers()
        assert {name for name, path in names.items() if path.exists()} == {"mapped", "young", "other"}
    distributed.remove_orphaned_buffers()
    assert {name for name, path in names.items() if path.exists()} == {"young", "other"}


@pytest.mark.parametrize(
    "collective",
    [
        lambda: distributed.all_reduce_sum(torch.ones(1)),
        lambda: distributed.any_rank(True),
        lambda: distributed.gather_objects(1),
        lambda: distributed.broadcast_object(1),
        lambda: distributed.raise_together(None),
        lambda: distributed.from_rank_0(lambda: 1),
        distributed.barrier,
    ],
    ids=[
        "all_reduce_sum",
        "any_rank",
        "gather_objects",
        "broadcast_object",
        "raise_together",
        "from_rank_0",
        "barrier",
    ],
)
def test_a_collective_that_is_asked_of_one_rank_is_a_bug_on_a_single_rank_too(collective) -> None:
    """On several it would wait for ever."""
    with pytest.raises(AssertionError, match="a collective within from_rank_0"):
        distributed.from_rank_0(collective)
    collective()
    with pytest.raises(ValueError, match="wrong"):
        distributed.from_rank_0(lambda: (_ for _ in ()).throw(ValueError("wrong")))
    collective()


def outlasting() -> tuple[float, list[float]]:
    """What rank 0 does by itself may take longer than a collective; the time-outs then."""
    dist.destroy_process_group()
    distributed._meet("gloo", timeout_minutes=0.15)
    value = distributed.from_rank_0(lambda: time.sleep(11) or 7.0)
    dist.new_group()  # as DeepSpeed makes them
    distributed.set_timeouts()
    return value, timeouts_s()


def timeouts_s() -> list[float]:
    """Of all groups, in seconds."""
    backends = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    return sorted(backend.options._timeout.total_seconds() for backend in backends)


def test_others_wait_for_rank_0_longer_than_for_a_step() -> None:
    assert on_ranks(2, outlasting) == [(7.0, [9.0, 9.0, 86400.0])] * 2


def joining_after_a_meeting_that_failed(store: Path) -> tuple[list[float], list[float]]:
    """The time-outs of the group that all tests have, and of one joined likewise after another never came together."""
    before = timeouts_s()
    dist.destroy_process_group()
    os.environ.update(WORLD_SIZE="2", MASTER_PORT=str(free_port()))
    with pytest.raises(ValueError, match="the 2 ranks did not all meet"):
        distributed._meet("gloo", timeout_minutes=0.01)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    distributed.set_timeouts()
    return before, timeouts_s()


def test_a_meeting_that_failed_leaves_no_time_out_behind(tmp_path: Path) -> None:
    """Ranks forked from a process of tests took over the 1.2 s of a test before, and fell apart on a busy machine."""
    ((before, after),) = on_ranks(1, joining_after_a_meeting_that_failed, tmp_path / "meeting")
    assert after == before


def interrupted_together(of_rank: dict[int, Exception]) -> str:
    try:
        distributed.raise_together(of_rank.get(distributed.rank()))
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def test_an_interruption_is_no_mistake_and_a_mistake_goes_first() -> None:
    ended = distributed.Interrupted("SIGTERM: at step 3")
    assert on_ranks(2, interrupted_together, {}) == ["nothing"] * 2
    assert on_ranks(2, interrupted_together, {1: ended}) == ["Interrupted: SIGTERM: at step 3"] * 2
    assert (
        on_ranks(2, interrupted_together, {0: ended, 1: OSError("the disk is full")})
        == ["SharedError: the disk is full"] * 2
    )
