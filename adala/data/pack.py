"""Writes shards: from any samples, from folders of images by class or with masks, and of the embedded data set."""

import argparse
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset import ShardWriter

from adala.data.addresses import local_path
from adala.data.embedded import load_split
from adala.data.folders import files_below, is_passed_over
from adala.data.images import IMAGE_FIELDS, DecodeError, decode_image
from adala.data.index import (
    CLASSES_NAMES,
    Shard,
    count_samples,
    listed_shards,
    load_classes,
    load_index,
    own_index,
    write_index,
)
from adala.data.masks import MaskFormat
from adala.data.pack_segmentation import LAYOUTS, PackedPairs, Pair, find_layout, find_pairs, read_pairs
from adala.files import write_json

CLASSES_NAME = CLASSES_NAMES[0]
EMBEDDED_SAMPLES_PER_SHARD = 2000
EMBEDDED_SAMPLES = {"train": 16_000, "val": 4_000}
PAIRS_PER_SHARD = 250


def write_shards(samples: Iterable[dict[str, Any]], folder: str | Path, split: str, samples_per_shard: int) -> None:
    """Writes ``split-00000.tar``, ... and the folder's index; the shards of other splits stay as they are.

    The new shards take the place of the split's old ones once all of them are written; until then, and should this
    stop half-way, the index does not list a split that is not whole.

    Args:
        samples: Each a dict from extension to content, ``{"jpg": bytes or PIL image, "cls": int}`` say. Without
            ``__key__`` it is numbered.
        folder: Made if it is not there.
        split: Name before the shards' numbers.
        samples_per_shard: Of all shards but the last.

    Raises:
        ValueError: No samples, a split with a folder in its name, or shards of less than one sample.
    """
    folder = Path(folder).absolute()
    if not split or "/" in split:
        raise ValueError(f"the split {split!r} is no name of a file: choose one such as train or val")
    if samples_per_shard < 1:
        raise ValueError(f"a shard holds at least one sample, not {samples_per_shard}")
    samples = iter(samples)
    first = list(islice(samples, 1))
    if not first:
        raise ValueError(f"there are no samples to write as the split {split!r} of {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    kept = _shards_of_other_splits(folder, split)
    temporary = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder))
    try:
        _write_tars(chain(first, samples), temporary, split, samples_per_shard)
        paths = sorted(temporary.glob("*.tar"))
        shards = [Shard(str(folder / path.name), count_samples(path).samples, path.stat().st_size) for path in paths]
        if own_index(folder).exists():
            write_index(folder, kept)
        for old in folder.glob("*.tar"):
            if _is_of_split(old.name, split):
                old.unlink()
        for path in paths:
            path.rename(folder / path.name)
        write_index(folder, [*kept, *shards])
    finally:
        shutil.rmtree(temporary)


def _shards_of_other_splits(folder: Path, split: str) -> list[Shard]:
    return [shard for shard in listed_shards(f"{folder}/") if not _is_of_split(shard.name, split)]


def _is_of_split(name: str, split: str) -> bool:
    stem, _, number = name.removesuffix(".tar").rpartition("-")
    return stem == split and number.isdigit()


def _write_tars(samples: Iterable[dict[str, Any]], folder: Path, split: str, samples_per_shard: int) -> None:
    # The writer puts numbers into it with %.
    pattern = str(folder / split).replace("%", "%%") + "-%05d.tar"
    # A fixed time, so that the same samples give the same bytes.
    with ShardWriter(pattern, maxcount=samples_per_shard, maxsize=float("inf"), verbose=0, mtime=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:08d}", **sample})


def write_embedded(folder: str | Path) -> None:
    """Writes the embedded Fashion-MNIST slice as PNG shards: 16,000 train and 4,000 val samples with labels.

    Does nothing where a complete copy lies already.
    """
    for split, num_samples in EMBEDDED_SAMPLES.items():
        if not _is_complete(Path(folder), split, num_samples):
            write_shards(_embedded_samples(split), folder, split, EMBEDDED_SAMPLES_PER_SHARD)


def _is_complete(folder: Path, split: str, num_samples: int) -> bool:
    try:
        return load_index([f"{folder}/{split}-*.tar"]).num_samples == num_samples
    except ValueError:  # no index, or not with these shards
        return False


def _embedded_samples(split: str) -> Iterator[dict[str, Any]]:
    images, labels = load_split(split)
    for pixels, label in zip(images, labels, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="PNG")
        yield {"png": stream.getvalue(), "cls": int(label)}


@dataclass
class Packed:
    """What became of a folder of images.

    Attributes:
        classes: Names of the classes; None where the images have no labels.
        images: How many went into the shards.
        left_out: Files that did not, and why.
        empty_classes: Classes without an image.
    """

    classes: list[str] | None
    images: int = 0
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)


