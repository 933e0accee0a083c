"""The stream of more ranks than anybody has at hand, planned by the very code that plans a run's, without any data.

    python bench/simulate_stream.py --ranks 1024 --workers 8 --shards 100000

plans what every worker of every rank reads of an epoch of uneven shards, draws the order in which each emits it, and
counts every sample. Then the epoch is stopped at a random step and taken up by three quarters of the ranks with other
workers and other micro-batches, stopped again, and taken up by all ranks. Prints figures; the exit status is 1 where
one of the claims does not hold.
"""

import argparse
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from adala.data import Mixture, Shard, ShardIndex, StreamPhase, StreamState, TrainLoader, View, prepare_images
from adala.data.index import mix, read_index
from adala.data.order import WorkerRange, open_phase, permuted_shards, usable_samples, worker_range
from adala.data.positions import Intervals
from adala.files import write_json
from adala.resident import resident_mib

MOST_SECONDS, MOST_MIB = 10, 2048
EPOCH = 3
# Parts of the shards that are empty, hold one sample, and hold 20,000; the others hold 200 to 2,000.
UNEVEN = {0: 0.03, 1: 0.01, 20_000: 0.002}
WEIGHTS = (5, 3, 1)


@dataclass
class Simulation:
    """What is simulated, and what was found.

    Attributes:
        options: Of the command.
        index: The shards.
        global_batch_size: Samples of a step on all ranks.
        ordering_s: Seconds that the order of the shards takes, which every worker draws.
        planning_s: Seconds that each worker planned beside that before it could ask for its first sample.
        failed: Claims that do not hold.
    """

    options: argparse.Namespace
    index: ShardIndex
    global_batch_size: int
    ordering_s: float = 0.0
    planning_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @cached_property
    def usable(self) -> int:
        return usable_samples(self.index.num_samples, self.global_batch_size)

    @property
    def steps(self) -> int:
        return self.usable // self.global_batch_size

    def claim(self, holds: bool, text: str) -> None:
        """Prints a claim and whether it holds."""
        print(f"  {'yes' if holds else 'NO '}  {text}", flush=True)
        if not holds:
            self.failed.append(text)

    def workers(self, state: StreamState) -> Iterator[tuple[int, int, WorkerRange]]:
        """Every worker of every rank with its range of the last phase of ``state``."""
        phase, seed = state.phases[-1], self.options.seed
        for rank in range(phase.world_size):
            for worker in range(phase.num_streams):
                begin = time.perf_counter()
                part = worker_range(self.usable, state, rank, worker, seed)
                # What a worker finds out before it opens its first shard, but for the order of the shards.
                part.positions.take(part.buffer.left_after(part.consumed))
                next(part.buffer.blocks(part.consumed))
                self.planning_s.append(time.perf_counter() - begin)
                yield rank, worker, part

    def read(self, state: StreamState, counts: np.ndarray) -> list[Intervals]:
        """Counts what every worker emits in the last phase of ``state``, up to where it stopped, by position.

        Returns:
            The positions of each worker's range.
        """
        ranges = []
        by_rank = np.zeros(state.phases[-1].world_size, dtype=np.int64)
        for rank, _, part in self.workers(state):
            ranges.append(part.positions)
            left = part.consumed
            for block in part.buffer.blocks():
                # The sum of a rank's shows if one should be in a block twice, which is counted once here.
                counts[part.positions.at(block[:left])] += 1
                by_rank[rank] += len(block[:left])
                left -= len(block[:left])
                if not left:
                    break
        batches = state.phases[-1].micro_batches * state.phases[-1].micro_batch_size
        self.claim(bool((by_rank == batches).all()), f"each of {len(by_rank)} ranks read {batches:,} samples")
        return ranges


