"""Files on other machines as streams: time-outs, bounded retries, and ranges that go on where a connection broke.

Time is counted while bytes are waited for, not while they are used: a trainer may take hours over a shard. A file that
changes between two attempts is never glued together: what was read before a break is compared with what is skipped
after it, unless the server vouches by ``If-Range`` that it is the same.
"""

import http.client
import io
import logging
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

# Longest wait between two attempts, where the server asks for none.
MAX_BACK_OFF_S = 30.0
# A server that answers with something else than the file may be about to mend; after so many answers it is not.
DOUBTFUL_ATTEMPTS = 3
# What a file of unknown size may hold at the slowest permitted rate before its time is over.
ASSUMED_BYTES = 2**30
BLOCK_BYTES = 2**18
# How web pages begin, which proxies and portals send in place of a file.
_WEB_PAGE = re.compile(rb"\s*(<!doctype|<html|<\?xml)", re.IGNORECASE)

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


@dataclass(frozen=True)
class RemoteOptions:
    """How long remote files are waited for, and where shards are kept.

    Attributes:
        remote_attempts: Attempts in a row without a new byte before a file is given up.
        stall_timeout_s: Seconds that an answer, and then each next byte, may take.
        total_timeout_s: Seconds that may be spent waiting for one file, besides what its size takes at
            ``min_mib_per_s``.
        min_mib_per_s: Slowest rate that is waited for, in MiB/s.
        cache_dir: Folder in which this node keeps shards; None keeps none.
        cache_gib: What they may take together, in GiB.
        first_wait_s: Seconds before the second attempt; each further wait is twice as long.
    """

    remote_attempts: int = 8
    stall_timeout_s: float = 60.0
    total_timeout_s: float = 600.0
    min_mib_per_s: float = 1.0
    cache_dir: str | None = None
    cache_gib: float = 100.0
    first_wait_s: float = 0.5


DEFAULT_OPTIONS = RemoteOptions()


class RemoteError(OSError):
    """A remote file cannot be read, whatever is tried; the message says why and what to do, and leaves the address to
    whoever knows what the file is."""


class AbsentError(RemoteError):
    """The other side is there, and does not have the file, or not for us."""


class ChangedError(RemoteError):
    """A file is another one than at the beginning."""


