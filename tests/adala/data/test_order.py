from itertools import islice

import numpy as np
import pytest

from adala.data.order import (
    StreamPhase,
    StreamState,
    advance,
    cut_range,
    evaluation_batches,
    evaluation_range,
    open_phase,
    permuted_shards,
    remaining_positions,
    shards_in_order,
    shuffled,
)


def emitted(usable: int, phase: StreamPhase, phases=(), seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Positions that each rank sees in a phase, from its beginning to the epoch's end, worker by worker."""
    remaining = remaining_positions(usable, phases, seed, epoch)
    ranks = []
    for rank in range(phase.world_size):
        parts = [cut_range(remaining, phase, rank, worker, seed, epoch) for worker in range(phase.num_streams)]
        ranks.append([int(part.positions[place]) for part in parts for place in part.emission()])
    return ranks


def test_shards_are_permuted_by_seed_and_epoch():
    sizes = [3, 5, 2, 7, 4, 6]
    orders = {permuted_shards(sizes, seed, epoch).shards for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert permuted_shards(sizes, 1, 2) == permuted_shards(sizes, 1, 2)


def test_positions_map_to_shards_and_ordinals():
    sequence = shards_in_order([3, 0, 4])
    assert [sequence.locate(position) for position in range(7)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (2, 0),
        (2, 1),
        (2, 2),
        (2, 3),
    ]
    assert [(shard, list(part), first) for shard, part, first in sequence.spans(range(1, 5))] == [
        (0, [1, 2], 0),
        (2, [3, 4], 3),
    ]
    assert [(shard, list(part)) for shard, part, _ in sequence.spans(np.array([2, 6]))] == [(0, [2]), (2, [6])]


@pytest.mark.parametrize("size", [0, 1, 4, 100])
def test_a_buffer_emits_each_number_once(size):
    order = list(shuffled(50, size, "key"))
    assert sorted(order) == list(range(50))
    assert (order == list(range(50))) == (size <= 1)
    if 1 < size < 50:
        # Nothing can come out before it is in the buffer.
        assert all(number < place + size for place, number in enumerate(order))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_every_cut_gives_the_same_set_once(world_size, num_workers):
    usable, micro = 120, 4
    phase = StreamPhase(world_size, num_workers, micro, 0, shuffle_buffer=7)
    ranks = emitted(usable, phase)
    assert {len(rank) for rank in ranks} == {usable // world_size}
    assert sorted(position for rank in ranks for position in rank) == list(range(usable))


def test_no_workers_cut_as_one():
    none, one = (StreamPhase(2, workers, 4, 0, 7) for workers in (0, 1))
    assert emitted(80, none) == emitted(80, one)
    assert none.cut == one.cut


def test_a_phase_leaves_exactly_what_it_did_not_read():
    phase = StreamPhase(world_size=2, num_workers=3, micro_batch_size=2, micro_batches=7, shuffle_buffer=5)
    usable = 96
    read = set()
    for rank in range(2):
        parts = [cut_range(range(usable), phase, rank, worker, 3, 1) for worker in range(3)]
        streams = [part.emission() for part in parts]
        # As torch collects them: micro-batch i from worker i % 3.
        for micro_batch in range(7):
            worker = micro_batch % 3
            read |= {int(parts[worker].positions[place]) for place in islice(streams[worker], 2)}
    assert len(read) == phase.samples == 28
    remaining = remaining_positions(usable, [phase], seed=3, epoch=1)
    assert list(remaining) == sorted(set(range(usable)) - read)


def test_chained_topologies_cover_the_epoch_once():
    first = StreamPhase(2, 3, 2, micro_batches=6, shuffle_buffer=5)
    second = StreamPhase(3, 0, 4, micro_batches=2, shuffle_buffer=0)
    third = StreamPhase(1, 2, 2, 0, shuffle_buffer=9)
    usable = 96
    rest = emitted(usable, third, phases=[first, second])[0]
    assert len(rest) == usable - 24 - 24
    remaining = remaining_positions(usable, [first, second], 0, 0)
    assert sorted(rest) == list(remaining)


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
