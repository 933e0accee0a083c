"""From a tar file to samples: which of its files belong together.

WebDataset's rule: files side by side whose names agree up to the first dot are one sample, and what follows the dot
says what each of them is. Counting and reading both go through here, so that the index and the stream agree.
"""

import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from adala.data.archives import MAX_FILE_BYTES, read_files

# A name up to the first dot behind its last folder, and the rest.
_FIRST_DOT = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
# The same of a key alone.
_STEM = re.compile(r"(?:.*/)?[^./]*", re.DOTALL)
# Files that programs leave behind: hidden ones (.DS_Store, macOS' ._NAME, but no ".." that leads up), macOS' folder of
# these, WebDataset's own notes (__index__).
_NOT_DATA = re.compile(r"(?:^|/)(?:\.(?!\.?/)[^/]+|__MACOSX|__[^/]+__)(?:/|$)")
# So many files in a row whose names agree up to the first dot are no sample, but names with dots in them.
MAX_FILES = 64
# Of a sample whose files have plain extensions.
MAX_SAMPLE_FILES = 1024

Files = Iterable[tuple[str, bytes]]
Fields = dict[str, bytes]


def read_samples(stream: BinaryIO, url: str) -> Iterator[tuple[str, Fields]]:
    """The samples of a tar stream, compressed or not: key, and contents by extension in lower case.

    Raises:
        ValueError: It holds links, a file twice, the files of a sample apart, too many or too large ones, or a second
            archive behind its end.
        tarfile.TarError, OSError: It is damaged, or cannot be read. The sample within which that is found is not given.
    """
    # By hash: a million long names would fill memory.
    seen: set[int] = set()
    dotted: set[int] = set()
    for key, fields in group_samples(read_files(stream, url, is_data), url):
        # Where a key has dots, its files might be some of a sample that came before, or comes yet.
        stem = _STEM.match(key)[0]
        if hash(key) in seen or hash(stem) in seen or hash(key) in dotted:
            raise ValueError(
                f"the shard {url} holds the files of the sample {key!r} apart, or twice: write it anew with the files "
                "of each sample side by side (`tar --sort=name`), and without an older version of any"
            )
        seen.add(hash(key))
        if stem != key:
            dotted.add(hash(stem))
        yield key, fields


def is_data(name: str) -> bool:
    """Whether a file's name is that of a part of a sample."""
    return _FIRST_DOT.fullmatch(name) is not None and not _NOT_DATA.search(name)


def group_samples(files: Files, url: str) -> Iterator[tuple[str, Fields]]:
    """Files side by side as samples.

    Raises:
        ValueError: A sample has two files of one extension, too many, or too large ones.
    """
    group: list[tuple[str, bytes]] = []
    current = None
    for name, content in files:
        key = _FIRST_DOT.fullmatch(name)[1]
        if key != current:
            yield from _samples_of(group, url)
            group, current = [], key
        elif len(group) >= MAX_FILES and not _has_plain_extension(group):
            last = _by_last_dot(group[-1][0])[0]
            begun = [file for file in group if _by_last_dot(file[0])[0] == last]
            yield from _samples_of(group[: -len(begun)], url)
            group = begun
        group.append((name, content))
        _check_group(group, url)
    yield from _samples_of(group, url)


def _check_group(group: list[tuple[str, bytes]], url: str) -> None:
    size = sum(len(content) for _, content in group)
    if len(group) > MAX_SAMPLE_FILES or size > MAX_FILE_BYTES:
        raise ValueError(
            f"the shard {url} holds {len(group)} files of {size} bytes in the sample of {group[0][0]!r}, where "
            f"{MAX_SAMPLE_FILES} and {MAX_FILE_BYTES} bytes are the most: it is damaged, or no shard of samples"
        )


def _by_last_dot(name: str) -> tuple[str, str]:
    key, _, extension = name.rpartition(".")
    return key, extension


def _by_first_dot(name: str) -> tuple[str, str]:
    return _FIRST_DOT.fullmatch(name).groups()


def _has_plain_extension(group: list[tuple[str, bytes]]) -> bool:
    return any("." not in _by_first_dot(name)[1] for name, _ in group)


def _samples_of(group: list[tuple[str, bytes]], url: str) -> Iterator[tuple[str, Fields]]:
    """One sample of files that agree up to the first dot, or several where the dots belong to the keys.

    ``0001.jpg`` beside ``0001.seg.png`` is one. In ``img.v1.png``, ``img.v1.cls``, ``img.v2.png`` no file has an
    extension without a dot: there the last dot parts key and extension.
    """
    divide = _by_first_dot if _has_plain_extension(group) else _by_last_dot
    key, fields = None, {}
    for name, content in group:
        own_key, extension = divide(name)
        if own_key != key:
            if key is not None:
                yield key, fields
            key, fields = own_key, {}
        if extension.lower() in fields:
            raise ValueError(f"the shard {url} holds the file {name!r} twice: write it anew with each file once")
        fields[extension.lower()] = content
    if key is not None:
        yield key, fields
