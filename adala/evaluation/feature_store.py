"""Features on disk: computed once for a model and a data set, and believed only if they are whole.

An entry is a folder, named by a digest of its key:

    entry.json    the key, the fields of a row, the bytes of rows.bin, the digest of rows.npy, and that of all this
    rows.npy      for each row, in the order of the data set: its place in rows.bin and its CRC-32
    rows.bin      the rows, each the bytes of all its fields, in the order in which they were computed

It is written under another name and renamed when it is complete. Whoever writes holds a lock that the system takes off
when the process ends, by which what a killed command left is told from what another one is still writing.

Shapes: n images, F pooled features.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adala.data.order import evaluation_range
from adala.distributed import from_rank_0, gather_objects, raise_together, rank, world_size
from adala.files import file_digest, read_json, sync_file, sync_folder, value_digest, write_json
from adala.runs import VISIBLE_WITHIN_S

# Part of every key; to be raised when features are laid out or computed in another way.
FORMAT = 1
# What an entry's key must say, because features change with it.
KEY_NAMES = ("weights", "model", "data", "image_size", "normalisation", "precision", "kind")
ENTRY, PLACES, ROWS = "entry.json", "rows.npy", "rows.bin"
ENTRY_NAME = "[0-9a-f]{32}"
PARTIAL = ".partial"
# A row's place in rows.bin, counted in rows, and its checksum.
PLACE = np.dtype([("row", np.int64), ("crc", np.uint32)])

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Field:
    """One array of every row.

    Attributes:
        shape: Without the rows.
        dtype: As it is stored. float16 keeps three more bits than bfloat16 and holds what a final norm gives, outliers
            of DINOv2 included; values beyond its 65504 are refused, not made infinite.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float16

    @property
    def numpy(self) -> np.dtype:
        """The dtype of its bytes: numpy knows no bfloat16, whose bits are kept as integers."""
        stored = torch.int16 if self.dtype == torch.bfloat16 else self.dtype
        return torch.zeros((), dtype=stored).numpy().dtype

    def described(self) -> dict[str, Any]:
        """As JSON; :meth:`of` reads it."""
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "Field":
        return cls(tuple(described["shape"]), getattr(torch, described["dtype"]))

    def to_bytes(self, name: str, values: Tensor) -> np.ndarray:
        """Values (B, *shape) as they are stored.

        Raises:
            ValueError: Another shape, or values that are not finite, or are not in the stored type.
        """
        if values.shape[1:] != self.shape:
            raise ValueError(f"{name} of an image has the shape {tuple(values.shape[1:])}, announced was {self.shape}")
        if not values.isfinite().all():
            raise ValueError(f"{name} are not finite: the model has diverged, or overflows in its precision")
        stored = values.detach().cpu().to(self.dtype).contiguous()
        if not stored.isfinite().all():
            raise ValueError(f"{name} are beyond what {self.dtype} holds: store them as bfloat16 or float32")
        return (stored.view(torch.int16) if self.dtype == torch.bfloat16 else stored).numpy()


def row_dtype(fields: Mapping[str, Field]) -> np.dtype:
    """A row with all its fields, each where the processor reads it fast."""
    return np.dtype([(name, field.numpy, field.shape) for name, field in fields.items()], align=True)


class StoredRows:
    """One field of an entry: ``stored[rows]`` reads these rows, in the order of the data set, out of its file."""

    def __init__(self, array: np.ndarray, places: np.ndarray, field: Field):
        self._array, self._places, self._field = array, places, field

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Tensor:
        """(rows, *shape), a copy in the dtype of the field."""
        places = self._places[rows.cpu().numpy() if isinstance(rows, Tensor) else rows]
        values = torch.from_numpy(np.ascontiguousarray(self._array[places]))
        return values.view(torch.bfloat16) if self._field.dtype == torch.bfloat16 else values


