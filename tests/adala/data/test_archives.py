"""Archives that are packed, or say what they should not: what is read of them, in how much memory, and what refused."""

import gzip
import io
import lzma
import random
import tarfile
import time
import zlib

import pytest
from memory_bounds import growth_below

from adala.data.archives import MAX_EXTENDED_BYTES, MAX_IN_A_ROW, MAX_NAME, read_files

BLOCK = 512


class Dribbling(io.BytesIO):
    """A stream that gives a few bytes at a time, as sockets do."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size, 100))


def member(name: str, content: bytes = b"", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def archive(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


FILES = [(f"{number}.cls", bytes([number]) * (number * 300)) for number in range(6)]
GOOD = archive(*(member(name, content) for name, content in FILES))
MEMBERS = GOOD[: GOOD.rindex(b"\5") // BLOCK * BLOCK + BLOCK]


def read(content: bytes) -> list[tuple[str, bytes]]:
    return list(read_files(io.BytesIO(content), "a.tar", lambda name: "." in name))


def test_streams_that_give_a_few_bytes_at_a_time_are_read_whole() -> None:
    for content in (GOOD, gzip.compress(GOOD)):
        assert list(read_files(Dribbling(content), "a.tar", lambda name: True)) == FILES


def test_gzip_of_several_members_is_one_archive() -> None:
    """As parallel packers and `cat` write it; tarfile sees the first of them alone."""
    packed = [gzip.compress(GOOD[begin : begin + 700]) for begin in range(0, len(GOOD), 700)]
    assert read(b"".join(packed)) == read(gzip.compress(b"") * 50 + b"".join(packed) + gzip.compress(b"")) == FILES


@pytest.mark.parametrize("length", [1, 9, 15, 60, -1, -4, -8, -9])
def test_gzip_that_is_cut_off_is_damaged(length: int) -> None:
    with pytest.raises(tarfile.TarError):
        read(gzip.compress(GOOD)[:length])


def test_gzips_checksum_and_what_lies_behind_it_are_looked_at() -> None:
    packed = bytearray(gzip.compress(GOOD))
    packed[-6] ^= 1
    with pytest.raises(tarfile.ReadError, match=r"what is compressed is damaged: .*incorrect data check"):
        read(bytes(packed))
    with pytest.raises(tarfile.ReadError, match="what is compressed is damaged"):
        read(gzip.compress(GOOD) + b"more")


def test_a_flipped_bit_that_gzip_stores_as_it_is_is_found() -> None:
    """In plain tar it would be another label."""
    packed = bytearray(gzip.compress(GOOD, compresslevel=0))
    packed[packed.index(b"\5" * 100)] ^= 1
    with pytest.raises(tarfile.ReadError):
        read(bytes(packed))


@pytest.mark.parametrize(
    "content", [lzma.compress(GOOD), b"\x89PNG" + bytes(600), b"x", b""], ids=["xz", "png", "x", ""]
)
def test_what_is_no_archive_says_so(content: bytes) -> None:
    with pytest.raises(tarfile.ReadError, match=r"no tar archive, plain or gzipped|cut|it is empty"):
        read(content)


def gzip_for_ever(begin: bytes, again: bytes) -> bytes:
    """5 MB that unpack to 5 GiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    fifty = b"".join([*(packer.compress(again) for _ in range(50)), packer.flush()])
    return gzip.compress(begin) + fifty * 100


def gnu_header(name: str, size: int, type: bytes = tarfile.REGTYPE) -> bytes:
    info, _ = member(name, size=size, type=type)
    return info.tobuf(tarfile.GNU_FORMAT)[-BLOCK:]


FOLDERS = archive(member("d", type=tarfile.DIRTYPE))[:BLOCK]


@pytest.mark.parametrize(
    ("begin", "again"),
    [
        (MEMBERS, bytes(2**20)),
        (MEMBERS, FOLDERS * 2048),
        (MEMBERS + gnu_header("x.png", 2**28), bytes(2**20)),
        (MEMBERS + gnu_header("x", 2**36), bytes(2**20)),
        (MEMBERS + gnu_header("x", 2**36, tarfile.GNUTYPE_LONGNAME), b"x" * 2**20),
        (MEMBERS + gnu_header("x", 2**36, tarfile.XHDTYPE), b"x" * 2**20),
    ],
    ids=["zeros", "headers", "image", "no_sample", "name", "pax"],
)
def test_a_gzip_bomb_is_refused_before_it_fills_memory_or_time(begin: bytes, again: bytes) -> None:
    bomb = gzip_for_ever(begin, again)
    start = time.monotonic()
    with growth_below(700), pytest.raises(tarfile.ReadError):
        read(bomb)
    assert time.monotonic() - start < 30


