"""Damaged and hostile archives: each is one error, when shards are counted and when they are read."""

import io
import tarfile
from pathlib import Path

import pytest

from adala.data.archives import MAX_END_ZEROS, MAX_FILE_BYTES
from adala.data.index import build_index, count_samples
from adala.data.tars import MAX_SAMPLE_FILES, read_samples

BLOCK = 512


def member(name: str, content: bytes = b"", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def samples(count: int = 5) -> bytes:
    """Of one file each, a block of header and one of content."""
    return archive(*(member(f"{number:03d}.cls", b"7") for number in range(count)))


def read(content: bytes) -> list[str]:
    return [key for key, _ in read_samples(io.BytesIO(content), "a.tar")]


def test_an_archive_is_read_to_its_end() -> None:
    assert len(read(samples())) == 5
    # One block of zeros at the end is enough, as some writers have it; so is a whole record of them.
    assert len(read(samples()[: 11 * BLOCK])) == len(read(samples()[: 10 * BLOCK] + bytes(MAX_END_ZEROS))) == 5
    assert read(archive()) == []


@pytest.mark.parametrize("length", [*range(1 * BLOCK, 11 * BLOCK, BLOCK), 100, 3 * BLOCK + 77, 10 * BLOCK + 300])
def test_one_that_is_cut_off_is_damaged_wherever_that_is(length: int, tmp_path: Path) -> None:
    """Between members too, where tarfile sees the end of an archive."""
    with pytest.raises((tarfile.TarError, EOFError)):
        read(samples()[:length])
    (tmp_path / "a.tar").write_bytes(samples()[:length])
    with pytest.raises(ValueError, match=r"a\.tar is damaged .*: fetch it or write it again"):
        build_index(tmp_path)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("place", [0, 150, 257])  # in the name, the checksum, the magic
def test_a_flipped_bit_in_a_header_is_seen(number: int, place: int) -> None:
    content = bytearray(samples())
    content[2 * BLOCK * number + place] ^= 0x10
    with pytest.raises(tarfile.TarError):
        read(bytes(content))


def test_zeros_alone_are_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(10**5))
    with pytest.raises(ValueError, match=r"a\.tar is damaged \(it holds nothing but zeros\)"):
        count_samples(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "holds the link"),
        ({"type": tarfile.LNKTYPE, "linkname": "000.cls"}, "holds the link"),
        ({"type": tarfile.CHRTYPE}, "holds the device or pipe"),
        ({"type": tarfile.BLKTYPE}, "holds the device or pipe"),
        ({"type": tarfile.FIFOTYPE}, "holds the device or pipe"),
    ],
)
def test_what_is_no_file_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"the shard a\.tar {message} '001\.png'"):
        read(archive(member("000.cls", b"7"), member("001.png", **changes)))


def test_a_sparse_file_is_refused_before_its_zeros_are_made() -> None:
    """A hundred bytes that say that they are a tebibyte."""
    size = str(2**40)
    headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "001.png",
        "GNU.sparse.realsize": size,
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info, content = member("001.png", b"0\n".ljust(BLOCK, b"\0"), pax_headers=headers)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"holds the sparse file '001\.png'"):
        read(stream.getvalue())


def test_a_size_beyond_all_images_is_refused_before_it_is_read() -> None:
    info, _ = member("001.png", size=MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match=r"'001\.png' of 268435457 bytes, more than the 268435456 of any image"):
        read(samples(1)[: 2 * BLOCK] + info.tobuf() + bytes(2 * BLOCK))


def test_one_that_is_cut_off_within_what_is_passed_over_is_damaged() -> None:
    content = archive(member("README", b"x" * 5000), member("0.cls", b"7"))
    for length in (BLOCK, 3 * BLOCK, 3 * BLOCK + 7):
        with pytest.raises(tarfile.ReadError, match=f"it ends within a file, at byte {length}"):
            read(content[:length])


def test_a_sample_has_no_end_of_files_or_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [member("0.png", b"x"), *(member(f"0.f{number}", b"x") for number in range(MAX_SAMPLE_FILES))]
    with pytest.raises(ValueError, match=r"the shard a\.tar holds 1025 files of 1025 bytes in the sample of '0\.png'"):
        read(archive(*many))
    assert read(archive(*many[:-1])) == ["0"]
    monkeypatch.setattr("adala.data.tars.MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"holds 3 files of 1500 bytes in the sample of '0\.png'"):
        read(archive(*(member(f"0.{kind}", bytes(500)) for kind in ("png", "cls", "txt"))))
