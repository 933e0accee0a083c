"""How well a sliding buffer mixes, which decides how different from each other batches are, and that any moment of it
is found without those before."""

import random

import numpy as np
import pytest

from adala.data.order import permuted_shards
from adala.data.positions import Intervals
from adala.data.shuffle import BLOCK, SlidingBuffer


def reference(buffer: SlidingBuffer) -> list[int]:
    """The same order, one number after the other."""
    content, order = list(range(buffer.held)), []
    for step, slot in enumerate(buffer._drawn_slots(0, buffer.steps).tolist()):
        order.append(content[slot])
        content[slot] = buffer.held + step
    return order + [content[slot] for slot in buffer._last_order.tolist()]


@pytest.mark.parametrize("length", [0, 1, 2, 50, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("size", [0, 1, 2, 4, 49, 50, 1000, 10**6])
def test_an_order_is_the_same_from_wherever_it_is_taken_up(length: int, size: int) -> None:
    buffer = SlidingBuffer(length, size, "key")
    order = list(buffer.emission())
    assert order == reference(buffer) and sorted(order) == list(range(length))
    assert (order == list(range(length))) == (size <= 1 or length <= 1)
    # Nothing can come out before it is in the buffer.
    assert all(number < place + max(size, 1) for place, number in enumerate(order))
    steps = buffer.steps
    for start in {0, 1, steps // 2, BLOCK, max(steps - 1, 0), steps, steps + 1, length - 1, length}:
        if 0 <= start <= length:
            assert list(buffer.emission(start)) == order[start:]
            assert list(buffer.left_after(start)) == sorted(order[start:])


def test_what_is_left_is_found_in_the_time_of_the_buffer_alone(monkeypatch) -> None:
    import adala.data.shuffle

    drawn, counts = adala.data.shuffle.drawn, []
    monkeypatch.setattr(adala.data.shuffle, "drawn", lambda *given: counts.append(given[2] - given[1]) or drawn(*given))
    left = SlidingBuffer(10**9, 1000, "key").left_after(6 * 10**8)
    assert len(left) == 4 * 10**8 and len(left.starts) <= 1000 and sum(counts) < 40_000


@pytest.mark.parametrize("size", [2, 16])
def test_a_buffer_mixes_from_the_first_sample_to_the_last(size: int) -> None:
    """A sample waits for about as many steps as the buffer is large, here over 2000 samples."""
    order = list(SlidingBuffer(2000, size, "key").emission())
    waits = [place - number + size for place, number in enumerate(order)]
    for part in (waits[:1000], waits[1000:]):
        assert sum(part) / 1000 == pytest.approx(size, rel=0.1)
        assert len(set(part)) > 3 * size, "some leave at once, some stay for long"
    assert min(waits) >= 1, "nothing comes before it was read"
    assert order != list(SlidingBuffer(2000, size, "other").emission())


def test_every_shard_comes_first_in_some_epoch() -> None:
    firsts = [permuted_shards([3, 3, 3, 3], seed=0, epoch=epoch).shards[0] for epoch in range(200)]
    assert {shard: 30 < firsts.count(shard) < 75 for shard in range(4)} == dict.fromkeys(range(4), True)


@pytest.mark.parametrize("case", range(60))
def test_intervals_are_the_numbers_that_they_stand_for(case: int) -> None:
    generator = random.Random(case)
    numbers = sorted(generator.sample(range(60), generator.randint(0, 40)))
    intervals = Intervals.of(np.array(numbers))
    assert list(intervals) == intervals.numbers().tolist() == numbers and len(intervals) == len(numbers)
    places = sorted(generator.sample(range(len(numbers)), generator.randint(0, len(numbers))))
    assert list(intervals.take(Intervals.of(np.array(places)))) == [numbers[place] for place in places]
    begin, end = sorted(generator.choices(range(len(numbers) + 1), k=2))
    assert list(intervals.slice(begin, end)) == numbers[begin:end]
    for bound in range(-1, 62):
        assert intervals.below(bound) == sum(number < bound for number in numbers)
    assert list(Intervals.joined([intervals.slice(0, begin), intervals.slice(begin, len(numbers))])) == numbers
    every = generator.randint(1, 30)
    assert [k * every + n for k, part in intervals.split(every) for n in part] == numbers
    assert all(0 <= n < every for _, part in intervals.split(every) for n in part)
    joined = Intervals.joined([intervals])
    assert (joined.starts[1:] > joined.ends[:-1]).all(), "what touches is one"
