"""From the bytes of a tar archive, plain or gzipped, to the names and contents of its files.

tarfile reads the headers. What it does with them is too kind for data of which nothing may be lost, and too trusting
for data of anybody: it takes a damaged header for the end of an archive, does not look at gzip's checksums, and reads a
name of as many bytes as its header claims. Here an archive has an end, every byte of it is accounted for, and what is
held in memory has a limit.
"""

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

# No image, label or mask is larger; a few bytes of a damaged or hostile archive can claim to be.
MAX_FILE_BYTES = 2**28
# Of a header that comes before another one, with a long name or with what its file system knew of a file.
MAX_EXTENDED_BYTES = 2**20
# In characters; file systems end there.
MAX_NAME = 4096
# Folders, hidden files and the like, and headers before headers, one after the other. Each takes the time of a file.
MAX_IN_A_ROW = 2**16
# Two blocks of zeros end an archive, and its last record is filled up with them. Where there are more, a part of the
# archive may have been overwritten or never been fetched.
MAX_END_ZEROS = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
# Images hardly shrink, labels and headers by a factor of 20; zeros by one of 1,000.
MAX_UNPACKING = 50
UNPACKED_ANYWAY = 2**26
GZIP = b"\x1f\x8b"
CHUNK = 2**16

_ZEROS = bytes(tarfile.BLOCKSIZE)
_EXTENDED_TYPES = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# Whatever their headers say of a size.
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
# Records of extended headers that say where a sparse file has its holes begin so.
_SPARSE = "GNU.sparse."


