"""Images as people bring them, against what people see of them."""

import io
import warnings

import numpy as np
import pytest
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
