"""A split written as shards: by several processes, whole or not at all, and taken up where it was stopped.

Shards are written into a folder of their own below their place, ``.converting/SPLIT/DIGEST``, each with a record of
what became of its files. Once all are there they are moved to their place, and the index, which is written last, lists
them. What is in a shard depends on the list of files and on the options alone, whoever writes it and when.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

from adala.data.convert.encoding import Encoding
from adala.data.convert.shards import Cut, ShardRecord, ShardTask, read_record, write_shard
from adala.data.convert.sources import LeftOut, Listing
from adala.data.index import CLASSES_NAMES, Shard
from adala.data.pack import check_split, is_of_split, list_shards, move_shards, shards_of
from adala.files import read_json, value_digest, write_json

STAGING = ".converting"
CONDITIONS_NAME = "conditions.json"
# So many bad files are always allowed, if they are not more than half of all.
ALLOWED_BAD = 10
# Errors of a disk that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Shards that wait for a process, for each process.
QUEUED_SHARDS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How a split is written.

    Attributes:
        cut: Into shards.
        encoding: Of images.
        workers: Processes; with one this process does it. It does not decide on a single byte.
        max_bad_fraction: Part of the items that may be unusable.
        overwrite: Whether the split may take the place of another one.
    """

    cut: Cut
    encoding: Encoding = field(default_factory=Encoding)
    workers: int = 1
    max_bad_fraction: float = 0.01
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: One of them is out of range.
        """
        if self.workers < 1:
            raise ValueError(f"--workers must be 1 or more, not {self.workers}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction is a part of all files, from 0 to 1, not {self.max_bad_fraction:g}")

    def conditions(self, listing: Listing) -> dict[str, Any]:
        """All that the shards' bytes depend on."""
        return {
            "files": len(listing.items),
            "listing": listing_digest(listing),
            **asdict(self.cut),
            **self.encoding.conditions(),
        }


def listing_digest(listing: Listing) -> str:
    """A digest of the files' names, sizes and times, of their classes and of how their masks are coded."""
    digest = hashlib.sha256(repr((listing.form, listing.classes)).encode())
    for item in listing.items:
        files = [(file.extension, file.bytes, file.modified_ns) for file in (item.image, item.mask) if file]
        digest.update(repr((item.key, item.label, files)).encode(errors="surrogatepass"))
    return f"sha256:{digest.hexdigest()}"


@dataclass
class Converted:
    """What became of a split.

    Attributes:
        samples: How many went into the shards.
        shards: How many there are.
        left_out: Files that did not, and why.
        encoded: How many images are others than in their files.
        coloured: How many masks are coded in colours.
        values: What stands in the other masks.
        was_there: Whether all of it was there before.
    """

    samples: int = 0
    shards: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    encoded: int = 0
    coloured: int = 0
    values: set[int] = field(default_factory=set)
    was_there: bool = False

    def add(self, record: ShardRecord) -> None:
        """Counts a shard."""
        self.samples += record.samples
        self.shards += 1
        self.left_out += record.left_out
        self.encoded += record.encoded
        self.coloured += record.coloured
        self.values |= set(record.values)


# (shards that are whole, shards in all, samples of those written now)
Progress = Callable[[int, int, int], None]


def convert(
    listing: Listing, folder: Path, split: str, settings: Settings, progress: Progress = lambda *counts: None
) -> Converted:
    """Writes a split, or what is missing of it; its shards take their place, and that of old ones, at the end.

    Args:
        listing: What becomes the split.
        folder: Where the shards go; made if it is not there.
        split: Name before the shards' numbers.
        settings: How.
        progress: Called at the beginning and after each shard.

    Raises:
        ValueError: There are other shards of the split, a part of it that was written from other files or with other
            options, another command that writes into the folder, too many bad files, or the source has changed.
        OSError: Something cannot be read or written; the same call goes on from there.
    """
    check_split(split)
    folder = folder.absolute()
    conditions = settings.conditions(listing)
    with _alone_in(folder) as lock, _disk_full_in_words(folder):
        finished = _finished(folder, split, conditions)
        if finished is not None:
            _remove(_staging(folder, split, conditions))
            return finished
        _refuse_others(folder, split, conditions, settings.overwrite)
        staged = _opened_staging(folder, split, conditions)
        tasks = [
            ShardTask(staged, f"{split}-{number:05d}.tar", items, listing.form, settings.encoding)
            for number, items in enumerate(settings.cut.shards(listing.items))
        ]
        bad = BadFiles(len(listing.items), listing.left_out, settings.max_bad_fraction)
        records = _write_all(tasks, folder, settings.workers, lock, bad, progress)
        converted = _summary(listing, records)
        _publish(folder, split, staged, records, listing, conditions, converted)
    return converted


