"""Writes shards of any samples, and of the embedded data set; of folders of images see :mod:`adala.data.convert`."""

import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset import ShardWriter

from adala.data.embedded import load_split
from adala.data.index import Shard, count_samples, listed_shards, load_index, own_index, write_index
from adala.files import sync_folder

EMBEDDED_SAMPLES_PER_SHARD = 2000
EMBEDDED_SAMPLES = {"train": 16_000, "val": 4_000}


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
    check_split(split)
    if samples_per_shard < 1:
        raise ValueError(f"a shard holds at least one sample, not {samples_per_shard}")
    samples = iter(samples)
    first = list(islice(samples, 1))
    if not first:
        raise ValueError(f"there are no samples to write as the split {split!r} of {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder))
    try:
        _write_tars(chain(first, samples), temporary, split, samples_per_shard)
        paths = sorted(temporary.glob("*.tar"))
        shards = [Shard(str(folder / path.name), count_samples(path).samples, path.stat().st_size) for path in paths]
        move_shards(temporary, folder, split, shards)
        list_shards(folder, split, shards)
    finally:
        shutil.rmtree(temporary)


def check_split(split: str) -> None:
    """Refuses what cannot stand before the shards' numbers.

    Raises:
        ValueError: It is empty, hidden, or has a folder in it.
    """
    if not split or "/" in split or split.startswith("."):
        raise ValueError(f"the split {split!r} is no name of a file: choose one such as train or val")


def move_shards(staged: Path, folder: Path, split: str, shards: Sequence[Shard]) -> None:
    """Puts finished shards, which lie in ``staged``, into the place of the split's old ones.

    The index does not list the split any more, see :func:`list_shards`. Called again after it was stopped half-way, it
    moves what is left.
    """
    if own_index(folder).exists():
        write_index(folder, shards_of(folder, split, others=True))
    moved = {shard.name for shard in shards if not (staged / shard.name).exists()}
    for old in folder.glob("*.tar"):
        if is_of_split(old.name, split) and old.name not in moved:
            old.unlink()
    for shard in shards:
        if shard.name not in moved:
            (staged / shard.name).rename(folder / shard.name)
    sync_folder(folder)


def list_shards(folder: Path, split: str, shards: Sequence[Shard]) -> None:
    """Writes the index: the shards of a split beside those of the others."""
    write_index(folder, [*shards_of(folder, split, others=True), *shards])


def shards_of(folder: Path, split: str, others: bool = False) -> list[Shard]:
    """The shards of a split that the index lists, or those of all others."""
    return [shard for shard in listed_shards(f"{folder}/") if is_of_split(shard.name, split) != others]


def is_of_split(name: str, split: str) -> bool:
    """Whether a shard has the name that one of the split has."""
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
