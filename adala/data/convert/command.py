"""The command: what is to be converted, from its words, and what is said of it."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adala.data.addresses import local_path
from adala.data.convert.conversion import Converted, Settings, convert, record_path
from adala.data.convert.conversion import Progress as OnProgress
from adala.data.convert.encoding import Encoding
from adala.data.convert.published import PUBLISHED, list_published
from adala.data.convert.shards import Cut
from adala.data.convert.sources import (
    Listing,
    known_classes,
    list_class_folders,
    list_images,
    list_pairs,
)
from adala.data.index import own_index
from adala.data.pack import write_embedded
from adala.failures import report_failure

IMAGES_PER_SHARD, PAIRS_PER_SHARD = 1000, 250
WITH_MASKS = ("segmentation", "ade20k", "cityscapes")
# Of files that are left out, those of which each has a line.
SHOWN_FILES = 20
# Between two lines of progress, where there is no terminal.
LINE_EVERY_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code is 1 after a mistake, which is one sentence."""
    options = build_parser().parse_args(arguments)
    try:
        folder = Path(local_path(options.folder))
        if options.command == "embedded":
            write_embedded(folder)
        else:
            _convert(options, folder)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error)
    print(f"the index is {own_index(folder)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adala.data.convert",
        description="Write WebDataset shards and their index. The same command goes on with what was stopped.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    classes = commands.add_parser("imagefolder", help="images with labels, in a sub-folder for each class")
    classes.add_argument("source", help="folder with a sub-folder for each class; without any there are no labels")
    images = commands.add_parser("images", help="images without labels, at any depth")
    images.add_argument("source", help="folder of images")
    pairs = commands.add_parser("segmentation", help="a folder of images and one of masks, by their names")
    pairs.add_argument("images", help="folder of images, at any depth")
    pairs.add_argument("masks", help="folder with each mask at the same place and of the same name")
    pairs.add_argument("--mask-ending", default="", help="what the masks' names have beyond the images', as _mask")
    for command in (classes, images, pairs):
        command.add_argument("--split", default="train", help="name before the shards' numbers (train)")
    for name, published in PUBLISHED.items():
        command = commands.add_parser(name, help=f"{', '.join(published.usual_splits)}, of {published.words}")
        command.add_argument("source", help=published.words)
        usual = ", ".join(published.usual_splits)
        command.add_argument("--splits", nargs="+", choices=published.splits, help=f"({usual}, if they are there)")
    commands.choices["imagenet"].add_argument(
        "--val-labels", type=Path, help="list of the classes of a val whose images lie side by side"
    )
    commands.add_parser("embedded", help="the embedded Fashion-MNIST slice")
    for name, command in commands.choices.items():
        command.add_argument("folder", help="where the shards go")
        if name != "embedded":
            _add_settings(command, PAIRS_PER_SHARD if name in WITH_MASKS else IMAGES_PER_SHARD)
    return parser


def _add_settings(command: argparse.ArgumentParser, samples: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, kind, default, words in (
        ("--samples-per-shard", int, samples, f"at most so many ({samples})"),
        ("--shard-mib", float, None, "at most so many MiB of source files in a shard (any)"),
        ("--seed", int, 0, "of the order of the samples (0)"),
        (
            "--max-size",
            int,
            None,
            "largest shorter side in pixels; what is larger, or no JPEG, becomes JPEG (as it is)",
        ),
        ("--quality", int, 92, "of these JPEG images, 1 to 100 (92)"),
        ("--workers", int, cores, f"processes, which change nothing in the shards ({cores})"),
        ("--max-bad-fraction", float, 0.01, "part of the samples that may be unusable, though 10 always may (0.01)"),
    ):
        command.add_argument(name, type=kind, default=default, help=words)
    command.add_argument("--overwrite", action="store_true", help="replace the split if it was made otherwise")


def _convert(options: argparse.Namespace, folder: Path) -> None:
    settings = Settings(
        Cut(options.samples_per_shard, options.shard_mib, options.seed),
        Encoding(options.max_size, options.quality),
        options.workers,
        options.max_bad_fraction,
        options.overwrite,
    )
    for split, listing in _listings(options, folder).items():
        if listing.empty_classes:
            print(f"classes without an image: {', '.join(listing.empty_classes)}", file=sys.stderr)
        with _progress(split) as progress:
            converted = convert(listing, folder, split, settings, progress)
        _say(split, listing, converted, record_path(folder, split))


def _listings(options: argparse.Namespace, folder: Path) -> Mapping[str, Listing]:
    """What becomes of each split.

    Raises:
        ValueError: The source is not what it should be, or has the shards' folder in it.
    """
    if options.command in PUBLISHED:
        labels = getattr(options, "val_labels", None)
        return list_published(options.command, Path(local_path(options.source)), folder, options.splits, labels)
    names = [options.images, options.masks] if options.command == "segmentation" else [options.source]
    sources = [Path(local_path(name)) for name in names]
    for source in sources:
        if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"the shards would lie among the images, in {source}: name a folder elsewhere")
    if options.command == "segmentation":
        return {options.split: list_pairs(*sources, mask_ending=options.mask_ending)}
    if options.command == "images":
        return {options.split: list_images(*sources)}
    return {options.split: list_class_folders(*sources, known_classes(folder))}


@contextmanager
def _progress(split: str) -> Iterator[OnProgress]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not sys.stdout.isatty():
        yield _lines(split)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=Console(highlight=False))
    task = bar.add_task(split, total=None)

    def update(done: int, total: int, samples: int) -> None:
        bar.update(task, completed=done, total=total)
        if samples:  # by then all processes are there, and none of them gets a copy of the bar's thread
            bar.start()

    try:
        yield update
    finally:
        bar.stop()