class BadFiles:
    """Counts what should have been a sample and is none, and stops when there is too much of it."""

    def __init__(self, num_items: int, left_out: Sequence[LeftOut], max_fraction: float):
        """Begins with what was left out when the files were listed.

        Args:
            num_items: How many became items then.
            left_out: The others.
            max_fraction: Part of all that may be bad; ten may, but no more than half of all.
        """
        self.found = [each for each in left_out if each.is_bad]
        self.total = num_items + len(self.found)
        self.limit = max(int(max_fraction * self.total), min(ALLOWED_BAD, self.total // 2))

    def add(self, left_out: Sequence[LeftOut]) -> None:
        """Counts further ones.

        Raises:
            ValueError: There are now more than may be.
        """
        self.found += left_out
        if len(self.found) > self.limit:
            raise ValueError(
                f"{len(self.found)} of {self.total} samples are bad, where {self.limit} may be, the last "
                f"{self.found[-1]}: repair or remove these files, or allow more of them with --max-bad-fraction"
            )


def _summary(listing: Listing, records: Mapping[str, ShardRecord]) -> Converted:
    converted = Converted(left_out=list(listing.left_out))
    for name in sorted(records):
        converted.add(records[name])
    if not converted.samples:
        example = next(left_out for left_out in reversed(converted.left_out) if left_out.is_bad)
        raise ValueError(f"none of the {len(listing.items)} samples can be read, as {example}")
    return converted


@contextmanager
def _alone_in(folder: Path) -> Iterator[int | None]:
    """Makes a folder, and keeps other commands out of it as long as this process lives.

    Gives the lock's file descriptor, None where the file system has no locks.

    Raises:
        ValueError: Another command is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor: int | None = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(
            f"another command is writing into {folder}: wait for its end, or name another folder"
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): let no other command write into it", folder, error)
        os.close(descriptor)
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Removes the folders of unfinished shards that are done, and that of the shards if nothing came of it."""
    splits = (folder / STAGING).glob("*")
    for path in (*splits, folder / STAGING, folder):
        with suppress(OSError):
            path.rmdir()


@contextmanager
def _disk_full_in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            f"there is no room left for {folder} ({error.strerror}): make room, and give the same command again, which "
            "goes on with what is there"
        ) from error


def record_path(folder: Path, split: str) -> Path:
    """What a split was made of, and what was left out."""
    return folder / f"{split}.conversion.json"


def _finished(folder: Path, split: str, conditions: Mapping[str, Any]) -> Converted | None:
    """The split, where it lies there whole and is what is asked for."""
    record = read_json(record_path(folder, split))
    if record is None or record["conditions"] != conditions:
        return None
    listed = {shard.name: shard for shard in shards_of(folder, split)}
    sizes = {name: path.stat().st_size for name in record["shards"] if (path := folder / name).is_file()}
    if sizes != {name: shard.bytes for name, shard in listed.items()} or list(sizes) != record["shards"]:
        return None
    left_out = [LeftOut(**value) for value in record["left_out"]]
    samples = sum(shard.samples for shard in listed.values())
    return Converted(samples, len(listed), left_out, was_there=True)


def _refuse_others(folder: Path, split: str, conditions: Mapping[str, Any], overwrite: bool) -> None:
    """Refuses to replace what was made of something else, or in another way.

    Raises:
        ValueError: There is such a thing, and it must not be overwritten.
    """
    if overwrite:
        return
    begun = [read_json(path) for path in sorted((folder / STAGING / split).glob(f"*/{CONDITIONS_NAME}"))]
    other = next((earlier for earlier in begun if earlier != conditions), None)
    if other is not None:
        raise ValueError(
            f"{folder} holds a part of the split {split} that was made otherwise ({_difference(other, conditions)}): "
            "give that command again, or begin anew with --overwrite"
        )
    if begun:
        return
    record = read_json(record_path(folder, split))
    if record is not None and record["conditions"] != conditions:
        raise ValueError(
            f"{folder} holds the split {split}, made otherwise ({_difference(record['conditions'], conditions)}): "
            "write to another folder, or replace it with --overwrite"
        )
    present = sorted(path.name for path in folder.glob("*.tar") if is_of_split(path.name, split))
    if record is None and present:
        raise ValueError(
            f"{folder} holds shards of the split {split} already, as {present[0]}: write to another folder or another "
            "--split, or replace them with --overwrite"
        )


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = next(key for key in (*earlier, *now) if earlier.get(key) != now.get(key))
    if changed in ("files", "listing"):
        return f"of {earlier.get('files')} files, and there are {now['files']} now, or some have changed"
    return f"{changed} was {earlier.get(changed)}, and is {now.get(changed)} now"


def _staging(folder: Path, split: str, conditions: Mapping[str, Any]) -> Path:
    """Where unfinished shards lie."""
    return folder / STAGING / split / value_digest(dict(conditions)).removeprefix("sha256:")[:16]


def _opened_staging(folder: Path, split: str, conditions: Mapping[str, Any]) -> Path:
    """The folder of unfinished shards, without those that were to be others, and what a killed process left in it."""
    staged = _staging(folder, split, conditions)
    if staged.parent.is_dir():
        for other in staged.parent.iterdir():
            if other != staged:
                _remove(other)
    staged.mkdir(parents=True, exist_ok=True)
    for partial in staged.glob(".*.partial"):
        partial.unlink(missing_ok=True)
    write_json(staged / CONDITIONS_NAME, dict(conditions))
    return staged


def _remove(staged: Path) -> None:
    shutil.rmtree(staged, ignore_errors=True)


def _write_all(
    tasks: Sequence[ShardTask], folder: Path, workers: int, lock: int | None, bad: BadFiles, progress: Progress
) -> dict[str, ShardRecord]:
    """The records of all shards, by name, once all are whole.

    Raises:
        ValueError: More files than allowed are bad.
    """
    found = {task.name: read_record(task.folder, folder, task.name) for task in tasks}
    records = {name: record for name, record in found.items() if record is not None}
    bad.add([each for record in records.values() for each in record.left_out])
    samples = 0
    progress(len(records), len(tasks), samples)
    for name, record in _written([task for task in tasks if task.name not in records], workers, lock):
        records[name] = record
        samples += record.samples
        bad.add(record.left_out)
        progress(len(records), len(tasks), samples)
    return records


def _written(tasks: Sequence[ShardTask], workers: int, lock: int | None) -> Iterator[tuple[str, ShardRecord]]:
    """Writes shards, and gives their records in the order in which they become whole."""
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield task.name, write_shard(task)
        return
    # Forked, since to import torch once more in each process would take longer than many a conversion.
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=get_context("fork"), initializer=_begin_worker, initargs=(lock,)
    )
    remaining = iter(tasks)
    running = {pool.submit(write_shard, task): task for task in islice(remaining, QUEUED_SHARDS * workers)}
    try:
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future).name, future.result()
                running |= {pool.submit(write_shard, task): task for task in islice(remaining, 1)}
    except BrokenProcessPool as error:
        raise OSError(
            "a process that wrote shards was ended from outside, most often because memory is full: give the same "
            "command again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(lock: int | None) -> None:
    """Leaves interruptions and the lock to the process that started this one, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if lock is not None:
        os.close(lock)
    threading.Thread(target=_end_with, args=(parent_process().sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for_end([sentinel])
    os._exit(1)


def _publish(
    folder: Path,
    split: str,
    staged: Path,
    records: Mapping[str, ShardRecord],
    listing: Listing,
    conditions: Mapping[str, Any],
    converted: Converted,
) -> None:
    """Moves the shards to their place, and names them; called again after it was stopped half-way, it does the rest."""
    shards = [Shard(str(folder / name), records[name].samples, records[name].bytes) for name in sorted(records)]
    move_shards(staged, folder, split, shards)
    if listing.classes is not None and not any((folder / name).exists() for name in CLASSES_NAMES):
        write_json(folder / CLASSES_NAMES[0], listing.classes)
    record = {
        "conditions": dict(conditions),
        "shards": [shard.name for shard in shards],
        "left_out": [asdict(left_out) for left_out in converted.left_out],
    }
    write_json(record_path(folder, split), record)
    list_shards(folder, split, shards)
    _remove(staged)
