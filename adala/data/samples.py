"""From shards to samples: reading tar files in sequence, decoding, and filling the slots of bad samples."""

import http.client
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from adala.data.addresses import is_remote, open_stream
from adala.data.images import IMAGE_FIELDS, DecodeError, decode_image
from adala.data.index import Shard, ShardIndex, image_field, index_command
from adala.data.order import ShardSequence
from adala.data.preparation import TargetReader
from adala.data.tars import Fields, read_samples

# Times in a row that a remote shard may break without one new sample between them before reading gives up.
REMOTE_ATTEMPTS = 3
# A worker's range may always hold so many bad samples, however short it is.
MIN_BAD_SAMPLES = 10

logger = logging.getLogger(__name__)


class BadDataError(ValueError):
    """Data from which nothing should be computed: too much of them is unusable, or a target shows that the recipe is
    wrong."""


@dataclass(frozen=True)
class Sample:
    """One decoded sample.

    Attributes:
        id: ``<shard file name>/<key>``.
        image: RGB.
        target: What the task reads of it; None where no target is wanted.
    """

    id: str
    image: Image.Image
    target: Any


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in its shard: ``fields`` are the contents of its files by extension."""

    shard: Shard
    key: str
    fields: Fields

    @property
    def id(self) -> str:
        return f"{self.shard.name}/{self.key}"


def decode(raw: RawSample, reader: TargetReader | None = None) -> Sample:
    """Decodes the image to RGB, and reads the target where one is wanted.

    Raises:
        DecodeError: No image, a damaged one, or no target that can be used although one is wanted.
        ValueError: A target that shows that the recipe is wrong; the message names the sample.
    """
    field = image_field(raw.fields, besides=None if reader is None else reader.field)
    if field is None:
        raise DecodeError(f"no image: it has the files {', '.join(sorted(raw.fields))}, and none of {IMAGE_FIELDS}")
    try:
        image = decode_image(raw.fields[field])
    except DecodeError as error:
        raise DecodeError(f"its {field} cannot be decoded: {error}") from error
    if reader is None:
        return Sample(raw.id, image, None)
    try:
        target = reader.read(raw.fields, raw.shard.classes, (image.height, image.width))
    except DecodeError:
        raise
    except ValueError as error:
        raise BadDataError(f"the sample {raw.id}: {error}") from error
    return Sample(raw.id, image, target)


def read_shard(shard: Shard, ordinals: Sequence[int]) -> Iterator[RawSample]:
    """The samples at ascending ``ordinals`` of a shard, read in sequence; closes it after the last.

    A remote shard whose stream breaks is opened again and skipped to where it was.

    Raises:
        ValueError: The shard ends before the ordinals do, or is damaged.
        OSError: The shard cannot be read.
    """
    done = 0
    attempts = REMOTE_ATTEMPTS if is_remote(shard.url) else 1
    failures = 0
    while done < len(ordinals):
        try:
            for raw in _read_once(shard, ordinals[done:]):
                yield raw
                done += 1
                failures = 0
        except (OSError, tarfile.TarError, EOFError, http.client.HTTPException) as error:
            failures += 1
            if failures == attempts:
                raise _unreadable(shard, int(ordinals[done]), error) from error
            logger.warning("reading %s broke before sample %d (%r): opening it again", shard.url, ordinals[done], error)


def _read_once(shard: Shard, ordinals: Sequence[int]) -> Iterator[RawSample]:
    """:func:`read_shard` without a second opening.

    Raises:
        EOFError: The shard ends early.
    """
    taken = 0
    with open_stream(shard.url) as stream:
        for ordinal, (key, fields) in enumerate(read_samples(stream, shard.url)):
            if ordinal != ordinals[taken]:
                continue
            yield RawSample(shard, key, fields)
            taken += 1
            if taken == len(ordinals):
                return
    raise EOFError("it ends there")


def _unreadable(shard: Shard, ordinal: int, error: Exception) -> Exception:
    if isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
        return OSError(f"cannot read the shard {shard.url}: {error}")
    folder = shard.url.rpartition("/")[0]
    return ValueError(
        f"the shard {shard.url} gave {ordinal} samples where its index lists {shard.samples} ({error}): fetch it "
        f"again, or write the index anew with `{index_command(folder)}`"
    )


def read_positions(index: ShardIndex, sequence: ShardSequence, positions: Sequence[int]) -> Iterator[RawSample]:
    """The samples at ascending ``positions`` of a sequence, each shard opened once."""
    for shard, part, first in sequence.spans(positions):
        yield from read_shard(index.shards[shard], [int(position) - first for position in part])


def reorder(samples: Iterable[RawSample], arriving: Iterable[int], leaving: Iterable[int]) -> Iterator[RawSample]:
    """Emits samples in the order ``leaving`` of the numbers under which they arrive, reading no further than needed.

    Holds as many samples as the two orders are apart, which for a shuffle buffer is its size.
    """
    held: dict[int, RawSample] = {}
    arrivals = zip(arriving, samples, strict=True)
    for number in leaving:
        while number not in held:
            place, sample = next(arrivals)
            held[place] = sample
        yield held.pop(number)


class BadSamples:
    """Counts bad samples of one worker's range by shard, and stops the run when there are too many."""

    def __init__(self, range_length: int, max_fraction: float, at_least: int = MIN_BAD_SAMPLES):
        """Permits a part of the range to be bad, but at least so many samples."""
        self.limit = max(at_least, int(max_fraction * range_length))
        self._seen: set[str] = set()
        self._fresh: Counter[str] = Counter()

    def add(self, raw: RawSample, error: DecodeError) -> None:
        """Notes a bad sample; one that comes again in the same range counts once.

        Raises:
            BadDataError: There are now more than the limit.
        """
        if raw.id in self._seen:
            return
        self._seen.add(raw.id)
        self._fresh[raw.shard.name] += 1
        logger.warning("skipping the sample %s: %s", raw.id, error)
        if len(self._seen) > self.limit:
            raise BadDataError(
                f"more than {self.limit} samples of one data worker's range are bad, the last in {raw.shard.url} "
                f"({raw.id}: {error}): repair the shards, or leave the bad samples out"
            )

    def take(self) -> dict[str, int]:
        """Counts by shard name since the last call."""
        fresh, self._fresh = self._fresh, Counter()
        return dict(fresh)


def fill_slots(
    slots: Iterable[RawSample],
    from_the_start: Callable[[], Iterable[RawSample]],
    bad: BadSamples,
    reader: TargetReader | None = None,
) -> Iterator[Sample]:
    """Decodes one sample for each slot; the next good one of the range takes the slot of a bad one beside its own.

    What a slot holds depends on the slots behind it alone, never on those before, so that a stream resumed at any slot
    goes on as it would have gone on. Behind the last slot the range's beginning follows.

    Args:
        slots: The samples in order of emission.
        from_the_start: Gives the samples of the whole range in order of emission.
        bad: Counts the bad ones.
        reader: See :func:`decode`.

    Raises:
        BadDataError: Too many bad samples, or no good one in the range.
    """
    waiting = 0
    for raw in slots:
        try:
            sample = decode(raw, reader)
        except DecodeError as error:
            bad.add(raw, error)
            waiting += 1
            continue
        for _ in range(waiting + 1):
            yield sample
        waiting = 0
    if not waiting:
        return
    for raw in from_the_start():
        try:
            sample = decode(raw, reader)
        except DecodeError as error:
            bad.add(raw, error)
            continue
        for _ in range(waiting):
            yield sample
        return
    raise BadDataError("every sample of one data worker's range is bad: repair the shards")
