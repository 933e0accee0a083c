"""Data sets as they are published: ImageNet, COCO, ADE20K and Cityscapes, by the layout of their folders."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.io import loadmat

from adala.data.convert.sources import (
    Listing,
    class_names,
    known_classes,
    list_class_folders,
    list_images,
    list_labelled,
    list_pairs,
)
from adala.data.folders import files_below
from adala.data.images import IMAGE_FIELDS
from adala.data.masks import MaskFormat

# Where ILSVRC's splits lie below the folder that people name: as unpacked from the archives, and in Kaggle's.
IMAGENET_ROOTS = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
IMAGENET_SPLITS = {
    "train": ("train", "ILSVRC2012_img_train"),
    "val": ("val", "validation", "ILSVRC2012_img_val"),
}
# Lists of the classes of the flat folder val, which are looked for from there upwards.
IMAGENET_LABELS = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
)
# Beside the devkit's list, whose numbers are of an order of their own.
DEVKIT_CLASSES = "meta.mat"
COCO_SPLITS = {
    "train": ("train2017", "train2014"),
    "val": ("val2017", "val2014"),
    "unlabeled": ("unlabeled2017",),
    "test": ("test2017", "test2015", "test2014"),
}
COCO_ROOTS = (".", "images")

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
class Published:
    """A data set with a layout of its own.

    Attributes:
        words: What people must name, for messages.
        splits: Our names of its splits, those first that are written unless others are asked for.
        list_split: From its folder, the folder of the shards, a split and a list of labels (or None) to what becomes of
            the split; None where the folder does not have it.
        optional: How many of ``splits``, from the end, are written only where they are asked for.
    """

    words: str
    splits: tuple[str, ...]
    list_split: Callable[[Path, Path, str, Path | None], Listing | None]
    optional: int = 0

    @property
    def usual_splits(self) -> tuple[str, ...]:
        return self.splits[: len(self.splits) - self.optional]


@dataclass(frozen=True)
class PairLayout:
    """How images and masks of a published data set lie in its folder.

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

    def list_split(self, root: Path, shards: Path, split: str, labels: Path | None) -> Listing | None:
        """The pairs of a split.

        Raises:
            ValueError: Images without masks, no pair, or other classes beside the shards.
        """
        images, masks = (root / folder for folder in self.splits[split])
        if not images.is_dir() and not masks.is_dir():
            return None
        for folder in (images, masks):
            if not folder.is_dir():
                raise ValueError(f"{folder} is no folder: name {self.words}")
        if known_classes(shards) not in (None, list(self.classes)):
            raise ValueError(f"{shards} has a list of other classes than this data set: write to another folder")
        listing = list_pairs(images, masks, self.form, self.image_ending, self.mask_ending)
        listing.classes = list(self.classes)
        return listing


ADE20K = PairLayout(
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
)
CITYSCAPES = PairLayout(
    splits={"train": ("leftImg8bit/train", "gtFine/train"), "val": ("leftImg8bit/val", "gtFine/val")},
    image_ending="_leftImg8bit",
    mask_ending="_gtFine_labelIds",
    form=MaskFormat(label_map="cityscapes"),
    classes=CITYSCAPES_NAMES,
    words="the folder with leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and "
    "gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
)


