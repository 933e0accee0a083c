"""Opens, shrinks and encodes pictures, and tells photographs from drawings and logos."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SMALLEST_SIDE_PIXELS = 200
OPAQUE = 250  # alpha of 255 from which a pixel hides what is behind it
# Of a copy of 96 x 96 pixels with 5 bits a channel: drawings have few colours, or one that fills them.
FEWEST_COLOURS, MOST_OF_ONE_COLOUR = 120, 0.35
COLOUR_PIXELS = 96
JPEG_QUALITY = 88


def open_picture(path: Path, at_least: int | None = None) -> Image.Image:
    """A picture as RGB, the right way up, on white where it is transparent.

    Where it need not have more pixels than ``at_least`` on a side, a JPEG is decoded smaller, which is faster.
    """
    with Image.open(path) as image:
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        upright = ImageOps.exif_transpose(image)
        if not _has_alpha(upright):
            return upright.convert("RGB")
        picture = upright.convert("RGBA")
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(picture, mask=picture.getchannel("A"))
    return canvas


def is_photograph(path: Path) -> bool:
    """Whether a file is likely a photograph: no small one, nothing transparent, many colours and none that fills it."""
    with Image.open(path) as image:
        if min(image.size) < SMALLEST_SIDE_PIXELS:
            return False
        image.draft("RGB", (2 * COLOUR_PIXELS, 2 * COLOUR_PIXELS))
        if _has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema()[0] < OPAQUE:
            return False
        small = image.convert("RGB").resize((COLOUR_PIXELS, COLOUR_PIXELS), Image.Resampling.BOX)
    channels = np.asarray(small).astype(int) >> 3
    _, counts = np.unique(channels @ np.array([1 << 10, 1 << 5, 1]), return_counts=True)
    return len(counts) >= FEWEST_COLOURS and counts.max() / counts.sum() <= MOST_OF_ONE_COLOUR


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def fit_long_side(image: Image.Image, pixels: int) -> Image.Image:
    """The picture, scaled down where its longer side has more pixels."""
    smaller = image.copy()
    smaller.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return smaller


def fit_short_side(image: Image.Image, pixels: int) -> Image.Image:
    """The picture, scaled down where its shorter side has more pixels."""
    longest = max(image.size) * pixels / min(image.size)
    return fit_long_side(image, round(longest))


def as_jpeg(image: Image.Image, quality: int = JPEG_QUALITY) -> bytes:
    return _encode(image, "JPEG", quality=quality)


def as_png(image: Image.Image) -> bytes:
    return _encode(image, "PNG")


def _encode(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()
