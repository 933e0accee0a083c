"""Files that are whole or absent, and digests of what they hold."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file under another name and renames it, so that no reader ever finds half of it; text as UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes a JSON value as a whole file; without ``indent`` on one line."""
    write_whole(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The contents of a JSON file; None where there is none.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove it to do without") from error


def is_git_lfs_pointer(start: bytes) -> bool:
    """Whether the first bytes of a file are of what Git LFS leaves in place of one that was not fetched."""
    return start.startswith(b"version https://git-lfs")


def sync_file(path: Path) -> None:
    """Waits until a file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# A folder is synced the same way; its contents are the names in it.
sync_folder = sync_file


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return "sha256:" + digest.hexdigest()


def file_checksum(path: Path) -> int:
    """CRC-32 of a file: finds damage at the speed of a disk."""
    value = 0
    for block in _blocks(path):
        value = zlib.crc32(block, value)
    return value


def _blocks(path: Path, size: int = 2**22) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block


def value_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def remove_tree(path: Path) -> None:
    """Removes a folder with all it holds, if it is there."""
    if path.exists():
        shutil.rmtree(path)
