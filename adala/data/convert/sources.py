"""What a folder holds: images with their classes or masks, each under the key of the sample that it becomes.

Nothing is opened here. What is listed is sorted, so that the same files give the same list.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adala.data.folders import files_below, is_passed_over
from adala.data.images import IMAGE_FIELDS
from adala.data.index import CLASSES_NAMES, load_classes
from adala.data.masks import MASK_EXTENSIONS, MaskFormat
from adala.data.tars import MAX_FILE_BYTES

# What a key cannot have: a dot would end it, a slash make folders of it, and a percent sign begins what stands for any.
NOT_IN_KEYS = "%/."

BESIDE_CLASSES = "it lies beside the folders of the classes"
NO_FILE = "it is no file that can be read"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was listed, so that one that changes meanwhile is noticed.

    Attributes:
        path: Where it lies.
        bytes: Its size.
        modified_ns: When it was last written, in ns since 1970.
    """

    path: str
    bytes: int
    modified_ns: int

    @property
    def extension(self) -> str:
        """In lower case, without its dot."""
        return os.path.splitext(self.path)[1].lower().removeprefix(".")


@dataclass(frozen=True, slots=True)
class Item:
    """What becomes one sample: an image, and its class or mask where it has one."""

    key: str
    image: SourceFile
    label: int | None = None
    mask: SourceFile | None = None

    @property
    def bytes(self) -> int:
        return self.image.bytes + (self.mask.bytes if self.mask else 0)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that is in no shard.

    Attributes:
        file: Its path.
        reason: Why, in words that many files share.
        detail: What more there is to say.
        is_bad: Whether it should have been a sample; notes that lie beside images should not.
    """

    file: str
    reason: str
    detail: str = ""
    is_bad: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}{f': {self.detail}' if self.detail else ''}"


@dataclass
class Listing:
    """What becomes a split.

    Attributes:
        items: Its samples to be, each with a key of its own.
        classes: Names of the classes; None where the items have no labels.
        form: How masks are coded; None takes them as they come.
        left_out: Files that are in no sample.
        empty_classes: Classes without an image.
    """

    items: list[Item] = field(default_factory=list)
    classes: list[str] | None = None
    form: MaskFormat | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)


def list_images(source: Path) -> Listing:
    """All images below a folder, without labels.

    Raises:
        ValueError: There is none.
    """
    listing = Listing()
    images = list(_images(files_below(_folder(source)), listing))
    listing.items = [Item(key, image) for key, image in zip(_keys(source, images), images, strict=True)]
    return _with_images(listing, source)


def list_class_folders(source: Path, known: list[str] | None = None) -> Listing:
    """Images of a folder with a sub-folder for each class; without labels where it has none, or only one.

    Args:
        source: The folder.
        known: The classes in the order of their numbers, as another split has them; None takes the folders, sorted.

    Raises:
        ValueError: There is no image, or there are classes that are not known.
    """
    names = class_names(_folder(source))
    new = sorted(set(names) - set(known or names))
    # One folder is no class: of a label that is always the same nothing is learnt, and every model scores 100 %.
    if not names or len(known or names) == 1 or (len(names) == 1 and new):
        return list_images(source)
    if new:
        raise ValueError(
            f"the shards have a list of other classes than {source} has ({new[0]!r} is not among them), and labels "
            "would not agree: write to another folder, or give both splits the same sub-folders"
        )
    listing = Listing(classes=known or names)
    beside = files_below(source, names=())
    listing.left_out += [LeftOut(str(path), BESIDE_CLASSES, is_bad=False) for path in beside]
    numbers = {name: number for number, name in enumerate(listing.classes)}
    images, labels = [], []
    for name in names:
        of_class = list(_images(files_below(source / name), listing))
        listing.empty_classes += [] if of_class else [name]
        images += of_class
        labels += [numbers[name]] * len(of_class)
    keys = _keys(source, images)
    listing.items = [Item(*of_item) for of_item in zip(keys, images, labels, strict=True)]
    return _with_images(listing, source)


def class_names(source: Path) -> list[str]:
    """The sub-folders of a folder, sorted."""
    return sorted(path.name for path in source.iterdir() if path.is_dir() and not is_passed_over(path.name))


def known_classes(shards: Path) -> list[str] | None:
    """The list of classes that lies beside shards; None where there is none."""
    present = [shards / name for name in CLASSES_NAMES if (shards / name).exists()]
    return list(load_classes(str(present[0]))) if present else None


def list_labelled(source: Path, labels: dict[str, int], classes: Sequence[str], where: str) -> Listing:
    """Images of a folder, at any depth, whose classes a list gives.

    Args:
        source: The folder.
        labels: Class by name of the image, without its folder and extension.
        classes: Names of the classes.
        where: What ``labels`` come from, for the reason why an image without one is left out.

    Raises:
        ValueError: There is no image that has one.
    """
    listing = Listing(classes=list(classes))
    images = list(_images(files_below(_folder(source)), listing))
    for key, image in zip(_keys(source, images), images, strict=True):
        label = labels.get(Path(image.path).stem)
        if label is None:
            listing.left_out.append(LeftOut(image.path, f"{where} does not have it"))
        else:
            listing.items.append(Item(key, image, label))
    if images and not listing.items:
        raise ValueError(f"{where} has none of the images in {source}, as {images[0].path}: name the list of these")
    return _with_images(listing, source)


def list_pairs(
    images: Path, masks: Path, form: MaskFormat | None = None, image_ending: str = "", mask_ending: str = ""
) -> Listing:
    """Images and masks with the same place below their folders and the same name, but for ending and extension.

    Raises:
        ValueError: A folder is none, or there is no pair.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: name the one of the images, and then the one of the masks")
    listing = Listing(form=form)
    found = _by_name(images, image_ending, IMAGE_FIELDS, listing)
    found_masks = _by_name(masks, mask_ending, MASK_EXTENSIONS, listing)
    names = sorted(found.keys() & found_masks.keys())
    if not names:
        raise ValueError(
            f"no mask in {masks} belongs to an image in {images}: of {len(found)} images and {len(found_masks)} masks "
            f"none have the same name, as 1{image_ending}.jpg and 1{mask_ending}.png"
        )
    listing.left_out += [LeftOut(found[name].path, "it has no mask") for name in sorted(found.keys() - names)]
    alone = sorted(found_masks.keys() - names)
    listing.left_out += [LeftOut(found_masks[name].path, "it has no image", is_bad=False) for name in alone]
    keys = _shortest(names)
    listing.items = [Item(escaped(key), found[n], None, found_masks[n]) for key, n in zip(keys, names, strict=True)]
    return listing