def uneven_shards(count: int, seed: int) -> ShardIndex:
    """Shards of 200 to 2,000 samples, some empty, some of one sample and some of 20,000."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(200, 2001, count)
    kinds = generator.choice([-1, *UNEVEN], count, p=[1 - sum(UNEVEN.values()), *UNEVEN.values()])
    sizes = np.where(kinds < 0, sizes, kinds)
    return ShardIndex(
        tuple(Shard(f"/data/train-{n:06d}.tar", size, 110_000 * size) for n, size in enumerate(sizes.tolist()))
    )


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """What ``work`` returns, and its seconds."""
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def phase_of(simulation: Simulation, ranks: int, workers: int, micro_batch_size: int) -> StreamPhase:
    return StreamPhase(ranks, workers, micro_batch_size, 0, simulation.options.shuffle_buffer)


def with_steps(simulation: Simulation, state: StreamState, steps: int) -> StreamState:
    """``state`` after so many steps under its last phase."""
    phase = state.phases[-1]
    done = steps * simulation.global_batch_size // (phase.world_size * phase.micro_batch_size)
    return replace(state, phases=(*state.phases[:-1], replace(phase, micro_batches=done)))


def check_once(simulation: Simulation, counts: np.ndarray) -> None:
    total, tail = len(counts), simulation.index.num_samples - len(counts)
    text = f"every one of {total:,} samples exactly once; {tail:,} that fill no global batch are dropped"
    simulation.claim(bool((counts == 1).all()), text)


def simulate_start(simulation: Simulation) -> None:
    """What a rank does before its workers start."""
    options, index = simulation.options, simulation.index
    print(f"start, {len(index.shards):,} shards:")
    with tempfile.TemporaryDirectory() as folder:
        entries = [{"name": shard.name, "samples": shard.samples, "bytes": shard.bytes} for shard in index.shards]
        write_json(Path(folder) / "index.json", {"shards": entries})
        _, reading = timed(lambda: read_index(f"{folder}/"))
    told, telling = timed(lambda: pickle.dumps(index))
    _, hearing = timed(lambda: pickle.loads(told))
    images = prepare_images(View((224, 224), (0.5,) * 3, (0.5,) * 3, (16, 16)).image_transform("crop"))
    build = {"global_batch_size": simulation.global_batch_size, "micro_batch_size": options.micro_batch_size}
    _, opening = timed(lambda: TrainLoader(index, images, seed=options.seed, rank=1, world_size=options.ranks, **build))
    print(
        f"  {reading:.2f} s to read the index (rank 0), {telling:.2f} s to pack its {len(told) / 2**20:.1f} MiB for "
        f"the other ranks, {hearing:.2f} s to unpack, {opening:.2f} s to build a loader"
    )
    simulation.claim(reading + telling + hearing + opening < MOST_SECONDS, f"a rank starts within {MOST_SECONDS} s")


def simulate_whole_epoch(simulation: Simulation) -> list[Intervals]:
    """An epoch without a stop: who reads what, and from which shard. Returns each worker's positions."""
    options, index, usable = simulation.options, simulation.index, simulation.usable
    print(f"one epoch of {options.ranks} ranks x {options.workers} workers, {simulation.steps:,} steps:")
    phase = phase_of(simulation, options.ranks, options.workers, options.micro_batch_size)
    counts = np.zeros(usable, dtype=np.uint8)
    ranges = simulation.read(with_steps(simulation, StreamState(EPOCH, (phase,)), simulation.steps), counts)
    check_once(simulation, counts)
    sizes = [shard.samples for shard in index.shards]
    sequence, simulation.ordering_s = timed(lambda: permuted_shards(sizes, options.seed, EPOCH))
    read, opened = np.zeros(len(sizes), dtype=np.int64), []
    for positions in ranges:
        spans = list(sequence.spans(positions))
        for shard, ordinals in spans:
            read[shard] += len(ordinals)
        opened.append(len(spans))
    # Of the shards that lie across the end of what is usable, or behind it, the tail is left.
    order, ends = np.array(sequence.shards), np.array(sequence.ends)
    expected = np.clip(usable - (ends - np.array(sizes)[order]), 0, np.array(sizes)[order])
    simulation.claim(
        bool((read[order] == expected).all()),
        f"every shard gives all its samples; a worker opens {median(opened):.0f} shards, {max(opened)} at most",
    )
    return ranges


