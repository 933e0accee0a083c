"""Damaged and hostile shards and indexes, made from a seed, each with what may become of it.

A mutant is one of two shards, or the index of both, changed in one way. The other shard stays whole. What may become of
it is a :class:`Fate`: whoever made the change knows whether it can be seen, and whom it concerns.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image

BLOCK = tarfile.BLOCKSIZE
WHOLE, MUTATED = "a.tar", "b.tar"
SHARD_SIZES = {WHOLE: 5, MUTATED: 8}
Member = tuple[tarfile.TarInfo, bytes]


@dataclass(frozen=True)
class Fate:
    """What may become of a mutant in one way of reading it.

    Attributes:
        refused: Whether one sentence may, or must, refuse it.
        read: Keys of the mutated shard's samples if it is read; None where it must not be.
        as_tar: Whether it may also be read as what GNU tar lists of it without a complaint: a change of whole members
            makes another archive, which nothing in it tells from the first.
    """

    refused: bool
    read: frozenset[str] | None
    as_tar: bool = False


REFUSED = Fate(True, None)
KEYS = frozenset(f"b{number}" for number in range(SHARD_SIZES[MUTATED]))
UNCHANGED = Fate(False, KEYS)
EITHER = Fate(True, KEYS)


@dataclass(frozen=True)
class Mutant:
    """A changed shard or index.

    Attributes:
        what: Its change, in words.
        shard: Bytes of the shard.
        anew: What may become of it with an index that is built of it.
        before: And with the index that lay beside it before, in which only its size is set right.
        name: The shard's file.
        index: Bytes of an index that takes the place of the one from before.
        bad: Keys of samples that must be counted as bad.
        touched: Keys of samples that may be bad, or have another image or label.
    """

    what: str
    shard: bytes
    anew: Fate
    before: Fate
    name: str = MUTATED
    index: bytes | None = None
    bad: frozenset[str] = frozenset()
    touched: frozenset[str] = frozenset()


# ---- what is mutated


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


@cache
def photograph() -> Image.Image:
    return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB").resize((96, 112))


@cache
def images() -> tuple[tuple[str, bytes], ...]:
    """Extensions and contents, of several formats and sizes; two of them a photograph."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    small = picture.resize((28, 24))
    return (
        ("jpg", encoded(small, "JPEG", quality=90)),
        ("png", encoded(small.convert("L"), "PNG")),
        ("webp", encoded(small, "WEBP")),
        ("jpg", encoded(photograph(), "JPEG", progressive=True)),
        ("png", encoded(small.quantize(16), "PNG", transparency=3)),
        ("jpeg", encoded(picture.convert("CMYK"), "JPEG")),
        ("png", encoded(photograph().resize((40, 30)), "PNG")),
        ("webp", encoded(picture, "WEBP", lossless=True)),
    )


def member(name: str, content: bytes = b"", **changes: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def members(prefix: str, count: int) -> list[Member]:
    """Of each sample its label and its image."""
    made = []
    for number in range(count):
        extension, content = images()[number % len(images())]
        made += [member(f"{prefix}{number}.cls", str(number % 7).encode())]
        made += [member(f"{prefix}{number}.{extension}", content)]
    return made


def archive(made: list[Member], format: int = tarfile.PAX_FORMAT, encoding: str = "utf-8") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, encoding=encoding, errors="surrogateescape") as tar:
        for info, content in made:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@cache
def whole_shard() -> bytes:
    return archive(members("a", SHARD_SIZES[WHOLE]))


@cache
def good_shard() -> bytes:
    return archive(members("b", SHARD_SIZES[MUTATED]))


def good_index(shard: bytes, name: str = MUTATED, samples: int = SHARD_SIZES[MUTATED]) -> bytes:
    """The index of before, with the size of the shard as it is now: a size alone would find nearly every damage."""
    entries = [
        {"name": WHOLE, "samples": SHARD_SIZES[WHOLE], "bytes": len(whole_shard())},
        {"name": name, "samples": samples, "bytes": len(shard)},
    ]
    return json.dumps({"shards": entries}, indent=1).encode()


