"""From shards to samples: reading tar files in sequence, decoding, and filling the slots of bad samples."""

import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from adala.data.addresses import is_remote, open_stream
from adala.data.cache import discard_cached, fetch_ahead
from adala.data.images import IMAGE_FIELDS, DecodeError, decode_image
from adala.data.index import Shard, ShardIndex, image_field, index_command
from adala.data.mixture import Mixture
from adala.data.order import ShardSequence, permuted_shards
from adala.data.positions import Intervals
from adala.data.preparation import TargetReader
from adala.data.remote import DEFAULT_OPTIONS, Patience, RemoteOptions
from adala.data.tars import Fields, read_samples

# Readings in a row of a remote shard that may end at the same damage before it is taken for the shard's own.
DAMAGED_READINGS = 3
# Samples of a mixture whose sources are found at once.
BLOCK = 4096
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
        id: ``<shard file name>/<key>``, in a mixture behind the number of the source.
        image: RGB.
        target: What the task reads of it; None where no target is wanted.
        epoch: How often its data set was read through before, which is a source's own count in a mixture.
    """

    id: str
    image: Image.Image
    target: Any
    epoch: int = 0


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in its shard.

    Attributes:
        shard: Which holds it.
        key: Its name there.
        fields: The contents of its files by extension.
        epoch: See :class:`Sample`.
    """

    shard: Shard
    key: str
    fields: Fields
    epoch: int = 0

    @property
    def id(self) -> str:
        return f"{self.shard.label}/{self.key}"


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
        return Sample(raw.id, image, None, raw.epoch)
    try:
        target = reader.read(raw.fields, raw.shard.classes, (image.height, image.width))
    except DecodeError:
        raise
    except ValueError as error:
        raise BadDataError(f"the sample {raw.id}: {error}") from error
    return Sample(raw.id, image, target, raw.epoch)


def read_shard(
    shard: Shard,
    ordinals: Sequence[int],
    remote: RemoteOptions = DEFAULT_OPTIONS,
) -> Iterator[RawSample]:
    """The samples at ascending ``ordinals`` of a shard, read in sequence; closes it after the last.

    A remote stream that breaks goes on by itself. A remote shard that comes damaged is read again and skipped to where
    it was: it may have been damaged on its way, or in the cache.

    Raises:
        ValueError: The shard does not hold as many samples as its index says, or is damaged.
        OSError: The shard cannot be read.
    """
    done = 0
    size = shard.bytes or None
    readings = DAMAGED_READINGS if is_remote(shard.url) else 1
    patience = Patience(remote, size)
    failures = 0
    while done < len(ordinals):
        try:
            for raw in _read_once(shard, ordinals[done:], remote, patience):
                yield raw
                done += 1
                failures = 0
        except (OSError, tarfile.TarError, EOFError) as error:
            failures += 1
            if _is_of_the_system(error) or failures == readings:
                raise _unreadable(shard, int(ordinals[done]), error) from error
            logger.warning("reading %s broke before sample %d (%r): reading it again", shard.url, ordinals[done], error)
            if remote.cache_dir is not None:
                discard_cached(shard.url, size, remote)


def _read_once(shard: Shard, ordinals: Sequence[int], remote: RemoteOptions, patience: Patience) -> Iterator[RawSample]:
    """:func:`read_shard` without a second opening.

    Raises:
        EOFError: The shard ends early.
        ValueError: It goes on behind the last sample that is listed.
    """
    taken = 0
    with open_stream(shard.url, remote, shard.bytes or None, patience) as stream:
        samples = enumerate(read_samples(stream, shard.url))
        for ordinal, (key, fields) in samples:
            if ordinal != ordinals[taken]:
                continue
            if ordinal + 1 == shard.samples and next(samples, None) is not None:
                raise ValueError(
                    f"the shard {shard.url} holds more than the {shard.samples} samples that its index lists: write "
                    f"the index anew with `{_index_command(shard)}`"
                )
            yield RawSample(shard, key, fields)
            taken += 1
            if taken == len(ordinals):
                return
    raise EOFError("it ends there")


def _is_of_the_system(error: Exception) -> bool:
    """Whether a file could not be read, and not what it holds."""
    return isinstance(error, OSError) and not isinstance(error, tarfile.TarError)


def _unreadable(shard: Shard, ordinal: int, error: Exception) -> Exception:
    if _is_of_the_system(error):
        return OSError(f"cannot read the shard {shard.url}: {error}")
    return ValueError(
        f"the shard {shard.url} gave {ordinal} samples where its index lists {shard.samples} ({error}): fetch it "
        f"again, or write the index anew with `{_index_command(shard)}`"
    )


def _index_command(shard: Shard) -> str:
    return index_command(shard.url.rpartition("/")[0])


def read_positions(index: ShardIndex, sequence: ShardSequence, positions: Intervals | range) -> Iterator[RawSample]:
    """The samples at ascending ``positions`` of a sequence, each shard opened once."""
    spans = iter(sequence.spans(positions))
    span = next(spans, None)
    while span is not None:
        (shard, ordinals), span = span, next(spans, None)
        for number, raw in enumerate(read_shard(index.shards[shard], ordinals.tolist(), index.remote)):
            # Not before, so that the shard that is needed now has the network to itself.
            if number == 0 and span is not None:
                _fetch_ahead(index.shards[span[0]], index.remote)
            yield replace(raw, epoch=sequence.epoch)


def _fetch_ahead(shard: Shard, remote: RemoteOptions) -> None:
    if remote.cache_dir is not None and is_remote(shard.url):
        fetch_ahead(shard.url, shard.bytes or None, remote)


def read_mixture(index: ShardIndex, mixture: Mixture, positions: Intervals, seed: int) -> Iterator[RawSample]:
    """The samples at ascending ``positions`` of a mixture; of each source one shard is open at a time."""
    sources = [
        _read_source(index.of_source(source), numbers, seed, source)
        for source, numbers in enumerate(mixture.numbers(positions))
    ]
    for begin in range(0, len(positions), BLOCK):
        block = positions.slice(begin, min(begin + BLOCK, len(positions)))
        for source in mixture.locate(block.numbers())[0].tolist():
            yield next(sources[source])


def _read_source(index: ShardIndex, numbers: Intervals, seed: int, source: int) -> Iterator[RawSample]:
    """The samples of a mixture's source at ascending numbers of its endless sequence, epoch by epoch of its own."""
    sizes = [shard.samples for shard in index.shards]
    for epoch, positions in numbers.split(sum(sizes)):
        yield from read_positions(index, permuted_shards(sizes, seed, epoch, source), positions)


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
        """Permits a part of the range to be bad, but at least so many samples; none where that part is 0."""
        self.limit = max(at_least, int(max_fraction * range_length)) if max_fraction else 0
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
        self._fresh[raw.shard.label] += 1
        logger.warning("skipping the sample %s: %s", raw.id, error)
        if len(self._seen) > self.limit:
            raise BadDataError(
                f"more than {self.limit} samples of one data worker's range are bad, the last in {raw.shard.url} "
                f"({raw.id}: {error}): repair the shards, leave the bad samples out, or allow more of them with "
                "data.max_bad_fraction"
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
