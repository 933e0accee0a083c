"""What a mask's file may hold, and what is said of the others."""

import io
import json
import random
import struct
import warnings
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, TiffImagePlugin

from adala.data.images import DecodeError, decode_image
from adala.data.index import image_field
from adala.data.masks import (
    MASK_FIELDS,
    MaskFormat,
    MissingMaskError,
    check_fit,
    check_mask,
    decode_mask,
    mask_field,
    read_mask,
)

VALUES = np.arange(12, dtype=np.uint8).reshape(3, 4)
INDEX = MaskFormat()
COLOURS = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
RGB = MaskFormat(encoding="rgb", colors=COLOURS)


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, form, **options)
    return stream.getvalue()


def with_palette(values: np.ndarray) -> Image.Image:
    """An image of these indices, whose colours say something else."""
    image = Image.new("P", values.shape[::-1])
    image.putdata(values.ravel().tolist())
    image.putpalette([channel for number in range(256) for channel in (255 - number, number // 2, 7)])
    return image


def packed_grey(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, made by hand: Pillow writes none of 2 and 4."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = []
    for row in values:
        ones = "".join(f"{value:0{bits}b}" for value in row)
        ones += "0" * (-len(ones) % 8)
        rows.append(b"\0" + bytes(int(ones[start : start + 8], 2) for start in range(0, len(ones), 8)))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


WIDE = VALUES.astype(np.uint16) * 300


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param(encoded(VALUES), VALUES, id="grey"),
        pytest.param(encoded(WIDE), WIDE, id="16 bits"),
        pytest.param(encoded(VALUES % 2 > 0), VALUES % 2, id="1 bit"),
        pytest.param(packed_grey(VALUES % 4, 2), VALUES % 4, id="2 bits"),
        pytest.param(packed_grey(VALUES, 4), VALUES, id="4 bits"),
        pytest.param(encoded(with_palette(VALUES)), VALUES, id="palette"),
        pytest.param(encoded(with_palette(VALUES), bits=4), VALUES, id="palette of 4 bits"),
        pytest.param(encoded(with_palette(VALUES), transparency=3), VALUES, id="palette with a transparent colour"),
        pytest.param(encoded(VALUES, "TIFF"), VALUES, id="TIFF"),
        pytest.param(encoded(WIDE, "TIFF", compression="tiff_lzw"), WIDE, id="TIFF of 16 bits"),
        pytest.param(encoded(WIDE.astype(np.int32), "TIFF"), WIDE, id="TIFF of 32 bits"),
        pytest.param(encoded(with_palette(VALUES), "TIFF"), VALUES, id="TIFF with a palette"),
        pytest.param(encoded(VALUES % 2 > 0, "TIFF"), VALUES % 2, id="TIFF of 1 bit"),
    ],
)
def test_one_channel_gives_its_numbers(content: bytes, expected: np.ndarray) -> None:
    mask = decode_mask(content, INDEX)
    assert mask.dtype == np.int32 and mask.flags.writeable
    np.testing.assert_array_equal(mask, expected)


def rgba(alpha: int) -> Image.Image:
    return Image.fromarray(np.full((2, 2, 4), (128, 0, 0, alpha), dtype=np.uint8))


GREY_RGB = np.repeat(VALUES[..., None], 3, axis=-1)
COLOURED = np.array(COLOURS, dtype=np.uint8)[VALUES % 3]


@pytest.mark.parametrize(
    "content, sentence",
    [
        pytest.param(encoded(COLOURED), r"coded in colours \(RGB\): mask.encoding: rgb reads it", id="RGB"),
        pytest.param(encoded(rgba(255)), r"coded in colours \(RGBA\): mask.encoding: rgb", id="RGBA"),
        pytest.param(encoded(GREY_RGB), r"in colours \(RGB, all of them grey\): mask.encoding: rgb", id="grey as RGB"),
        pytest.param(encoded(Image.new("LA", (2, 2))), "alpha channel: write it with one", id="grey with alpha"),
        pytest.param(encoded(VALUES, "JPEG"), "it is JPEG: masks are read from PNG and lossless TIFF", id="JPEG"),
        pytest.param(encoded(GREY_RGB, "WEBP"), "it is WEBP: masks are read from PNG", id="WebP"),
        pytest.param(
            encoded(VALUES, "TIFF", compression="jpeg"), "it is TIFF, compressed with losses", id="lossy TIFF"
        ),
        pytest.param(
            encoded(VALUES, "TIFF", tiffinfo={262: 0}), "a TIFF whose 0 is white: write it as PNG", id="inverted TIFF"
        ),
        pytest.param(encoded(VALUES.astype(np.float32), "TIFF"), "its values are floats", id="floats"),
        pytest.param(encoded(WIDE.astype(np.int32) * 90, "TIFF"), "go from 0 to 297000: they must have 16", id="large"),
        pytest.param(encoded(-WIDE.astype(np.int32), "TIFF"), "go from -3300 to 0: they must", id="negative"),
        pytest.param(b"", "these bytes are empty", id="empty"),
        pytest.param(b"plain text", "these bytes are no image", id="no image"),
        pytest.param(encoded(VALUES)[:-30], "truncated", id="cut short"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS", id="Git LFS"),
    ],
)
def test_what_holds_no_numbers_is_a_bad_sample(content: bytes, sentence: str) -> None:
    with pytest.raises(DecodeError, match=sentence):
        decode_mask(content, INDEX)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(Image.fromarray(COLOURED), id="RGB"),
        pytest.param(Image.fromarray(COLOURED).convert("RGBA"), id="opaque RGBA"),
        pytest.param(Image.fromarray(COLOURED).quantize(3), id="palette"),
    ],
)
def test_colours_are_classes_by_their_place(image: Image.Image) -> None:
    mask = decode_mask(encoded(image), RGB)
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, VALUES % 3)
    # The order in the list counts, and not that of the colours.
    turned = MaskFormat(encoding="rgb", colors=COLOURS[::-1])
    np.testing.assert_array_equal(decode_mask(encoded(image), turned), 2 - VALUES % 3)


