"""Images as people bring them, against what people see of them."""

import io
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from memory_bounds import growth_below
from PIL import Image

from adala.data.images import DecodeError, decode_image

ORIENTATION = 0x0112


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image = decode_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda seen: seen),
        (2, lambda seen: seen[:, ::-1]),
        (3, lambda seen: seen[::-1, ::-1]),
        (4, lambda seen: seen[::-1]),
        (5, lambda seen: seen.transpose(1, 0, 2)),
        (6, lambda seen: np.rot90(seen, 1)),
        (7, lambda seen: seen[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda seen: np.rot90(seen, -1)),
    ],
)
def test_an_image_is_seen_upright(orientation, turned):
    """What a camera that was held so stores (``turned``) is given back as it was ``seen``."""
    seen = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned(seen)))
    assert np.array_equal(pixels(encoded(stored, "PNG", exif=exif)), seen)


@pytest.mark.parametrize(("damage", "turned"), [(b"", True), (b"MM", False)], ids=["other_tags", "all"])
def test_damaged_exif_loses_the_orientation_at_most(damage: bytes, turned: bool) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x0103] = 1
    content = exif.tobytes()
    if damage:
        content = content.replace(damage, b"??", 1)
    else:
        # The other tag, a short number, is now said to be a string of 4 GB.
        content = content.replace(b"\x01\x03\x00\x03\x00\x00\x00\x01", b"\x01\x03\x00\x02\xff\xff\xff\xff")
    assert content != exif.tobytes()
    image = decode_image(encoded(Image.new("RGB", (6, 4)), "PNG", exif=content))
    assert image.size == ((4, 6) if turned else (6, 4))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(("white", "half"), [(65535, 32768), (4095, 2048)], ids=["16_bits", "12_in_16"])
def test_deep_grey_is_scaled_and_not_cut_off(format, white, half):
    values = np.array([[0, half, white]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(values), format))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_grey_is_scaled(white):
    values = np.array([[0, 0.5 * white, white]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[0, np.nan], [-1, 0], [0, 300]])
def test_float_grey_whose_white_is_unknown_is_refused(values):
    with pytest.raises(DecodeError, match="grey values"):
        decode_image(encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))


def test_transparent_pixels_show_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    coloured = np.full((1, 2, 4), (9, 8, 7, 0), dtype=np.uint8)
    coloured[0, 1] = (0, 0, 0, 51)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(encoded(image, "PNG", transparency=0))[0].tolist() == [[255] * 3, [200, 100, 50]]
        assert pixels(encoded(image, "PNG", transparency=bytes([255, 0])))[0].tolist() == [[10, 20, 30], [255] * 3]
        assert pixels(encoded(Image.fromarray(coloured), "PNG"))[0].tolist() == [[255] * 3, [204] * 3]
        assert pixels(encoded(Image.new("RGB", (1, 1), (5, 6, 7)), "PNG", transparency=(5, 6, 7))).tolist() == [
            [[255] * 3]
        ]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    grey = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("RGB").convert(mode)
    format = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    assert np.abs(pixels(encoded(grey, format))[0].astype(int) - [[0] * 3, [255] * 3]).max() <= 1


@pytest.mark.parametrize("format", ["BMP", "TIFF", "GIF", "PPM", "WEBP", "PNG"])
def test_formats_without_loss(format):
    seen = np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(encoded(Image.fromarray(seen), format, **options)), seen)