def list_imagenet(root: Path, shards: Path, split: str, labels: Path | None) -> Listing | None:
    """A split of ILSVRC: folders of classes, or the flat folder of val with a list of labels.

    Classes are numbered in the order of their names (``n01440764`` is 0), which is the one of pretrained models.

    Raises:
        ValueError: No list of labels, or one that does not fit.
    """
    folder = _first_folder(root, IMAGENET_ROOTS, IMAGENET_SPLITS[split])
    if folder is None:
        return None
    classes = _imagenet_classes(root, shards)
    if class_names(folder):
        return list_class_folders(folder, classes)
    if any(path.suffix == ".tar" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds archives: unpack each n*.tar into a folder of its name")
    if split == "train":
        raise ValueError(f"{folder} has no folders of classes: name the one that has, as train/n01440764/*.JPEG")
    labels = labels or _labels_above(folder)
    if labels is None:
        raise ValueError(
            f"the images in {folder} lie side by side, and nothing says their classes: name the list of these with "
            f"--val-labels, which is {' or '.join(Path(name).name for name in IMAGENET_LABELS)}"
        )
    return list_labelled(folder, *_read_labels(labels, folder, classes), str(labels))


def _imagenet_classes(root: Path, shards: Path) -> list[str] | None:
    """Those of the shards that are there already, else those of the folder train."""
    train = _first_folder(root, IMAGENET_ROOTS, IMAGENET_SPLITS["train"])
    return known_classes(shards) or (class_names(train) if train is not None else None) or None


def _labels_above(folder: Path) -> Path | None:
    above = [folder, *list(folder.absolute().parents)[: 1 + max(root.count("/") + 1 for root in IMAGENET_ROOTS)]]
    found = [parent / name for parent in above for name in IMAGENET_LABELS if (parent / name).is_file()]
    return found[0] if found else None


def _read_labels(path: Path, folder: Path, classes: list[str] | None) -> tuple[dict[str, int], list[str]]:
    """The number of each image's class by the image's name, and the classes, of a list of labels.

    Each line is of one image: its name and its class, or the class alone, of the images in the order of their names.

    Raises:
        ValueError: It cannot be read, is not as long as there are images, or has other classes.
    """
    try:
        rows = _rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read the list of labels {path} ({error})") from error
    if not rows:
        raise ValueError(f"{path} lists no labels: name a list of the images' classes")
    if all(len(row) > 1 for row in rows):
        names, found = [Path(row[0]).stem for row in rows], [row[1] for row in rows]
        if all(name.isdecimal() for name in found):
            found = _numbered_names(path, found, classes)
    else:
        names, found = _image_names(folder), [row[0] for row in rows]
        if len(names) != len(found):
            raise ValueError(f"{path} has {len(found)} lines, and {folder} {len(names)} images: name the list of these")
        if all(name.isdecimal() for name in found):
            found = _devkit_names(path, found)
    classes = classes or sorted(set(found))
    new = sorted(set(found) - set(classes))
    if new:
        raise ValueError(f"{path} has the class {new[0]!r}, which is none of the {len(classes)} from {classes[0]!r} on")
    places = {name: number for number, name in enumerate(classes)}
    return {name: places[of_image] for name, of_image in zip(names, found, strict=True)}, classes


def _image_names(folder: Path) -> list[str]:
    files = files_below(folder)
    return sorted(file.stem for file in files if file.suffix.lower().removeprefix(".") in IMAGE_FIELDS)


def _numbered_names(path: Path, numbers: Sequence[str], classes: list[str] | None) -> list[str]:
    """Names of classes by their places in the order of the names.

    Raises:
        ValueError: The names are not known, or there are fewer.
    """
    if not classes or max(map(int, numbers)) >= len(classes):
        raise ValueError(
            f"{path} has the class {max(map(int, numbers))}, and there are {len(classes or ())} classes, counted from "
            "0: the folder train or the list beside the shards must name them"
        )
    return [classes[int(number)] for number in numbers]


def _rows(path: Path) -> list[list[str]]:
    """The words of each line that has any; of Kaggle's table the image and the class, without the box behind it."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() != ".csv":
        return [line.split() for line in text.splitlines() if line.strip()]
    rows = [row for row in csv.reader(text.splitlines()) if len(row) > 1 and row[1].strip()]
    return [[row[0], row[1].split()[0]] for row in rows if row[0] != "ImageId"]


def _devkit_names(path: Path, numbers: Sequence[str]) -> list[str]:
    """Names of classes by the devkit's own numbers, which are not in the order of the names.

    Raises:
        ValueError: The devkit's table is not beside the list, or does not have a number.
    """
    table = path.with_name(DEVKIT_CLASSES)
    if not table.is_file():
        raise ValueError(
            f"{path} holds numbers alone, which count in the order of ILSVRC's devkit: put its {DEVKIT_CLASSES} beside "
            "it, or name a list of the classes' names"
        )
    synsets = loadmat(table, squeeze_me=True)["synsets"]
    names = {int(of["ILSVRC2012_ID"]): str(of["WNID"]) for of in synsets if int(of["num_children"]) == 0}
    unknown = sorted({int(number) for number in numbers} - set(names))
    if unknown:
        raise ValueError(f"{path} has a class {unknown[0]}, which {table} does not list")
    return [names[int(number)] for number in numbers]


def list_coco(root: Path, shards: Path, split: str, labels: Path | None) -> Listing | None:
    """The images of one of COCO's splits; captions and other annotations are passed over."""
    folder = _first_folder(root, COCO_ROOTS, COCO_SPLITS[split])
    return None if folder is None else list_images(folder)


def _first_folder(root: Path, below: Sequence[str], names: Sequence[str]) -> Path | None:
    places = [root / parent / name for parent in below for name in names]
    return next((place for place in places if place.is_dir()), None)


PUBLISHED = {
    "imagenet": Published(
        "the folder with train/n*/*.JPEG and val/*.JPEG, in folders of classes or side by side",
        ("train", "val"),
        list_imagenet,
    ),
    "coco": Published("the folder with train2017/*.jpg and val2017/*.jpg", tuple(COCO_SPLITS), list_coco, optional=2),
    "ade20k": Published(ADE20K.words, tuple(ADE20K.splits), ADE20K.list_split),
    "cityscapes": Published(CITYSCAPES.words, tuple(CITYSCAPES.splits), CITYSCAPES.list_split),
}


def list_published(
    name: str, root: Path, shards: Path, splits: Sequence[str] | None = None, labels: Path | None = None
) -> dict[str, Listing]:
    """What becomes of the splits of a published data set that its folder has.

    Args:
        name: One of ``PUBLISHED``.
        root: Its folder, laid out as it is published.
        shards: Where the shards go.
        splits: Those that are wanted; None takes the usual ones of which the folder has any.
        labels: List of the classes of ImageNet's val, where it lies elsewhere.

    Raises:
        ValueError: The folder has another layout, or not what was asked for.
    """
    published = PUBLISHED[name]
    found = {}
    for split in splits or published.usual_splits:
        listing = published.list_split(root, shards, split, labels)
        if listing is None and splits:
            raise ValueError(f"{root} does not have the split {split}: name {published.words}")
        found |= {} if listing is None else {split: listing}
    if not found:
        raise ValueError(f"{root} has another layout: name {published.words}")
    return found
