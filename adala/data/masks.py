"""From the mask file of a sample to the class of every pixel.

A mask is an int32 array (H, W): classes 0 .. K-1, and ``ignore_index`` where nothing is known of a pixel.

Shapes: H, W height and width in pixels of the mask, and of the image it belongs to; K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from adala.data.images import (
    MAX_PIXELS,
    PHOTOMETRIC_INTERPRETATION,
    WHITE_IS_ZERO,
    DecodeError,
    decoding,
    open_image,
    orientation,
    upright,
)
from adala.data.index import image_field

# Files that may hold a mask, in the order in which they are asked.
MASK_EXTENSIONS = ("png", "tif", "tiff")
MASK_FIELDS = tuple(
    f"{name}.{extension}" for extension in MASK_EXTENSIONS for name in ("seg", "mask", "segmentation", "label")
)
# Pillow's names of the formats that keep every value and that Pillow gives out unscaled, or scaled so that it can be
# undone. Among the others JPEG changes values, and PGM's are scaled to its white.
MASK_FORMATS = ("PNG", "TIFF")
# TIFF's compressions that change values.
LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")
# One of TIFF's tags.
BITS_PER_SAMPLE = 258
# What Pillow multiplies grey values of so many bits with, so that the largest is white.
GREY_FACTORS = {2: 85, 4: 17}
COLOUR_MODES = ("RGB", "RGBA")
# Fewer than of an image: a class takes 4 bytes, and 8 on its way into a batch.
MAX_MASK_PIXELS = MAX_PIXELS // 2
LARGEST_VALUE = 2**16 - 1

ADE20K_CLASSES = 150
# Of Cityscapes' 34 ids, which its *_labelIds.png hold, the 19 that are trained and scored, at the place of their class.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_NUM_IDS = 34
CITYSCAPES_LICENSE_PLATE = 255  # its id is -1, in 8 bits

LabelMapName = Literal["none", "ade20k", "cityscapes"]
# Of no mask: values have at most 16 bits.
_UNLISTED = np.iinfo(np.int32).min


class MissingMaskError(DecodeError):
    """A sample without a mask."""


@dataclass(frozen=True)
class MaskFormat:
    """How a mask's file codes the classes.

    Attributes:
        encoding: ``index``: one channel of numbers, or a palette of which the indices count, not the colours, as Pascal
            VOC has it. ``rgb``: a colour stands for a class.
        colors: With ``rgb``: the classes' colours [red, green, blue], each at the place of its class.
        unknown_colors: With ``rgb``, what a colour is that is not among them: ``error``, or ``ignore`` for a pixel of
            which nothing is known.
        label_map: From numbers in the file to classes. ``none``: they are the classes. ``ade20k``: 1 .. 150 are classes
            0 .. 149, and of 0 nothing is known. ``cityscapes``: 19 of the 34 ids are classes, of the others nothing is
            known. Or a mapping that lists every number but ``ignore_index``.
        ignore_index: Stands in the mask where nothing is known of a pixel; a file may hold it, too.
    """

    encoding: Literal["index", "rgb"] = "index"
    colors: Sequence[Sequence[int]] = ()
    unknown_colors: Literal["error", "ignore"] = "error"
    label_map: LabelMapName | Mapping[int, int] = "none"
    ignore_index: int = 255

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: One of them is none of the above, or they contradict each other.
        """
        for key, known in (("encoding", ("index", "rgb")), ("unknown_colors", ("error", "ignore"))):
            if getattr(self, key) not in known:
                raise ValueError(f"mask.{key} must be {' or '.join(known)}, not {getattr(self, key)!r}")
        if not _is_whole(self.ignore_index):
            raise ValueError(f"mask.ignore_index must be a whole number, not {self.ignore_index!r}")
        object.__setattr__(self, "colors", _checked_colors(self.colors, self.encoding))
        object.__setattr__(self, "label_map", _checked_label_map(self.label_map, self.encoding))
        if isinstance(self.label_map, str) and self.ignore_index in _named_map(self.label_map, None).values():
            raise ValueError(
                f"mask.ignore_index {self.ignore_index} is a class of the label map {self.label_map}: take 255, say"
            )

    def table(self) -> Mapping[int, int] | None:
        """From numbers in the file to what stands in the mask; None where they are the same."""
        if not isinstance(self.label_map, str):
            return self.label_map
        return None if self.label_map == "none" else _named_map(self.label_map, self.ignore_index)


