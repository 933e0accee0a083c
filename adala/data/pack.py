"""Writes shards: from any samples, from a folder of images by class, and the embedded Fashion-MNIST slice."""

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset import ShardWriter

from adala.data.embedded import load_split
from adala.data.index import INDEX_NAME, Shard, count_samples, load_index, read_index, write_index
from adala.data.samples import DecodeError, decode_image

CLASSES_NAME = "classes.json"
EMBEDDED_SAMPLES_PER_SHARD = 2000
EMBEDDED_SAMPLES = {"train": 16_000, "val": 4_000}
# Extension of a file -> extension in the shard.
IMAGE_SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


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
        ValueError: No samples, or the folder has an ``index.json`` that is not one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = _shards_of_other_splits(folder, split)
    temporary = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder))
    try:
        _write_tars(samples, temporary / f"{split}-%05d.tar", samples_per_shard)
        paths = sorted(temporary.glob("*.tar"))
        shards = [Shard(str(folder / path.name), count_samples(path), path.stat().st_size) for path in paths]
        if not any(shard.samples for shard in shards):
            raise ValueError(f"there are no samples to write as the split {split!r} of {folder}")
        if (folder / INDEX_NAME).exists():
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
    if not (folder / INDEX_NAME).exists():
        return []
    return [shard for name, shard in read_index(f"{folder}/").items() if not _is_of_split(name, split)]


def _is_of_split(name: str, split: str) -> bool:
    stem, _, number = name.removesuffix(".tar").rpartition("-")
    return stem == split and number.isdigit()


def _write_tars(samples: Iterable[dict[str, Any]], pattern: Path, samples_per_shard: int) -> None:
    # A fixed time, so that the same samples give the same bytes.
    with ShardWriter(str(pattern), maxcount=samples_per_shard, maxsize=float("inf"), verbose=0, mtime=0) as writer:
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


def write_image_folder(
    source: str | Path, folder: str | Path, split: str, samples_per_shard: int = 1000, seed: int = 0
) -> list[Path]:
    """Writes a folder of images, one sub-folder a class, as shards with labels, and ``classes.json`` beside them.

    Images are copied as they are, in an order shuffled by ``seed``: a shard is to hold many classes, because reading
    shuffles within a buffer only. ``classes.json`` lists the sub-folders' names, sorted, each at its label's place.

    Returns:
        Files that were left out because they cannot be decoded.

    Raises:
        ValueError: No class or no image in ``source``, or ``folder`` has shards of other classes.
    """
    names = sorted(path.name for path in Path(source).iterdir() if path.is_dir())
    if not names:
        raise ValueError(
            f"{source} holds no sub-folders: it needs one for each class, with its images inside "
            "(a single one for images without labels)"
        )
    _write_classes(Path(folder), names)
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((Path(source) / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    random.Random(seed).shuffle(files)
    left_out: list[Path] = []
    write_shards(_readable_samples(files, left_out), folder, split, samples_per_shard)
    return left_out


def _readable_samples(files: Iterable[tuple[Path, int]], left_out: list[Path]) -> Iterator[dict[str, Any]]:
    """Samples of those files that decode; the others are added to ``left_out``."""
    for path, label in files:
        content = path.read_bytes()
        try:
            decode_image(content)
        except DecodeError:
            left_out.append(path)
        else:
            yield {IMAGE_SUFFIXES[path.suffix.lower()]: content, "cls": label}


def _write_classes(folder: Path, names: list[str]) -> None:
    path = folder / CLASSES_NAME
    if path.exists() and json.loads(path.read_text()) != names:
        raise ValueError(
            f"{path} lists other classes than the new split has, and labels would not agree: write to another folder, "
            "or give both splits the same sub-folders"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(names, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code is 1 after a mistake, which is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m adala.data.pack", description="Write WebDataset shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser("imagefolder", help="a folder of images, one sub-folder a class")
    images.add_argument("source", help="folder with a sub-folder for each class (a single one without labels)")
    images.add_argument("folder", help="where the shards go")
    images.add_argument("--split", default="train", help="name before the shards' numbers (train)")
    images.add_argument("--samples-per-shard", type=int, default=1000, help="samples in each shard (1000)")
    images.add_argument("--seed", type=int, default=0, help="of the order of the images (0)")
    embedded = commands.add_parser("embedded", help="the embedded Fashion-MNIST slice")
    embedded.add_argument("folder", help="where the shards go")
    options = parser.parse_args(arguments)
    left_out: list[Path] = []
    try:
        if options.command == "imagefolder":
            left_out = write_image_folder(
                options.source, options.folder, options.split, options.samples_per_shard, options.seed
            )
        else:
            write_embedded(options.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if left_out:
        shown = ", ".join(map(str, left_out[:3])) + (", ..." if len(left_out) > 3 else "")
        print(f"left out {len(left_out)} files that cannot be decoded: {shown}", file=sys.stderr)
    print(f"wrote {Path(options.folder) / INDEX_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
