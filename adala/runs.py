"""Where a run's files lie: ``runs/NAME/stage{1,2,3}/`` and, beside them, the run's report.

A stage's folder has ``attempt.json`` (what it was started with) before anything else, and ``finished.json`` (what it
was finished with) after everything else. A stage that runs again is trained in ``stageN.new`` beside the old one, which
it replaces by a rename when it is complete. Only rank 0 writes here; what it finds is told to all ranks.
"""

import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adala.distributed import barrier, broadcast_object, from_rank_0, raise_together, rank, say
from adala.files import read_json, remove_tree, sync_folder, write_json

ATTEMPT = "attempt.json"
FINISHED = "finished.json"
# The last file that a checkpoint gets, see adala.checkpoint.
CHECKPOINT_MARKER = "COMPLETE"
# How often a run was asked to end since it last got further.
INTERRUPTED = "interrupted.json"
FRUITLESS_STARTS = 3
SEARCH = "search.json"
KEPT_BY_ENDS = (f"stage*/checkpoints/step-*/{CHECKPOINT_MARKER}", f"stage*/{FINISHED}", SEARCH, "features/*")
# File systems shared over a network may show another machine's new file late.
VISIBLE_WITHIN_S = 20.0


@dataclass(frozen=True)
class StageRecord:
    """What a stage was finished with.

    Attributes:
        conditions: Everything that decides the result, by recipe key; see :mod:`adala.plan`.
        student: Digest of its exported student.
        metrics: Of the last evaluation.
        overwrite: Of which order to overwrite it is the result; None of none.
    """

    conditions: dict[str, Any]
    student: str
    metrics: dict[str, float] = field(default_factory=dict)
    overwrite: str | None = None


@dataclass(frozen=True)
class StageFolder:
    """One stage's files: config, metrics, checkpoints, exported student."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def attempt(self) -> dict[str, Any] | None:
        """The conditions under which training was started here; None where it was not."""
        return read_json(self.path / ATTEMPT)

    def has_checkpoint(self) -> bool:
        """Whether training has come far enough here for something to be lost."""
        return any(self.checkpoints.glob(f"step-*/{CHECKPOINT_MARKER}"))

    def start_attempt(self, conditions: Mapping[str, Any]) -> None:
        """Notes under which conditions training starts, or goes on, here."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / ATTEMPT, dict(conditions))

    def begin_as(self, finished: "StageFolder") -> None:
        """Takes over a finished stage's checkpoints and metrics, to go on from there; that folder stays as it is."""
        others = shutil.ignore_patterns("*.json", "*.safetensors", finished.checkpoints.name)
        shutil.copytree(finished.path, self.path, ignore=others)
        shutil.copytree(finished.checkpoints, self.checkpoints, copy_function=_link)

    def record(self) -> StageRecord | None:
        """What the stage was finished with; None where it is not finished."""
        values = read_json(self.path / FINISHED)
        try:
            return None if values is None else StageRecord(**values)
        except TypeError as error:
            raise ValueError(
                f"{self.path / FINISHED} is not of this version ({error}): move {self.path} away, or choose another "
                "--run_name"
            ) from error

    def finish(self, record: StageRecord) -> None:
        """The last file that a stage writes."""
        write_json(self.path / FINISHED, asdict(record))


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody writes into; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@dataclass(frozen=True)
class OverwriteOrder:
    """A request to run finished stages again, which outlives the process that was given it.

    Attributes:
        id: Stages that were run again under it bear this.
        stages: Which stages.
        since: When it was given.
    """

    id: str
    stages: list[int]
    since: str