def read_files(stream: BinaryIO, url: str, is_data: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive's files, those alone whose name is one of data.

    What cannot be printed stands in names as an escape, and so do bytes that are not UTF-8.

    Raises:
        ValueError: It holds something else in place of a file (a link, a device), a file that is too large, or a second
            archive behind its end.
        tarfile.TarError: It is damaged or cut off, no tar archive, or unpacks to far more than it is.
    """
    archive = _Archive(stream)
    passed_over = 0
    for member in _members(archive, url):
        passed_over = 0 if is_data(member.name) else passed_over + 1
        if passed_over:
            _refuse_more(passed_over, "members that are no data")
            archive.skip(member.size)
            continue
        _check_member(member, url)
        content = archive.content(member.size)
        if member.isfile():
            yield member.name, content


class _Archive:
    """The bytes of an archive, unpacked."""

    def __init__(self, stream: BinaryIO):
        self._begin = _read_all(stream, len(GZIP))
        self._stream = stream
        if self._begin == GZIP:
            self._begin, self._stream = b"", _Unpacked(stream, GZIP)
        self.offset = 0

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer where it ends."""
        begin, self._begin = self._begin[:size], self._begin[size:]
        found = begin + _read_all(self._stream, size - len(begin))
        self.offset += len(found)
        return found

    def content(self, size: int) -> bytes:
        """The content of a member, and what fills up its last block, which is passed over.

        Raises:
            tarfile.ReadError: It ends before that.
        """
        found = self.read(size)
        self._refuse_end(len(found) < size or len(self.read(-size % tarfile.BLOCKSIZE)) < -size % tarfile.BLOCKSIZE)
        return found

    def skip(self, size: int) -> None:
        """As :meth:`content`, without keeping it."""
        left = size + -size % tarfile.BLOCKSIZE
        while left:
            found = len(self.read(min(left, CHUNK)))
            self._refuse_end(not found)
            left -= found

    def _refuse_end(self, is_end: bool) -> None:
        if is_end:
            raise tarfile.ReadError(f"it ends within a file, at byte {self.offset}")


def _read_all(stream: BinaryIO, size: int) -> bytes:
    """So many bytes, or fewer at the end of the stream: sockets and pipes give what they have."""
    parts, left = [], size
    while left and (part := stream.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Unpacked:
    """The contents of a gzip stream of one or several members, whose checksums are looked at."""

    def __init__(self, stream: BinaryIO, begin: bytes):
        self._stream = stream
        self._packed = begin
        self._member = self._next_member()
        self._num_packed = len(begin)
        self._num_unpacked = 0

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end.

        Raises:
            tarfile.ReadError: It is damaged or cut off, or unpacks to far more than it is.
        """
        while True:
            if not self._packed:
                self._packed = self._stream.read(CHUNK)
                self._num_packed += len(self._packed)
            is_end = not self._packed
            if self._member.eof:
                if is_end:
                    return b""
                self._member = self._next_member()
            try:
                found = self._member.decompress(self._packed, size)
            except zlib.error as error:
                raise tarfile.ReadError(f"what is compressed is damaged: {error}") from error
            self._packed = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if found:
                return self._counted(found)
            if is_end and not self._member.eof:
                raise tarfile.ReadError("it ends within what is compressed")

    @staticmethod
    def _next_member() -> "zlib._Decompress":
        return zlib.decompressobj(zlib.MAX_WBITS | 16)  # with gzip's head and checksum

    def _counted(self, found: bytes) -> bytes:
        self._num_unpacked += len(found)
        if self._num_unpacked > UNPACKED_ANYWAY + MAX_UNPACKING * self._num_packed:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_UNPACKING} times its size, as no images do")
        return found


def _members(archive: _Archive, url: str) -> Iterator[tarfile.TarInfo]:
    """The members of an archive; whoever takes one reads its content before the next.

    Raises:
        ValueError: Something else than zeros lies behind its end.
        tarfile.ReadError: A header is damaged, the end is missing, or there are far more zeros than end an archive.
    """
    extended: dict[str, str] = {}
    is_empty, in_a_row = True, 0
    while True:
        place = archive.offset
        block = archive.read(tarfile.BLOCKSIZE)
        if block == _ZEROS:
            break
        header = _header(block, place)
        if header.type in _EXTENDED_TYPES:
            in_a_row += 1
            _refuse_more(in_a_row, "headers before a header")
            extended |= _extension(header, archive)
        else:
            is_empty, in_a_row = False, 0
            yield _extended(header, extended)
            extended = {}
    if extended:
        raise tarfile.ReadError(f"it ends behind the first half of a header, at byte {place}")
    _check_end(archive, is_empty, url)


def _refuse_more(in_a_row: int, what: str) -> None:
    if in_a_row > MAX_IN_A_ROW:
        raise tarfile.ReadError(f"more than {MAX_IN_A_ROW} {what}, one after the other")


def _header(block: bytes, place: int) -> tarfile.TarInfo:
    if len(block) < tarfile.BLOCKSIZE:
        is_cut = "it ends without the blocks that end an archive, as if it had been cut"
        raise tarfile.ReadError(is_cut if place or block else "it is empty")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        damage = f"{error} at byte {place}" if place else "it is no tar archive, plain or gzipped, or damaged at once"
        raise tarfile.ReadError(damage) from error
    if header.size < 0:
        raise tarfile.ReadError(f"a size below zero at byte {place}")
    return header


def _extension(header: tarfile.TarInfo, archive: _Archive) -> dict[str, str]:
    """What a header says of the member behind it: of PAX's records those that matter here, and GNU's long name."""
    if header.size > MAX_EXTENDED_BYTES:
        raise tarfile.ReadError(f"a header of {header.size} bytes at byte {archive.offset}")
    content = archive.content(header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(content.partition(b"\0")[0])}
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    records = _pax_records(content)
    if header.type == tarfile.XGLTYPE:
        if records:
            raise tarfile.ReadError(f"a header that gives all files one {' and '.join(records)}")
        return {}
    return records


def _pax_records(content: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of names, sizes and holes; the length is in bytes, and counts all of it."""
    records, begin = {}, 0
    while begin < len(content) and content[begin]:
        length, _, _ = content[begin : begin + len(str(MAX_EXTENDED_BYTES))].partition(b" ")
        end = begin + int(length) if length.isdigit() else begin
        key, is_record, value = content[begin + len(length) + 1 : end].partition(b"=")
        if end > len(content) or not is_record or not value.endswith(b"\n"):
            raise tarfile.ReadError("a damaged PAX header")
        name = _text(key)
        if name in ("path", "size") or name.startswith(_SPARSE):
            records[name] = _text(value[:-1])
        begin = end
    return records


def _text(content: bytes) -> str:
    return content.decode("utf-8", "backslashreplace")


def _extended(header: tarfile.TarInfo, extended: dict[str, str]) -> tarfile.TarInfo:
    """A member with what headers before its own said of it."""
    size = extended.get("size", str(header.size))
    if not re.fullmatch("[0-9]{1,19}", size):
        raise tarfile.ReadError(f"a size of {size[:20]!r} in a PAX header")
    header.size = 0 if header.type in _WITHOUT_CONTENT else int(size)
    name = extended.get(_SPARSE + "name", extended.get("path", header.name))
    if len(name) > MAX_NAME:
        raise tarfile.ReadError(f"a name of {len(name)} characters, {name[:20]!r}...")
    header.name = _printable(name)
    # tarfile's mark of a sparse file; GNU's older ones have a type of their own.
    header.sparse = [] if any(key.startswith(_SPARSE) for key in extended) else None
    return header


def _printable(name: str) -> str:
    """A name that stays in its line, wherever it is said."""
    if name.isprintable():
        return name
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)


def _check_end(archive: _Archive, is_empty: bool, url: str) -> None:
    zeros = tarfile.BLOCKSIZE
    while block := archive.read(tarfile.RECORDSIZE):
        if block.strip(b"\0"):
            raise ValueError(
                f"the shard {url} goes on behind its end, as files do that were joined with `cat`: join them with "
                "`tar --concatenate`, or keep them apart"
            )
        zeros += len(block)
        if is_empty and zeros > tarfile.RECORDSIZE:
            raise tarfile.ReadError("it holds nothing but zeros")
        if zeros > MAX_END_ZEROS:
            raise tarfile.ReadError(
                f"more than the {MAX_END_ZEROS} zeros that end an archive, as if a part had not been fetched"
            )


def _check_member(member: tarfile.TarInfo, url: str) -> None:
    if member.issym() or member.islnk():
        raise ValueError(
            f"the shard {url} holds the link {member.name!r} in place of a file: write it anew with `tar "
            "--dereference --hard-dereference`"
        )
    is_sparse = member.type == tarfile.GNUTYPE_SPARSE or member.issparse()
    if is_sparse or not (member.isfile() or member.isdir()):
        kind = "sparse file" if is_sparse else "device or pipe"
        raise ValueError(f"the shard {url} holds the {kind} {member.name!r}: write it anew with plain files alone")
    if member.size > MAX_FILE_BYTES:
        raise ValueError(
            f"the shard {url} holds {member.name!r} of {member.size} bytes, more than the {MAX_FILE_BYTES} of any "
            "image, label or mask: it is damaged, or no shard of samples"
        )
