"""How well a sliding buffer mixes, which decides how different from each other batches are."""

import pytest

from adala.data.order import permuted_shards, shuffled


@pytest.mark.parametrize("size", [0, 1])
def test_no_buffer_keeps_the_order(size: int) -> None:
    assert list(shuffled(20, size, "key")) == list(range(20))


@pytest.mark.parametrize("size", [2, 16])
def test_a_buffer_mixes_from_the_first_sample_to_the_last(size: int) -> None:
    """A sample waits for about as many steps as the buffer is large, here over 2000 samples."""
    order = list(shuffled(2000, size, "key"))
    assert sorted(order) == list(range(2000))
    waits = [place - number + size for place, number in enumerate(order)]
    for part in (waits[:1000], waits[1000:]):
        assert sum(part) / 1000 == pytest.approx(size, rel=0.1)
        assert len(set(part)) > 3 * size, "some leave at once, some stay for long"
    assert min(waits) >= 1, "nothing comes before it was read"
    assert order != list(shuffled(2000, size, "other"))


def test_every_shard_comes_first_in_some_epoch() -> None:
    firsts = [permuted_shards([3, 3, 3, 3], seed=0, epoch=epoch).shards[0] for epoch in range(200)]
    assert {shard: 30 < firsts.count(shard) < 75 for shard in range(4)} == dict.fromkeys(range(4), True)