@dataclass(frozen=True)
class RunFolder:
    """One run's folder.

    Attributes:
        path: ``runs_dir / run_name``.
    """

    path: Path

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def picture(self) -> Path:
        return self.path / "report.png"

    @property
    def search(self) -> Path:
        """Which blocks keep softmax attention, and what else was tried."""
        return self.path / SEARCH

    @property
    def features(self) -> Path:
        """Where features lie while models are scored."""
        return self.path / "features"

    def stage(self, number: int) -> StageFolder:
        """The folder of stage 1, 2 or 3."""
        return StageFolder(self.path / f"stage{number}")

    def replacement(self, number: int) -> StageFolder:
        """Where the stage is trained while an earlier result of it is kept."""
        return StageFolder(self.path / f"stage{number}.new")

    def install(self, number: int) -> None:
        """Puts a finished replacement into the place of what it replaces."""
        final, new, old = self.stage(number).path, self.replacement(number).path, self.path / f"stage{number}.old"
        remove_tree(old)
        if final.exists():
            final.rename(old)
        new.rename(final)
        sync_folder(self.path)
        remove_tree(old)

    def complete_installations(self) -> None:
        """Ends what a process that died between two renames began."""
        for number in (1, 2, 3):
            if self.replacement(number).record() is not None:
                self.install(number)
            elif self.stage(number).path.exists():
                remove_tree(self.path / f"stage{number}.old")

    @property
    def _order(self) -> Path:
        return self.path / "overwrite.json"

    def overwrite_order(self, stages: Sequence[int]) -> tuple[OverwriteOrder, bool]:
        """The order to overwrite ``stages``, and whether it was given before and not carried out to its end."""
        stored = read_json(self._order)
        if stored is not None and stored["stages"] == list(stages):
            return OverwriteOrder(**stored), True
        order = OverwriteOrder(uuid.uuid4().hex, list(stages), time.strftime("%Y-%m-%d %H:%M:%S"))
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self._order, asdict(order))
        return order, False

    def close_order(self) -> None:
        """Forgets the order to overwrite: it has been carried out."""
        self._order.unlink(missing_ok=True)

    def note_end(self) -> None:
        """Notes that the run was asked to end before it was finished.

        Raises:
            ValueError: It was so several times in a row without getting any further: to be queued again would not help.
        """
        progress, path = self._progress(), self.path / INTERRUPTED
        earlier = read_json(path) or {}
        times = 1 + (earlier["times"] if earlier.get("progress") == progress else 0)
        if times < FRUITLESS_STARTS:
            write_json(path, {"times": times, "progress": progress})
            return
        path.unlink(missing_ok=True)
        raise ValueError(
            f"the run {self.path} was asked to end {times} times in a row and got no further between them: give its "
            "jobs more time, or look at what takes it before the first step; the same command goes on from what is "
            "saved"
        )

    def forget_ends(self) -> None:
        """A run that is through has been interrupted for the last time."""
        (self.path / INTERRUPTED).unlink(missing_ok=True)

    def _progress(self) -> list[str]:
        """What is there of a run and is not lost: checkpoints, finished stages, features for its scores."""
        found = [path for kind in KEPT_BY_ENDS for path in self.path.glob(kind)]
        return sorted(str(path.relative_to(self.path)) for path in found)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the run for this command; every rank calls it.

        Raises:
            ValueError: Another command trains a run of this name, or ranks do not see the same folder.
        """
        lock = from_rank_0(self._take_lock)
        try:
            _check_shared(self.path)
            yield
        finally:
            if rank() == 0:
                os.close(lock)

    def _take_lock(self) -> int:
        self.path.mkdir(parents=True, exist_ok=True)
        return _lock(self.path / ".lock")


def _lock(path: Path) -> int:
    """An open descriptor that holds the lock; the system lets go of it when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not flock: data workers would inherit it, and hold it a moment longer than a killed trainer.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(descriptor, 1000).decode(errors="replace").strip()
        os.close(descriptor)
        raise ValueError(
            f"the run {path.parent} is being trained by another command ({holder}): wait for it, stop it, or choose "
            "another --run_name"
        ) from error
    except OSError as error:
        # A file system without locks, as some network ones are.
        say(f"{path} cannot be locked ({error}): do not start two commands of one --run_name at once")
        return descriptor
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    return descriptor


def wait_until_visible(path: Path, what: str) -> None:
    """Waits for a file that another rank has written, as long as a network file system may take to show it.

    Raises:
        ValueError: It does not appear.
    """
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank {rank()} on {socket.gethostname()} does not see {what}, {path}: runs_dir must be one folder on "
                "a file system that all machines share"
            )
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes network file systems look again
        time.sleep(0.2)


def _check_shared(path: Path) -> None:
    """Refuses a folder that is another one on each machine, as a node-local disk is.

    Raises:
        ValueError: On every rank, where one does not see what rank 0 wrote.
    """
    nonce = broadcast_object(f".seen-{uuid.uuid4().hex}")
    from_rank_0((path / nonce).touch)
    error = None
    try:
        wait_until_visible(path / nonce, "what rank 0 writes")
    except ValueError as raised:
        error = raised
    try:
        raise_together(error)
    finally:
        barrier()
        if rank() == 0:
            (path / nonce).unlink(missing_ok=True)