def write_image_folder(
    source: str | Path, folder: str | Path, split: str, samples_per_shard: int = 1000, seed: int = 0
) -> Packed:
    """Writes a folder of images as shards: with labels where it has a sub-folder for each class, without them else.

    Images are copied as they are, in an order shuffled by ``seed``: a shard is to hold many classes, because reading
    shuffles within a buffer only. ``classes.json`` beside the shards lists the sub-folders' names, sorted, each at its
    label's place; a further split takes its numbers from there. Hidden files and folders are passed over.

    Raises:
        ValueError: No image in ``source``, or a class that the ``classes.json`` of ``folder`` does not have.
    """
    source, folder = Path(local_path(str(source))), Path(local_path(str(folder)))
    if not source.is_dir():
        raise ValueError(f"{source} is no folder: name the one in which the images lie")
    names = sorted(path.name for path in source.iterdir() if path.is_dir() and not is_passed_over(path.name))
    packed = Packed(_classes_of(folder, names))
    files = list(_images_by_class(source, names, packed))
    if not files:
        raise ValueError(f"{source} holds no images, which are files .{', .'.join(IMAGE_FIELDS)}")
    random.Random(seed).shuffle(files)
    write_shards(_readable_samples(files, packed), folder, split, samples_per_shard)
    if packed.classes is not None:
        write_json(folder / CLASSES_NAME, packed.classes)
    return packed


def _classes_of(folder: Path, names: list[str]) -> list[str] | None:
    """The classes in the order of their numbers: those that the folder's shards have already, else ``names``."""
    present = [folder / name for name in CLASSES_NAMES if (folder / name).exists()]
    known = list(load_classes(str(present[0]))) if present else names
    new = sorted(set(names) - set(known))
    # One folder is no class: of a label that is always the same nothing is learnt, and every model scores 100 %.
    if not names or len(known) == 1 or (len(names) == 1 and new):
        return None
    if new:
        raise ValueError(
            f"{present[0]} lists other classes than the new split has ({new[0]!r} is not among them), and labels would "
            "not agree: write to another folder, or give both splits the same sub-folders"
        )
    return known


def _images_by_class(source: Path, names: list[str], packed: Packed) -> Iterator[tuple[Path, int | None]]:
    """The images and their labels; what is none is added to what is left out."""
    for path in files_below(source, names=()):
        if packed.classes is not None:
            packed.left_out.append((path, "it lies beside the folders of the classes"))
        elif _is_image(path, packed):
            yield path, None
    for name in names:
        label = None if packed.classes is None else packed.classes.index(name)
        images = [path for path in files_below(source / name) if _is_image(path, packed)]
        packed.empty_classes += [] if images else [name]
        yield from ((path, label) for path in images)


def _is_image(path: Path, packed: Packed) -> bool:
    if path.suffix.lower().removeprefix(".") in IMAGE_FIELDS:
        return True
    packed.left_out.append((path, "its name is not that of an image"))
    return False


def _readable_samples(files: Iterable[tuple[Path, int | None]], packed: Packed) -> Iterator[dict[str, Any]]:
    """Samples of those files that decode; the others are added to what is left out."""
    for path, label in files:
        try:
            content = path.read_bytes()
            decode_image(content)
        except (DecodeError, OSError) as error:
            packed.left_out.append((path, f"it cannot be decoded: {error}"))
            continue
        packed.images += 1
        yield {path.suffix.lower().removeprefix("."): content} | ({} if label is None else {"cls": label})
    if not packed.images:
        path, reason = packed.left_out[-1]
        raise ValueError(f"none of the images can be read, as {path}: {reason}")


def write_segmentation_data_set(
    name: str, source: str | Path, folder: str | Path, samples_per_shard: int = PAIRS_PER_SHARD, seed: int = 0
) -> dict[str, PackedPairs]:
    """Writes the train and val splits of a published data set for segmentation as shards, and ``classes.json``.

    Files are copied as they are, in an order shuffled by ``seed``; a recipe's label map makes classes of the masks'
    numbers.

    Args:
        name: ``ade20k`` or ``cityscapes``.
        source: Its folder, laid out as it is published.
        folder: Where the shards go.
        samples_per_shard: Of all shards but the last.
        seed: Of the order.

    Returns:
        What became of it, by split.

    Raises:
        ValueError: Another layout, no pair of image and mask that can be read, or other classes beside the shards.
    """
    layout, source, folder = LAYOUTS[name], Path(local_path(str(source))), Path(local_path(str(folder)))
    splits = find_layout(layout, source)
    present = [folder / known for known in CLASSES_NAMES if (folder / known).exists()]
    if present and load_classes(str(present[0])) != layout.classes:
        raise ValueError(f"{present[0]} lists other classes than {name} has: write to another folder")
    results = {split: PackedPairs() for split in splits}
    for split, (images, masks) in splits.items():
        pairs = find_pairs(images, masks, results[split], layout.image_ending, layout.mask_ending)
        _write_pairs(pairs, layout.form, folder, split, samples_per_shard, seed, results[split])
    write_json(folder / CLASSES_NAME, list(layout.classes))
    return results