def _lines(split: str, clock: Callable[[], float] = time.monotonic) -> OnProgress:
    started = said = clock()

    def say(done: int, total: int, samples: int) -> None:
        nonlocal said
        if done and not samples and done < total:
            print(f"{split}: {done} of {total} shards are there, going on", flush=True)
        elif clock() - said >= LINE_EVERY_S:
            said = clock()
            print(f"{split}: {done} of {total} shards, {samples / (said - started):.0f} samples/s", flush=True)

    return say


def _say(split: str, listing: Listing, converted: Converted, record: Path) -> None:
    """What came of it, on stderr what is missing."""
    _say_left_out(converted.left_out, record)
    has_masks = listing.items[0].mask is not None
    said = f"{split}: {_counted(converted.samples, 'pair of image and mask' if has_masks else 'image')}"
    said += f" in {_counted(converted.shards, 'shard')}"
    if not has_masks:
        said += f", {_counted(len(listing.classes), 'class')}" if listing.classes else ", no labels"
    if converted.values:
        said += f", masks of {len(converted.values)} values from {min(converted.values)} to {max(converted.values)}"
    if converted.coloured:
        said += f", {_counted(converted.coloured, 'mask')} coded in colours (mask.encoding: rgb)"
    if converted.encoded:
        said += f", {_counted(converted.encoded, 'image')} encoded anew"
    print(said + (": all of it was there" if converted.was_there else ""))


def _say_left_out(left_out: Sequence, record: Path) -> None:
    if not left_out:
        return
    reasons = Counter(each.reason for each in left_out)
    counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    print(f"left out {_counted(len(left_out), 'file')} ({counts}):", file=sys.stderr)
    for each in left_out[:SHOWN_FILES]:
        print(f"  {each}", file=sys.stderr)
    if len(left_out) > SHOWN_FILES:
        print(f"  and {len(left_out) - SHOWN_FILES} more, all of them in {record}", file=sys.stderr)


def _counted(count: int, what: str) -> str:
    """A number of things; "3 pairs of image and mask"."""
    word, space, rest = what.partition(" ")
    return f"{count} {word if count == 1 else word + ('es' if word.endswith('s') else 's')}{space}{rest}"
