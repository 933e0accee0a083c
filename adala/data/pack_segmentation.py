"""Pairs of image and mask in folders: those of ADE20K and Cityscapes, and any that go by the same names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adala.data.folders import files_below
from adala.data.images import IMAGE_FIELDS, decode_image
from adala.data.masks import MASK_EXTENSIONS, MaskFormat, check_fit, coding_of, decode_mask

# Of masks by colours all that packing asks is that they can be read.
ANY_COLOURS = MaskFormat("rgb", colors=[[0, 0, 0]], unknown_colors="ignore")
# What a key of a shard's sample cannot have, and what stands for it.
KEY_ESCAPES = str.maketrans({"%": "%25", "/": "%2F", ".": "%2E"})

ADE20K_NAMES = (
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet"),
    *("sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water"),
    *("painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk"),
    *("rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard"),
    *("chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand"),
    *("path", "stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge"),
    *("bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove"),
    *("palm", "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus"),
    *("towel", "light", "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television receiver"),
    *("airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle"),
    *("buffet", "poster", "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything"),
    *("swimming pool", "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven"),
    *("ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle", "lake"),
    *("dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray"),
    *("ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator"),
    *("glass", "clock", "flag"),
)
CITYSCAPES_NAMES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)


@dataclass(frozen=True)
class Layout:
    """How a published data set lies in its folder.

    Attributes:
        splits: Folder of the images and of the masks, by our name of the split.
        image_ending: What follows an image's name, before the extension.
        mask_ending: The same of masks; what ends in another way is none.
        form: How its masks are coded.
        classes: Names of the classes.
        words: What people must name, for messages.
    """

    splits: dict[str, tuple[str, str]]
    image_ending: str
    mask_ending: str
    form: MaskFormat
    classes: tuple[str, ...]
    words: str


LAYOUTS = {
    "ade20k": Layout(
        splits={
            "train": ("images/training", "annotations/training"),
            "val": ("images/validation", "annotations/validation"),
        },
        image_ending="",
        mask_ending="",
        form=MaskFormat(label_map="ade20k"),
        classes=ADE20K_NAMES,
        words="the folder ADEChallengeData2016 with images/{training,validation}/*.jpg and "
        "annotations/{training,validation}/*.png",
    ),
    "cityscapes": Layout(
        splits={"train": ("leftImg8bit/train", "gtFine/train"), "val": ("leftImg8bit/val", "gtFine/val")},
        image_ending="_leftImg8bit",
        mask_ending="_gtFine_labelIds",
        form=MaskFormat(label_map="cityscapes"),
        classes=CITYSCAPES_NAMES,
        words="the folder with leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and "
        "gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
    ),
}


@dataclass(frozen=True)
class Pair:
    """An image and its mask, and the key of the sample that they become."""

    key: str
    image: Path
    mask: Path


@dataclass
class PackedPairs:
    """What became of pairs.

    Attributes:
        pairs: How many went into the shards.
        coloured: How many of these have masks that are coded in colours.
        values: What stands in the others' masks.
        left_out: Files that did not, and why.
    """

    pairs: int = 0
    coloured: int = 0
    values: set[int] = field(default_factory=set)
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def find_layout(layout: Layout, root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and masks of the splits that ``root`` has.

    Raises:
        ValueError: It has none, or the images without the masks.
    """
    found = {split: (root / images, root / masks) for split, (images, masks) in layout.splits.items()}
    found = {split: folders for split, folders in found.items() if any(map(Path.is_dir, folders))}
    missing = [str(folder) for folders in found.values() for folder in folders if not folder.is_dir()]
    if missing or not found:
        fault = f"{missing[0]} is no folder" if missing else f"{root} has another layout"
        raise ValueError(f"{fault}: name {layout.words}")
    return found


def find_pairs(
    images: Path, masks: Path, packed: PackedPairs, image_ending: str = "", mask_ending: str = ""
) -> list[Pair]:
    """Images and masks with the same place below their folders and the same name, but for ending and extension.

    What has no counterpart is added to what is left out.

    Raises:
        ValueError: A folder is none, or there is no pair.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: name the one of the images, and then the one of the masks")
    images_by_name = _by_name(images, image_ending, IMAGE_FIELDS, packed)
    masks_by_name = _by_name(masks, mask_ending, MASK_EXTENSIONS, packed)
    names = images_by_name.keys() & masks_by_name.keys()
    if not names:
        raise ValueError(
            f"no mask in {masks} belongs to an image in {images}: of {len(images_by_name)} images and "
            f"{len(masks_by_name)} masks none have the same name, as 1{image_ending}.jpg and 1{mask_ending}.png"
        )
    for found, fault in ((images_by_name, "it has no mask"), (masks_by_name, "it has no image")):
        packed.left_out += [(path, fault) for name, path in sorted(found.items()) if name not in names]
    # A key without its folders is easier to read, where that tells all of them apart.
    alone = {name: name.rpartition("/")[2] for name in names}
    keys = alone if len(set(alone.values())) == len(alone) else {name: name for name in names}
    return [
        Pair(keys[name].translate(KEY_ESCAPES), images_by_name[name], masks_by_name[name]) for name in sorted(names)
    ]


def _by_name(folder: Path, ending: str, extensions: Iterable[str], packed: PackedPairs) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files_below(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if path.suffix.lower().removeprefix(".") not in extensions or not stem.endswith(ending):
            # Beside Cityscapes' masks lie others of instances and colours, under other endings.
            packed.left_out += [] if ending else [(path, f"its extension is none of .{', .'.join(extensions)}")]
            continue
        name = stem.removesuffix(ending)
        if name in found:
            packed.left_out.append((path, f"{found[name].name} has the same name"))
        else:
            found[name] = path
    return found


def read_pairs(pairs: Iterable[Pair], form: MaskFormat | None, packed: PackedPairs) -> Iterator[dict[str, Any]]:
    """Samples of those pairs that can be read and fit each other, bytes as they are; the others are left out.

    Args:
        pairs: In the order of the shards.
        form: How the masks are coded; None takes them as they come.
        packed: Counts.

    Raises:
        ValueError: None of them can be read.
    """
    for pair in pairs:
        path = pair.image
        try:
            image = path.read_bytes()
            decode_image(image)
            path = pair.mask
            mask = path.read_bytes()
            coloured = form is None and coding_of(mask) == "rgb"
            values = decode_mask(mask, ANY_COLOURS if coloured else form or MaskFormat())
            check_fit(image, mask)
        except (ValueError, OSError) as error:
            packed.left_out.append((path, str(error)))
            continue
        packed.pairs += 1
        packed.coloured += coloured
        packed.values |= set() if coloured else set(np.unique(values).tolist())
        extension = pair.image.suffix.lower().removeprefix(".")
        mask_extension = pair.mask.suffix.lower().removeprefix(".")
        yield {"__key__": pair.key, extension: image, f"seg.{mask_extension}": mask}
    if not packed.pairs:
        path, reason = packed.left_out[-1]
        raise ValueError(f"none of the pairs of image and mask can be read, as {path}: {reason}")
