"""Training checkpoints that are complete or absent, and the newest of them.

A checkpoint is a folder ``step-00000100`` with DeepSpeed's files of every rank, ``trainer.json``, and an empty file
``COMPLETE`` that is written last; it is built under another name and renamed. What was interrupted is never read.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adala.distributed import barrier, rank, world_size
from adala.engine import Engine

STATE = "trainer.json"
MARKER = "COMPLETE"
PARTIAL_PREFIX = "partial-"


def save_checkpoint(folder: Path, engine: Engine, step: int, state: dict[str, Any], keep_last: int = 2) -> Path:
    """Saves engine and trainer state after ``step`` optimizer steps; every rank calls it.

    Args:
        folder: Where a stage's checkpoints lie, on a file system that all ranks share.
        engine: What is trained.
        step: Optimizer steps done.
        state: What else a resumed trainer needs; goes into JSON.
        keep_last: Older complete checkpoints are removed.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL_PREFIX}{final.name}"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save(partial)
    barrier()
    if rank() == 0:
        conditions = {"step": step, "world_size": world_size(), "zero_stage": engine.zero_stage}
        _write_synced(partial / STATE, json.dumps({**conditions, **state}, indent=1))
        _write_synced(partial / MARKER, "")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync_folder(folder)
        for old in complete_checkpoints(folder)[:-keep_last]:
            # The marker goes first, so that a removal cut short leaves nothing that looks complete.
            (old / MARKER).unlink()
            shutil.rmtree(old)
    barrier()
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))


def load_checkpoint(path: Path, engine: Engine, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Restores the engine and returns the trainer's state; every rank calls it.

    Args:
        path: A complete checkpoint.
        engine: What is trained.
        conditions: By recipe key, what must be as it was when the checkpoint was written.

    Raises:
        ValueError: It was written under other conditions, on another number of ranks or under another ZeRO stage.
    """
    state = json.loads((path / STATE).read_text())
    for key, here in conditions.items():
        if state["conditions"].get(key) != here:
            raise ValueError(
                f"checkpoint {path} was written with {key} {state['conditions'].get(key)!r}, this run has {here!r}: "
                "set it back, choose another --run_name, or start the stage anew with --overwrite"
            )
    for key, here, advice in (
        ("world_size", world_size(), "start as many ranks"),
        ("zero_stage", engine.zero_stage, "use the same ds_config"),
    ):
        if state[key] != here:
            raise ValueError(
                f"checkpoint {path} was written with {key} {state[key]}, this run has {here}: {advice}, "
                "or start the stage anew with --overwrite"
            )
    engine.load(path)
    return state


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
