"""Where data lie, as people write it: paths and URLs, with globs, braces, ``~`` and ``file:``.

What exists under the very name that was written is meant by it, whatever characters the name has: patterns are looked
for only in what is left.
"""

import glob
import io
import os
import re
import urllib.parse
from pathlib import Path
from typing import BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from adala.data.cache import open_cached
from adala.data.openers import MAX_TEXT_BYTES, open_remote, read_remote_text
from adala.data.remote import BLOCK_BYTES, DEFAULT_OPTIONS, Patience, RemoteOptions

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAGIC = re.compile(r"[*?\[]")


def is_remote(address: str) -> bool:
    """Whether ``address`` is something else than a path on this machine."""
    return _SCHEME.match(address) is not None


def is_pattern(name: str) -> bool:
    """Whether a name without a folder stands for several."""
    return _MAGIC.search(name) is not None


def unescaped(pattern: str) -> str:
    """The name that ``glob.escape`` made a pattern of; another pattern as it is."""
    return re.sub(r"\[([*?[])\]", r"\1", pattern)


def open_stream(
    address: str, remote: RemoteOptions, size: int | None = None, patience: Patience | None = None
) -> BinaryIO:
    """The bytes of a shard: of a local file, or of a remote one, from the node's cache where there is one.

    Args:
        address: Path or URL.
        remote: How a remote one is read.
        size: How many bytes it must have; None where that is not known.
        patience: Time that several readings of one shard share.

    Raises:
        OSError: It cannot be opened, or, while it is read, see :class:`adala.data.remote.RemoteStream`.
    """
    if not is_remote(address):
        return open(address, "rb")
    if remote.cache_dir is not None:
        return open_cached(address, size, remote, patience or Patience(remote, size))
    return io.BufferedReader(open_remote(address, remote, size, patience), BLOCK_BYTES)


def read_text(address: str, remote: RemoteOptions = DEFAULT_OPTIONS) -> str:
    """A whole text file, UTF-8.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not UTF-8, or far too large.
    """
    if is_remote(address):
        return read_remote_text(address, remote).decode("utf-8-sig")
    with open(address, "rb") as stream:
        content = stream.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"it is larger than {MAX_TEXT_BYTES} bytes")
    return content.decode("utf-8-sig")


def local_path(address: str) -> str:
    """A local address as a path: without ``file:``, and with the home folder for ``~``."""
    if not address.startswith("file:"):
        return os.path.expanduser(address)
    path = address.removeprefix("file:")
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        path = slash + rest if host in ("", "localhost") else path[2:]
    # A name with a percent sign that exists is meant as it is written.
    return path if os.path.exists(path) else urllib.parse.unquote(path)


def expand(address: str) -> list[tuple[str, str]]:
    """The folders and names that one address stands for.

    Returns:
        Pairs of a folder, which ends in a slash or is empty for the working directory, and a glob over the names of the
        shards in it.

    Raises:
        ValueError: No folder matches.
    """
    if is_remote(address) and not address.startswith("file:"):
        return [(folder, name or "*") for folder, name in map(_divide, _expand_braces(address))]
    path = local_path(address)
    if os.path.isdir(path):
        return [(_as_folder(path), "*")]
    existing, rest = _existing_part(path.rstrip("/"))
    found = [pair for pattern in _expand_braces(rest) for pair in _match(existing, pattern)]
    if not found:
        raise ValueError(f"{address}: there is no such folder, and none with *.tar files that it stands for")
    return found


def _existing_part(path: str) -> tuple[str, str]:
    """The longest beginning of a path that is a folder, with its slash, and the rest."""
    parts = re.split(r"(?<=/)(?=[^/])", path)
    taken = ""
    while len(parts) > 1 and os.path.isdir(taken + parts[0]):
        taken += parts.pop(0)
    return taken, "".join(parts)


def _match(existing: str, pattern: str) -> list[tuple[str, str]]:
    """What a path below a folder stands for: shards in folders, or whole folders of shards."""
    between, name = _divide(pattern)
    folders = [existing + between]
    if is_pattern(between):
        folders = [_as_folder(path) for path in _glob(existing, between) if os.path.isdir(path)]
    found = []
    for folder in folders:
        inside = [path for path in _glob(folder, name) if os.path.isdir(path) and _holds_shards(path)]
        if os.path.isdir(folder + name):
            found.append((_as_folder(folder + name), "*"))
        elif os.path.isfile(folder + name) or not is_pattern(between + name):
            found.append((folder, glob.escape(name)))
        elif inside:
            found += [(_as_folder(path), "*") for path in inside]
        elif not is_pattern(between) or _glob(folder, name):
            found.append((folder, name))
    return found


def _glob(folder: str, pattern: str) -> list[str]:
    return sorted(glob.glob(glob.escape(folder) + pattern, recursive=True))


def _holds_shards(folder: str) -> bool:
    return any(is_shard(name) for name in os.listdir(folder))


def is_shard(name: str) -> bool:
    """Whether a file's name is that of a shard."""
    return name.lower().endswith(SHARD_SUFFIXES) and not name.startswith(".")


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError:
        return [pattern]


def _divide(address: str) -> tuple[str, str]:
    folder, slash, name = address.rpartition("/")
    return folder + slash, name


def _as_folder(path: str) -> str:
    return path if path.endswith("/") else path + "/"


def display(folder: str) -> Path | str:
    """A folder as it stands in a command."""
    return folder if is_remote(folder) else Path(folder or ".")
