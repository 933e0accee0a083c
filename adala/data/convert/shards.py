"""Which items become which shard, and one shard written whole, with a record of it beside it."""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from webdataset import TarWriter

from adala.data.convert.encoding import Encoded, Encoding, UnusableError, encode
from adala.data.convert.sources import Item, LeftOut
from adala.data.masks import MaskFormat
from adala.files import read_json, sync_folder, write_json

MIB = 2**20


@dataclass(frozen=True)
class Cut:
    """How items are cut into shards, in an order of their own.

    An item that turns out to be unusable leaves its shard one shorter, so that what is in a shard is known before
    anything is read.

    Attributes:
        samples_per_shard: At most.
        shard_mib: The source files of a shard have at most so many MiB, unless it is a single one; None sets no limit.
        seed: Of the order.
    """

    samples_per_shard: int
    shard_mib: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: A shard would have no room for a sample.
        """
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard must be 1 or more, not {self.samples_per_shard}")
        if self.shard_mib is not None and not self.shard_mib > 0:
            raise ValueError(f"--shard-mib must be above 0, not {self.shard_mib:g}")

    def shards(self, items: Sequence[Item]) -> list[list[Item]]:
        """The items of each shard: a mix of all, because reading shuffles within a buffer only."""
        # Of Python's generators only `random()` promises the same numbers in every version.
        generator = random.Random(f"convert/{self.seed}")
        places = [generator.random() for _ in items]
        largest = float("inf") if self.shard_mib is None else self.shard_mib * MIB
        shards: list[list[Item]] = []
        held = 0
        for place in sorted(range(len(items)), key=places.__getitem__):
            item = items[place]
            if not shards or len(shards[-1]) == self.samples_per_shard or held + item.bytes > largest:
                shards.append([])
                held = 0
            shards[-1].append(item)
            held += item.bytes
        return shards


@dataclass(frozen=True)
class ShardTask:
    """A shard that is to be written.

    Attributes:
        folder: Where it is written.
        name: Of the shard.
        items: What becomes its samples.
        form: How masks are coded; None takes them as they come.
        encoding: What becomes of images.
    """

    folder: Path
    name: str
    items: Sequence[Item]
    form: MaskFormat | None
    encoding: Encoding


@dataclass
class ShardRecord:
    """What became of a shard's items.

    Attributes:
        samples: How many are in the shard.
        bytes: Size of the shard.
        left_out: Files of the others, and why.
        encoded: How many images are others than in their files.
        coloured: How many masks are coded in colours.
        values: What stands in the other masks, ascending.
    """

    samples: int = 0
    bytes: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    encoded: int = 0
    coloured: int = 0
    values: list[int] = field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        """Counts a sample."""
        self.samples += 1
        self.encoded += encoded.is_encoded
        self.coloured += encoded.is_coloured
        self.values = sorted({*self.values, *encoded.values})

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ShardRecord":
        return cls(**{**value, "left_out": [LeftOut(**left_out) for left_out in value["left_out"]]})


def write_shard(task: ShardTask) -> ShardRecord:
    """Writes a shard and then its record, each whole or not at all.

    Raises:
        ValueError: The items' files are not those that were listed.
        OSError: Something cannot be read or written.
    """
    record = ShardRecord()
    # Of this process alone: one whose command was killed may be at the same shard still.
    partial = task.folder / f".{task.name}.{os.getpid()}.partial"
    try:
        with partial.open("wb") as stream:
            _write_samples(task, record, stream)
            stream.flush()
            os.fsync(stream.fileno())
        record.bytes = partial.stat().st_size
        partial.replace(task.folder / task.name)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(task.folder)
    write_json(_record_path(task.folder, task.name), asdict(record))
    return record


def _write_samples(task: ShardTask, record: ShardRecord, stream: BinaryIO) -> None:
    # A fixed time, so that the same samples give the same bytes.
    with TarWriter(stream, encoder=False, mtime=0) as writer:
        for key, encoded in _encoded(task, record):
            writer.write({"__key__": key, **encoded.fields})
            record.add(encoded)


def _encoded(task: ShardTask, record: ShardRecord) -> Iterator[tuple[str, Encoded]]:
    for item in task.items:
        try:
            yield item.key, encode(item, task.form, task.encoding)
        except UnusableError as error:
            record.left_out.append(error.left_out)


def read_record(staged: Path, folder: Path, name: str) -> ShardRecord | None:
    """The record of a shard that is whole; None where it has yet to be written.

    Args:
        staged: Where the record lies, and the shard until it is moved.
        folder: Where the shard is moved at last.
        name: Of the shard.
    """
    try:
        value = read_json(_record_path(staged, name))
    except ValueError:
        return None
    sizes = [path.stat().st_size for path in (staged / name, folder / name) if path.exists()]
    return ShardRecord.from_json(value) if value is not None and sizes and sizes[0] == value["bytes"] else None


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
