"""From an item's files to the files of a sample: copied as they are, or images and masks of a bounded size.

Everything is decoded, as reading shards does it: what cannot be read there does not get into a shard.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
from PIL import Image, features

from adala.data.convert.sources import Item, LeftOut, SourceFile
from adala.data.images import decode_image, decoding, open_image, upright
from adala.data.masks import MaskFormat, check_fit, coding_of, decode_mask

# Of masks by colours all that is asked is that they can be read.
ANY_COLOURS = MaskFormat("rgb", colors=[[0, 0, 0]], unknown_colors="ignore")
# Pillow's names; MPO is a JPEG with further ones behind it.
JPEG_FORMATS = ("JPEG", "MPO")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Encoding:
    """What becomes of images.

    Attributes:
        max_size: Largest shorter side in pixels; None copies all files as they are. JPEG images that are small enough
            are copied, all others become JPEG.
        quality: Of these, from 1 to 100.
    """

    max_size: int | None = None
    quality: int = 92

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: One of them is out of range.
        """
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"--max-size is the largest shorter side in pixels, not {self.max_size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is that of JPEG, from 1 to 100, not {self.quality}")

    def conditions(self) -> dict[str, str | int | None]:
        """What the bytes of a sample depend on, beside its files."""
        if self.max_size is None:
            return {"max_size": None}
        versions = f"Pillow {PIL.__version__}, libjpeg {features.version('libjpeg_turbo') or features.version('jpg')}"
        return {"max_size": self.max_size, "quality": self.quality, "encoder": versions}


@dataclass
class Encoded:
    """The files of a sample, and what was seen of its mask.

    Attributes:
        fields: Contents by extension.
        is_encoded: Whether the image is another one than the file holds.
        is_coloured: Whether the mask is coded in colours.
        values: What stands in the mask if it is not.
    """

    fields: dict[str, bytes]
    is_encoded: bool = False
    is_coloured: bool = False
    values: set[int] = field(default_factory=set)


class UnusableError(ValueError):
    """An item that becomes no sample."""

    def __init__(self, left_out: LeftOut):
        super().__init__(str(left_out))
        self.left_out = left_out


def encode(item: Item, form: MaskFormat | None, encoding: Encoding) -> Encoded:
    """The sample of an item.

    Args:
        item: Image, and class or mask.
        form: How masks are coded; None takes them as they come.
        encoding: What becomes of the image; a mask is brought to its size by the nearest pixels.

    Raises:
        UnusableError: Image or mask cannot be read, or do not fit each other.
        ValueError: The files are not those that were listed.
        OSError: The machine fails to read them.
    """
    content = _read(item.image)
    image = _tried(item.image, "it cannot be decoded", lambda: decode_image(content))
    encoded = Encoded({item.image.extension: content})
    mask = None
    if item.mask is not None:
        mask = _read(item.mask)
        _tried(item.mask, "it is no mask of its image", lambda: _look_at_mask(content, mask, form, encoded))
    if encoding.max_size is not None and not _is_small_jpeg(content, image, encoding.max_size):
        size = bounded_size(image.size, encoding.max_size)
        encoded.is_encoded = True
        encoded.fields = {"jpg": _tried(item.image, "it cannot be encoded", lambda: _as_jpeg(image, size, encoding))}
        if mask is not None and size != image.size:
            encoded.fields["seg.png"] = _tried(item.mask, "it cannot be resized", lambda: resized_mask(mask, size))
            mask = None
    if mask is not None:
        encoded.fields[f"seg.{item.mask.extension}"] = mask
    if item.label is not None:
        encoded.fields["cls"] = str(item.label).encode()
    return encoded


def _read(source: SourceFile) -> bytes:
    try:
        content = Path(source.path).read_bytes()
    except PermissionError as error:
        raise UnusableError(LeftOut(source.path, "it cannot be read", error.strerror or "")) from error
    except FileNotFoundError as error:
        raise ValueError(f"{source.path} is gone since the files were listed: {_AGAIN}") from error
    if len(content) != source.bytes:
        raise ValueError(f"{source.path} has changed since the files were listed: {_AGAIN}")
    return content


_AGAIN = "leave the source alone while it is converted, and give the command again with --overwrite"


def _tried(source: SourceFile, reason: str, attempt: Callable[[], Result]) -> Result:
    try:
        return attempt()
    except (ValueError, OSError) as error:
        raise UnusableError(LeftOut(source.path, reason, str(error))) from error


def _look_at_mask(image: bytes, mask: bytes, form: MaskFormat | None, encoded: Encoded) -> None:
    encoded.is_coloured = form is None and coding_of(mask) == "rgb"
    values = decode_mask(mask, ANY_COLOURS if encoded.is_coloured else form or MaskFormat())
    check_fit(image, mask)
    encoded.values = set() if encoded.is_coloured else set(np.unique(values).tolist())


def _is_small_jpeg(content: bytes, image: Image.Image, max_size: int) -> bool:
    return min(image.size) <= max_size and open_image(content).format in JPEG_FORMATS


def bounded_size(size: tuple[int, int], max_size: int) -> tuple[int, int]:
    """Width and height, aspect ratio kept, of which the smaller is at most ``max_size``."""
    shorter = min(size)
    if shorter <= max_size:
        return size
    width, height = (max(1, (side * max_size + shorter // 2) // shorter) for side in size)
    return width, height


def _as_jpeg(image: Image.Image, size: tuple[int, int], encoding: Encoding) -> bytes:
    stream = io.BytesIO()
    resized = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    resized.save(stream, "JPEG", quality=encoding.quality)
    return stream.getvalue()


def resized_mask(content: bytes, size: tuple[int, int]) -> bytes:
    """A mask of ``size`` (width, height) by the nearest pixels, upright, as PNG of the same numbers or colours.

    Raises:
        DecodeError: It cannot be read.
    """
    with decoding(content):
        stored = open_image(content)
        if stored.mode == "P" or coding_of(content) == "rgb":
            image = upright(stored)
            options = {"bits": 8} if image.mode == "P" else {}
        else:
            # Pillow spreads grey of fewer than 8 bits over 0 .. 255.
            values = decode_mask(content, MaskFormat())
            image, options = Image.fromarray(values.astype(np.uint8 if values.max() < 256 else np.uint16)), {}
        stream = io.BytesIO()
        image.resize(size, Image.Resampling.NEAREST).save(stream, "PNG", **options)
    return stream.getvalue()
