"""The order of the stream: which sample comes when, as a pure function of (seed, epoch, ranks, workers). No I/O.

An epoch is a sequence of positions 0 .. S-1: its shards permuted, their samples one after the other (or a stretch of a
mixture, see ``mixture``). The first ``usable`` of them (whole global batches) are trained on. They are cut into equal
contiguous ranges, one a rank; a rank's micro-batches are dealt to its workers in turn, and each worker reads one
contiguous range in sequence and emits it through a seeded buffer.

What was consumed is a list of phases, each a number of micro-batches under one cut. Of each range it leaves the part
that was not read yet and what the buffer held; the next cut is one of what all ranges left. A worker finds its own
range by going through those alone that overlap with it, so that planning costs as much on a thousand ranks as on one.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from adala.data.positions import Intervals
from adala.data.shuffle import SlidingBuffer, drawn


@dataclass(frozen=True)
class StreamPhase:
    """A stretch of an epoch that was read under one cut.

    Attributes:
        world_size: Ranks.
        num_workers: Data workers of each rank; 0 (reading in the training process) cuts as 1 does.
        micro_batch_size: Samples of one micro-batch on one rank.
        micro_batches: Micro-batches that each rank was handed during the phase.
        shuffle_buffer: Samples in each worker's shuffle buffer; part of the order, hence of what was consumed.
    """

    world_size: int
    num_workers: int
    micro_batch_size: int
    micro_batches: int = 0
    shuffle_buffer: int = 0

    @property
    def num_streams(self) -> int:
        """Ranges into which a rank's share is cut: one for each worker."""
        return max(1, self.num_workers)

    @property
    def samples(self) -> int:
        """Samples that the phase consumed on all ranks together."""
        return self.micro_batches * self.micro_batch_size * self.world_size

    @property
    def cut(self) -> tuple[int, int, int, int]:
        """What decides the order; phases with equal cuts continue each other."""
        return self.world_size, self.num_streams, self.micro_batch_size, self.shuffle_buffer


