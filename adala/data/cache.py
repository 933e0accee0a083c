"""Remote shards on this node's disk, for all its ranks and data workers together.

A shard is fetched once, by whoever needs it first, into a partial file, while the one before it is read; the others
wait for it. Locks are the kernel's and end with whoever holds them: a partial file that nobody holds is gone on with.
What is read is held, too, and is not evicted. Contents are not flushed to the disk: what the end of a machine tears is
found by its checksum, which is looked at when a shard is first read after the machine has started anew.
"""

import fcntl
import functools
import hashlib
import io
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adala.data.openers import open_remote
from adala.data.remote import (
    BLOCK_BYTES,
    ChangedError,
    Patience,
    Progress,
    RemoteError,
    RemoteOptions,
    RemoteStream,
)
from adala.files import file_checksum, read_json, write_json

COMPLETE, PARTIAL, RECORD = ".shard", ".part", ".json"
# How often a lock that another process holds is asked for.
ASK_EVERY_S = 0.1
# Within which a process has made room that is not stuck.
ALONE_WITHIN_S = 60.0

logger = logging.getLogger(__name__)


def open_cached(url: str, size: int | None, options: RemoteOptions, patience: Patience) -> BinaryIO:
    """A remote shard from the cache, fetched into it first where it is not there.

    Where the cache cannot be used (its disk is full, everything in it is being read), the shard is streamed past it.

    Args:
        url: Address of the shard.
        size: Its bytes; None where the index does not say.
        options: With a ``cache_dir``.
        patience: Time that may be spent on this shard.

    Raises:
        RemoteError: The shard cannot be fetched.
    """
    try:
        cache = ShardCache(Path(options.cache_dir), int(options.cache_gib * 2**30))
        cached = cache.open(url, size, options, patience)
        if cached is not None:
            return cached
    except RemoteError:
        raise
    except OSError as error:
        _warn(options.cache_dir, f"it cannot be used ({error.strerror or error})")
    return io.BufferedReader(open_remote(url, options, size, patience), BLOCK_BYTES)


def fetch_ahead(url: str, size: int | None, options: RemoteOptions) -> None:
    """Begins to fetch a shard into the cache, in a thread, while another one is being read.

    Whoever opens it then waits for the rest. What goes wrong is met again there, and told.
    """

    def fetch() -> None:
        with suppress(OSError):
            open_cached(url, size, options, Patience(options, size)).close()

    threading.Thread(target=fetch, daemon=True).start()


def discard_cached(url: str, size: int | None, options: RemoteOptions) -> None:
    """Has a shard that turned out to be damaged fetched anew by the next one who opens it."""
    with suppress(OSError):
        ShardCache(Path(options.cache_dir), 0).discard(url, size)


@functools.cache
def _warn(folder: str, what: str) -> None:
    """Says once a process why shards are read past the cache."""
    logger.warning("data.cache_dir %s: %s; shards are read past it", folder, what)


@dataclass(frozen=True)
class _Entry:
    """Where a shard lies in a cache: its file, the part of it that is there so far, and what is known of either."""

    complete: Path
    partial: Path
    record: Path

    def remove(self) -> None:
        for path in (self.complete, self.partial, self.record):
            path.unlink(missing_ok=True)