def test_a_colour_that_is_not_listed_stops_or_is_passed_over() -> None:
    pixels = COLOURED.copy()
    pixels[0, 0], pixels[1, 1] = (224, 224, 192), (1, 2, 3)
    with pytest.raises(ValueError, match=r"holds the colours \[1, 2, 3\], \[224, 224, 192\].*unknown_colors") as caught:
        decode_mask(encoded(pixels), RGB)
    assert not isinstance(caught.value, DecodeError)
    for ignore_index in (255, -1):
        form = MaskFormat("rgb", COLOURS, unknown_colors="ignore", ignore_index=ignore_index)
        expected = VALUES.astype(np.int32) % 3
        expected[0, 0] = expected[1, 1] = ignore_index
        np.testing.assert_array_equal(decode_mask(encoded(pixels), form), expected)


@pytest.mark.parametrize(
    "image, sentence",
    [
        (Image.fromarray(VALUES), "not coded in colours .it is L.: mask.encoding: index reads it"),
        (rgba(128), "transparent"),
    ],
)
def test_what_has_no_colours_is_a_bad_sample(image: Image.Image, sentence: str) -> None:
    with pytest.raises(DecodeError, match=sentence):
        decode_mask(encoded(image), RGB)


def test_ade20ks_numbers() -> None:
    values = np.array([[0, 1, 2, 150, 255]], dtype=np.uint8)
    mask = decode_mask(encoded(values), MaskFormat(label_map="ade20k"))
    assert mask.tolist() == [[255, 0, 1, 149, 255]]
    with pytest.raises(ValueError, match="holds 151, 200, which the label map ade20k does not list"):
        decode_mask(encoded(np.array([[1, 151, 200]], dtype=np.uint8)), MaskFormat(label_map="ade20k"))


def test_cityscapes_numbers() -> None:
    mask = decode_mask(encoded(np.arange(34, dtype=np.uint8)[None]), MaskFormat(label_map="cityscapes"))
    # Of the data set's own table: the ids that are scored by the class they become.
    trained = {
        7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
        28: 15, 31: 16, 32: 17, 33: 18,
    }  # fmt: skip
    assert {number: value for number, value in enumerate(mask[0].tolist()) if value != 255} == trained
    license_plate = np.array([[255, 7]], dtype=np.uint8)
    form = MaskFormat(label_map="cityscapes", ignore_index=-1)
    assert decode_mask(encoded(license_plate), form).tolist() == [[-1, 0]]
    with pytest.raises(ValueError, match="holds 34, which the label map cityscapes does not list"):
        decode_mask(encoded(np.array([[34]], dtype=np.uint8)), form)


