"""From the bytes of an image file to the RGB image that people see."""

import functools
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from adala.files import is_git_lfs_pointer

# Extension in a shard, in lower case. Which one a file has says that it is an image; its bytes say of which format.
IMAGE_FIELDS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "jp2", "avif")
# Pillow's names. Left out are formats that start other programs (EPS: Ghostscript) and such as are no photographs. MPO
# is what many telephones write under the name .jpg.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
# No model sees a fraction of them, and an image in memory takes 4 bytes for each, two or three times over. Decoders of
# these formats hold a picture several times themselves, and get half as many.
MAX_PIXELS = 2**26
HEAVY_FORMATS = ("WEBP", "JPEG2000", "AVIF")
# Of the longer side over the shorter one. An image is resized until the shorter one fits the model, the other with it.
MAX_ASPECT = 50
# Of a progressive JPEG, which has some ten. Each of them goes over the whole picture.
MAX_SCANS = 250
_SCAN = b"\xff\xda"
# Depths in bits of grey images whose values come in 16 or 32 bits. Of the smallest that holds an image's brightest
# value, that value is white: cameras and scanners of 12 bits write their values as they are.
GREY_DEPTHS = (12, 16)
# One of TIFF's tags, and a value of it.
PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 262, 0
# By EXIF orientation, what turns an image upright.
TURNED_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logger = logging.getLogger(__name__)


class DecodeError(ValueError):
    """A sample whose image or target cannot be used."""


def decode_image(content: bytes) -> Image.Image:
    """The whole first image of a file's bytes, as RGB.

    It is turned upright as its EXIF orientation says. Grey of 16 bits is scaled to 8, from 12 bits where no value is
    larger; transparent pixels show white behind them.

    Raises:
        DecodeError: Damaged, cut short, no image, of a format that is not read, or too large.
    """
    with decoding(content):
        stored = open_image(content)
        _refuse_inverted(stored)
        return _to_rgb(upright(stored))


def _refuse_inverted(stored: Image.Image) -> None:
    """Refuses grey that Pillow does not turn into what is seen, as it does with that of 8 bits."""
    if (
        stored.format == "TIFF"
        and stored.mode not in ("1", "L")
        and stored.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    ):
        raise DecodeError(f"a TIFF of mode {stored.mode} whose 0 is white: write it as PNG")


def open_image(content: bytes) -> Image.Image:
    """The first image of a file's bytes as it is stored, its pixels not yet read.

    Raises:
        DecodeError: Reading them would take more memory or time than any image of use does.
    """
    # Without a format of its list Pillow tries all that it knows.
    image = Image.open(io.BytesIO(content), formats=_formats())
    shorter, longer = sorted(image.size)
    most = MAX_PIXELS // 2 if image.format in HEAVY_FORMATS else MAX_PIXELS
    if shorter * longer > most:
        raise DecodeError(f"{image.width} x {image.height} pixels, more than {most} in all: make it smaller")
    if not shorter or longer > MAX_ASPECT * shorter:
        raise DecodeError(f"{image.width} x {image.height} pixels, one side more than {MAX_ASPECT} times the other")
    if image.format in ("JPEG", "MPO") and content.count(_SCAN) > MAX_SCANS:
        raise DecodeError(f"a JPEG of more than {MAX_SCANS} scans: write it anew")
    return image


@contextmanager
def decoding(content: bytes) -> Iterator[None]:
    """Makes a :class:`DecodeError` of whatever reading these bytes as an image raises."""
    try:
        yield
    except (MemoryError, DecodeError):
        raise
    except UnidentifiedImageError as error:  # whose message names an address in memory
        raise DecodeError(f"these bytes are {_kind_of(content)}") from error
    except Exception as error:  # damaged bytes bring nearly any exception out of image codecs
        raise DecodeError(repr(error)) from error


def upright(image: Image.Image) -> Image.Image:
    """Read and turned as its EXIF orientation says."""
    image.load()
    # Not Pillow's exif_transpose: it also writes all tags anew, and fails where any of them is damaged.
    turned = orientation(image)
    return image if turned is None else image.transpose(TURNED_BY[turned])


def orientation(image: Image.Image) -> int | None:
    """Its EXIF orientation where that turns it; None also where it cannot be read, as browsers show it."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # damaged EXIF brings nearly any exception out of its parser
        logger.debug("an image's EXIF cannot be read (%r): it is left as it is", error)
        return None
    return value if value in TURNED_BY else None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this build of Pillow can open (AVIF is young)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _kind_of(content: bytes) -> str:
    if is_git_lfs_pointer(content):
        return "a Git LFS pointer instead of an image: fetch the file itself with `git lfs pull`"
    if content.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "PostScript, which is not read, since that would start another program"
    return "no image" if content else "empty"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled_grey(image).convert("RGB")
    if image.has_transparency_data:
        # Nothing is held longer than needed: each of these may be a quarter of a gigabyte.
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """8-bit grey of values in 12 or 16 bits, or of floats in 0 .. 1 or 0 .. 255."""
    values = np.asarray(image)
    lowest, highest = float(values.min()), float(values.max())
    if not 0 <= lowest <= highest:  # NaN too
        raise DecodeError(f"grey values from {lowest:g} to {highest:g}: they must not be below 0")
    if image.mode == "F":
        white = next((white for white in (1.0, 255.0) if highest <= white), None)
    else:
        white = next((2.0**depth - 1 for depth in GREY_DEPTHS if highest < 2**depth), None)
    if white is None:
        raise DecodeError(f"grey values up to {highest:g}: there is no telling which of them is white")
    grey = np.empty(values.shape, dtype=np.uint8)
    for row, of_row in zip(grey, values, strict=True):  # in float64, of which the whole would be 8 bytes a pixel
        row[:] = (of_row.astype(np.float64) * (255 / white)).round()
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