class ShardCache:
    """Shards in one folder, which together take no more than a limit."""

    def __init__(self, folder: Path, limit_bytes: int):
        """Uses ``folder``, which is made where it is not there."""
        self.folder = folder
        self.limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, url: str, size: int | None, options: RemoteOptions, patience: Patience) -> BinaryIO | None:
        """The whole shard, held as long as it is open; None where there is no room. See :func:`open_cached`.

        Raises:
            RemoteError: It cannot be fetched.
            OSError: The folder cannot be used.
        """
        entry = self._entry(url, size)
        # Another process may evict it, or finish it, between any two looks.
        while (file := self._open_complete(entry)) is None:
            with self._held_partial(entry, patience.total_s) as partial:
                if partial is None:
                    _warn(str(self.folder), "another process has been fetching a shard for too long")
                    return None
                if not _is_at(partial, entry.partial):
                    continue
                if entry.complete.exists():
                    entry.partial.unlink(missing_ok=True)
                    continue
                if not self._fetch(url, size, options, patience, entry, partial):
                    return None
        return file

    def discard(self, url: str, size: int | None) -> None:
        """Removes a complete shard; who has it open goes on reading it."""
        entry = self._entry(url, size)
        for path in (entry.complete, entry.record):
            path.unlink(missing_ok=True)

    def _entry(self, url: str, size: int | None) -> _Entry:
        return self._entry_of(hashlib.sha256(f"{url}\n{size}".encode()).hexdigest()[:32])

    def _entry_of(self, stem: str) -> _Entry:
        return _Entry(*(self.folder / f"{stem}{suffix}" for suffix in (COMPLETE, PARTIAL, RECORD)))

    def _open_complete(self, entry: _Entry) -> BinaryIO | None:
        """The shard, if it is there and whole."""
        try:
            file = entry.complete.open("rb")
        except FileNotFoundError:
            return None
        # Whoever holds it alone is removing it.
        if not _lock(file, fcntl.LOCK_SH) or not _is_at(file, entry.complete):
            file.close()
            return None
        if not self._is_whole(entry, os.fstat(file.fileno()).st_size):
            file.close()
            logger.warning("%s in the cache is damaged: fetching the shard again", entry.complete)
            entry.complete.unlink(missing_ok=True)
            return None
        # When it was read last.
        os.utime(file.fileno())
        return file

    def _is_whole(self, entry: _Entry, size: int) -> bool:
        record = _read_record(entry.record)
        if record.get("bytes") != size or "checksum" not in record:
            return False
        if record.get("boot") != _boot():
            if file_checksum(entry.complete) != record["checksum"]:
                return False
            write_json(entry.record, {**record, "boot": _boot()})
        return True

    @contextmanager
    def _held_partial(self, entry: _Entry, seconds: float) -> Iterator[BinaryIO | None]:
        """The partial file, which nobody else writes meanwhile as long as it goes by that name.

        None where another process has held it for so many seconds.
        """
        end = time.monotonic() + seconds
        with os.fdopen(os.open(entry.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as partial:
            # Once it is complete it has another name, and its readers hold it.
            while not _lock(partial, fcntl.LOCK_EX, ASK_EVERY_S) and _is_at(partial, entry.partial):
                if time.monotonic() >= end:
                    yield None
                    return
            try:
                yield partial
            finally:
                # Closing it is not enough where a process was forked meanwhile, which has it open as well.
                fcntl.flock(partial, fcntl.LOCK_UN)

    def _fetch(
        self,
        url: str,
        size: int | None,
        options: RemoteOptions,
        patience: Patience,
        entry: _Entry,
        partial: BinaryIO,
    ) -> bool:
        """Completes a partial file that is held, and gives it its name; False where there is no room for it."""
        progress = _progress(entry, partial)
        try:
            with open_remote(url, options, size, patience, progress) as stream:
                if not self._has_room(stream, url, progress, entry):
                    entry.partial.unlink(missing_ok=True)
                    return False
                self._write(stream, url, entry, partial)
        except ChangedError:
            # What a killed process left may be of another state of the shard.
            entry.partial.unlink(missing_ok=True)
            if not progress.position:
                raise
        except RemoteError:
            if not os.fstat(partial.fileno()).st_size:
                entry.partial.unlink(missing_ok=True)
            raise
        except OSError:
            entry.partial.unlink(missing_ok=True)
            raise
        return True

    def _has_room(self, stream: RemoteStream, url: str, progress: Progress, entry: _Entry) -> bool:
        """Claims room for a shard; says so where there is none."""
        if stream.length is None:
            stream.open()
        if stream.length is None:
            _warn(str(self.folder), "neither the index nor the server says how large a shard is")
            return False
        if not self._make_room(stream.length, url, progress, entry):
            _warn(str(self.folder), f"a shard does not fit into what is free of its {self.limit_bytes / 2**30:g} GiB")
            return False
        return True

    def _write(self, stream: RemoteStream, url: str, entry: _Entry, partial: BinaryIO) -> None:
        partial.seek(stream.progress.position)
        partial.truncate()
        noted = stream.progress.validator
        while block := stream.read_block(BLOCK_BYTES):
            partial.write(block)
            if stream.progress.validator != noted:
                noted = stream.progress.validator
                write_json(entry.record, _record(url, stream.length, noted))
        partial.flush()
        write_json(entry.record, _record(url, stream.length, noted) | {"checksum": stream.progress.checksum})
        entry.partial.rename(entry.complete)

    def _make_room(self, size: int, url: str, progress: Progress, own: _Entry) -> bool:
        """Evicts what was not read for longest and is not in use, until ``size`` bytes fit, and claims these."""
        if size > self.limit_bytes:
            return False
        with self._alone():
            others = {entry: _taken(entry) for entry in self._entries() if entry != own}
            excess = sum(taken for taken, _ in others.values()) + size - self.limit_bytes
            for entry, (taken, _) in sorted(others.items(), key=lambda each: each[1][1]):
                if excess <= 0:
                    break
                if _evict(entry):
                    excess -= taken
            if excess <= 0:
                write_json(own.record, _record(url, size, progress.validator))
        return excess <= 0

    def _entries(self) -> set[_Entry]:
        ours = (COMPLETE, PARTIAL, RECORD)
        return {self._entry_of(path.stem) for path in self.folder.iterdir() if path.suffix in ours}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process claims room meanwhile."""
        with open(self.folder / ".lock", "a") as file:
            if not _lock(file, fcntl.LOCK_EX, ALONE_WITHIN_S):
                raise OSError("another process is stuck with its lock")
            yield


def _record(url: str, size: int, validator: str | None) -> dict[str, Any]:
    """What is known of a shard that is being fetched; one that is complete has its ``checksum`` as well."""
    return {"url": url, "bytes": size, "validator": validator, "boot": _boot()}


def _read_record(path: Path) -> dict[str, Any]:
    """A record; an empty one where there is none that can be read."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _progress(entry: _Entry, partial: BinaryIO) -> Progress:
    """What a partial file holds that can be gone on with: nothing that was written before the machine started."""
    record = _read_record(entry.record)
    position = os.fstat(partial.fileno()).st_size
    if not position or record.get("boot") != _boot() or position > record.get("bytes", 0):
        return Progress()
    return Progress(position, file_checksum(entry.partial), record.get("validator"))


def _taken(entry: _Entry) -> tuple[int, float]:
    """Bytes that a shard takes, or will take when it is complete, and when it was used last."""
    for path in (entry.complete, entry.partial):
        with suppress(FileNotFoundError):
            found = path.stat()
            claimed = _read_record(entry.record).get("bytes", 0) if path == entry.partial else 0
            return max(found.st_size, claimed), found.st_mtime
    return 0, 0.0


def _evict(entry: _Entry) -> bool:
    """Removes a shard unless it is being read or fetched."""
    for path in (entry.complete, entry.partial):
        with suppress(FileNotFoundError), path.open("r+b") as file:
            if not _lock(file, fcntl.LOCK_EX, 0.0):
                return False
            entry.remove()
            return True
    entry.record.unlink(missing_ok=True)
    return True


def _lock(file: BinaryIO, how: int, seconds: float = 10.0) -> bool:
    """Whether a lock could be had within ``seconds``; it is held until the file is closed, or its process ends.

    Raises:
        OSError: The file system has no locks.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        time.sleep(ASK_EVERY_S)


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@functools.cache
def _boot() -> str:
    """What tells this start of the machine from others; where nothing does, what tells this process from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process {uuid.uuid4()}"