class RowWriter:
    """Writes this rank's rows into the file that all ranks share."""

    def __init__(self, descriptor: int, fields: Mapping[str, Field], room: range):
        """Starts at the beginning of this rank's part.

        Args:
            descriptor: Of the open file.
            fields: Of each row.
            room: Places in the file that are this rank's.
        """
        self._descriptor, self._fields, self._room = descriptor, fields, room
        self._dtype = row_dtype(fields)
        self.ids: list[Any] = []
        self.places: list[tuple[int, int]] = []

    def add(self, ids: Sequence[Any], **values: Tensor) -> None:
        """Writes a batch, whichever comes next.

        Args:
            ids: By which rows are put in order, over all ranks: positions in the data set, or strings.
            **values: (B, *shape), one for each field.

        Raises:
            ValueError: Other fields or shapes than announced, more rows than announced, or values that cannot be
                stored.
            OSError: The disk is full, or gone.
        """
        if set(values) != set(self._fields):
            raise ValueError(f"a row has the fields {sorted(values)}, announced were {sorted(self._fields)}")
        if len(self.ids) + len(ids) > len(self._room):
            raise ValueError(f"a rank gave more images than the {len(self._room)} that were announced for it")
        rows = np.zeros(len(ids), self._dtype)
        for name, value in values.items():
            rows[name] = self._fields[name].to_bytes(name, value)
        first, size, data = self._room.start + len(self.ids), self._dtype.itemsize, rows.tobytes()
        write_at(self._descriptor, data, first * size)
        self.ids += ids
        self.places += [(first + row, zlib.crc32(data[row * size : (row + 1) * size])) for row in range(len(ids))]


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Writes all of ``data``, of which one call may take only a part."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@dataclass(frozen=True)
class Entry:
    """One folder of the store, whether it is there or not.

    Attributes:
        path: Of the folder.
        key: What was computed, as JSON.
    """

    path: Path
    key: dict[str, Any]

    def is_whole(self) -> bool:
        """Whether all is there and as it was written; what is not is removed, and why is logged."""
        if not self.path.exists():
            return False
        try:
            self._check()
        except (ValueError, OSError, KeyError, TypeError) as error:
            logger.warning("the features in %s are damaged (%s) and will be computed again", self.path, error)
            discard(self.path)
            return False
        return True

    def _check(self) -> None:
        header = read_json(self.path / ENTRY)
        if header is None or value_digest(header["entry"]) != header["digest"]:
            raise ValueError(f"its {ENTRY} is not there, or another one")
        stored = header["entry"]
        if stored["key"] != self.key:
            raise ValueError(f"its {ENTRY} is of another key")
        if file_digest(self.path / PLACES) != stored["places"]:
            raise ValueError(f"its {PLACES} is another one")
        if (self.path / ROWS).stat().st_size != stored["bytes"]:
            raise ValueError(f"its {ROWS} is not of {stored['bytes']} bytes")
        places = np.sort(np.load(self.path / PLACES), order="row")
        rows = np.memmap(self.path / ROWS, mode="r").reshape(-1, row_dtype(self._fields()).itemsize)
        if any(zlib.crc32(rows[row]) != crc for row, crc in places.tolist()):
            raise ValueError(f"a row of its {ROWS} is another one")

    def _fields(self) -> dict[str, Field]:
        stored = read_json(self.path / ENTRY)["entry"]
        return {described["name"]: Field.of(described) for described in stored["fields"]}

    def open(self) -> dict[str, StoredRows]:
        """Its fields by name, mapped into memory."""
        fields, places = self._fields(), np.load(self.path / PLACES)["row"]
        rows = np.memmap(self.path / ROWS, row_dtype(fields), mode="r")
        return {name: StoredRows(rows[name], places, field) for name, field in fields.items()}


