"""Batches that come from workers through a few buffers are the worker's, and stay what they were."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import IterableDataset

from adala.data.loader import iterate, worker_place
from adala.data.transfer import BUFFERS, LendingStream, Lent, _receivers, lending


def batch_of(worker: int, number: int) -> dict:
    """A batch whose sizes and types change, and that no other equals."""
    generator = torch.Generator().manual_seed(1000 * worker + number)
    size = 1 + number * 7 % 5
    return {
        "image": torch.randint(0, 256, (size, 3, 20, 30), generator=generator, dtype=torch.uint8),
        "label": torch.randint(0, 9, (size,), generator=generator),
        "mask": torch.rand(size, 4, 6, generator=generator) > 0.5,
        "strided": torch.rand(6, size, generator=generator).T,
        "scalar": torch.tensor(1.5 * number),
        "none": torch.empty(0, 3),
        "id": [f"{worker}/{number}/{place}" for place in range(size)],
        "epoch": number,
    }


@dataclass(frozen=True)
class Numbered(IterableDataset):
    lengths: tuple[int, ...]

    def __iter__(self) -> Iterator[dict]:
        worker, _ = worker_place()
        for number in range(self.lengths[worker]):
            yield batch_of(worker, number)


def assert_equal(batch: dict, expected: dict) -> None:
    assert list(batch) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert batch[name].dtype == value.dtype and torch.equal(batch[name], value)
            assert not batch[name].is_shared(), "the worker could write into it"
        else:
            assert batch[name] == value


@pytest.mark.parametrize("lengths", [(9,), (9, 9), (2, 12), (12, 0, 5)], ids=str)
def test_batches_arrive_whole_in_order_and_stay_as_they_were(lengths):
    """All of them are kept until the end, when the buffers have been written over many times."""
    received = list(iterate(Numbered(lengths), len(lengths)))
    assert len(received) == sum(lengths) > 2 * BUFFERS
    expected = {(worker, number): batch_of(worker, number) for worker in range(3) for number in range(12)}
    seen = []
    for batch in received:
        worker, number, _ = map(int, batch["id"][0].split("/"))
        assert_equal(batch, expected[worker, number])
        seen.append((worker, number))
    assert sorted(seen) == [(worker, number) for worker in range(len(lengths)) for number in range(lengths[worker])]


def test_a_buffer_is_written_again_only_once_it_is_free(monkeypatch):
    """In one process: the worker would wait for ever for what nobody has taken."""
    monkeypatch.setattr("adala.data.transfer.get_worker_info", lambda: type("Info", (), {"id": 0}))
    with lending(Numbered((9,)), 1) as stream:
        assert isinstance(stream, LendingStream)
        lent = iter(stream)
        waiting: list[Lent] = [next(lent) for _ in range(BUFFERS)]
        assert not stream.free[0].acquire(block=False)
        for number in range(BUFFERS, 9):
            assert_equal(waiting.pop(0).taken(), batch_of(0, number - BUFFERS))
            waiting.append(next(lent))
        # By torch's thread that pins memory; there is no GPU here to pin it for.
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        assert_equal(waiting.pop(0).pin_memory(), batch_of(0, 9 - BUFFERS))


def test_nothing_is_kept_of_a_stream_that_has_ended():
    batches = iterate(Numbered((50, 50)), 2)
    next(batches)
    assert len(_receivers) == 1
    batches.close()
    assert not _receivers
