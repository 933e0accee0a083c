"""Which sample comes when: every one of an epoch exactly once, whatever the ranks and workers, and however often they
change within it."""

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from adala.data.order import (
    Cut,
    Remainder,
    StreamPhase,
    StreamState,
    advance,
    evaluation_batches,
    evaluation_range,
    open_phase,
    permuted_shards,
    shards_in_order,
    worker_range,
)


def emitted_by(usable: int, state: StreamState, rank: int, worker: int, seed: int = 0) -> list[int]:
    """Positions that a worker emits in the last phase of a state, from the phase's beginning to the epoch's end."""
    part = worker_range(usable, state, rank, worker, seed)
    return [int(part.positions.at(np.array(place))) for place in part.buffer.emission()]


def emitted(usable: int, phase: StreamPhase, phases=(), seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Positions that each rank sees in a phase, from its beginning to the epoch's end, worker by worker."""
    state = StreamState(epoch, (*phases, phase))
    return [
        [position for worker in range(phase.num_streams) for position in emitted_by(usable, state, rank, worker, seed)]
        for rank in range(phase.world_size)
    ]


def read_by_micro_batch(usable: int, state: StreamState, seed: int) -> list[int]:
    """What a phase consumed, dealt as torch collects it: micro-batch i of a rank from worker i % num_streams."""
    phase, seen = state.phases[-1], []
    for rank in range(phase.world_size):
        streams = [iter(emitted_by(usable, state, rank, worker, seed)) for worker in range(phase.num_streams)]
        for micro_batch in range(phase.micro_batches):
            stream = streams[micro_batch % phase.num_streams]
            seen += [next(stream) for _ in range(phase.micro_batch_size)]
    return seen


def remaining(usable: int, phases: list[StreamPhase], seed: int, epoch: int) -> list[int]:
    rest = Remainder(usable, tuple(phases), seed, epoch)
    return list(rest.slice(0, len(rest)))


def test_shards_are_permuted_by_seed_epoch_and_source():
    sizes = [3, 5, 2, 7, 4, 6]
    orders = {
        permuted_shards(sizes, seed, epoch, source).shards
        for seed in range(3)
        for epoch in range(3)
        for source in (None, 0, 1)
    }
    assert len(orders) == 27
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert permuted_shards(sizes, 1, 2) == permuted_shards(sizes, 1, 2)


def test_the_order_is_the_same_in_every_version():
    """What is drawn is written down here: a state that was saved must mean the same after an update of numpy."""
    assert permuted_shards([3, 5, 2, 7, 4, 6], 1, 2).shards == (4, 5, 2, 0, 1, 3)
    phase = StreamPhase(1, 0, 4, 0, shuffle_buffer=5)
    assert emitted(16, phase) == [[0, 3, 4, 5, 8, 6, 9, 1, 10, 2, 7, 12, 15, 11, 14, 13]]


def test_positions_map_to_shards_and_ordinals():
    sequence = shards_in_order([3, 0, 4])
    spans = [(shard, ordinals.tolist()) for shard, ordinals in sequence.spans(range(1, 5))]
    assert spans == [(0, [1, 2]), (2, [0, 1])]
    some = Remainder(6, (), 0, 0).slice(1, 6).take(Remainder(6, (), 0, 0).slice(1, 4))
    assert [(shard, ordinals.tolist()) for shard, ordinals in sequence.spans(some)] == [(0, [2]), (2, [0, 1])]
    assert list(sequence.spans(range(0))) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_every_cut_gives_the_same_set_once(world_size, num_workers):
    usable, micro = 120, 4
    phase = StreamPhase(world_size, num_workers, micro, 0, shuffle_buffer=7)
    ranks = emitted(usable, phase)
    assert {len(rank) for rank in ranks} == {usable // world_size}
    assert sorted(position for rank in ranks for position in rank) == list(range(usable))


def test_ranges_are_contiguous_and_read_in_sequence():
    phase = StreamPhase(2, 3, 4, 0, shuffle_buffer=7)
    parts = [worker_range(120, StreamState(0, (phase,)), rank, worker, 0) for rank in range(2) for worker in range(3)]
    assert all(len(part.positions.starts) == 1 for part in parts)
    assert all(one.positions.ends[0] == other.positions.starts[0] for one, other in pairwise(parts))


def test_no_workers_cut_as_one():
    none, one = (StreamPhase(2, workers, 4, 0, 7) for workers in (0, 1))
    assert emitted(80, none) == emitted(80, one)
    assert none.cut == one.cut


def test_a_phase_leaves_exactly_what_it_did_not_read():
    phase = StreamPhase(world_size=2, num_workers=3, micro_batch_size=2, micro_batches=7, shuffle_buffer=5)
    read = read_by_micro_batch(96, StreamState(1, (phase,)), seed=3)
    assert len(read) == len(set(read)) == phase.samples == 28
    assert remaining(96, [phase], seed=3, epoch=1) == sorted(set(range(96)) - set(read))


def test_a_slice_of_what_is_left_is_that_part_of_it():
    phases = (
        StreamPhase(2, 3, 2, micro_batches=6, shuffle_buffer=5),
        StreamPhase(3, 2, 4, micro_batches=2, shuffle_buffer=9),
        StreamPhase(1, 4, 4, micro_batches=3, shuffle_buffer=3),
    )
    rest = Remainder(96, phases, 5, 1)
    whole = remaining(96, list(phases), 5, 1)
    assert len(whole) == len(rest) == 96 - 24 - 24 - 12
    for begin in range(len(rest) + 1):
        for end in range(begin, len(rest) + 1):
            assert list(rest.slice(begin, end)) == whole[begin:end]


def random_phase(generator: random.Random, global_batch_size: int, left: int) -> StreamPhase:
    """Some whole steps under a cut that the global batch divides into, of what is left of an epoch."""
    world_size = generator.choice([n for n in range(1, 7) if global_batch_size % n == 0])
    share = global_batch_size // world_size
    micro = generator.choice([n for n in range(1, share + 1) if share % n == 0])
    steps = generator.randint(0, left // global_batch_size)
    return StreamPhase(
        world_size, generator.randint(0, 5), micro, steps * share // micro, generator.choice([0, 1, 3, 8, 40, 1000])
    )


@pytest.mark.parametrize("case", range(120))
def test_worlds_that_change_any_number_of_times_see_every_sample_once(case: int):
    generator = random.Random(case)
    global_batch_size = generator.choice([4, 6, 8, 12, 24, 30])
    usable = global_batch_size * generator.randint(1, 40)
    state, seed = StreamState(case), generator.randrange(5)
    while state.samples < usable:
        phase = random_phase(generator, global_batch_size, usable - state.samples)
        *past, current = open_phase(state, phase, usable, global_batch_size).phases
        state = StreamState(case, (*past, replace(current, micro_batches=current.micro_batches + phase.micro_batches)))
    seen = []
    for number in range(len(state.phases)):
        seen += read_by_micro_batch(usable, StreamState(case, state.phases[: number + 1]), seed)
    assert sorted(seen) == list(range(usable))


def test_thirty_changes_within_an_epoch_cost_no_more_than_their_number():
    """Each step back asks for the ranges that overlap: neither for all, nor for those of each of these anew."""
    phases = tuple(StreamPhase((48, 32)[i % 2], 1 + i % 4, 1, (2, 3)[i % 2], 20) for i in range(30))
    state, calls = StreamState(0, (*phases, StreamPhase(48, 4, 2, 0, 50))), []
    range_of = Cut.range_of

    def counted(*given):
        calls.append(given[1])
        return range_of(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cut, "range_of", counted)
        parts = [worker_range(96 * 500, state, rank, 1, 0) for rank in (0, 47)]
    assert all(len(part.positions) for part in parts) and len(calls) < 2 * 30 * 40
    assert sum(phase.world_size * phase.num_streams for phase in phases) > 30 * 90


def test_the_state_survives_json():
    state = StreamState(3, (StreamPhase(2, 4, 8, 5, 100), StreamPhase(1, 0, 16, 2)))
    assert StreamState.from_dict(state.to_dict()) == state
    with pytest.raises(ValueError, match="not the state of a sample stream"):
        StreamState.from_dict({"epoch": 1})


def test_a_cut_changes_between_global_batches_only():
    phase = StreamPhase(2, 2, 4, 0, 10)
    within = StreamState(0, (StreamPhase(2, 2, 4, 3, 10),))
    assert open_phase(within, phase, 160, 16) == within
    with pytest.raises(ValueError, match="within a global batch of 16"):
        open_phase(within, StreamPhase(1, 2, 4, 0, 10), 160, 16)
    between = StreamState(0, (StreamPhase(2, 2, 4, 4, 10),))
    changed = StreamPhase(1, 2, 4, 0, 10)
    assert open_phase(between, changed, 160, 16).phases == (*between.phases, changed)


def test_a_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="belongs to other data"):
        open_phase(StreamState(0, (StreamPhase(1, 0, 4, 40),)), StreamPhase(1, 0, 4), usable=80, global_batch_size=4)


def test_the_last_micro_batch_ends_the_epoch():
    state = StreamState(4, (StreamPhase(2, 0, 4, 8),))
    state = advance(state, usable=80)
    assert state.phases[-1].micro_batches == 9
    assert advance(state, usable=80) == StreamState(5)


@pytest.mark.parametrize("num_samples", [0, 1, 2, 10, 11])
def test_evaluation_covers_each_position_once(num_samples):
    ranges = [evaluation_range(num_samples, rank, 3) for rank in range(3)]
    assert [position for part in ranges for position in part] == list(range(num_samples))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    for part in ranges:
        batches = [batch for worker in range(2) for batch in evaluation_batches(part, 2, 2, worker)]
        assert [position for batch in batches for position in batch] == list(part)
        assert all(len(batch) == 2 for batch in batches[:-1])
