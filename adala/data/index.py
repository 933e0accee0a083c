"""The shard index: which shards there are and how many samples each holds.

Each shard folder has one ``index.json``, ``{"shards": [{"name": "train-00000.tar", "samples": 24, "bytes": 91136}]}``.
With it every rank knows the length of an epoch and its own part of it before a byte is read.
"""

import argparse
import fnmatch
import functools
import json
import os
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

INDEX_NAME = "index.json"
HTTP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Shard:
    """One tar file of samples.

    Attributes:
        url: Path or URL.
        samples: How many samples it holds.
        bytes: Its size.
    """

    url: str
    samples: int
    bytes: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one dataset or split, in the order in which they were listed."""

    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def is_remote(url: str) -> bool:
    """Whether ``url`` is something else than a path on this machine."""
    return "://" in url


def index_command(folder: str | Path) -> str:
    """The command that writes the index of ``folder``, for error messages."""
    return f"python -m adala.data.index {folder}"


def load_index(sources: Sequence[str]) -> ShardIndex:
    """The shards that ``sources`` name, one source after the other, with counts from the ``index.json`` beside them.

    Args:
        sources: Each a brace pattern (``/x/train-{00000..00007}.tar``), a glob over the names in the index
            (``/x/train-*.tar``), a single path, or a URL in one of these forms.

    Raises:
        ValueError: No source; no readable ``index.json``; a shard that the index does not list, that is listed twice,
            or that is missing on disk or of another size there; a glob that matches nothing.
    """
    if not sources:
        raise ValueError("no shards were named: give at least one path, glob or brace pattern of tar files")
    read = functools.cache(read_index)
    shards = [shard for source in sources for url in _expand_braces(source) for shard in _resolve(url, read)]
    seen: set[str] = set()
    for shard in shards:
        if shard.url in seen:
            raise ValueError(f"the shard {shard.url} is named twice: name each shard once, an epoch reads it once")
        seen.add(shard.url)
        if not is_remote(shard.url):
            _check_file(shard)
    return ShardIndex(tuple(shards))


def _expand_braces(source: str) -> list[str]:
    return [url if is_remote(url) else os.path.expanduser(url) for url in expand_urls(source.removeprefix("file://"))]


def _resolve(url: str, read: Callable[[str], dict[str, Shard]]) -> list[Shard]:
    """The shards that one path, URL or glob stands for."""
    folder, slash, name = url.rpartition("/")
    folder = folder + slash
    listed = read(folder)
    if any(character in name for character in "*?["):
        matches = sorted(fnmatch.filter(listed, name))
        if not matches:
            raise ValueError(
                f"no shard in {folder}{INDEX_NAME} matches {name!r}: it lists {_examples(listed)}; correct the "
                f"pattern, or write the index anew with `{index_command(folder or '.')}`"
            )
        return [listed[match] for match in matches]
    if name not in listed:
        raise ValueError(
            f"{folder}{INDEX_NAME} does not list the shard {name!r} but {_examples(listed)}: correct the pattern, or "
            f"write the index anew with `{index_command(folder or '.')}`"
        )
    return [listed[name]]


def _examples(listed: dict[str, Shard]) -> str:
    names = sorted(listed)
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]]) or "no shards"


def read_index(folder: str) -> dict[str, Shard]:
    """The shards of a folder by name. ``folder`` ends in a slash, or is empty for the working directory.

    Raises:
        ValueError: There is no ``index.json``, or it is not one.
    """
    url = folder + INDEX_NAME
    try:
        text = _read_text(url)
    except OSError as error:
        raise ValueError(
            f"cannot read the shard index {url} ({error}): write it with `{index_command(folder or '.')}`"
            + (" where the shards lie, and put it beside them" if is_remote(url) else "")
        ) from error
    try:
        return {
            entry["name"]: Shard(folder + entry["name"], int(entry["samples"]), int(entry["bytes"]))
            for entry in json.loads(text)["shards"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{url} is not a shard index ({error!r}): write it anew with `{index_command(folder or '.')}`"
        ) from error


def _read_text(url: str) -> str:
    if url.startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S) as response:
            return response.read().decode()
    with gopen(url) as stream:
        return stream.read().decode()


def _check_file(shard: Shard) -> None:
    """Refuses a local shard that is not what the index says, at start-up rather than in the middle of an epoch."""
    if not os.path.isfile(shard.url):
        folder = os.path.dirname(shard.url) or "."
        raise ValueError(
            f"the index lists the shard {shard.url}, but there is no such file: fetch it, or write the index anew with "
            f"`{index_command(folder)}`"
        )
    size = os.path.getsize(shard.url)
    if size != shard.bytes:
        raise ValueError(
            f"the shard {shard.url} has {size} bytes, but the index says {shard.bytes}: fetch it again, or write the "
            f"index anew with `{index_command(os.path.dirname(shard.url) or '.')}`"
        )


def group_samples(stream: BinaryIO, url: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar stream: file contents by extension, beside ``__key__`` and ``__url__``.

    Counting and reading both go through here, so that the index and the stream agree on what one sample is.
    """
    return group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))


def count_samples(path: Path) -> int:
    """Samples of a local tar file, grouped by key as reading does it.

    Raises:
        ValueError: The file is not a tar of samples, or truncated.
    """
    try:
        with open(path, "rb") as stream:
            return sum(1 for _ in group_samples(stream, str(path)))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the shard {path} is damaged ({error}): fetch it or write it again") from error


def build_index(folder: str | Path) -> Path:
    """Counts the samples of every ``*.tar`` in a local folder and writes its ``index.json``.

    Returns:
        Path of the index.

    Raises:
        ValueError: The folder holds no tar file, or a damaged one.
    """
    paths = sorted(Path(folder).glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder} holds no *.tar: name the folder in which the shards lie")
    return write_index(folder, [Shard(str(path), count_samples(path), path.stat().st_size) for path in paths])


def write_index(folder: str | Path, shards: Sequence[Shard]) -> Path:
    """Writes ``index.json`` into ``folder``, complete or not at all. Returns its path."""
    path = Path(folder) / INDEX_NAME
    entries = [
        {"name": shard.name, "samples": shard.samples, "bytes": shard.bytes}
        for shard in sorted(shards, key=lambda shard: shard.name)
    ]
    temporary = path.with_name(f".{INDEX_NAME}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump({"shards": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code is 1 after a mistake, which is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m adala.data.index", description="Write a shard folder's index.")
    parser.add_argument("folder", help="folder of *.tar shards")
    try:
        path = build_index(parser.parse_args(arguments).folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