def write_pairs(
    images: str | Path,
    masks: str | Path,
    folder: str | Path,
    split: str,
    samples_per_shard: int = PAIRS_PER_SHARD,
    seed: int = 0,
    mask_ending: str = "",
) -> PackedPairs:
    """Writes images and the masks of the same names as shards, copied as they are, in an order shuffled by ``seed``.

    Args:
        images: Folder of images, at any depth.
        masks: Folder with each mask at the same place, of the same name up to the extension.
        folder: Where the shards go.
        split: Name before the shards' numbers.
        samples_per_shard: Of all shards but the last.
        seed: Of the order.
        mask_ending: What the masks' names have beyond the images', before the extension.

    Raises:
        ValueError: No pair, or none that can be read.
    """
    packed = PackedPairs()
    folder = Path(local_path(str(folder)))
    pairs = find_pairs(Path(local_path(str(images))), Path(local_path(str(masks))), packed, mask_ending=mask_ending)
    _write_pairs(pairs, None, folder, split, samples_per_shard, seed, packed)
    return packed


def _write_pairs(
    pairs: list[Pair],
    form: MaskFormat | None,
    folder: Path,
    split: str,
    samples_per_shard: int,
    seed: int,
    packed: PackedPairs,
) -> None:
    random.Random(seed).shuffle(pairs)
    write_shards(read_pairs(pairs, form, packed), folder, split, samples_per_shard)


def _say_left_out(left_out: list[tuple[Path, str]]) -> None:
    if left_out:
        print(f"left out {len(left_out)} files:", file=sys.stderr)
        for path, reason in left_out:
            print(f"  {path}: {reason}", file=sys.stderr)


def _say(packed: Packed) -> None:
    """What came of it, on stderr what is missing."""
    _say_left_out(packed.left_out)
    if packed.empty_classes:
        print(f"classes without an image: {', '.join(packed.empty_classes)}", file=sys.stderr)
    labels = f"{len(packed.classes)} classes" if packed.classes else "no labels, since there are no folders of classes"
    print(f"{packed.images} images, {labels}")


def _say_pairs(split: str, packed: PackedPairs) -> None:
    """What came of it, on stderr what is missing."""
    _say_left_out(packed.left_out)
    print(f"{split}: {packed.pairs} pairs of image and mask", end="")
    if packed.values:
        print(f", masks of {len(packed.values)} values from {min(packed.values)} to {max(packed.values)}", end="")
    print(f", {packed.coloured} masks coded in colours (mask.encoding: rgb)" if packed.coloured else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code is 1 after a mistake, which is one sentence."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {own_index(local_path(options.folder))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m adala.data.pack", description="Write WebDataset shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser("imagefolder", help="a folder of images, with labels by sub-folder")
    images.add_argument("source", help="folder of images, or with a sub-folder for each class")
    pairs = commands.add_parser("segmentation", help="a folder of images and one of masks, by their names")
    pairs.add_argument("images", help="folder of images, at any depth")
    pairs.add_argument("masks", help="folder with each mask at the same place and of the same name")
    pairs.add_argument("--mask-ending", default="", help="what the masks' names have beyond the images', as _mask")
    for name, layout in LAYOUTS.items():
        data_set = commands.add_parser(name, help=f"train and val, of {layout.words}".replace("%", "%%"))
        data_set.add_argument("source", help=layout.words)
    embedded = commands.add_parser("embedded", help="the embedded Fashion-MNIST slice")
    for command in commands.choices.values():
        command.add_argument("folder", help="where the shards go")
        if command is not embedded:
            samples = 1000 if command is images else PAIRS_PER_SHARD
            command.add_argument(
                "--samples-per-shard", type=int, default=samples, help=f"samples in each shard ({samples})"
            )
            command.add_argument("--seed", type=int, default=0, help="of the order of the images (0)")
    for command in (images, pairs):
        command.add_argument("--split", default="train", help="name before the shards' numbers (train)")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.command == "embedded":
        write_embedded(local_path(options.folder))
        return
    sizes = {"samples_per_shard": options.samples_per_shard, "seed": options.seed}
    if options.command == "imagefolder":
        _say(write_image_folder(options.source, options.folder, options.split, **sizes))
    elif options.command == "segmentation":
        packed = write_pairs(
            options.images, options.masks, options.folder, options.split, mask_ending=options.mask_ending, **sizes
        )
        _say_pairs(options.split, packed)
    else:
        results = write_segmentation_data_set(options.command, options.source, options.folder, **sizes)
        for split, packed in results.items():
            _say_pairs(split, packed)


if __name__ == "__main__":
    sys.exit(main())