def simulate_stops(simulation: Simulation) -> None:
    """An epoch that is stopped twice at random steps, and taken up by other ranks, workers and micro-batches."""
    options = simulation.options
    generator = np.random.default_rng(options.seed)
    first, second = sorted(generator.choice(np.arange(1, simulation.steps), 2, replace=False).tolist())
    fewer = options.ranks * 3 // 4
    worlds = [
        (phase_of(simulation, options.ranks, options.workers, options.micro_batch_size), first),
        (phase_of(simulation, fewer, max(options.workers - 3, 1), options.micro_batch_size * 2 // 3), second - first),
        (phase_of(simulation, options.ranks, options.workers + 1, options.micro_batch_size // 2), None),
    ]
    counts, state = np.zeros(simulation.usable, dtype=np.uint8), StreamState(EPOCH)
    for phase, steps in worlds:
        share = phase.world_size * phase.micro_batch_size
        print(
            f"{f'{steps:,} steps' if steps else 'the rest'} on {phase.world_size} ranks x {phase.num_workers} workers, "
            f"{simulation.global_batch_size // share} micro-batches of {phase.micro_batch_size} a step:"
        )
        state = open_phase(state, phase, simulation.usable, simulation.global_batch_size)
        state = with_steps(simulation, state, steps or simulation.steps - second)
        simulation.read(state, counts)
    check_once(simulation, counts)


def simulate_mixture(simulation: Simulation, ranges: Sequence[Intervals]) -> None:
    """The same ``ranges`` of positions, of a mixture of three sources of very different sizes."""
    shards = simulation.index.shards
    bounds = [0, len(shards) // 10, len(shards) // 4, len(shards)]
    mixture = Mixture.of(mix([ShardIndex(shards[begin:end]) for begin, end in pairwise(bounds)], WEIGHTS))
    sizes, begun = ", ".join(f"{size:,}" for size in mixture.sizes), EPOCH * simulation.usable
    print(f"an epoch of a mixture with the weights {WEIGHTS}, of sources of {sizes} samples:")
    parts: list[list[Intervals]] = [[] for _ in WEIGHTS]
    worst = 0.0
    for positions in ranges:
        for source, own in enumerate(mixture.numbers(positions.shifted(begun))):
            parts[source].append(own)
            worst = max(worst, abs(len(own) - len(positions) * mixture.shares[source]))
    joined = [Intervals.joined(own) for own in parts]
    expected = mixture.counts(np.array([begun, begun + simulation.usable])).tolist()
    exact = [list(zip(own.starts, own.ends, strict=True)) == [tuple(expected[n])] for n, own in enumerate(joined)]
    simulation.claim(all(exact), "each source goes on where its last epoch stopped, and every sample is read once")
    simulation.claim(worst < 4, f"every worker's range has the proportions to {worst:.1f} samples")


def report(simulation: Simulation, seconds: float) -> None:
    peak_mib = resident_mib("VmHWM")
    slowest, usual = (simulation.ordering_s + of(simulation.planning_s) for of in (max, median))
    print(f"all in {seconds:.0f} s:")
    simulation.claim(
        slowest < MOST_SECONDS,
        f"a worker plans in {1000 * usual:.1f} ms (median of {len(simulation.planning_s):,}; {slowest:.2f} s at most), "
        f"{1000 * simulation.ordering_s:.1f} ms of it for the order of the shards",
    )
    simulation.claim(peak_mib < MOST_MIB, f"{peak_mib:.0f} MiB at most, with torch and the counts of all samples")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=1024, help="a multiple of 4")
    parser.add_argument("--workers", type=int, default=8, help="of each rank")
    parser.add_argument(
        "--micro_batch_size", type=int, default=6, help="a multiple of 6, also a rank's share of a step"
    )
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--shuffle_buffer", type=int, default=1000, help="samples, of each worker")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.ranks < 4 or options.ranks % 4 or options.micro_batch_size < 6 or options.micro_batch_size % 6:
        parser.error("--ranks must be a multiple of 4, --micro_batch_size one of 6: the epoch goes on on 3/4 of them")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    begin = time.perf_counter()
    index = uneven_shards(options.shards, options.seed)
    simulation = Simulation(options, index, options.ranks * options.micro_batch_size)
    print(f"{index.num_samples:,} samples in {options.shards:,} shards, {simulation.global_batch_size:,} a step")
    if simulation.steps < 3:
        print("error: fewer than three steps an epoch: name more --shards or fewer --ranks", file=sys.stderr)
        return 1
    simulate_start(simulation)
    simulate_mixture(simulation, simulate_whole_epoch(simulation))
    simulate_stops(simulation)
    report(simulation, time.perf_counter() - begin)
    return 1 if simulation.failed else 0


if __name__ == "__main__":
    sys.exit(main())