def _is_whole(value: Any) -> bool:
    return type(value) is int and -LARGEST_VALUE <= value <= LARGEST_VALUE


def _checked_colors(colors: Any, encoding: str) -> tuple[tuple[int, ...], ...]:
    if bool(colors) != (encoding == "rgb"):
        raise ValueError(
            "mask.colors lists the colours of mask.encoding: rgb, by class: "
            + ("give both or none of them" if colors else "it must not be empty there")
        )
    is_list = isinstance(colors, Sequence) and all(isinstance(color, Sequence) for color in colors)
    checked = tuple(map(tuple, colors)) if is_list else ((),)
    for color in checked:
        if len(color) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in color):
            raise ValueError(f"mask.colors must be a list of [red, green, blue] from 0 to 255, it holds {color}")
    if len(set(checked)) < len(checked):
        twice = next(color for color in checked if checked.count(color) > 1)
        raise ValueError(f"mask.colors holds {list(twice)} twice: a colour stands for one class")
    return checked


def _checked_label_map(label_map: Any, encoding: str) -> LabelMapName | dict[int, int]:
    names = get_args(LabelMapName)
    if label_map in names:
        checked = label_map
    elif isinstance(label_map, Mapping) and label_map:
        # A mapping that went through JSON has its numbers as texts.
        pairs = {int(key) if str(key).isdecimal() else key: value for key, value in label_map.items()}
        if not all(_is_whole(key) and key >= 0 and _is_whole(value) for key, value in pairs.items()):
            raise ValueError(f"mask.label_map must map whole numbers of up to 16 bits to such, not {label_map!r}")
        checked = pairs
    else:
        raise ValueError(f"mask.label_map must be {', '.join(names)} or a mapping of numbers, not {label_map!r}")
    if encoding == "rgb" and checked != "none":
        raise ValueError("mask.label_map maps numbers: with mask.encoding: rgb the place in mask.colors is the class")
    return checked


def _named_map(name: str, unknown: int | None) -> dict[int, int | None]:
    """A label map of which ``unknown`` stands for what is no class."""
    if name == "ade20k":
        return {0: unknown} | {number + 1: number for number in range(ADE20K_CLASSES)}
    if name == "cityscapes":
        ids = dict.fromkeys((*range(CITYSCAPES_NUM_IDS), CITYSCAPES_LICENSE_PLATE), unknown)
        return ids | {number: place for place, number in enumerate(CITYSCAPES_IDS)}
    return {}


def decode_mask(content: bytes, form: MaskFormat) -> np.ndarray:
    """The classes in a file's bytes, turned as the file's own EXIF orientation says.

    Grey of 1, 2, 4, 8 or 16 bits gives its values, a palette its indices, and colours what ``form`` says of them.

    Returns:
        int32 (H, W).

    Raises:
        DecodeError: Damaged, in a format that may change values, or coded in another way than ``form`` says.
        ValueError: A number or a colour that ``form`` does not list.
    """
    with decoding(content):
        stored = _open(content)
        depth = _depth(stored, content)
        image = upright(stored)
        values = _colors(image, depth) if form.encoding == "rgb" else _indices(image, depth)
    if form.encoding == "rgb":
        return _classes_of_colors(values, form)
    return _classes_of_indices(values, form)


def coding_of(content: bytes) -> Literal["index", "rgb"]:
    """Which ``MaskFormat.encoding`` a file's channels make likely: colours, or numbers and palettes.

    Raises:
        DecodeError: As :func:`decode_mask`.
    """
    with decoding(content):
        return "rgb" if _open(content).mode in COLOUR_MODES else "index"