@dataclass(frozen=True)
class FeatureStore:
    """Entries in a folder that all ranks see.

    A key is JSON values that say all that features depend on: at least :data:`KEY_NAMES`, where ``weights`` and
    ``data`` are digests and ``kind`` tells pooled features from others, and by what they are pooled.

    Attributes:
        folder: Made when something is first written.
    """

    folder: Path

    def find(self, key: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, StoredRows] | None:
        """What :meth:`writing` wrote under ``key``, by field and memory-mapped; None where nothing whole is there.

        Rows are in the order of the ids that they were written with. Every rank calls it and gets the same.

        Raises:
            ValueError: The key lacks a name, or ranks do not see the same folder; every rank raises.
        """
        entry = self._entry(key, fields)
        if not from_rank_0(entry.is_whole):
            return None
        wait_until_seen(entry.path / ENTRY)
        return entry.open()

    @contextmanager
    def writing(self, key: Mapping[str, Any], fields: Mapping[str, Field], capacity: int) -> Iterator[RowWriter]:
        """Writes rows into one file from all ranks, complete or absent; every rank enters it and leaves it.

        Each rank writes those of its samples that it could read, in any order. Ids put them in order, which no number
        of ranks or data workers changes; of equal ids the lower rank's, and then the earlier, comes first.

        Args:
            key: Of this model on these data.
            fields: Arrays of a row by name.
            capacity: Rows of all ranks together, at most; a rank's are as many as
                :func:`adala.data.order.evaluation_range` gives it.

        Raises:
            ValueError: The key lacks a name, rows are not as announced or cannot be stored, none were written, the disk
                is too full, or ranks do not see the same folder; every rank raises, also what one raises within.
        """
        entry = self._entry(key, fields)
        name, own = from_rank_0(lambda: self._begin(entry, fields, capacity))
        partial, descriptor = self.folder / name, own if rank() == 0 else None
        try:
            wait_until_seen(partial / ROWS)
            if descriptor is None:
                descriptor = os.open(partial / ROWS, os.O_WRONLY)
            writer, error = RowWriter(descriptor, fields, evaluation_range(capacity, rank(), world_size())), None
            try:
                yield writer
                os.fsync(descriptor)
            except (ValueError, OSError) as raised:
                error = raised
            raise_together(error)
            parts = gather_objects((writer.ids, writer.places))
            from_rank_0(lambda: self._install(entry, fields, partial, parts))
        finally:
            if descriptor is not None:
                os.close(descriptor)
            if rank() == 0:
                discard(partial)

    def summary(self) -> str:
        """How much lies there, in a sentence."""
        entries = self._entries()
        if not entries:
            return f"no features lie in {self.folder}"
        mib = sum(file.stat().st_size for path in entries for file in path.iterdir()) / 2**20
        return f"{len(entries)} sets of features take {mib:.0f} MiB in {self.folder}, which may be removed"

    def _entries(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if re.fullmatch(ENTRY_NAME, path.name)]

    def _entry(self, key: Mapping[str, Any], fields: Mapping[str, Field]) -> Entry:
        missing = [name for name in KEY_NAMES if name not in key]
        if missing:
            raise ValueError(f"the key of features lacks {', '.join(missing)}: features change with it")
        described = {name: field.described() for name, field in fields.items()}
        # As it is read back: tuples are lists there.
        full = json.loads(json.dumps({**key, "fields": described, "format": FORMAT}))
        return Entry(self.folder / value_digest(full).removeprefix("sha256:")[:32], full)

    def _begin(self, entry: Entry, fields: Mapping[str, Field], capacity: int) -> tuple[str, int]:
        """The name of a new folder to write into, and the descriptor of its file of rows, by which it is held."""
        size = capacity * row_dtype(fields).itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._remove_orphans()
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise ValueError(
                    f"features take {size / 2**20:.0f} MiB, and {self.folder} has {free / 2**20:.0f} MiB left: name "
                    "another folder, remove what it holds, or evaluate fewer images"
                )
            partial = self.folder / f".{entry.path.name}-{uuid.uuid4().hex}{PARTIAL}"
            partial.mkdir()
            descriptor = os.open(partial / ROWS, os.O_RDWR | os.O_CREAT, 0o666)
            _lock(descriptor)
        os.ftruncate(descriptor, size)
        return partial.name, descriptor

    def _install(self, entry: Entry, fields: Mapping[str, Field], partial: Path, parts: Sequence[tuple]) -> None:
        """Completes what all ranks wrote, ``parts`` being their ids and places, and gives it its name."""
        rows = [(key, place) for ids, places in parts for key, place in zip(ids, places, strict=True)]
        if not rows:
            raise ValueError("no image could be read of which features would be kept: look at the shards")
        rows.sort(key=lambda row: row[0])
        np.save(partial / PLACES, np.array([place for _, place in rows], PLACE))
        sync_file(partial / PLACES)
        described = [{"name": name, **field.described()} for name, field in fields.items()]
        digest, size = file_digest(partial / PLACES), (partial / ROWS).stat().st_size
        stored = {"key": entry.key, "fields": described, "places": digest, "bytes": size}
        write_json(partial / ENTRY, {"entry": stored, "digest": value_digest(stored)})
        with self._locked():
            # Another command may have computed the same meanwhile.
            if not entry.path.exists():
                partial.rename(entry.path)
                sync_folder(self.folder)
        logger.info(self.summary())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all commands: nobody begins to write while another looks for what was left."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _remove_orphans(self) -> None:
        """Removes what killed commands left: what nobody holds."""
        for partial in self.folder.glob(f".*{PARTIAL}"):
            try:
                descriptor = os.open(partial / ROWS, os.O_RDWR)
            except FileNotFoundError:
                discard(partial)
                continue
            if _lock(descriptor):
                discard(partial)
            os.close(descriptor)


def _lock(descriptor: int, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Whether the lock is now held, until the last process that has the descriptor closes it or ends."""
    try:
        # Not lockf, whose locks this process would lose as soon as it closes another descriptor of the file.
        fcntl.flock(descriptor, how)
    except OSError:
        # Held by another one, or a file system without locks: what lies there is then left alone.
        return False
    return True


def discard(path: Path) -> None:
    """Removes a folder that another command may be removing, too."""
    shutil.rmtree(path, ignore_errors=True)


def wait_until_seen(path: Path) -> None:
    """Waits until every rank sees a file that rank 0 wrote; every rank calls it.

    Raises:
        ValueError: On every rank, where one does not see it.
    """
    error, deadline = None, time.monotonic() + VISIBLE_WITHIN_S
    while error is None and not path.exists():
        if time.monotonic() > deadline:
            error = ValueError(
                f"rank {rank()} on {socket.gethostname()} does not see {path}, which rank 0 wrote: the folder of "
                "features must lie on a file system that all machines share"
            )
        elif path.parent.parent.is_dir():
            os.listdir(path.parent.parent)  # makes network file systems look again
        time.sleep(0.2)
    raise_together(error)