def test_tiny_images_and_their_labels_are_no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which most is headers, and what fills up blocks."""
    monkeypatch.setattr("adala.data.archives.UNPACKED_ANYWAY", 2**16)
    noise = random.Random(0)
    files = [
        (f"{n:06d}.{kind}", b"7" if kind == "cls" else noise.randbytes(70))
        for n in range(300)
        for kind in ("cls", "png")
    ]
    assert read(gzip.compress(archive(*(member(*file) for file in files)))) == files
    with pytest.raises(tarfile.ReadError, match="unpacks to more than 50 times its size, as no images do"):
        read(gzip.compress(MEMBERS * 1000 + bytes(1024)))


def pax(records: bytes, type: bytes = tarfile.XHDTYPE) -> bytes:
    return gnu_header("p", len(records), type) + records + bytes(-len(records) % BLOCK)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"30 size=1" + b"0" * 20 + b"\n", "a size of"),
        (b"11 size=-1\n", "a size of '-1' in a PAX header"),
        (b"0 path=x.png\n", "a damaged PAX header"),
        (b"999 path=x.png\n", "a damaged PAX header"),
        (b"path=x.png\n", "a damaged PAX header"),
        (b"10 path x.\n", "a damaged PAX header"),
        (b"9" * 500_000, "a damaged PAX header"),
        (b"x" * (MAX_EXTENDED_BYTES + 1), "a header of 1048577 bytes"),
        (b"5015 path=" + b"n" * 5000 + b".png\n", "a name of 5004 characters, 'n"),
    ],
)
def test_a_pax_header_that_cannot_be_is_damage(records: bytes, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(tarfile.ReadError, match=message):
        read(pax(records) + GOOD)
    assert time.monotonic() - begin < 2


def test_a_pax_header_for_all_files_may_say_nothing_of_their_names_and_sizes() -> None:
    assert read(pax(b"12 comment=x\n"[:13].replace(b"12", b"13"), tarfile.XGLTYPE) + GOOD) == FILES
    with pytest.raises(tarfile.ReadError, match="gives all files one path"):
        read(pax(b"14 path=x.png\n", tarfile.XGLTYPE) + GOOD)


def test_headers_one_after_the_other_are_no_depth() -> None:
    """tarfile goes one function deeper with each."""
    assert read(pax(b"13 comment=x\n") * 5000 + GOOD) == FILES
    with pytest.raises(tarfile.ReadError, match="ends behind the first half of a header"):
        read(MEMBERS + pax(b"14 path=x.png\n") + bytes(1024))
    with pytest.raises(tarfile.ReadError, match="more than 65536 headers before a header"):
        read(pax(b"") * (MAX_IN_A_ROW + 1) + GOOD)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_and_endless_ones_refused(format: int) -> None:
    name = "d/" * 1000 + "é.cls"
    assert read(archive(member(name, b"1"), format=format)) == [(name, b"1")]
    for length in (MAX_NAME, 100_000):
        with pytest.raises(tarfile.ReadError, match=f"a name of {length + 4} characters"):
            read(archive(member("n" * length + ".cls", b"1"), format=format))


def test_names_stay_in_their_line() -> None:
    names = ["a\nb.cls", "c\x1b[2Jd.cls", "e\u202ef.cls"]
    found = [name for name, _ in read(pax(b"16 path=g\0h.cls\n") + archive(*(member(name) for name in ["x", *names])))]
    assert found == [r"g\x00h.cls", r"a\nb.cls", r"c\x1b[2Jd.cls", r"e\u202ef.cls"]


@pytest.mark.parametrize("size", [b"\xff" * 12, b"-0000000001\0"], ids=["base_256", "octal"])
def test_a_size_below_zero_is_damage(size: bytes) -> None:
    block = bytearray(gnu_header("x.png", 0))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    with pytest.raises(tarfile.ReadError, match="a size below zero at byte 0"):
        read(bytes(block) + GOOD)


def test_zeros_from_somewhere_on_are_no_end() -> None:
    """A file whose size was set beforehand, and of which a part was never fetched."""
    large = archive(*(member(f"{number}.cls", b"x" * 5000) for number in range(10)))
    for length in (20 * BLOCK, 33 * BLOCK, 10_000):
        with pytest.raises(tarfile.ReadError):
            read(large[:length].ljust(len(large), b"\0"))


def test_an_archive_whose_middle_is_zeros_is_not_at_its_end() -> None:
    with pytest.raises(ValueError, match=r"the shard a\.tar goes on behind its end"):
        read(GOOD[:BLOCK] + bytes(BLOCK) + GOOD[2 * BLOCK :])
