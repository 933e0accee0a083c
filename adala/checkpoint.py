"""Training checkpoints that are complete or absent, and the newest of them.

A checkpoint is a folder ``step-00000100`` with DeepSpeed's files of every rank, ``trainer.json``, and ``COMPLETE``,
which is written last and lists size and checksum of every other file; it is built under another name and renamed. What
was interrupted, or damaged since, is never read.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adala.distributed import SharedError, from_rank_0, gather_objects, say, world_size
from adala.files import file_checksum, read_json, remove_tree, sync_file, sync_folder, write_json
from adala.runs import CHECKPOINT_MARKER as MARKER

if TYPE_CHECKING:
    from adala.engine import Engine

STATE = "trainer.json"
PARTIAL_PREFIX = "partial-"
KEPT_CHECKPOINTS = 2


def save_checkpoint(
    folder: Path, engine: "Engine", step: int, state: dict[str, Any], keep_last: int = KEPT_CHECKPOINTS
) -> Path:
    """Saves engine and trainer state after ``step`` optimizer steps; every rank calls it.

    Args:
        folder: Where a stage's checkpoints lie, on a file system that all ranks share.
        engine: What is trained.
        step: Optimizer steps done.
        state: What else a resumed trainer needs; goes into JSON.
        keep_last: Older complete checkpoints are removed.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: The weights are not finite, or there is no room on the disk; nothing is left of the attempt.
    """
    if not all(gather_objects(engine.has_finite_weights())):
        raise SharedError(
            f"step {step}: the weights are not finite, and are not saved; the last checkpoint is intact: "
            "lower the learning rate, lengthen the warm-up, or look at the data"
        )
    final = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL_PREFIX}{final.name}"
    from_rank_0(lambda: _make_room(partial, engine.checkpoint_bytes()))
    try:
        engine.save(partial)
    except ValueError:
        from_rank_0(lambda: remove_tree(partial))
        raise
    conditions = {"step": step, "world_size": world_size(), "zero_stage": engine.zero_stage}
    from_rank_0(lambda: _complete(partial, final, {**conditions, **state}, keep_last))
    return final


def _make_room(partial: Path, needed_bytes: int) -> None:
    for left in partial.parent.glob(f"{PARTIAL_PREFIX}*"):
        remove_tree(left)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed_bytes:
        partial.rmdir()
        raise ValueError(
            f"a checkpoint needs {needed_bytes / 2**20:,.0f} MiB, and {partial.parent} has {free / 2**20:,.0f} MiB "
            "left: make room, and start the same command again"
        )


def _complete(partial: Path, final: Path, state: dict[str, Any], keep_last: int) -> None:
    write_json(partial / STATE, state)
    files = [path for path in partial.rglob("*") if path.is_file()]
    for path in files:
        sync_file(path)
    manifest = {str(path.relative_to(partial)): [path.stat().st_size, file_checksum(path)] for path in files}
    write_json(partial / MARKER, {"files": manifest})
    remove_tree(final)
    partial.rename(final)
    sync_folder(final.parent)
    for old in complete_checkpoints(final.parent)[:-keep_last]:
        # The marker goes first, so that a removal cut short leaves nothing that looks complete.
        (old / MARKER).unlink()
        remove_tree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a stage that were written to their end, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is still whole, as rank 0 sees it; every rank calls it.

    One that was damaged since is passed over for the one before, and said.
    """
    return from_rank_0(lambda: _newest_whole(folder))


def _newest_whole(folder: Path) -> Path | None:
    for path in reversed(complete_checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            return path
        say(f"checkpoint {path} is damaged ({damage}): going back to the one before")
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where they are as they were written."""
    try:
        manifest = read_json(path / MARKER)["files"]
        for name, (size, checksum) in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
            if file_checksum(path / name) != checksum:
                return f"{name} has changed"
    except (ValueError, TypeError, KeyError) as error:
        return f"{MARKER} cannot be read: {error}"
    except OSError as error:
        return str(error)
    return None


def load_checkpoint(path: Path, engine: "Engine") -> dict[str, Any]:
    """Restores the engine and returns the trainer's state; every rank calls it.

    Args:
        path: A whole checkpoint.
        engine: What is trained.

    Raises:
        ValueError: It was written on another number of ranks or under another ZeRO stage.
    """
    state = read_json(path / STATE)
    for key, here, advice in (
        ("world_size", world_size(), "start as many ranks"),
        ("zero_stage", engine.zero_stage, "use the same ds_config"),
    ):
        if state[key] != here:
            raise SharedError(
                f"checkpoint {path} was written with {key} {state[key]}, this run has {here}: {advice}, "
                "or start the stage anew with --overwrite"
            )
    engine.load(path)
    return state
