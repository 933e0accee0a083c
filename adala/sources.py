"""The data sets that a recipe names: their shards, and what their first samples say of labels."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from adala.data import ShardIndex, load_index, write_embedded
from adala.data.samples import LABEL_FIELD, DecodeError, RawSample, decode, read_shard
from adala.tasks import Task

EMBEDDED = "embedded"
# Samples that are looked at to see whether a data set has labels, and which.
PEEKED_SAMPLES = 64


class Sources:
    """Reads each list of shards once, and looks at its first samples once."""

    def __init__(self, embedded: Path):
        """``embedded`` is where the embedded data set is written when it is first asked for."""
        self._embedded = embedded
        self._read: dict[tuple[str, ...], ShardIndex] = {}
        self._peeked: dict[tuple[str, ...], list[RawSample]] = {}

    def index(self, sources: Sequence[str]) -> ShardIndex:
        """The shards behind ``sources``; those of the embedded data set are written when first asked for.

        Raises:
            ValueError: See ``adala.data.load_index``.
        """
        key = tuple(sources)
        if key not in self._read:
            if any(source.startswith(f"{EMBEDDED}:") for source in sources):
                write_embedded(self._embedded)
            self._read[key] = load_index([self._pattern(source) for source in sources])
        return self._read[key]

    def _pattern(self, source: str) -> str:
        name, _, split = source.partition(":")
        if name != EMBEDDED:
            return source
        if split not in ("train", "val"):
            raise ValueError(f"{source}: the embedded data are embedded:train and embedded:val")
        return str(self._embedded / f"{split}-*.tar")

    def first_samples(self, sources: Sequence[str]) -> list[RawSample]:
        key = tuple(sources)
        if key not in self._peeked:
            index = self.index(sources)
            filled = next((shard for shard in index.shards if shard.samples), None)
            count = min(PEEKED_SAMPLES, filled.samples) if filled else 0
            self._peeked[key] = list(islice(read_shard(filled, range(count)), count)) if count else []
        return self._peeked[key]

    def is_labelled(self, sources: Sequence[str]) -> bool:
        """Whether more than half of the first samples have a label."""
        samples = self.first_samples(sources)
        return 2 * sum(LABEL_FIELD in sample.fields for sample in samples) > len(samples)

    def check_targets(self, task: Task, sources: Sequence[str], key: str) -> None:
        """Refuses a data set whose first samples the task cannot be trained or scored on.

        Raises:
            ValueError: No labels, or one that the task cannot have; the message names ``key``.
        """
        if not self.is_labelled(sources):
            raise ValueError(
                f"Stage 3 needs labels, and the samples of {key} have no .{LABEL_FIELD} files: name labelled shards"
            )
        for raw in self.first_samples(sources):
            try:
                label = decode(raw, labelled=True).label
            except DecodeError:
                continue
            try:
                task.target({"label": torch.tensor([label])}, torch.device("cpu"))
            except ValueError as error:
                raise ValueError(f"{key}, sample {raw.id}: {error}") from error