def _by_name(folder: Path, ending: str, extensions: Sequence[str], listing: Listing) -> dict[str, SourceFile]:
    found: dict[str, SourceFile] = {}
    for path in files_below(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if path.suffix.lower().removeprefix(".") not in extensions or not stem.endswith(ending):
            # Beside Cityscapes' masks lie others of instances and colours, under other endings.
            reason = f"its extension is none of .{', .'.join(extensions)}"
            listing.left_out += [] if ending else [LeftOut(str(path), reason, is_bad=False)]
            continue
        name = stem.removesuffix(ending)
        if name in found:
            listing.left_out.append(LeftOut(str(path), f"{Path(found[name].path).name} has the same name"))
        else:
            found.update((name, file) for file in _regular([path], listing))
    return found


def _folder(source: Path) -> Path:
    if not source.is_dir():
        raise ValueError(f"{source} is no folder: name the one in which the images lie")
    return source


def _with_images(listing: Listing, source: Path) -> Listing:
    if not listing.items:
        raise ValueError(f"{source} holds no images, which are files .{', .'.join(IMAGE_FIELDS)}")
    return listing


def _images(paths: Iterable[Path], listing: Listing) -> Iterator[SourceFile]:
    """Those whose names are images'; the others are added to what is left out."""
    named = []
    for path in paths:
        if path.suffix.lower().removeprefix(".") in IMAGE_FIELDS:
            named.append(path)
        else:
            listing.left_out.append(LeftOut(str(path), "its name is not that of an image", is_bad=False))
    yield from _regular(named, listing)


def _regular(paths: Iterable[Path], listing: Listing) -> Iterator[SourceFile]:
    """Those that are files once links are followed, and not larger than a shard's may be."""
    for path in paths:
        try:
            status = path.stat()
        except (FileNotFoundError, PermissionError, RuntimeError) as error:  # a link to nowhere
            listing.left_out.append(LeftOut(str(path), NO_FILE, _in_words(error)))
            continue
        except OSError as error:
            if not path.is_symlink():
                raise
            listing.left_out.append(LeftOut(str(path), NO_FILE, _in_words(error)))  # a link to itself
            continue
        if not stat.S_ISREG(status.st_mode):
            listing.left_out.append(LeftOut(str(path), NO_FILE, "it is a device or a pipe"))
        elif status.st_size > MAX_FILE_BYTES:
            listing.left_out.append(LeftOut(str(path), f"it is larger than {MAX_FILE_BYTES} bytes"))
        else:
            yield SourceFile(str(path), status.st_size, status.st_mtime_ns)


def _in_words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _keys(source: Path, files: Sequence[SourceFile]) -> list[str]:
    """Keys by the files' names: without folders and extensions where that tells all of them apart."""
    names = [Path(file.path).relative_to(source) for file in files]
    stems = [name.with_suffix("").as_posix() for name in names]
    stems = stems if len(set(stems)) == len(stems) else [name.as_posix() for name in names]
    return [escaped(name) for name in _shortest(stems)]


def _shortest(names: Sequence[str]) -> list[str]:
    """Names without their folders, where that tells all of them apart."""
    counts = Counter(name.rpartition("/")[2] for name in names)
    return list(names) if len(counts) < len(names) else [name.rpartition("/")[2] for name in names]


def escaped(name: str) -> str:
    """A name as a key: what a key cannot have, and what cannot be printed or is no UTF-8, as %XX for each byte."""
    if name.isprintable() and not any(character in name for character in NOT_IN_KEYS):
        return name
    return "".join(
        character
        if character.isprintable() and character not in NOT_IN_KEYS
        else "".join(f"%{byte:02X}" for byte in os.fsencode(character))
        for character in name
    )
