"""The order of the stream: which sample comes when, as a pure function of (seed, epoch, ranks, workers). No I/O.

An epoch is a sequence of positions 0 .. S-1: its shards permuted, their samples one after the other. The first
``usable`` of them (whole global batches) are trained on. They are cut into equal contiguous ranges, one a rank; a
rank's micro-batches are dealt to its workers in turn, and each worker reads one contiguous range in sequence and
emits it through a seeded buffer.

What was consumed is a list of phases, each a number of micro-batches under one cut. Replaying them gives what
remains of the epoch, which another number of ranks or workers then cuts anew.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice
from typing import Any

import numpy as np


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
    """

    shards: tuple[int, ...]
    ends: tuple[int, ...]

    def locate(self, position: int) -> tuple[int, int]:
        """The shard that holds a position, and the position's ordinal within it."""
        place = bisect_right(self.ends, position)
        return self.shards[place], position - (self.ends[place - 1] if place else 0)

    def spans(self, positions: Sequence[int]) -> Iterator[tuple[int, Sequence[int], int]]:
        """Ascending ``positions`` by shard: (shard, its part of the positions, position of the shard's ordinal 0)."""
        begin = 0
        while begin < len(positions):
            place = bisect_right(self.ends, positions[begin])
            end = bisect_right(positions, self.ends[place] - 1, lo=begin)
            yield self.shards[place], positions[begin:end], self.ends[place - 1] if place else 0
            begin = end


def shards_in_order(shard_sizes: Sequence[int]) -> ShardSequence:
    """The sequence without a permutation, for evaluation. ``shard_sizes`` counts samples."""
    return ShardSequence(tuple(range(len(shard_sizes))), tuple(accumulate(shard_sizes)))


def permuted_shards(shard_sizes: Sequence[int], seed: int, epoch: int) -> ShardSequence:
    """The sequence of a training epoch. ``shard_sizes`` counts samples."""
    # Of Python's generators only `random()` promises the same numbers in every version, so no `shuffle` here.
    generator = random.Random(f"shards/{seed}/{epoch}")
    keys = [generator.random() for _ in shard_sizes]
    shards = tuple(sorted(range(len(shard_sizes)), key=keys.__getitem__))
    return ShardSequence(shards, tuple(accumulate(shard_sizes[shard] for shard in shards)))


def usable_samples(num_samples: int, global_batch_size: int) -> int:
    """Samples of an epoch that fill whole global batches."""
    return num_samples // global_batch_size * global_batch_size


def shuffled(length: int, buffer_size: int, key: str) -> Iterator[int]:
    """0 .. length-1 in the order in which a sliding buffer of ``buffer_size`` emits them; 0 and 1 keep the order.

    The first number comes out once the buffer is full, so that at most ``buffer_size`` samples are held at a time.
    """
    if buffer_size <= 1:
        yield from range(length)
        return
    generator = random.Random(key)
    buffer = list(range(min(buffer_size, length)))
    for incoming in range(len(buffer), length):
        slot = int(generator.random() * buffer_size)
        yield buffer[slot]
        buffer[slot] = incoming
    while buffer:
        slot = int(generator.random() * len(buffer))
        buffer[slot], buffer[-1] = buffer[-1], buffer[slot]
        yield buffer.pop()


@dataclass(frozen=True)
class WorkerRange:
    """What one worker of one rank reads during a phase.

    Attributes:
        positions: Ascending positions of its range, a ``range`` or an integer array.
        key: Seeds the shuffle buffer.
        shuffle_buffer: Size of the buffer, in samples.
        consumed: Samples that were emitted already.
    """

    positions: Sequence[int]
    key: str
    shuffle_buffer: int
    consumed: int

    def emission(self) -> Iterator[int]:
        """Indices into ``positions`` in the order of emission, from the first."""
        return shuffled(len(self.positions), self.shuffle_buffer, self.key)

    def consumed_mask(self) -> np.ndarray:
        """Boolean (len(positions),): which were emitted already."""
        mask = np.zeros(len(self.positions), dtype=bool)
        if self.consumed:
            mask[np.fromiter(islice(self.emission(), self.consumed), dtype=np.int64, count=self.consumed)] = True
        return mask


def micro_batches_of_worker(micro_batches: int, num_streams: int, worker: int) -> int:
    """How many of the first ``micro_batches`` come from ``worker``: number i comes from worker i % num_streams."""
    return len(range(worker, micro_batches, num_streams))


def cut_range(
    remaining: Sequence[int], phase: StreamPhase, rank: int, worker: int, seed: int, epoch: int
) -> WorkerRange:
    """The part of ``remaining`` (ascending positions) that a worker of a rank reads during ``phase``."""
    rank_length = len(remaining) // phase.world_size
    counts = [
        micro_batches_of_worker(rank_length // phase.micro_batch_size, phase.num_streams, other)
        * phase.micro_batch_size
        for other in range(worker + 1)
    ]
    begin = rank * rank_length + sum(counts[:worker])
    positions = remaining[begin : begin + counts[worker]]
    first = int(positions[0]) if len(positions) else -1
    return WorkerRange(
        positions=positions,
        key=f"buffer/{seed}/{epoch}/{first}/{len(positions)}",
        shuffle_buffer=phase.shuffle_buffer,
        consumed=micro_batches_of_worker(phase.micro_batches, phase.num_streams, worker) * phase.micro_batch_size,
    )


def remaining_positions(usable: int, phases: Sequence[StreamPhase], seed: int, epoch: int) -> Sequence[int]:
    """Ascending positions of an epoch that ``phases`` left over, by replaying them.

    Costs about 0.3 s for every million samples consumed, and nothing without phases.
    """
    remaining: Sequence[int] = range(usable)
    for phase in phases:
        left = [
            np.asarray(part.positions)[~part.consumed_mask()]
            for rank in range(phase.world_size)
            for worker in range(phase.num_streams)
            for part in [cut_range(remaining, phase, rank, worker, seed, epoch)]
        ]
        remaining = np.concatenate(left)
    return remaining


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
