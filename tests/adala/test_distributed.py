"""Devices as DeepSpeed's switch says, and the shared memory that its CPU communication leaves behind."""

import mmap
import os
import time
from pathlib import Path

import pytest
import torch

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