def _open(content: bytes) -> Image.Image:
    """A mask's file, its pixels not yet read.

    Raises:
        DecodeError: Its format is not among those that keep values, or it is too large.
    """
    image = open_image(content)
    if image.width * image.height > MAX_MASK_PIXELS:
        raise DecodeError(f"{image.width} x {image.height} pixels, more than {MAX_MASK_PIXELS} in all")
    lossy = image.info.get("compression") in LOSSY_COMPRESSIONS
    if image.format not in MASK_FORMATS or lossy:
        raise DecodeError(
            f"it is {image.format}{', compressed with losses' if lossy else ''}: masks are read from PNG and lossless "
            "TIFF, because others change values, as JPEG does"
        )
    # TIFF's grey may begin at white, and Pillow inverts it: no telling whether the writer had values or looks in mind.
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        raise DecodeError("it is a TIFF whose 0 is white: write it as PNG")
    return image


def _depth(image: Image.Image, content: bytes) -> int:
    """Bits of a value in the file."""
    if image.format == "TIFF":
        return image.tag_v2.get(BITS_PER_SAMPLE, (1,))[0]
    return content[24]  # behind PNG's signature, the head of its first chunk, width and height


def _indices(image: Image.Image, depth: int) -> np.ndarray:
    """The numbers that a file of one channel holds.

    Raises:
        DecodeError: It has more channels, or other numbers.
    """
    if image.mode in ("LA", "PA", "La"):
        raise DecodeError("it has an alpha channel: write it with one channel, which holds the classes")
    if image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;16"):
        bands = np.asarray(image.convert("RGB"))
        grey = (bands == bands[..., :1]).all()
        raise DecodeError(
            f"it is coded in colours ({image.mode}{', all of them grey' if grey else ''}): mask.encoding: rgb reads it "
            "where mask.colors lists the classes' colours; or write it with one channel that holds the classes"
        )
    values = np.asarray(image)
    if image.mode == "F":
        raise DecodeError("its values are floats: write whole numbers")
    values = values.astype(np.int32)
    if image.mode == "L":
        values //= GREY_FACTORS.get(depth, 1)
    if values.min() < 0 or values.max() > LARGEST_VALUE:
        raise DecodeError(f"its values go from {values.min()} to {values.max()}: they must have 16 bits, from 0 on")
    return values


def _classes_of_indices(values: np.ndarray, form: MaskFormat) -> np.ndarray:
    table = form.table()
    if table is None:
        return values
    lookup = np.full(LARGEST_VALUE + 1, _UNLISTED, dtype=np.int32)
    if form.ignore_index >= 0:
        lookup[form.ignore_index] = form.ignore_index
    lookup[list(table)] = list(table.values())
    classes = lookup[values]
    unlisted = np.unique(values[classes == _UNLISTED])
    if unlisted.size:
        name = f" {form.label_map}" if isinstance(form.label_map, str) else ""
        raise ValueError(
            f"it holds {_listed(unlisted)}, which the label map{name} does not list: choose mask.label_map as the "
            f"masks are coded, with {form.ignore_index} (mask.ignore_index) for what is not to be learnt"
        )
    return classes


def _colors(image: Image.Image, depth: int) -> np.ndarray:
    """A file's colours as numbers, int32 (H, W).

    Raises:
        DecodeError: It has none, or some of its pixels are transparent.
    """
    if image.mode not in (*COLOUR_MODES, "P"):
        raise DecodeError(f"it is not coded in colours (it is {image.mode}): mask.encoding: index reads it")
    if depth > 8:
        raise DecodeError(f"its colours have {depth} bits a channel: write 8")
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
        raise DecodeError("some of its pixels are transparent: write it without an alpha channel")
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int32), -1, 0)
    return _color_numbers(red, green, blue)


