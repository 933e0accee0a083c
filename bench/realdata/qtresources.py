"""Reads the archives in which programs written with Qt keep their pictures (``.rcc``)."""

import struct
import zlib
from collections.abc import Iterator

MAGIC = b"qres"
IS_ZLIB, IS_FOLDER, IS_ZSTD = 1, 2, 4
FIRST_VERSION_WITH_TIMES = 2


def read_resources(archive: bytes, suffix: str) -> Iterator[tuple[str, bytes]]:
    """The files of an archive whose names end in ``suffix``: path, without a slash in front, and content.

    Raises:
        ValueError: It is no such archive, or such a file in it is compressed with Zstandard.
    """
    if archive[:4] != MAGIC:
        raise ValueError(f"this is no archive of Qt resources: it begins with {archive[:4]!r}")
    version, tree, contents, names = struct.unpack_from(">4I", archive, 4)
    node_bytes = 22 if version >= FIRST_VERSION_WITH_TIMES else 14

    def name_of(offset: int) -> str:
        # Its length, then a hash that lookups go by, then UTF-16.
        (length,) = struct.unpack_from(">H", archive, names + offset)
        begin = names + offset + 6
        return archive[begin : begin + 2 * length].decode("utf-16-be")

    def content_of(path: str, offset: int, flags: int) -> bytes:
        (length,) = struct.unpack_from(">I", archive, contents + offset)
        begin = contents + offset + 4
        content = archive[begin : begin + length]
        if flags & IS_ZSTD:
            raise ValueError(f"{path} is compressed with Zstandard, which is not read here")
        # Qt's qCompress puts the size in front.
        return zlib.decompress(content[4:]) if flags & IS_ZLIB else content

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name, flags, first, second = struct.unpack_from(">IHII", archive, tree + node * node_bytes)
        path = f"{folder}/{name_of(name)}".lstrip("/") if node else ""
        if flags & IS_FOLDER:
            for child in range(second, second + first):
                yield from walk(child, path)
        elif path.endswith(suffix):
            yield path, content_of(path, second, flags)

    return walk(0, "")
