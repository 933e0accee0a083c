"""The data sets that a recipe names: their shards, and what their first samples say of images and targets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from adala.data import ShardIndex, load_index, mix, write_embedded
from adala.data.images import DecodeError
from adala.data.index import Census, refuse_unusable, take_census
from adala.data.labels import Classes
from adala.data.remote import DEFAULT_OPTIONS, RemoteOptions
from adala.data.samples import RawSample, decode, read_shard
from adala.tasks import Task

EMBEDDED = "embedded"
# How many samples are looked at, and in how many shards, spread over the data set.
PEEKED_SAMPLES = 64
PEEKED_SHARDS = 8
# Addresses of shards, or the sources of a mixture as ``adala.rules.MIXTURE_KEYS`` has them.
DataSet = Sequence[str] | Sequence[Mapping[str, Any]]


class Sources:
    """Reads each list of shards once, and looks at some of its samples once."""

    def __init__(
        self,
        embedded: Path,
        classes: str | None = None,
        remote: RemoteOptions = DEFAULT_OPTIONS,
    ):
        """Starts from nothing.

        Args:
            embedded: Where the embedded data set is written when it is first asked for.
            classes: File with the names of classes; None takes those beside the shards.
            remote: How remote shards are read.
        """
        self._embedded = embedded
        self._classes = classes
        self._remote = remote
        self._read: dict[str, ShardIndex] = {}
        self._peeked: dict[str, list[RawSample]] = {}
        self._seen: dict[tuple[str, str], list[_Seen]] = {}

    def index(self, sources: DataSet) -> ShardIndex:
        """The shards behind ``sources``; those of the embedded data set are written when first asked for.

        Raises:
            ValueError: See ``adala.data.load_index`` and ``adala.data.mix``; or most of the samples that were looked at
                cannot be used.
        """
        key = _key(sources)
        if key not in self._read and _is_mixture(sources):
            data_sets = [self.index(_addresses(entry)) for entry in sources]
            self._read[key] = mix(data_sets, [entry["weight"] for entry in sources])
        if key not in self._read:
            if any(source.startswith(f"{EMBEDDED}:") for source in sources):
                write_embedded(self._embedded)
            self._read[key] = load_index([self._pattern(source) for source in sources], self._classes, self._remote)
            self._refuse_unusable(sources)
        return self._read[key]

    def _pattern(self, source: str) -> str:
        name, _, split = source.partition(":")
        if name != EMBEDDED:
            return source
        if split not in ("train", "val"):
            raise ValueError(f"{source}: the embedded data are embedded:train and embedded:val")
        return str(self._embedded / f"{split}-*.tar")

    def _refuse_unusable(self, sources: Sequence[str]) -> None:
        """An index from elsewhere says nothing of what the samples hold."""
        samples = self.first_samples(sources)
        census = sum((take_census(raw.id, raw.fields) for raw in samples), Census())
        refuse_unusable(census, ", ".join(sources))

    def first_samples(self, sources: DataSet) -> list[RawSample]:
        """The first samples of some shards, spread over the data set: as many of each as make 64 together; of a mixture
        those of each source."""
        if _is_mixture(sources):
            return [raw for entry in sources for raw in self.first_samples(_addresses(entry))]
        key, index = _key(sources), self.index(sources)
        if key not in self._peeked:
            filled = [shard for shard in index.shards if shard.samples]
            chosen = filled[:: -(-len(filled) // PEEKED_SHARDS) or 1]
            counts = [min(-(-PEEKED_SAMPLES // len(chosen)), shard.samples) for shard in chosen]
            # A few samples are no reason to fetch a shard as a whole.
            remote = replace(self._remote, cache_dir=None)
            peeked = [islice(read_shard(shard, range(n), remote), n) for shard, n in zip(chosen, counts, strict=True)]
            self._peeked[key] = [raw for samples in peeked for raw in samples]
        return self._peeked[key]

    def missing_targets(self, task: Task, *data_sets: DataSet) -> str | None:
        """Why these data sets have no targets to train or score by, in words; None where all have.

        A shard has targets where more than half of its samples have. All must have them: whoever mixes shards with and
        without means something else than that the ones without are all bad samples.

        Raises:
            ValueError: A target that the task cannot have; the message names the sample.
        """
        by_shard: dict[str, list[str | None]] = {}
        classes: dict[Classes, str] = {}
        for seen in (seen for sources in data_sets for seen in self._first_targets(task, sources)):
            by_shard.setdefault(seen.raw.shard.url, []).append(seen.fault)
            if seen.raw.shard.classes is not None:
                classes[seen.raw.shard.classes] = seen.raw.shard.url
        for url, faults in by_shard.items():
            found = [fault for fault in faults if fault is not None]
            if 2 * len(found) >= len(faults):
                return f"most samples of {url} are of no use for {task.name}: {found[0]}"
        if len(classes) > 1:
            return f"{' and '.join(list(classes.values())[:2])} lie beside different lists of classes"
        return None

    def check_targets(self, task: Task, sources: DataSet, key: str) -> None:
        """Refuses a data set whose first samples the task cannot be trained or scored on.

        Raises:
            ValueError: No targets, none that says anything, or one that the task cannot have; it names ``key``.
        """
        try:
            missing = self.missing_targets(task, sources)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        if missing is not None:
            raise ValueError(f"Stage 3 needs targets for {task.name}, and {key} has none: {missing}")
        if not any(seen.is_labelled for seen in self._first_targets(task, sources)):
            raise ValueError(f"{key}: of the first samples' targets for {task.name} nothing is known, all is ignored")

    def _first_targets(self, task: Task, sources: DataSet) -> list["_Seen"]:
        """What the task reads of the first samples; each is decoded once."""
        key = (repr(task), _key(sources))
        if key not in self._seen:
            self._seen[key] = [_look_at(task, raw) for raw in self.first_samples(sources)]
        return self._seen[key]


def _key(sources: DataSet) -> str:
    return json.dumps(list(sources), sort_keys=True)


def _is_mixture(sources: DataSet) -> bool:
    return any(isinstance(source, Mapping) for source in sources)


def _addresses(entry: Mapping[str, Any]) -> list[str]:
    """Those of one source of a mixture."""
    return [entry["source"]] if isinstance(entry["source"], str) else list(entry["source"])


@dataclass(frozen=True)
class _Seen:
    """What a task reads of a sample: what is wrong with its target, in words, and whether it says anything."""

    raw: RawSample
    fault: str | None
    is_labelled: bool


def _look_at(task: Task, raw: RawSample) -> _Seen:
    try:
        target = decode(raw, task.reader).target
    except DecodeError as error:
        return _Seen(raw, str(error), False)
    return _Seen(raw, None, task.is_labelled(target))
