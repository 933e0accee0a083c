"""From a tar file to samples: which of its files belong together.

WebDataset's rule: files side by side whose names agree up to the first dot are one sample, and what follows the dot
says what each of them is. Counting and reading both go through here, so that the index and the stream agree.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

# A name up to the first dot behind its last folder, and the rest.
_FIRST_DOT = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
# The same of a key alone.
_STEM = re.compile(r"(?:.*/)?[^./]*", re.DOTALL)
# Files that programs leave behind: hidden ones (.DS_Store, macOS' ._NAME), macOS' folder of these, WebDataset's own
# notes (__index__).
_NOT_DATA = re.compile(r"(?:^|/)(?:\.[^/]+|__MACOSX|__[^/]+__)(?:/|$)")
# So many files in a row whose names agree up to the first dot are no sample, but names with dots in them.
MAX_FILES = 64
# No image, label or mask is larger; a few bytes of a damaged or hostile archive can claim to be.
MAX_FILE_BYTES = 2**30

Files = Iterable[tuple[str, bytes]]
Fields = dict[str, bytes]


def read_samples(stream: BinaryIO, url: str) -> Iterator[tuple[str, Fields]]:
    """The samples of a tar stream, compressed or not: key, and contents by extension in lower case.

    Raises:
        ValueError: It holds links, a file twice, the files of a sample apart, or a second archive behind its end.
        tarfile.TarError, EOFError, OSError: It is damaged, or cannot be read.
    """
    seen: set[str] = set()
    dotted: set[str] = set()
    for key, fields in group_samples(read_files(stream, url), url):
        # Where a key has dots, its files might be some of a sample that came before, or comes yet.
        stem = _STEM.match(key)[0]
        if key in seen or stem in seen or key in dotted:
            raise ValueError(
                f"the shard {url} holds the files of the sample {key!r} apart, or twice: write it anew with the files "
                "of each sample side by side (`tar --sort=name`), and without an older version of any"
            )
        seen.add(key)
        if stem != key:
            dotted.add(stem)
        yield key, fields


class _Member(tarfile.TarInfo):
    """A member of an archive that has an end.

    tarfile takes a header that it cannot read, and the end of the file, for the end of the archive: what is cut off, or
    comes behind a flipped bit, would be missing without a word.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:
            if tar.offset == 0:  # of which tarfile has more to say
                raise
            raise tarfile.ReadError("it ends without the blocks that end an archive, as if it had been cut") from error
        except tarfile.InvalidHeaderError as error:
            if tar.offset == 0:
                raise
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


def read_files(stream: BinaryIO, url: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar stream, but those that are no data.

    Raises:
        ValueError: It holds something else in place of a file (a link, a device), a file that is too large, or a second
            archive behind its end.
        tarfile.TarError: A header is damaged, the end is missing, or there are zeros alone, more than an empty archive
            has.
    """
    with tarfile.open(fileobj=stream, mode="r|*", encoding="utf-8", errors="backslashreplace", tarinfo=_Member) as tar:
        has_members, zeros = False, 0
        for member in tar:
            has_members = True
            tar.members = []  # tarfile would keep all of them
            if _NOT_DATA.search(member.name) or not _FIRST_DOT.fullmatch(member.name):
                continue
            _check_member(member, url)
            if member.isfile():
                yield member.name, tar.extractfile(member).read()
        while block := tar.fileobj.read(2**20):
            zeros += len(block)
            if block.strip(b"\0"):
                raise ValueError(
                    f"the shard {url} goes on behind its end, as files do that were joined with `cat`: join them with "
                    "`tar --concatenate`, or keep them apart"
                )
        if not has_members and zeros > tarfile.RECORDSIZE:
            raise tarfile.ReadError("it holds nothing but zeros")


def _check_member(member: tarfile.TarInfo, url: str) -> None:
    if member.issym() or member.islnk():
        raise ValueError(
            f"the shard {url} holds the link {member.name!r} in place of a file: write it anew with `tar "
            "--dereference --hard-dereference`"
        )
    if member.issparse() or not (member.isfile() or member.isdir()):
        kind = "sparse file" if member.issparse() else "device or pipe"
        raise ValueError(f"the shard {url} holds the {kind} {member.name!r}: write it anew with plain files alone")
    if member.size > MAX_FILE_BYTES:
        raise ValueError(
            f"the shard {url} holds {member.name!r} of {member.size} bytes, more than the {MAX_FILE_BYTES} of any "
            "image, label or mask: it is damaged, or no shard of samples"
        )


def group_samples(files: Files, url: str) -> Iterator[tuple[str, Fields]]:
    """Files side by side as samples.

    Raises:
        ValueError: A sample has two files of one extension.
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
    yield from _samples_of(group, url)


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