def test_the_first_picture_of_an_animation_counts():
    first, second = Image.new("RGB", (2, 2), (255, 0, 0)), Image.new("RGB", (2, 2), (0, 0, 255))
    content = encoded(first, "GIF", save_all=True, append_images=[second])
    assert pixels(content)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "would start another program"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"", "empty"),
        (b"<html>", "no image"),
    ],
    ids=["eps", "lfs", "empty", "html"],
)
def test_what_is_no_image_says_what_it_is(content, message, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(DecodeError, match=message):
        decode_image(content)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *more: bytes, bits: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """A PNG made by hand, with what Pillow does not write."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body


def tiff_of(values: list[int], order: str, photometric: int) -> bytes:
    """A grey TIFF of 16 bits."""
    data = struct.pack(f"{order}{len(values)}H", *values)
    tags = {256: len(values), 257: 1, 258: 16, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


GREY_16 = struct.pack(">x3H", 0, 32768, 65535)


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (png_of(3, 1, bits=16, colour=0, rows=GREY_16), [0, 128, 255]),
        (png_of(3, 1, chunk(b"tRNS", b"\x80\0"), bits=16, colour=0, rows=GREY_16), [0, 255, 255]),
        (tiff_of([0, 32768, 65535], "<", 1), [0, 128, 255]),
        (tiff_of([0, 32768, 65535], ">", 1), [0, 128, 255]),
        (b"P5 3 1 65535\n" + GREY_16[1:], [0, 128, 255]),
        (b"P5 3 1 1000\n" + struct.pack(">3H", 0, 500, 1000), [0, 128, 255]),
    ],
    ids=["png", "png_transparent", "tiff_little", "tiff_big", "pgm", "pgm_1000"],
)
def test_16_bits_of_many_writers(content: bytes, seen: list[int]) -> None:
    assert pixels(content)[0, :, 0].tolist() == seen


def test_colours_and_alpha_of_16_bits() -> None:
    colours = png_of(2, 1, bits=16, rows=struct.pack(">x6H", 0, 32768, 65535, 65535, 0, 32768))
    assert pixels(colours)[0].tolist() == [[0, 128, 255], [255, 0, 128]]
    with_alpha = png_of(2, 1, bits=16, colour=4, rows=struct.pack(">x4H", 0, 65535, 32768, 0))
    assert pixels(with_alpha)[0].tolist() == [[0] * 3, [255] * 3]


def test_16_bits_whose_0_is_white_are_refused() -> None:
    """Pillow leaves them a negative."""
    with pytest.raises(DecodeError, match="whose 0 is white: write it as PNG"):
        decode_image(tiff_of([0, 32768, 65535], "<", 0))
    eight_bits = encoded(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)), "TIFF", tiffinfo={262: 0})
    assert pixels(eight_bits)[0, :, 0].tolist() == [0, 255]


def test_a_printers_jpeg_is_no_negative() -> None:
    """CMYK, and YCCK, in which Adobe's programs store it: both inverted."""
    colour, size = (200, 30, 60), (16, 16)
    plain = encoded(Image.new("RGB", size, colour).convert("CMYK"), "JPEG", quality=100)
    inks = Image.new("RGB", size, tuple(255 - value for value in colour)).convert("YCbCr")
    inverted = [Image.fromarray(255 - np.asarray(band)) for band in inks.split()]
    ycck = bytearray(encoded(Image.merge("CMYK", [*inverted, Image.new("L", size, 0)]), "JPEG", quality=100))
    ycck[ycck.index(b"Adobe") + 11] = 2  # which says what the first three channels are
    for content in (plain, bytes(ycck)):
        assert np.abs(pixels(content).astype(int) - colour).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_the_first_counts(format: str) -> None:
    first, *others = (Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(first, format, save_all=True, append_images=others, **options)
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 3
    assert pixels(content)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI"])
def test_other_formats_are_not_read(format: str) -> None:
    with pytest.raises(DecodeError, match=r"these bytes are (no image|PostScript)"):
        decode_image(encoded(Image.new("RGB", (16, 16)), format))


def claiming(width: int, height: int) -> bytes:
    """A small JPEG that claims another size."""
    content = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


SCANS = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of(8193, 8192), "8193 x 8192 pixels, more than 67108864 in all"),
        (claiming(65_535, 65_535), "65535 x 65535 pixels|exceeds limit"),
        (claiming(1, 51), "1 x 51 pixels, one side more than 50 times the other"),
        (png_of(60_000_000, 1), "one side more than 50 times"),
        (png_of(0, 0), "0 x 0 pixels|no image"),
        (encoded(Image.new("L", (8192, 4097)), "JPEG2000"), "8192 x 4097 pixels, more than 33554432 in all"),
        (encoded(Image.new("RGB", (8192, 4097)), "WEBP"), "8192 x 4097 pixels, more than 33554432 in all"),
        (SCANS[:-2] + SCANS[SCANS.rindex(b"\xff\xda") : -2] * 300 + SCANS[-2:], "a JPEG of more than 250 scans"),
    ],
    ids=["png", "jpeg", "thin", "line", "nothing", "jpeg2000", "webp", "scans"],
)
def test_what_takes_too_much_memory_or_time_is_refused_before_it_is_decoded(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DecodeError, match=message):
            decode_image(content)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_what_is_packed_beside_the_pixels_does_not_fill_memory(kind: bytes) -> None:
    """300 MB of zeros."""
    packer = zlib.compressobj(9)
    packed = b"".join([*(packer.compress(bytes(2**20)) for _ in range(300)), packer.flush()])
    content = png_of(8, 8, chunk(kind, b"x\0\0" + packed), rows=bytes(200))
    with growth_below(100), suppress(DecodeError):
        decode_image(content)


def test_the_largest_images_are_read() -> None:
    content = encoded(Image.new("L", (8192, 8192), 7), "PNG", compress_level=1)
    assert decode_image(content).size == (8192, 8192)
    assert decode_image(claiming(16, 16)).size == (16, 16)