def test_a_mapping_lists_every_number_but_the_ignored() -> None:
    form = MaskFormat(label_map={0: 255, 10: 0, 3300: 1})
    values = np.array([[0, 10, 3300, 255]], dtype=np.uint16)
    assert decode_mask(encoded(values), form).tolist() == [[255, 0, 1, 255]]
    with pytest.raises(ValueError, match="holds 1, 11, 256, 3301, which the label map does not list") as caught:
        decode_mask(encoded(values + np.uint16(1)), form)
    assert not isinstance(caught.value, DecodeError)
    # A student's folder keeps it as JSON, whose keys are texts.
    assert MaskFormat(label_map=json.loads(json.dumps(form.label_map))) == form


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"encoding": "palette"}, "mask.encoding must be index or rgb, not 'palette'"),
        ({"encoding": "rgb"}, "mask.colors lists the colours.*must not be empty"),
        ({"colors": COLOURS}, "mask.colors lists the colours of mask.encoding: rgb"),
        ({"encoding": "rgb", "colors": [[0, 0]]}, "a list of .red, green, blue. from 0 to 255"),
        ({"encoding": "rgb", "colors": [[0, 0, 256]]}, "a list of .red, green, blue. from 0 to 255"),
        ({"encoding": "rgb", "colors": [0, 1, 2]}, "a list of .red, green, blue. from 0 to 255"),
        ({"encoding": "rgb", "colors": [*COLOURS, [128, 0, 0]]}, r"\[128, 0, 0\] twice"),
        ({"encoding": "rgb", "colors": COLOURS, "label_map": "ade20k"}, "the place in mask.colors is the class"),
        ({"encoding": "rgb", "colors": COLOURS, "unknown_colors": "skip"}, "must be error or ignore, not 'skip'"),
        ({"label_map": "voc"}, "must be none, ade20k, cityscapes or a mapping of numbers, not 'voc'"),
        ({"label_map": {}}, "a mapping of numbers, not {}"),
        ({"label_map": {"road": 0}}, "must map whole numbers of up to 16 bits"),
        ({"label_map": {0: 1.5}}, "must map whole numbers of up to 16 bits"),
        ({"label_map": {70000: 0}}, "must map whole numbers of up to 16 bits"),
        ({"ignore_index": 2.0}, "mask.ignore_index must be a whole number"),
        ({"label_map": "cityscapes", "ignore_index": 18}, "18 is a class of the label map cityscapes"),
        ({"label_map": "ade20k", "ignore_index": 0}, "0 is a class of the label map ade20k"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MaskFormat(**options)


def test_the_sample_says_which_file_is_its_mask() -> None:
    assert mask_field({"jpg": b"", "cls": b"", "mask.png": b"", "seg.png": b""}) == "seg.png"
    assert mask_field({"jpg": b"", "seg.tiff": b"", "label.png": b""}) == "label.png"
    assert mask_field({"jpg": b"", "png": b"", "seg.png": b""}, ".PNG") == "png"
    for field in (None, "gt.png"):
        with pytest.raises(MissingMaskError, match=r"it has no mask: none of its files cls, jpg is .*mask_field"):
            mask_field({"jpg": b"", "cls": b""}, field)
    assert MASK_FIELDS[:4] == ("seg.png", "mask.png", "segmentation.png", "label.png")


@pytest.mark.parametrize("field", MASK_FIELDS)
def test_a_mask_is_no_image(field: str) -> None:
    assert image_field({field: b""}) is None
    assert image_field({field: b"", "webp": b""}) == "webp"


def test_the_page_names_every_file_and_option() -> None:
    page = (Path(__file__).parents[3] / "docs/DATA.md").read_text(encoding="utf-8")
    assert all(f"`.{field}`" in page for field in MASK_FIELDS if field.endswith(".png"))
    assert "`.tif` and `.tiff`" in page
    section = page.split("## Masks")[1].split("\n## ")[0]
    assert all(f"| `{option.name}` |" in section for option in fields(MaskFormat))


def test_a_plain_file_that_is_named_as_the_mask_is_not_the_image() -> None:
    files = {"webp": encoded(GREY_RGB, "WEBP"), "png": encoded(VALUES)}
    assert image_field(files, besides="png") == "webp"
    np.testing.assert_array_equal(read_mask(files, INDEX, "png"), VALUES)
    with pytest.raises(DecodeError, match="image has 4 x 3 pixels and its mask 2 x 2"):
        read_mask({**files, "png": encoded(np.zeros((2, 2), np.uint8))}, INDEX, "png")


def test_what_is_wrong_with_a_mask_is_said_with_its_name() -> None:
    image = encoded(GREY_RGB)
    with pytest.raises(DecodeError, match=r"its seg\.png cannot be read as a mask: it is coded in colours"):
        read_mask({"jpg": image, "seg.png": encoded(COLOURED)}, INDEX)
    with pytest.raises(ValueError, match=r"its seg\.png does not fit the recipe: it holds 0, 1, 2") as caught:
        read_mask({"jpg": image, "seg.png": encoded(VALUES)}, MaskFormat(label_map={99: 0}))
    assert not isinstance(caught.value, DecodeError)


def test_a_mask_of_another_size_is_a_bad_sample() -> None:
    with pytest.raises(DecodeError, match="image has 8 x 6 pixels and its mask 4 x 3 pixels"):
        read_mask({"jpg": encoded(Image.new("RGB", (8, 6)), "JPEG"), "seg.png": encoded(VALUES)}, INDEX)
    with pytest.raises(DecodeError, match="image has 3 x 4 pixels and its mask 4 x 3 pixels"):
        check_fit(encoded(Image.new("RGB", (3, 4))), encoded(VALUES))


def turned(orientation: int) -> dict[str, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_is_turned_as_its_image_is(orientation: int) -> None:
    """Both say how they are turned; the picture's colours are the classes, so that they can be compared."""
    files = {
        "png": encoded(GREY_RGB, **turned(orientation)),
        "seg.png": encoded(VALUES, **turned(orientation)),
    }
    np.testing.assert_array_equal(read_mask(files, INDEX), np.asarray(decode_image(files["png"]))[..., 0])


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_that_may_have_been_drawn_before_turning_is_refused(orientation: int) -> None:
    files = {"jpg": encoded(GREY_RGB, "JPEG", **turned(orientation)), "seg.png": encoded(VALUES)}
    with pytest.raises(DecodeError, match=f"EXIF orientation {orientation}, .*turn both upright"):
        read_mask(files, INDEX)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_that_was_drawn_over_the_upright_image_fits(orientation: int) -> None:
    upright = np.ascontiguousarray(VALUES.T)
    files = {"jpg": encoded(GREY_RGB, "JPEG", **turned(orientation)), "seg.png": encoded(upright)}
    np.testing.assert_array_equal(read_mask(files, INDEX), upright)
    with pytest.raises(DecodeError, match="image has 3 x 4 pixels and its mask 4 x 4 pixels"):
        check_fit(files["jpg"], encoded(np.zeros((4, 4), np.uint8)))


def test_a_turned_tiff_fits_its_mask() -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[0x0112] = 6
    files = {"tif": encoded(GREY_RGB, "TIFF", tiffinfo=info), "seg.png": encoded(np.ascontiguousarray(VALUES.T))}
    assert decode_image(files["tif"]).size == (3, 4)
    assert read_mask(files, INDEX).shape == (4, 3)


def test_classes_outside_are_named() -> None:
    mask = np.array([[0, 1, 2, 255]], dtype=np.int32)
    check_mask(mask, 3, 255)
    check_mask(np.full((2, 2), 255, dtype=np.int32), 3, 255)
    with pytest.raises(ValueError, match=r"holds 2, no class from 0 to 1 and not mask.ignore_index \(255\)") as caught:
        check_mask(mask, 2, 255)
    assert not isinstance(caught.value, DecodeError)
    with pytest.raises(ValueError, match=r"holds 255, no class .*\(-1\).*num_classes.*label_map"):
        check_mask(mask, 3, -1)
    with pytest.raises(ValueError, match="holds -1, no class"):
        check_mask(mask - 1, 255, 254)
    with pytest.raises(ValueError, match="holds 10, 11, 12, 13, 14, 15, 16, 17 and 82 more"):
        check_mask(np.arange(100, dtype=np.int32)[None], 10, 255)


def test_damaged_masks_bring_no_other_error() -> None:
    """As of images, see test_images: whatever is broken about a file is a bad sample."""
    draw = Image.new("P", (40, 30))
    ImageDraw.Draw(draw).ellipse((5, 5, 30, 25), fill=3)
    generator = random.Random(0)
    outcomes = set()
    for form in ("PNG", "TIFF"):
        whole = encoded(draw, form)
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(generator.randint(1, 4)):
                content[generator.randrange(len(content))] = generator.randrange(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    outcomes.add(decode_mask(bytes(content), INDEX).dtype)
                except DecodeError:
                    outcomes.add(DecodeError)
    assert outcomes == {np.dtype(np.int32), DecodeError}


def test_a_mask_has_fewer_pixels_than_an_image_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class takes more memory than a colour."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(DecodeError, match="8192 x 4097 pixels, more than 33554432 in all"):
        decode_mask(encoded(np.zeros((4097, 8192), np.uint8), compress_level=1), INDEX)