@cache
def layout() -> tuple[tuple[str, int, int, int], ...]:
    """Of each member of the good shard its key, and where its header, its content and the next header begin."""
    with tarfile.open(fileobj=io.BytesIO(good_shard())) as tar:
        return tuple(
            (
                info.name.partition(".")[0],
                info.offset,
                info.offset_data,
                info.offset_data + -(-info.size // BLOCK) * BLOCK,
            )
            for info in tar
        )


# ---- damage: bits, blocks and ends


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def flip_in_a_header(draw: random.Random) -> Mutant:
    _, begin, end, _ = draw.choice(layout())
    place, bit = draw.randrange(begin, end), draw.randrange(8)
    # A checksum has two bytes behind its digits that nobody reads.
    return Mutant(f"bit {bit} of byte {place}, in a header", flipped(good_shard(), place, bit), EITHER, EITHER)


def flip_in_contents(draw: random.Random) -> Mutant:
    shard, touched = good_shard(), set()
    for _ in range(draw.choice((1, 1, 3, 20))):
        key, _, begin, end = draw.choice(layout()[2:7])
        shard = flipped(shard, draw.randrange(begin, end), draw.randrange(8))
        touched.add(key)
    return Mutant("bits of contents", shard, UNCHANGED, UNCHANGED, touched=frozenset(touched))


def flip_anywhere(draw: random.Random) -> Mutant:
    shard = good_shard()
    for _ in range(draw.choice((1, 2, 5))):
        shard = flipped(shard, draw.randrange(len(shard)), draw.randrange(8))
    return Mutant("bits anywhere", shard, EITHER, EITHER, touched=KEYS)


def blocks_of(draw: random.Random) -> tuple[int, int]:
    """A range of whole blocks, among them often such as begin and end where members do."""
    borders = [begin for _, begin, _, _ in layout()] + [layout()[-1][3]]
    if draw.random() < 0.5:
        begin, end = sorted(draw.sample(borders, 2))
        return begin, end
    first = draw.randrange(len(good_shard()) // BLOCK)
    return first * BLOCK, (first + draw.choice((1, 1, 2, 5, 20))) * BLOCK


def damage_blocks(draw: random.Random) -> Mutant:
    shard, (begin, end) = good_shard(), blocks_of(draw)
    piece = shard[begin:end]
    other = draw.randrange(len(shard) // BLOCK) * BLOCK
    what, changed = draw.choice(
        (
            ("removed", shard[:begin] + shard[end:]),
            ("doubled", shard[:end] + piece + shard[end:]),
            ("put elsewhere, too", shard[:other] + piece + shard[other:]),
            ("written over others", shard[:other] + piece + shard[other + len(piece) :]),
            ("zeros", shard[:begin] + bytes(len(piece)) + shard[end:]),
            ("noise", shard[:begin] + draw.randbytes(len(piece)) + shard[end:]),
            ("in reverse", shard[:begin] + piece[::-1] + shard[end:]),
        )
    )
    return Mutant(f"blocks {begin}..{end} {what}", changed, replace(EITHER, as_tar=True), EITHER, touched=KEYS)


def cut_off(draw: random.Random) -> Mutant:
    border = draw.choice(layout())[draw.choice((1, 2, 3))]
    length = draw.choice((draw.randrange(len(good_shard())), border, border + draw.randrange(-3, 4)))
    return Mutant(f"the first {length} bytes", good_shard()[:length], EITHER, EITHER)


def cut_and_filled(draw: random.Random) -> Mutant:
    """As a download that was broken off leaves a file whose size was set beforehand."""
    length = draw.choice((draw.randrange(len(good_shard())), draw.choice(layout())[1]))
    shard = good_shard()[:length].ljust(len(good_shard()), b"\0")
    # Where little was lost, a valid archive of fewer members is left.
    touched = frozenset(key for key, _, begin, end in layout() if begin <= length < end)
    return Mutant(f"zeros from byte {length} on", shard, replace(EITHER, as_tar=True), EITHER, touched=touched)


def behind_the_end(draw: random.Random) -> Mutant:
    what, more, fate = draw.choice(
        (
            ("noise", draw.randbytes(700), REFUSED),
            ("itself", good_shard(), REFUSED),
            ("another archive", whole_shard(), REFUSED),
            ("some zeros", bytes(draw.randrange(1, 1000)), EITHER),
            ("a megabyte of zeros", bytes(2**20), REFUSED),
            ("a byte", b"x", REFUSED),
        )
    )
    return Mutant(f"{what} behind the end", good_shard() + more, fate, fate)


def something_else(draw: random.Random) -> Mutant:
    what, shard = draw.choice(
        (
            ("nothing", b""),
            ("zeros", bytes(draw.choice((1, 511, 10241, 10**6)))),
            ("noise", draw.randbytes(draw.choice((1, 511, 512, 5000)))),
            ("text", b"<html>404 not found</html>\n" * draw.choice((1, 100))),
            ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
            ("a photograph", images()[3][1]),
            ("a zip", b"PK\3\4" + draw.randbytes(1000)),
            ("xz", lzma.compress(good_shard())),
            ("bzip2", bz2.compress(good_shard())),
            ("a header without anything", good_shard()[:BLOCK]),
        )
    )
    return Mutant(f"{what} in place of the shard", shard, REFUSED, REFUSED)


def an_empty_archive(draw: random.Random) -> Mutant:
    return Mutant("an archive of nothing", archive([]), Fate(False, frozenset()), REFUSED)


# ---- members: what they are, how large, and what they are called


def with_members(what: str, made: list[Member], anew: Fate, before: Fate | None = None, **fields: object) -> Mutant:
    options = {key: fields.pop(key) for key in ("format", "encoding") if key in fields}
    return Mutant(what, archive(made, **options), anew, before or anew, **fields)


def not_a_file(draw: random.Random) -> Mutant:
    made = members("b", SHARD_SIZES[MUTATED])
    place = draw.randrange(len(made))
    changes = draw.choice(
        (
            {"type": tarfile.SYMTYPE, "linkname": draw.choice(("/etc/passwd", "b0.cls", "../../x"))},
            {"type": tarfile.LNKTYPE, "linkname": "b0.cls"},
            {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
            {"type": tarfile.BLKTYPE, "devmajor": 8},
            {"type": tarfile.FIFOTYPE},
            {"type": tarfile.GNUTYPE_SPARSE},
        )
    )
    made[place] = member(made[place][0].name, **changes)
    return with_members(f"member {place} is {changes}", made, REFUSED)


def header(info: tarfile.TarInfo, size: int | None = None, size_field: bytes | None = None) -> bytes:
    """A header with any size at all, and a checksum that is right."""
    if size is not None:
        info.size = size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-BLOCK:])
    if size_field is not None:
        block[124:136] = size_field.ljust(12, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def between_members(draw: random.Random, piece: bytes) -> bytes:
    place = draw.choice(layout())[1]
    return good_shard()[:place] + piece + good_shard()[place:]


def an_absurd_size(draw: random.Random) -> Mutant:
    what, size_field = draw.choice(
        (
            ("2**33 - 1", b"77777777777"),
            ("2**60", b"\x80" + (2**60).to_bytes(11, "big")),
            ("2**87", b"\x80" + (2**87).to_bytes(11, "big")),
            ("-1", b"\xff" * 12),
            ("-2**60", b"\xff" + (2**88 - 2**60).to_bytes(11, "big")),
            ("-1 in octal", b"-0000000001"),
            ("a text", b"many"),
            ("a gigabyte", b"10000000000"),
        )
    )
    name, type_ = draw.choice((("x.png", tarfile.REGTYPE), ("x.png", b"7"), ("x", b"Z"), (".x", tarfile.REGTYPE)))
    types = (type_, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
    info, _ = member(name, type=draw.choice(types))
    shard = between_members(draw, header(info, size_field=size_field))
    return Mutant(f"a member of type {info.type!r} and size {what}", shard, REFUSED, REFUSED)


def pax(records: bytes, type_: bytes = tarfile.XHDTYPE) -> bytes:
    return header(member("PaxHeader", type=type_)[0], len(records)) + records.ljust(
        -(-len(records) // BLOCK) * BLOCK, b"\0"
    )


def record(key: str, value: bytes) -> bytes:
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def a_bad_pax_header(draw: random.Random) -> Mutant:
    what, records = draw.choice(
        (
            ("a size of 10**30", record("size", b"1" + b"0" * 30)),
            ("a size of 2**62", record("size", str(2**62).encode())),
            ("a size of -1", record("size", b"-1")),
            ("a size in words", record("size", b"1e3")),
            ("a size of other digits", record("size", "٣".encode())),
            ("a sparse file", record("GNU.sparse.major", b"1") + record("GNU.sparse.realsize", b"1099511627776")),
            ("an old sparse file", record("GNU.sparse.size", b"99999999999") + record("GNU.sparse.map", b"0,9")),
            ("a length of 0", b"0 path=x.png\n"),
            ("a length of 10**9", b"1000000000 path=x.png\n"),
            ("a length of -1", b"-1 path=x.png\n"),
            ("a length that falls short", b"9 path=x.png\n"),
            ("no length", b"path=x.png\n"),
            ("no end", b"99999 path=x"),
            ("no equals sign", b"9 path x\n"),
            ("a name of 100,000 characters", record("path", b"x" * 100_000 + b".png")),
            ("two megabytes", record("comment", b"x" * 2**21)),
            ("digits for a slow pattern", b"9" * 300_000),
        )
    )
    return Mutant(f"a PAX header with {what}", between_members(draw, pax(records)), REFUSED, REFUSED)


def a_good_pax_header(draw: random.Random) -> Mutant:
    what, piece = draw.choice(
        (
            ("times", pax(record("mtime", b"1.5") + record("atime", b"0"))),
            ("attributes that are not UTF-8", pax(record("SCHILY.xattr.user.x", b"\xff\0\xfe"))),
            ("another character set", pax(record("hdrcharset", b"BINARY"))),
            ("a comment for all", pax(record("comment", b"x" * 40), tarfile.XGLTYPE)),
            ("30,000 records", pax(b"".join(record(f"k{n}", b"v") for n in range(30_000)))),
            ("nothing", pax(b"")),
        )
    )
    return Mutant(f"a PAX header of {what}", between_members(draw, piece), UNCHANGED, UNCHANGED)


def headers_in_a_row(draw: random.Random) -> Mutant:
    count = draw.choice((2, 1000, 5000))
    what, piece = draw.choice(
        (
            ("PAX headers", pax(record("comment", b"x"))),
            ("global headers", pax(record("comment", b"x"), tarfile.XGLTYPE)),
            ("long names", header(member("l", type=tarfile.GNUTYPE_LONGNAME)[0], 600) + b"y" * 600 + bytes(424)),
            ("long links", header(member("l", type=tarfile.GNUTYPE_LONGLINK)[0], 600) + b"y" * 600 + bytes(424)),
        )
    )
    if what == "long names":  # the member behind them has that name, which is none of data
        key = layout()[2][0]
        shard = good_shard()[: layout()[2][1]] + piece * count + good_shard()[layout()[2][1] :]
        return Mutant(f"{count} {what}", shard, UNCHANGED, UNCHANGED, bad=frozenset({key}))
    return Mutant(f"{count} {what}", between_members(draw, piece * count), UNCHANGED, UNCHANGED)


def a_header_for_all(draw: random.Random) -> Mutant:
    records = draw.choice((record("path", b"x.png"), record("size", b"0"), record("GNU.sparse.major", b"1")))
    shard = pax(records, tarfile.XGLTYPE) + good_shard()
    return Mutant(f"a global header {records[:30]!r}", shard, REFUSED, REFUSED)


def other_names(draw: random.Random) -> Mutant:
    made = members("b", SHARD_SIZES[MUTATED])
    what, name, seen = draw.choice(
        (
            ("leads up", "../../../../etc/b0", None),
            ("is absolute", "/etc/b0", None),
            ("is a URL", "http://x/b0", None),
            ("is not UTF-8", "b\udcff0", r"b\xff0"),
            ("has lines", "b\n0\x1b[2J", r"b\n0\x1b[2J"),
            ("goes deep", "d/" * 1500 + "b0", None),
            ("is long", "n" * 3000, None),
            ("has spaces", " b 0 ", None),
            ("is in another script", "ビ零", None),
            ("turns the line around", "b\u202e0", r"b\u202e0"),
        )
    )
    for place in (0, 1):
        extension = made[place][0].name.partition(".")[2]
        made[place] = member(f"{name}.{extension}", made[place][1])
    fate = Fate(False, KEYS - {"b0"} | {seen or name})
    format_ = tarfile.GNU_FORMAT
    return with_members(f"a name that {what}", made, fate, format=format_, touched=frozenset({seen or name}))


def names_too_long(draw: random.Random) -> Mutant:
    made = members("b", SHARD_SIZES[MUTATED])
    length = draw.choice((5000, 100_000, 2 * 2**20))
    made[3] = member("n" * length + ".png", made[3][1])
    format_ = draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    return with_members(f"a name of {length} characters", made, REFUSED, format=format_)


def no_data(draw: random.Random) -> Mutant:
    """What lies about in archives and is no part of a sample."""
    what, extra = draw.choice(
        (
            ("a folder", member("b", type=tarfile.DIRTYPE)),
            ("a folder of a file's name", member("b0.png", type=tarfile.DIRTYPE)),
            ("a README", member("README", b"x" * 5000)),
            ("a hidden file", member("._b0.png", b"x")),
            ("a file without a name", member("", b"x")),
            ("a link", member("elsewhere", type=tarfile.SYMTYPE, linkname="/")),
            ("macOS' folder", member("__MACOSX/b0.png", b"x")),
            ("an unknown type", member("y", b"x" * 600, type=b"Z")),
        )
    )
    made = members("b", SHARD_SIZES[MUTATED])
    made.insert(2 * draw.randrange(SHARD_SIZES[MUTATED]), extra)
    return with_members(f"{what} among the members", made, UNCHANGED)


def other_members(draw: random.Random) -> Mutant:
    """Members gone, come, doubled or moved: archives as good as the first, but for the index of before."""
    made = members("b", SHARD_SIZES[MUTATED])
    number = draw.randrange(SHARD_SIZES[MUTATED])
    key, place = f"b{number}", 2 * number
    label, image = made[place : place + 2]
    gone, rest = KEYS - {key}, made[:place] + made[place + 2 :]
    return draw.choice(
        (
            lambda: with_members("a sample gone", rest, Fate(False, gone), REFUSED),
            lambda: with_members("a label gone", [*rest, image], UNCHANGED, bad=frozenset({key})),
            lambda: with_members("an image gone", [*rest, label], UNCHANGED, bad=frozenset({key})),
            lambda: with_members("a sample at the end", [*rest, label, image], UNCHANGED),
            lambda: with_members("an image before its label", [*rest, image, label], UNCHANGED),
            lambda: with_members(
                "a sample more",
                [*made, member("b8.cls", b"1"), member("b8.png", image[1])],
                Fate(False, KEYS | {"b8"}),
                REFUSED,
            ),
            lambda: with_members("a sample twice", [*made, label, image], REFUSED),
            lambda: with_members("a file twice", [*made[: place + 2], image, *made[place + 2 :]], REFUSED),
            lambda: with_members("files apart", [image, *rest, label], REFUSED),
            lambda: with_members("all labels first", made[::2] + made[1::2], REFUSED),
            lambda: with_members("GNU's format", made, UNCHANGED, format=tarfile.GNU_FORMAT),
            lambda: with_members("POSIX' old format", made, UNCHANGED, format=tarfile.USTAR_FORMAT),
            lambda: with_members(
                "2,000 files of one sample",
                made + [member(f"b8.f{n:04d}", b"") for n in range(2000)],
                REFUSED,
            ),
        )
    )()


# ---- gzip


def packed(what: str, content: bytes, anew: Fate, before: Fate | None = None, **fields: object) -> Mutant:
    return Mutant(what, content, anew, before or anew, **fields)


def gzipped(draw: random.Random) -> Mutant:
    shard, name = good_shard(), draw.choice(("b.tar.gz", "b.tgz", "b.tar"))
    parts = sorted(draw.randrange(len(shard)) for _ in range(draw.choice((0, 1, 7))))
    pieces = [shard[i:j] for i, j in zip([0, *parts], [*parts, len(shard)], strict=True)]
    members_ = [gzip.compress(piece, draw.choice((0, 1, 9)), mtime=0) for piece in pieces]
    content = b"".join(members_)
    empty = gzip.compress(b"")
    place = draw.randrange(len(content))
    cut = draw.choice((place, len(content) - draw.randrange(1, 12)))
    return draw.choice(
        (
            lambda: packed(f"gzip of {len(pieces)} members", content, UNCHANGED, name=name),
            lambda: packed("gzip with empty members", empty * 3 + content + empty * 1000, UNCHANGED, name=name),
            lambda: packed(f"the first {cut} bytes of gzip", content[:cut], EITHER, name=name),
            lambda: packed("a bit of gzip", flipped(content, place, draw.randrange(8)), EITHER, name=name),
            lambda: packed("gzip's checksum", flipped(members_[0], len(members_[0]) - 6, 0), REFUSED, name=name),
            lambda: packed(
                "gzip without its first member", b"".join(members_[1:]), replace(EITHER, as_tar=True), EITHER, name=name
            ),
            lambda: packed("noise behind gzip", content + draw.randbytes(90), REFUSED, name=name),
            lambda: packed("gzip within gzip", gzip.compress(content), REFUSED, name=name),
        )
    )()


@cache
def bomb(kind: str) -> bytes:
    """Some 10 MB of gzip that unpack to 10 GiB: the same 100 MiB a hundred times, each a member of its own."""
    end = good_shard()[: layout()[-1][3]]
    begin, again = {
        "zeros behind the end": (end, bytes(2**20)),
        "folders": (end, archive([member("d", type=tarfile.DIRTYPE)])[:BLOCK] * 2048),
        "one sample for ever": (end, archive([member("x.cls", b"1")])[: 2 * BLOCK] * 1024),
        "a great image": (end + header(member("x.png")[0], 2**28), bytes(2**20)),
        "a great file of no sample": (end + header(member("x")[0], 2**36), bytes(2**20)),
        "a great name": (end + header(member("x", type=b"L")[0], 2**31), b"n" * 2**20),
    }[kind]
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    hundred = b"".join([*(packer.compress(again) for _ in range(100)), packer.flush()])
    return gzip.compress(begin) + hundred * 100


BOMBS = (
    "zeros behind the end", "folders", "one sample for ever", "a great image", "a great file of no sample",
    "a great name",
)  # fmt: skip


def a_gzip_bomb(draw: random.Random) -> Mutant:
    kind = draw.choice(BOMBS)
    return packed(f"a gzip bomb: {kind}", bomb(kind), REFUSED, name=draw.choice(("b.tar.gz", "b.tar")))


# ---- images and labels


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *more: bytes, content: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG that claims another size."""
    content = bytearray(images()[0][1])
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


@cache
def other_images() -> tuple[tuple[str, bytes, bool | None], ...]:
    """What it is, its content, and whether it is an image; None where a decoder may say either."""
    small = Image.fromarray(np.asarray(photograph().resize((30, 26))))
    grey16 = Image.fromarray((np.asarray(small.convert("L")).astype(np.uint16)) * 257)
    floats = Image.fromarray(np.asarray(small.convert("L")).astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    scan = images()[3][1]
    sos = scan.rindex(b"\xff\xda")
    text = b"x\0\0" + zlib.compress(bytes(50 * 2**20), 9)
    return (
        ("grey of 16 bits", encoded(grey16, "PNG"), True),
        ("a TIFF of 16 bits", encoded(grey16, "TIFF"), True),
        ("floats", encoded(floats, "TIFF"), True),
        ("floats far above white", encoded(Image.fromarray(np.full((9, 9), 1e9, np.float32)), "TIFF"), False),
        ("CMYK", encoded(small.convert("CMYK"), "JPEG"), True),
        ("a palette", encoded(small.quantize(8), "PNG", transparency=bytes(range(8))), True),
        ("grey and alpha", encoded(small.convert("LA"), "PNG"), True),
        ("a GIF", encoded(small, "GIF"), True),
        ("an animation", encoded(small, "GIF", save_all=True, append_images=[small.rotate(90)] * 3), True),
        ("an animated PNG", encoded(small, "PNG", save_all=True, append_images=[small.rotate(90)]), True),
        ("an animated WebP", encoded(small, "WEBP", save_all=True, append_images=[small.rotate(90)]), True),
        ("a turned JPEG", encoded(small, "JPEG", exif=exif), True),
        ("JPEG 2000", encoded(small, "JPEG2000"), True),
        ("a bitmap", encoded(small, "BMP"), True),
        ("PostScript", encoded(small, "EPS"), False),
        ("PDF", encoded(small, "PDF"), False),
        ("an icon", encoded(small, "ICO"), False),
        ("Targa", encoded(small, "TGA"), False),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>', False),
        ("a pickle", b"\x80\x04\x95\x00.", False),
        ("nothing", b"", False),
        ("no pixels", png_of(0, 30), False),
        ("a PNG of 60,000 x 60,000", png_of(60_000, 60_000), False),
        ("a PNG of 2**31 - 1 squared", png_of(2**31 - 1, 2**31 - 1), False),
        ("a PNG of 8,193 x 8,193", png_of(8193, 8193), False),
        ("a PNG of 1 x 60,000,000", png_of(60_000_000, 1), False),
        ("a PNG of 1 x 60,000 that is whole", png_of(60_000, 1, content=bytes(180_001)), False),
        ("a PNG cut off", images()[6][1][:-200], False),
        ("a PNG of which text unpacks to 50 MB", png_of(8, 8, chunk(b"zTXt", text), content=bytes(200)), None),
        ("a PNG of which the profile unpacks to 50 MB", png_of(8, 8, chunk(b"iCCP", text), content=bytes(200)), None),
        ("a chunk of 2 GB", png_of(8, 8, struct.pack(">I", 2**31 - 1) + b"tEXtabc"), False),
        ("a JPEG of 65,535 x 65,535", jpeg_of(65_535, 65_535), False),
        ("a JPEG cut off", images()[3][1][:700], False),
        ("a JPEG of 5,000 scans", scan[:sos] + scan[sos:-2] * 5000 + scan[-2:], False),
        ("a TIFF that claims 50,000 x 50,000", encoded(grey16, "TIFF").replace(
            struct.pack("<HHLL", 256, 4, 1, 30), struct.pack("<HHLL", 256, 4, 1, 50_000)).replace(
            struct.pack("<HHLL", 257, 4, 1, 26), struct.pack("<HHLL", 257, 4, 1, 50_000)), False),
        ("a GIF of 65,535 x 65,535", b"GIF89a\xff\xff\xff\xff" + encoded(small, "GIF")[10:], None),
    )  # fmt: skip


def with_sample(draw: random.Random, what: str, extension: str, content: bytes, is_good: bool | None) -> Mutant:
    """A sample's image or label replaced."""
    made, number = members("b", SHARD_SIZES[MUTATED]), draw.randrange(SHARD_SIZES[MUTATED])
    key, place = f"b{number}", 2 * number
    label, image = made[place : place + 2]
    if extension in ("cls", "json", "txt"):
        made[place : place + 2] = [member(f"{key}.{extension}", content), image]
    else:
        made[place : place + 2] = [label, member(f"{key}.{extension}", content)]
    bad = frozenset({key}) if is_good is False else frozenset()
    return with_members(f"{what} in {key}", made, UNCHANGED, bad=bad, touched=frozenset({key}))


def another_image(draw: random.Random) -> Mutant:
    what, content, is_good = draw.choice(other_images())
    return with_sample(draw, what, draw.choice(("jpg", "png", "tif")), content, is_good)


def a_damaged_image(draw: random.Random) -> Mutant:
    _, content = draw.choice(images())
    content = draw.choice(
        (
            lambda: content[: draw.randrange(len(content))],
            lambda: flipped(content, draw.randrange(min(len(content), 200)), draw.randrange(8)),
            lambda: content[: len(content) // 2] + draw.randbytes(50) + content[len(content) // 2 + 50 :],
        )
    )()
    return with_sample(draw, "a damaged image", "jpg", content, None)


LABELS = (
    ("cls", b"-100", False), ("cls", b"-1", False), ("cls", b"+1", False), ("cls", b"1e0", False),
    ("cls", b"1_0", False), ("cls", b"9223372036854775808", False), ("cls", b"1" * 5000, False),
    ("cls", "٣".encode(), False), ("cls", b"3\0", False), ("cls", b"", False), ("cls", b"  ", False),
    ("cls", b"nan", False), ("cls", b"1.5", False), ("cls", b"cat", False), ("cls", b"\xff\xfe3\0", False),
    ("cls", b"x" * 2**21, False), ("cls", b"\x80\x04K\x03.", False), ("cls", b" 3 \r\n", True),
    ("cls", b"3.0", True), ("cls", b"\xef\xbb\xbf3", True), ("json", b"3", True), ("json", b'{"label": 3}', True),
    ("json", b"[" * 100_000, False), ("json", b'{"label":' * 100_000, False), ("json", b"NaN", False),
    ("json", b"-Infinity", False), ("json", b"1e400", False), ("json", b"1" * 5000, False), ("json", b"true", False),
    ("json", b'{"label": -100}', False), ("json", b'{"label": [3]}', False), ("json", b"", False),
    ("json", b'{"label": ' + b"[" * 900 + b"]" * 900 + b"}", False),
    ("txt", b"a caption", False), ("txt", b"3", True), ("txt", b"\xff", False),
)  # fmt: skip


def another_label(draw: random.Random) -> Mutant:
    extension, content, is_good = draw.choice(LABELS)
    return with_sample(draw, f"the label {content[:20]!r} (.{extension})", extension, content, is_good)


# ---- indexes


def index_of(what: str, index: bytes, before: Fate) -> Mutant:
    return Mutant(what, good_shard(), UNCHANGED, before, index=index)


def another_index(draw: random.Random) -> Mutant:
    value = json.loads(good_index(good_shard()))
    entry = value["shards"][draw.randrange(2)]
    key = draw.choice(("samples", "bytes"))
    names = (
        "../b.tar",
        "/etc/passwd",
        "",
        ".",
        "..",
        "x/b.tar",
        "http://127.0.0.1:1/b.tar",
        "b\0.tar",
        "b\n.tar",
        3,
        None,
    )
    numbers = (-1, 10**30, 2**63, 2**31, 1.0, 8.5, float("nan"), float("inf"), -float("inf"), "8", True, None, [], {})
    return draw.choice(
        (
            lambda: changed_entry(value, entry, key, draw.choice(numbers)),
            lambda: changed_entry(value, entry, "samples", entry["samples"] + draw.choice((-3, -1, 1, 1000))),
            lambda: changed_entry(value, entry, "samples", 0),
            lambda: changed_entry(value, entry, "bytes", entry["bytes"] + draw.choice((-512, 512))),
            lambda: changed_entry(value, entry, "name", draw.choice(names)),
            lambda: changed_entry(value, entry, "name", "c.tar"),
            lambda: index_of("an entry gone", json.dumps({"shards": value["shards"][:1]}).encode(), REFUSED),
            lambda: index_of("an entry twice", json.dumps({"shards": value["shards"] * 2}).encode(), REFUSED),
            lambda: index_of("no entries", b'{"shards": []}', REFUSED),
        )
    )()


def changed_entry(value: dict, entry: dict, key: str, to: object) -> Mutant:
    what = f"{key} of {entry['name']} is {to!r}"
    entry[key] = to
    return index_of(what, json.dumps(value).encode(), REFUSED)


def another_text(draw: random.Random) -> Mutant:
    good = good_index(good_shard())
    what, index, fate = draw.choice(
        (
            ("nothing", b"", REFUSED),
            ("lists within lists", b"[" * 100_000 + b"]" * 100_000, REFUSED),
            ("objects within objects", b'{"shards":' * 50_000 + b"1" + b"}" * 50_000, REFUSED),
            ("20 MB of spaces", good + b" " * (20 * 2**20), REFUSED),
            ("16 MB of lists", b"[" + b"[]," * (5 * 2**20) + b"[]]", REFUSED),
            ("UTF-16", good.decode().encode("utf-16"), REFUSED),
            ("a byte order mark", b"\xef\xbb\xbf" + good, UNCHANGED),
            ("bytes that are no text", good.replace(b"shards", b"sh\xffrds"), REFUSED),
            ("a list", json.dumps(json.loads(good)["shards"]).encode(), REFUSED),
            ("two values", good + good, REFUSED),
            ("a key more", good.replace(b'{\n "shards"', b'{"more": [1], "shards"', 1), UNCHANGED),
            ("wids with text counts", json.dumps({"shardlist": [
                {"url": "a.tar", "nsamples": "5"}, {"url": "b.tar", "nsamples": "8"}]}).encode(), REFUSED),
            ("wids with infinite counts", b'{"shardlist": [{"url": "a.tar", "nsamples": Infinity}]}', REFUSED),
            ("wids without a shard", b'{"shardlist": [{"url": "a.tar", "nsamples": 5}]}', REFUSED),
            ("wids", b'{"shardlist": [{"url": "a.tar", "nsamples": 5}, {"url": "x/b.tar", "nsamples": 8}]}', UNCHANGED),
        )
    )  # fmt: skip
    return index_of(f"an index of {what}", index, fate)


def damaged_text(draw: random.Random) -> Mutant:
    good = good_index(good_shard())
    if draw.random() < 0.3:
        length = draw.randrange(len(good) - 2)
        return index_of(f"the first {length} bytes of an index", good[:length], REFUSED)
    place, bit = draw.randrange(len(good)), draw.randrange(8)
    return index_of(f"bit {bit} of byte {place} of an index", flipped(good, place, bit), EITHER)


# How often each is drawn.
KINDS: dict[Callable[[random.Random], Mutant], int] = {
    flip_in_a_header: 8, flip_in_contents: 8, flip_anywhere: 5, damage_blocks: 14, cut_off: 8, cut_and_filled: 6,
    behind_the_end: 3, something_else: 4, an_empty_archive: 1, not_a_file: 4, an_absurd_size: 6, a_bad_pax_header: 5,
    a_good_pax_header: 2, headers_in_a_row: 3, a_header_for_all: 1, other_names: 4, names_too_long: 2, no_data: 3,
    other_members: 7, gzipped: 8, a_gzip_bomb: 2, another_image: 10, a_damaged_image: 5, another_label: 8,
    another_index: 8, another_text: 4, damaged_text: 6,
}  # fmt: skip


def make(seed: int, number: int) -> Mutant:
    """Mutant ``number`` of a seed, always the same."""
    draw = random.Random(f"{seed}/{number}")
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    made = kind(draw)
    return replace(made, what=f"{kind.__name__}: {made.what}")


def write(mutant: Mutant, folder: Path, with_index: bool) -> None:
    """Both shards, and the index of before or none."""
    (folder / WHOLE).write_bytes(whole_shard())
    (folder / mutant.name).write_bytes(mutant.shard)
    if with_index:
        index = good_index(mutant.shard, mutant.name) if mutant.index is None else mutant.index
        (folder / "index.json").write_bytes(index)


def listed_by_tar(path: Path) -> frozenset[str] | None:
    """Keys of the samples that GNU tar finds, where it has nothing to complain of."""
    command = f"LC_ALL=C tar -tf '{path}' 2>&1 && echo fine"
    names = os.popen(command).read().splitlines()
    if not names or names.pop() != "fine" or any(name.startswith("tar: ") for name in names):
        return None
    return frozenset(name.partition(".")[0] for name in names)