class Setback(Exception):
    """Why an attempt failed that may be repeated, and how long the server asks to wait before."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class OtherAnswer(Setback):
    """The server sends something else than the file. It may be about to mend; after a few attempts it is not."""


class Patience:
    """The seconds that may still be spent waiting for one file, over all attempts."""

    def __init__(self, options: RemoteOptions, size: int | None = None):
        """Allows what a file of ``size`` bytes, or of an unknown size, may take."""
        self.total_s = options.total_timeout_s + (size or ASSUMED_BYTES) / 2**20 / options.min_mib_per_s
        self._left_s = self.total_s

    def allow(self, seconds: float) -> float:
        """As much of ``seconds`` as is left.

        Raises:
            RemoteError: Nothing is left.
        """
        if self._left_s <= 0:
            raise self.over()
        return min(seconds, self._left_s)

    def wait(self, seconds: float) -> None:
        """Sleeps.

        Raises:
            RemoteError: There is no more time than that.
        """
        if seconds >= self._left_s:
            raise self.over()
        with self.spent():
            time.sleep(seconds)

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Counts the time within."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._left_s -= time.monotonic() - start

    def over(self) -> RemoteError:
        return RemoteError(
            f"the {self.total_s:.0f} s that one file of this size may take are over: look at the server and the "
            "network, or raise data.total_timeout_s or lower data.min_mib_per_s"
        )


class Body(Protocol):
    """What one attempt reads from.

    Attributes:
        start: Place in the file of its first byte.
        length: Bytes of the whole file; None where nobody says.
        validator: What tells this state of the file from others; None where nothing does.
    """

    start: int
    length: int | None
    validator: str | None

    def read(self, count: int, seconds: float) -> bytes:
        """At most ``count`` bytes, none at the end; raises TimeoutError where none came within ``seconds``."""

    def close(self) -> None: ...


class Source(Protocol):
    """Where a remote file is opened."""

    def open(self, position: int, validator: str | None, seconds: float) -> Body:
        """Opens it, at ``position`` if the file still is the one of ``validator`` and this can be told, else at 0."""


@dataclass(frozen=True)
class Progress:
    """What was read of a file before: so many bytes, their CRC-32, and the validator of the file that they are of."""

    position: int = 0
    checksum: int = 0
    validator: str | None = None


NOTHING_READ = Progress()


class RemoteStream(io.RawIOBase):
    """The bytes of a remote file, in order and once, over as many connections as that takes.

    Attributes:
        progress: What was read so far.
        length: Bytes of the whole file, once an answer or the caller has said so.
    """

    def __init__(
        self,
        source: Source,
        options: RemoteOptions,
        size: int | None = None,
        patience: Patience | None = None,
        progress: Progress = NOTHING_READ,
    ):
        """Connects when it is first read.

        Args:
            source: Opens the file.
            options: See :class:`RemoteOptions`.
            size: How many bytes the file must have; None where that is not known.
            patience: Time that it shares with other streams of the same file.
            progress: Goes on behind what was read before.
        """
        self.progress = progress
        self.length = size
        self._source = source
        self._options = options
        self._expected = size
        self._patience = patience or Patience(options, size)
        self._failures = 0
        self._body: Body | None = None
        self._head = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """See ``io.RawIOBase``.

        Raises:
            RemoteError: The file cannot be read, or is not what it should be.
        """
        block = self.read_block(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def read_block(self, count: int) -> bytes:
        """The next bytes, at most ``count``; none at the end. See :meth:`readinto`."""
        return self._insist(lambda: self._attempt(count))

    def open(self) -> None:
        """Connects, so that :attr:`length` is known where anybody knows it. See :meth:`readinto`."""
        self._insist(self._open)

    def close(self) -> None:
        self._drop()
        super().close()

    def _insist(self, attempt: Callable[[], Value]) -> Value:
        """Attempts it as often as it may succeed."""
        while True:
            try:
                return attempt()
            except RemoteError:
                self._drop()
                raise
            except (Setback, OSError, http.client.HTTPException) as error:
                self._set_back(error)

    def _attempt(self, count: int) -> bytes:
        if self._body is None and self.progress.position != self.length:
            self._open()
        position = self.progress.position
        if self.length is not None:
            # A server may keep the connection open behind the end, or send more than it said.
            count = min(count, self.length - position)
        if count == 0:
            return b""
        block = self._read(count)
        if block:
            self._advance(block)
        elif self.length is not None:
            raise Setback(f"it ended after {position} of {self.length} bytes")
        return block

    def _read(self, count: int) -> bytes:
        with self._patience.spent():
            return self._body.read(count, self._patience.allow(self._options.stall_timeout_s))

    def _advance(self, block: bytes) -> None:
        before = self.progress
        if before.position < 64:
            self._head += block[: 64 - len(self._head)]
            if _WEB_PAGE.match(self._head):
                raise OtherAnswer(f"a web page came in its place ({self._head[:32]!r}...)")
        checksum = zlib.crc32(block, before.checksum)
        self.progress = Progress(before.position + len(block), checksum, self._body.validator)
        self._failures = 0

    def _open(self) -> None:
        """Opens the file where it was left, by reading again what lies before where there is no other way."""
        before = self.progress
        with self._patience.spent():
            seconds = self._patience.allow(self._options.stall_timeout_s)
            self._body = self._source.open(before.position, before.validator, seconds)
        self._check_length(self._body.length)
        if self._body.start < before.position:
            self._skip(before)

    def _check_length(self, length: int | None) -> None:
        if length is None:
            return
        if self._expected is not None and length != self._expected:
            raise OtherAnswer(
                f"it has {length} bytes there and {self._expected} in the index, which may have to be written anew"
            )
        if self.progress.position and self.length is not None and length != self.length:
            raise ChangedError("it changed while it was read: leave the data alone during a run, and start again")
        self.length = length

    def _skip(self, before: Progress) -> None:
        """Reads what was read before, and compares."""
        position, checksum = self._body.start, 0
        assert position == 0, "a source opens at the position or at the beginning"
        while position < before.position:
            block = self._read(min(BLOCK_BYTES, before.position - position))
            if not block:
                raise Setback(f"it ended after {position} bytes, of which there were {before.position} before")
            position, checksum = position + len(block), zlib.crc32(block, checksum)
        if checksum != before.checksum:
            raise ChangedError("it changed while it was read: leave the data alone during a run, and start again")

    def _set_back(self, error: Exception) -> None:
        """Waits until the next attempt.

        Raises:
            RemoteError: There is none.
        """
        self._drop()
        self._failures += 1
        self._head = self._head[: self.progress.position]
        reason = _reason(error, self._options.stall_timeout_s)
        if self._failures >= self._attempts_for(error):
            raise self._given_up(error, reason) from error
        wait_s = error.wait_s if isinstance(error, Setback) and error.wait_s is not None else self._back_off_s()
        place = f"{self._source} broke at byte {self.progress.position}"
        logger.warning("%s (%s): going on in %.1f s", place, reason, wait_s)
        self._patience.wait(wait_s)

    def _attempts_for(self, error: Exception) -> int:
        attempts = self._options.remote_attempts
        return min(attempts, DOUBTFUL_ATTEMPTS) if isinstance(error, OtherAnswer) else attempts

    def _given_up(self, error: Exception, reason: str) -> RemoteError:
        advice = "look at the server and the network, or raise data.remote_attempts or data.stall_timeout_s"
        if isinstance(error, OtherAnswer):
            advice = "see what the server sends for this address"
        times = "one attempt" if self._failures == 1 else f"{self._failures} attempts"
        return RemoteError(f"given up at byte {self.progress.position} after {times}, since {reason}: {advice}")

    def _back_off_s(self) -> float:
        """Twice as long each time, and somewhat shorter at random, so that not all workers come back at once."""
        longest = min(MAX_BACK_OFF_S, self._options.first_wait_s * 2 ** (self._failures - 1))
        # Of its own generator: the order of samples and the trainer's random numbers must not move.
        return longest * random.SystemRandom().uniform(0.5, 1.0)

    def _drop(self) -> None:
        if self._body is not None:
            with suppress(OSError):
                self._body.close()
        self._body = None


def _reason(error: Exception, stall_timeout_s: float) -> str:
    """Why an attempt failed, as the end of a sentence of one line."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"nothing came for {stall_timeout_s:g} s (timed out)"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was cut in the middle of the file"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
        return f"the answer is not HTTP as it should be ({type(error).__name__}: {short(error)})"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return short(text)


def short(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def call_within(seconds: float, function: Callable[..., Value], *arguments: Any) -> Value:
    """What a function returns that may hang; it is left behind in a thread of its own if it does.

    Raises:
        TimeoutError: It has not returned within ``seconds``.
    """
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((function(*arguments), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("timed out") from None
    if error is not None:
        raise error
    return value
