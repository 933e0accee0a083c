"""Which address is opened by what: HTTP by itself, other schemes by fsspec, or by a command that WebDataset starts."""

import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from webdataset.gopen import gopen

from adala.data.over_http import HttpSource
from adala.data.remote import (
    BLOCK_BYTES,
    NOTHING_READ,
    AbsentError,
    Patience,
    Progress,
    RemoteError,
    RemoteOptions,
    RemoteStream,
    Setback,
    Source,
    call_within,
    short,
)

# Of an index or a list of classes: as JSON it takes some 50 times as much memory at worst.
MAX_TEXT_BYTES = 2**24
# Schemes for which this package has an extra.
EXTRAS = ("s3", "gs")
# Those that WebDataset opens, and the commands that it starts.
COMMANDS = {"gs": "gsutil", "ais": "ais", "sftp": "curl", "ftps": "curl"}


def open_remote(
    url: str,
    options: RemoteOptions,
    size: int | None = None,
    patience: Patience | None = None,
    progress: Progress = NOTHING_READ,
) -> RemoteStream:
    """The bytes of ``url``, see :class:`RemoteStream`; it connects when it is first read.

    Raises:
        RemoteError: A scheme that nothing opens.
    """
    return RemoteStream(_source_of(url), options, size, patience, progress)


def read_remote_text(url: str, options: RemoteOptions) -> bytes:
    """All bytes of a text file.

    Raises:
        RemoteError: It cannot be read, or is larger than any index.
    """
    with open_remote(url, options, patience=Patience(options, 2**20)) as stream:
        blocks, total = [], 0
        while block := stream.read_block(BLOCK_BYTES):
            blocks.append(block)
            total += len(block)
            if total > MAX_TEXT_BYTES:
                raise RemoteError(
                    f"it is larger than {MAX_TEXT_BYTES // 2**20} MiB: no index and no list of classes is"
                )
    return b"".join(blocks)


def _source_of(url: str) -> Source:
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return HttpSource(url)
    # Here: it takes a third of a second, for schemes that few have.
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
        return FsspecSource(url)
    except (ImportError, ValueError) as error:
        if scheme in COMMANDS and shutil.which(COMMANDS[scheme]):
            return PipeSource(url)
        advice = (
            f"pip install 'adala[{scheme}]'" if scheme in EXTRAS else "install the package that fsspec names for it"
        )
        raise RemoteError(
            f"nothing here opens {scheme}:// ({short(error)}): {advice}, or copy the shards to where they can be read"
        ) from error


class FsspecSource:
    """A file of any scheme that fsspec knows, with the credentials that its package finds by itself."""

    def __init__(self, url: str):
        self._url = url

    def __str__(self) -> str:
        return self._url

    def open(self, position: int, validator: str | None, seconds: float) -> "FsspecBody":
        return call_within(seconds, self._open, position, validator)

    def _open(self, position: int, validator: str | None) -> "FsspecBody":
        # Anew each time: a file system holds connections and threads that a forked process does not have.
        from fsspec.core import url_to_fs

        with _as_os_error():
            files, path = url_to_fs(self._url, skip_instance_cache=True)
            information = files.info(path)
            current = str(files.ukey(path))
            file = files.open(path, "rb")
            start = position if position and current == validator else 0
            file.seek(start)
            return FsspecBody(file, start, information.get("size"), current)


@dataclass
class FsspecBody:
    """An open file of fsspec, see :class:`Body`."""

    file: BinaryIO
    start: int
    length: int | None
    validator: str | None

    def read(self, count: int, seconds: float) -> bytes:
        return call_within(seconds, self._read, count)

    def _read(self, count: int) -> bytes:
        with _as_os_error():
            return self.file.read(count)

    def close(self) -> None:
        # It may be stuck in a read.
        with suppress(TimeoutError), _as_os_error():
            call_within(1.0, self.file.close)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """The packages behind fsspec raise whatever their clients raise."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise AbsentError(f"there is no such file ({short(error)}): correct the address, or put it there") from error
    except PermissionError as error:
        raise AbsentError(f"it may not be read ({short(error)}): see to credentials and permissions") from error
    except OSError:
        raise
    except Exception as error:  # theirs, whatever they are
        raise OSError(f"{type(error).__name__}: {error}") from error


class PipeSource:
    """A file that a command writes to its output, as WebDataset starts it."""

    def __init__(self, url: str):
        self._url = url

    def __str__(self) -> str:
        return self._url

    def open(self, position: int, validator: str | None, seconds: float) -> "PipeBody":
        return PipeBody(gopen(self._url))


class PipeBody:
    """The output of a running command, see :class:`Body`."""

    def __init__(self, pipe: Any):
        self.start = 0
        self.length = None
        self.validator = None
        self._pipe = pipe  # which ends with its last reference
        self._process = pipe.proc
        self._output = pipe.stream

    def read(self, count: int, seconds: float) -> bytes:
        waiting = select.poll()
        waiting.register(self._output, select.POLLIN)
        if not waiting.poll(1000 * seconds):
            raise TimeoutError("timed out")
        block = os.read(self._output.fileno(), count)
        if not block:
            self._check_end(seconds)
        return block

    def _check_end(self, seconds: float) -> None:
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError("timed out") from None
        if status:
            raise Setback(f"the command {self._process.args[0]} ended with {status}")

    def close(self) -> None:
        """Ends the command, which may be stuck."""
        self._process.kill()
        self._output.close()
        self._process.wait()