def _color_numbers(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    return red << 16 | green << 8 | blue


def _classes_of_colors(numbers: np.ndarray, form: MaskFormat) -> np.ndarray:
    listed = _color_numbers(*np.array(form.colors, dtype=np.int32).T)
    order = listed.argsort()
    places = np.searchsorted(listed[order], numbers).clip(max=len(order) - 1)
    known = listed[order][places] == numbers
    if form.unknown_colors == "error" and not known.all():
        unknown = [[int(n >> 16), int(n >> 8 & 255), int(n & 255)] for n in np.unique(numbers[~known])]
        raise ValueError(
            f"it holds the colours {_listed(unknown)}, which mask.colors does not list: list them, or pass over their "
            "pixels with mask.unknown_colors: ignore"
        )
    return np.where(known, order[places], form.ignore_index).astype(np.int32)


def _listed(values: Sequence[Any], most: int = 8) -> str:
    """Values in a sentence, the first of them where there are many."""
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def mask_field(fields: Mapping[str, bytes], field: str | None = None) -> str:
    """Which of a sample's files is its mask: ``field``, or the first of ``MASK_FIELDS`` that it has.

    Raises:
        MissingMaskError: It has none.
    """
    wanted = MASK_FIELDS if field is None else (field.lower().lstrip("."),)
    found = next((name for name in wanted if name in fields), None)
    if found is None:
        raise MissingMaskError(
            f"it has no mask: none of its files {', '.join(sorted(fields))} is {' or '.join(wanted)}; the recipe's "
            "mask_field may name another"
        )
    return found


def read_mask(fields: Mapping[str, bytes], form: MaskFormat, field: str | None = None) -> np.ndarray:
    """The mask of a sample, which fits its image as :func:`adala.data.images.decode_image` gives it.

    Args:
        fields: Contents of the sample's files by extension.
        form: How the mask is coded.
        field: Extension of the mask's file; None takes the first of ``MASK_FIELDS``.

    Returns:
        int32 (H, W).

    Raises:
        MissingMaskError: The sample has no mask.
        DecodeError: It has one that cannot be decoded, or of another size or orientation than its image.
        ValueError: It holds a number or a colour that ``form`` does not list.
    """
    name = mask_field(fields, field)
    try:
        mask = decode_mask(fields[name], form)
    except DecodeError as error:
        raise DecodeError(f"its {name} cannot be read as a mask: {error}") from error
    except ValueError as error:
        raise ValueError(f"its {name} does not fit the recipe: {error}") from error
    image = image_field(fields, besides=name)
    if image is not None:
        check_fit(fields[image], fields[name])
    return mask


def check_fit(image: bytes, mask: bytes) -> None:
    """Refuses a mask that does not lie over its image pixel by pixel; reads no more than the heads of the two files.

    Raises:
        DecodeError: The sizes differ once both are turned upright; or only the image has an EXIF orientation, and the
            mask may have been drawn before it was turned.
    """
    with decoding(image):
        stored, turned = _stored(open_image(image))
    with decoding(mask):
        own, own_turned = _stored(open_image(mask))
    if turned is not None and own_turned is None and own == stored:
        raise DecodeError(
            f"its image has the EXIF orientation {turned}, and its mask has none but the size of the image before it "
            "is turned: turn both upright in their files, or take the orientation out of the image"
        )
    upright_size, own_upright = _upright_size(stored, turned), _upright_size(own, own_turned)
    if upright_size != own_upright:
        raise DecodeError(
            f"its image has {_pixels(upright_size)} and its mask {_pixels(own_upright)}: they must have the same size"
        )


def _stored(image: Image.Image) -> tuple[tuple[int, int], int | None]:
    """Width and height in the file, and the EXIF orientation."""
    if image.format == "TIFF":
        image.load()  # by which Pillow turns it
    return image.size, orientation(image)


def _upright_size(size: tuple[int, int], turned: int | None) -> tuple[int, int]:
    # From 5 on orientations exchange the sides.
    return size[::-1] if turned is not None and turned >= 5 else size


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def check_mask(mask: np.ndarray, num_classes: int, ignore_index: int) -> None:
    """Refuses a mask with other classes than the task has.

    Raises:
        ValueError: A value is neither in 0 .. K-1 nor ``ignore_index``.
    """
    outside = np.unique(mask[((mask < 0) | (mask >= num_classes)) & (mask != ignore_index)])
    if outside.size:
        raise ValueError(
            f"its mask holds {_listed(outside)}, no class from 0 to {num_classes - 1} and not mask.ignore_index "
            f"({ignore_index}): correct num_classes, map numbers to classes with mask.label_map, or name the one that "
            "stands for unknown pixels as mask.ignore_index"
        )
