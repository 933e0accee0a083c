"""Training checkpoints that are complete or absent, written while training goes on, and the newest of them.

A checkpoint is a folder ``step-00000100`` with one file of slices from each rank (see :mod:`adala.slices`),
``trainer.json``, and ``COMPLETE``, which is written last and lists size and checksum of every other file. It is built
under another name and renamed, once rank 0 has seen every rank's file in it. What was interrupted, or damaged since, is
never read. Any number of ranks reads it, under any ZeRO stage; nothing in it is code.
"""

import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adala.distributed import SharedError, broadcast_object, from_rank_0, gather_objects, rank, say, world_size
from adala.files import file_checksum, read_json, remove_tree, sync_file, sync_folder, write_json
from adala.runs import CHECKPOINT_MARKER as MARKER
from adala.runs import wait_until_visible
from adala.slices import Slice, SliceReader, describe_slices, snapshot, write_slices

if TYPE_CHECKING:
    from adala.engine import Engine

STATE = "trainer.json"
PARTIAL_PREFIX = "partial-"


@dataclass
class Checkpoints:
    """A stage's checkpoints: saves without holding training up for longer than a copy of the state takes.

    Attributes:
        folder: Where they lie, on a file system that all ranks share.
        engine: What is trained.
        keep_last: How many of the newest are kept.
        keep_every: Those after a multiple of so many steps are kept for good; 0 keeps none.
    """

    folder: Path
    engine: "Engine"
    keep_last: int = 2
    keep_every: int = 0
    _pending: "_Writing | None" = field(default=None, init=False)
    _pinned: dict[str, Tensor] = field(default_factory=dict, init=False)

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Copies engine and trainer state after ``step`` optimizer steps, and begins to write; every rank calls it.

        One that is still being written is waited for first.

        Args:
            step: Optimizer steps done.
            state: What else a resumed trainer needs; goes into JSON.

        Raises:
            ValueError: The weights are not finite, or there is no room on the disk; nothing is left of the attempt.
        """
        self.finish()
        began = time.perf_counter()
        if not all(gather_objects(self.engine.has_finite_weights())):
            raise SharedError(
                f"step {step}: the weights are not finite, and are not saved; the last checkpoint is intact: "
                "lower the learning rate, lengthen the warm-up, or look at the data"
            )
        slices = self.engine.slices()
        total = sum(gather_objects(sum(part.bytes for part in slices)))
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f"{PARTIAL_PREFIX}{final.name}"
        from_rank_0(lambda: _make_room(partial, total))
        conditions = {"step": step, "world_size": world_size(), "zero_stage": self.engine.zero_stage}
        copies = snapshot(slices, self._pinned)
        self._pending = _Writing(partial, final, {**conditions, **state}, copies, total)
        self._pending.pause_s = time.perf_counter() - began
        self._pending.thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still at the files of a checkpoint."""
        return self._pending is not None and self._pending.thread.is_alive()

    def finish(self) -> dict[str, float]:
        """Completes what was begun, as soon as all ranks have written; every rank calls it.

        Returns:
            How long training stood still for it and how long it took to write (``pause_ms``, ``write_s``), and its
            size; empty where nothing was begun.

        Raises:
            ValueError: A rank could not write its part, and nothing is left of the attempt; or rank 0 does not see it,
                and the next attempt removes what is left.
        """
        if self._pending is None:
            return {}
        writing, self._pending = self._pending, None
        writing.thread.join()
        results = gather_objects(writing.outcome)
        failed = next((outcome for outcome in results if isinstance(outcome, str)), None)
        if failed is not None:
            from_rank_0(lambda: remove_tree(writing.partial))
            raise SharedError(f"could not write the checkpoint {writing.partial}: {failed}; is the disk full?")
        from_rank_0(lambda: self._complete(writing, results))
        return {
            "pause_ms": 1000 * writing.pause_s,
            "write_s": max(written.seconds for written in results),
            "mib": writing.total_bytes / 2**20,
        }

    def _complete(self, writing: "_Writing", results: list["_Written"]) -> None:
        partial, final = writing.partial, writing.final
        for number, written in enumerate(results):
            path = partial / written.name
            wait_until_visible(path, f"rank {number}'s part of a checkpoint")
            if path.stat().st_size != written.size:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, rank {number} wrote {written.size}")
        contents = {written.name: written.slices for written in results}
        write_json(partial / STATE, {**writing.state, "slices": contents}, indent=None)
        manifest = {written.name: [written.size, written.checksum] for written in results}
        manifest[STATE] = [(partial / STATE).stat().st_size, file_checksum(partial / STATE)]
        write_json(partial / MARKER, {"files": manifest})
        remove_tree(final)
        partial.rename(final)
        sync_folder(final.parent)
        for old in self._superseded():
            # The marker goes first, so that a removal cut short leaves nothing that looks complete.
            (old / MARKER).unlink()
            remove_tree(old)

    def _superseded(self) -> list[Path]:
        older = complete_checkpoints(self.folder)[: -self.keep_last]
        return [path for path in older if not (self.keep_every and _step_of(path) % self.keep_every == 0)]


