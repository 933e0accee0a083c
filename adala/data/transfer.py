"""Batches on their way from data workers to the process that trains, without new memory for each of them.

torch puts every batch into shared memory of its own, whose pages the kernel clears, maps twice and takes away again,
which costs several times what copying them does. Here every worker writes into a few buffers in turn, and the other
side copies a batch out of its buffer before that is written again.
"""

import multiprocessing
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Semaphore
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

Batch = dict[str, Any]
# Of each worker: as many batches as torch has it read ahead, and one that is being copied.
BUFFERS = 3


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in the buffer of its worker, number and name.

    Attributes:
        shape: Of the tensor.
        dtype: Of the tensor.
        buffer: The buffer, when it is used for the first time; it comes but once, since to map it costs more than to
            copy what is in it.
    """

    shape: torch.Size
    dtype: torch.dtype
    buffer: Tensor | None


@dataclass(frozen=True)
class Lent:
    """A batch as it goes through torch's queue: its tensors in buffers, the rest as it is."""

    token: str
    worker: int
    number: int
    places: dict[str, Place]
    rest: Batch

    def taken(self, copy: Callable[[Tensor], Tensor] = Tensor.clone) -> Batch:
        """The batch, copied out of its buffers, which the worker may then use again."""
        receiver = _receivers[self.token]
        tensors = {name: copy(self._view(receiver, name, place)) for name, place in self.places.items()}
        receiver.free[self.worker].release()
        return tensors | self.rest

    def pin_memory(self) -> Batch:
        """What torch's thread calls that brings batches into pinned memory."""
        return self.taken(Tensor.pin_memory)

    def _view(self, receiver: "Receiver", name: str, place: Place) -> Tensor:
        key = (self.worker, self.number, name)
        if place.buffer is not None:
            receiver.buffers[key] = place.buffer
        length = place.shape.numel() * place.dtype.itemsize
        return receiver.buffers[key][:length].view(place.dtype).view(place.shape)


@dataclass
class Receiver:
    """What the receiving side knows of a stream's buffers.

    Attributes:
        free: Of each worker, how many of its buffers may be written.
        buffers: By worker, number and name, bytes.
    """

    free: list[Semaphore]
    buffers: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)


# By token: torch's thread that pins memory finds nothing but what is global.
_receivers: dict[str, Receiver] = {}


@dataclass(frozen=True)
class LendingStream(IterableDataset):
    """A stream of batches, which gives each of them as :class:`Lent`."""

    stream: IterableDataset
    token: str
    free: list[Semaphore]

    def __iter__(self) -> Iterator[Lent]:
        worker = get_worker_info().id
        buffers: list[dict[str, Tensor]] = [{} for _ in range(BUFFERS)]
        number = 0
        for batch in self.stream:
            self.free[worker].acquire()
            tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            places = {name: _put(buffers[number], name, tensor) for name, tensor in tensors.items()}
            rest = {name: value for name, value in batch.items() if name not in tensors}
            yield Lent(self.token, worker, number, places, rest)
            number = (number + 1) % BUFFERS


def _put(buffers: dict[str, Tensor], name: str, tensor: Tensor) -> Place:
    """Copies a tensor into the buffer of its name, or into a new one where that is too small."""
    content = tensor.contiguous().view(-1).view(torch.uint8)
    is_new = name not in buffers or buffers[name].numel() < content.numel()
    if is_new:
        buffers[name] = torch.empty_like(content).share_memory_()
    buffers[name][: content.numel()] = content
    return Place(tensor.shape, tensor.dtype, buffers[name] if is_new else None)


@contextmanager
def lending(stream: IterableDataset, num_workers: int) -> Iterator[LendingStream]:
    """The stream for torch's DataLoader, as long as its batches are received."""
    token = uuid.uuid4().hex
    free = [multiprocessing.Semaphore(BUFFERS) for _ in range(num_workers)]
    _receivers[token] = Receiver(free)
    try:
        yield LendingStream(stream, token, free)
    finally:
        del _receivers[token]