@dataclass(frozen=True)
class StreamState:
    """What of the stream was consumed.

    Attributes:
        epoch: The epoch under way, counted from 0.
        phases: What was read of it, oldest first; empty at the epoch's beginning.
    """

    epoch: int = 0
    phases: tuple[StreamPhase, ...] = ()

    @property
    def samples(self) -> int:
        """Samples of this epoch that were consumed on all ranks together."""
        return sum(phase.samples for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "phases": [asdict(phase) for phase in self.phases]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StreamState":
        """The state that :meth:`to_dict` wrote.

        Raises:
            ValueError: ``values`` is not such a state.
        """
        try:
            return cls(int(values["epoch"]), tuple(StreamPhase(**phase) for phase in values["phases"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not the state of a sample stream ({error!r}): it has an epoch and phases, as StreamState.to_dict "
                "writes them"
            ) from error


@dataclass(frozen=True)
class ShardSequence:
    """Shards in the order in which an epoch reads them.

    Attributes:
        shards: Indices of the shards.
        ends: Position after the last sample of each of them.
        epoch: Whose order it is.
    """

    shards: tuple[int, ...]
    ends: tuple[int, ...]
    epoch: int = 0

    @cached_property
    def _bounds(self) -> np.ndarray:
        return np.array(self.ends, dtype=np.int64)

    def spans(self, positions: Intervals | range) -> Iterator[tuple[int, np.ndarray]]:
        """Ascending ``positions`` by shard: (shard, their ordinals within it), one shard after the other."""
        if isinstance(positions, range):
            positions = Intervals.whole(positions.start, positions.stop)
        begin = 0
        while begin < len(positions):
            first = positions.at(np.array(begin))
            place = int(np.searchsorted(self._bounds, first, side="right"))
            end = positions.below(self.ends[place])
            start = self.ends[place - 1] if place else 0
            yield self.shards[place], positions.slice(begin, end).numbers() - start
            begin = end


def shards_in_order(shard_sizes: Sequence[int]) -> ShardSequence:
    """The sequence without a permutation, for evaluation. ``shard_sizes`` counts samples."""
    return ShardSequence(tuple(range(len(shard_sizes))), tuple(accumulate(shard_sizes)))


def permuted_shards(shard_sizes: Sequence[int], seed: int, epoch: int, source: int | None = None) -> ShardSequence:
    """The sequence of a training epoch.

    Args:
        shard_sizes: Samples of each shard.
        seed: Of the order.
        epoch: Counted from 0.
        source: Which one of a mixture's sources the shards are, all of which have orders of their own.
    """
    key = f"shards/{seed}/{epoch}" if source is None else f"shards/{seed}/{epoch}/{source}"
    order = np.argsort(drawn(key, 0, len(shard_sizes)), kind="stable")
    ends = np.cumsum(np.asarray(shard_sizes, dtype=np.int64)[order])
    return ShardSequence(tuple(order.tolist()), tuple(ends.tolist()), epoch)


def usable_samples(num_samples: int, global_batch_size: int) -> int:
    """Samples of an epoch that fill whole global batches."""
    return num_samples // global_batch_size * global_batch_size


@dataclass(frozen=True)
class WorkerRange:
    """What one worker of one rank reads during a phase.

    Attributes:
        positions: Those of its range.
        key: Seeds the shuffle buffer.
        shuffle_buffer: Size of the buffer, in samples.
        consumed: Samples that were emitted already.
    """

    positions: Intervals
    key: str
    shuffle_buffer: int
    consumed: int

    @property
    def buffer(self) -> SlidingBuffer:
        """Emits places in :attr:`positions`, from the first."""
        return SlidingBuffer(len(self.positions), self.shuffle_buffer, self.key)

    def left(self) -> Intervals:
        """The positions that were not emitted."""
        return self.positions.take(self.buffer.left_after(self.consumed))


def micro_batches_of_worker(micro_batches: int, num_streams: int, worker: int) -> int:
    """How many of the first ``micro_batches`` come from ``worker``: number i comes from worker i % num_streams."""
    return len(range(worker, micro_batches, num_streams))


@dataclass(frozen=True)
class Cut:
    """How ``length`` samples are cut into ranges: number i is that of rank i // num_streams, worker i % num_streams."""

    length: int
    phase: StreamPhase

    def __post_init__(self) -> None:
        share = self.phase.world_size * self.phase.micro_batch_size
        assert self.length % share == 0, "cuts change between global batches, which every cut divides"

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        """Where the ranges of a rank begin within its share, and the last one's end."""
        phase = self.phase
        micro_batches = self.length // (phase.world_size * phase.micro_batch_size)
        return (0, *accumulate(self._samples_of(worker, micro_batches) for worker in range(phase.num_streams)))

    @cached_property
    def _left_bounds(self) -> tuple[int, ...]:
        """As :attr:`_bounds`, of what the phase left of each range."""
        lengths = (end - begin for begin, end in zip(self._bounds, self._bounds[1:], strict=False))
        return (0, *accumulate(length - self.consumed(worker) for worker, length in enumerate(lengths)))

    def _samples_of(self, worker: int, micro_batches: int) -> int:
        return micro_batches_of_worker(micro_batches, self.phase.num_streams, worker) * self.phase.micro_batch_size

    def consumed(self, worker: int) -> int:
        """Samples that a worker emitted during the phase."""
        return self._samples_of(worker, self.phase.micro_batches)

    def bounds(self, number: int) -> tuple[int, int]:
        """Where a range begins and ends among the ``length`` samples."""
        return self._bound(self._bounds, number), self._bound(self._bounds, number, 1)

    def left_bounds(self, number: int) -> tuple[int, int]:
        """Where what is left of a range begins and ends among what is left of all."""
        return self._bound(self._left_bounds, number), self._bound(self._left_bounds, number, 1)

    def _bound(self, bounds: tuple[int, ...], number: int, edge: int = 0) -> int:
        rank, worker = divmod(number, self.phase.num_streams)
        return rank * bounds[-1] + bounds[worker + edge]

    def holder(self, place: int) -> int:
        """The range that left the sample at a place among what is left of all."""
        rank, place = divmod(place, self._left_bounds[-1])
        return rank * self.phase.num_streams + bisect_right(self._left_bounds, place) - 1

    def range_of(self, number: int, positions: Intervals, seed: int, epoch: int) -> WorkerRange:
        """Range ``number``, which has these ``positions``."""
        first = int(positions.starts[0]) if len(positions) else -1
        return WorkerRange(
            positions=positions,
            key=f"buffer/{seed}/{epoch}/{first}/{len(positions)}",
            shuffle_buffer=self.phase.shuffle_buffer,
            consumed=self.consumed(number % self.phase.num_streams),
        )


@dataclass(frozen=True)
class Remainder:
    """The positions of an epoch that some phases left over.

    Attributes:
        usable: Samples of the epoch.
        phases: What was read of it, oldest first.
        seed: Of the order.
        epoch: Counted from 0.
    """

    usable: int
    phases: tuple[StreamPhase, ...]
    seed: int
    epoch: int

    def __len__(self) -> int:
        return self.usable - sum(phase.samples for phase in self.phases)

    @cached_property
    def _cuts(self) -> list[Cut]:
        read = accumulate((phase.samples for phase in self.phases), initial=0)
        return [Cut(self.usable - before, phase) for before, phase in zip(read, self.phases, strict=False)]

    def slice(self, begin: int, end: int) -> Intervals:
        """The positions of the remaining samples begin .. end-1."""
        if begin >= end:
            return Intervals.whole(0, 0)
        # From the last phase back to the first: which ranges, whole, what is asked for came from.
        asked = []
        for cut in reversed(self._cuts):
            first, last = cut.holder(begin), cut.holder(end - 1)
            asked.append((cut, first, last, begin - cut.left_bounds(first)[0], end - begin))
            begin, end = cut.bounds(first)[0], cut.bounds(last)[1]
        positions = Intervals.whole(begin, end)
        for cut, first, last, skipped, count in reversed(asked):
            left = Intervals.joined(self._left_of(cut, first, last, positions))
            positions = left.slice(skipped, skipped + count)
        return positions

    def _left_of(self, cut: Cut, first: int, last: int, positions: Intervals) -> Iterator[Intervals]:
        """What is left of each of the ranges first .. last, which together have these ``positions``."""
        origin = cut.bounds(first)[0]
        for number in range(first, last + 1):
            begin, end = cut.bounds(number)
            own = positions.slice(begin - origin, end - origin)
            yield cut.range_of(number, own, self.seed, self.epoch).left()


def worker_range(usable: int, state: StreamState, rank: int, worker: int, seed: int) -> WorkerRange:
    """What a worker of a rank reads in the last phase of ``state``, of an epoch of ``usable`` samples."""
    *before, phase = state.phases
    remainder = Remainder(usable, tuple(before), seed, state.epoch)
    cut, number = Cut(len(remainder), phase), rank * phase.num_streams + worker
    return cut.range_of(number, remainder.slice(*cut.bounds(number)), seed, state.epoch)


def open_phase(state: StreamState, phase: StreamPhase, usable: int, global_batch_size: int) -> StreamState:
    """``state`` with a last phase that has the cut of ``phase``: the one that was there, or a new, empty one.

    Raises:
        ValueError: The state consumed more than the epoch has, or stopped within a global batch although the cut
            changes.
    """
    phases = tuple(past for past in state.phases if past.micro_batches)
    if sum(past.samples for past in phases) >= max(usable, 1):
        raise ValueError(
            f"the saved state of the stream has read {state.samples} samples of an epoch of {usable}: it belongs to "
            "other data or another global batch; resume with those, or start a new run"
        )
    if phases and phases[-1].cut == phase.cut:
        return replace(state, phases=phases)
    consumed = sum(past.samples for past in phases)
    if consumed % global_batch_size:
        raise ValueError(
            f"the saved state of the stream has read {consumed} samples, which is within a global batch of "
            f"{global_batch_size}: resume it on the same ranks, workers and micro-batch, or save after whole steps"
        )
    return replace(state, phases=(*phases, replace(phase, micro_batches=0)))


def advance(state: StreamState, usable: int) -> StreamState:
    """``state`` after one more micro-batch on every rank; the next epoch's beginning when that completes the epoch."""
    *past, current = state.phases
    state = replace(state, phases=(*past, replace(current, micro_batches=current.micro_batches + 1)))
    return StreamState(state.epoch + 1) if state.samples >= usable else state


def evaluation_range(num_samples: int, rank: int, world_size: int) -> range:
    """The positions that a rank evaluates: contiguous, each position on one rank, sizes differing by at most one."""
    return range(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)


def evaluation_batches(positions: range, batch_size: int, num_streams: int, worker: int) -> list[range]:
    """The batches of a rank that ``worker`` reads, in sequence; batch i comes from worker i % num_streams.

    The batches of a worker lie side by side, so that it reads its shards in sequence; one batch of the rank may be
    partial.
    """
    num_batches = -(-len(positions) // batch_size)
    before = sum(micro_batches_of_worker(num_batches, num_streams, other) for other in range(worker))
    mine = micro_batches_of_worker(num_batches, num_streams, worker)
    return [positions[batch * batch_size : (batch + 1) * batch_size] for batch in range(before, before + mine)]