@dataclass(frozen=True)
class _Written:
    """One rank's file of a checkpoint."""

    name: str
    size: int
    checksum: int
    slices: list[list[Any]]
    seconds: float


class _Writing:
    """A checkpoint on its way to the disk."""

    def __init__(self, partial: Path, final: Path, state: dict[str, Any], slices: list[Slice], total_bytes: int):
        self.partial, self.final, self.state, self.total_bytes = partial, final, state, total_bytes
        self.pause_s = 0.0
        # What was written, or in words why not.
        self.outcome: _Written | str = "it was not begun"
        self.thread = threading.Thread(target=self._write, args=(slices,), name="checkpoint", daemon=True)

    def _write(self, slices: list[Slice]) -> None:
        began = time.perf_counter()
        path = self.partial / f"rank-{rank():05d}.safetensors"
        try:
            # Rank 0 has made it; on a network file system this rank may not see that yet.
            path.parent.mkdir(parents=True, exist_ok=True)
            write_slices(path, slices)
            sync_file(path)
            size, checksum = path.stat().st_size, file_checksum(path)
        except Exception as error:
            self.outcome = str(error) or type(error).__name__
            return
        self.outcome = _Written(path.name, size, checksum, describe_slices(slices), time.perf_counter() - began)


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


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a stage that were written to their end, oldest first."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MARKER}")), key=_step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is still whole; every rank calls it and gets the same.

    One that was damaged since is passed over for the one before, and said.

    Raises:
        ValueError: There are some, and all are damaged: to begin from zero is nothing that happens by itself.
    """
    candidates = from_rank_0(lambda: complete_checkpoints(folder))
    for path in reversed(candidates):
        damage = find_damage(path)
        if damage is None:
            return path
        say(f"checkpoint {path} is damaged ({damage}): going back to the one before")
    if candidates:
        raise SharedError(
            f"all checkpoints in {folder} are damaged: restore one, or add --overwrite to begin the stage anew"
        )
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where they are as they were written.

    Every rank calls it, reads its share of the files, and gets the same.
    """
    manifest = broadcast_object(_read_manifest(path) if rank() == 0 else None)
    found = manifest if isinstance(manifest, str) else None
    if found is None:
        mine = sorted(manifest.items())[rank() :: world_size()]
        found = next((damage for name, entry in mine if (damage := _damage_of(path / name, entry))), None)
    return next((damage for damage in gather_objects(found) if damage is not None), None)


def _read_manifest(path: Path) -> dict[str, tuple[int, int]] | str:
    """Size and checksum by file name, or why they cannot be told."""
    try:
        return {name: (size, checksum) for name, (size, checksum) in read_json(path / MARKER)["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return f"{MARKER} cannot be read: {error}"


def _damage_of(path: Path, entry: tuple[int, int]) -> str | None:
    size, checksum = entry
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
        if file_checksum(path) != checksum:
            return f"{path.name} has changed"
    except OSError as error:
        return str(error)
    return None


def load_checkpoint(path: Path, engine: "Engine") -> dict[str, Any]:
    """Restores the engine and returns the trainer's state; every rank calls it.

    Args:
        path: A whole checkpoint, of however many ranks and whatever ZeRO stage.
        engine: What is trained.

    Raises:
        ValueError: It is of another model, or of a version of this program that wrote them otherwise.
    """
    state = read_json(path / STATE)
    if "slices" not in state:
        raise SharedError(
            f"checkpoint {path} was written by an earlier version, in a form that is no longer read: finish the stage "
            "with that version, or add --overwrite to begin it anew"
        )
    engine.restore(SliceReader(path, state.pop("slices")))
    before, now = (state["world_size"], state["zero_stage"]), (world_size(), engine.zero_stage)
    if before != now:
        say("written on {} ranks under ZeRO {}, taken up by {} ranks under ZeRO {}".format(*before, *now))
    return state
