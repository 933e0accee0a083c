"""The buffer that each data worker shuffles through. What it holds at any moment follows from the draws just before it,
so that a stream is taken up anywhere for the cost of the buffer, however much of it was read."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from adala.data.positions import Intervals

# Draws that are made at once: many enough for numpy, few enough that a stream's first sample does not wait for them.
BLOCK = 4096


@dataclass(frozen=True)
class SlidingBuffer:
    """0 .. length-1 in the order in which a buffer emits them that reads them one after the other.

    Each step draws a slot of the full buffer, emits what lies there and puts the next number into its place. Behind the
    last number what is left leaves in a random order. Sizes 0 and 1 keep the order.

    Attributes:
        length: How many numbers.
        size: How many of them are held at most.
        key: Seeds the draws.
    """

    length: int
    size: int
    key: str

    @property
    def held(self) -> int:
        """Slots of the buffer."""
        return min(max(self.size, 1), self.length)

    @property
    def steps(self) -> int:
        """Steps at which a number comes in for the one that leaves."""
        return self.length - self.held

    def blocks(self, start: int = 0) -> Iterator[np.ndarray]:
        """The numbers in order of emission, from number ``start`` of that order on, in arrays made as they are asked
        for."""
        content = self._slots_after(min(start, self.steps))
        for begin in range(start, self.steps, BLOCK):
            end = min(begin + BLOCK, self.steps)
            yield _exchange(content, self._drawn_slots(begin, end), np.arange(begin, end) + self.held)
        leaving = content[self._last_order]
        yield leaving[max(0, start - self.steps) :]

    def emission(self, start: int = 0) -> Iterator[int]:
        """:meth:`blocks` number by number."""
        for block in self.blocks(start):
            yield from block.tolist()

    def left_after(self, emitted: int) -> Intervals:
        """The numbers that have not left when ``emitted`` have."""
        if emitted >= self.steps:
            inside = self._slots_after(self.steps)[self._last_order][emitted - self.steps :]
        else:
            inside = self._slots_after(emitted)
        unread = Intervals.whole(min(emitted + self.held, self.length), self.length)
        return Intervals.joined([Intervals.of(np.sort(inside)), unread])

    def _slots_after(self, steps: int) -> np.ndarray:
        """Integer (held,): what each slot holds after so many steps, found from the last of them backwards."""
        content, end = np.full(self.held, -1), steps
        while end > 0 and (content < 0).any():
            begin = max(0, end - max(BLOCK, 4 * self.held))
            came = np.full(self.held, -1)
            np.maximum.at(came, self._drawn_slots(begin, end), np.arange(begin, end) + self.held)
            content = np.where(content < 0, came, content)
            end = begin
        return np.where(content < 0, np.arange(self.held), content)

    def _drawn_slots(self, begin: int, end: int) -> np.ndarray:
        """Integer (end - begin,): the slots of the steps begin .. end-1."""
        draws = drawn(self.key, begin, end) >> np.uint64(32)
        return (draws * np.uint64(self.held) >> np.uint64(32)).astype(np.int64)

    @cached_property
    def _last_order(self) -> np.ndarray:
        """Integer (held,): the slots in the order in which they are emptied at the end."""
        return np.argsort(drawn(self.key, self.steps, self.steps + self.held), kind="stable")


def drawn(key: str, begin: int, end: int) -> np.ndarray:
    """The numbers begin .. end-1 of an endless row that ``key`` seeds: unsigned, 64 bits.

    They are the same in every version of numpy, which promises that of its generators' raw numbers, and of these alone.
    """
    generator = np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    generator.advance(begin)
    return generator.random_raw(end - begin)


def _exchange(content: np.ndarray, slots: np.ndarray, incoming: np.ndarray) -> np.ndarray:
    """Puts the ``incoming`` numbers (n,) into ``slots`` (n,) one after the other, in place.

    Returns:
        What each found in its slot, integer (n,).
    """
    # Sorted by slot, each finds the one before it there, and the first of a slot what lay in it before.
    # Of 16 bits, numpy sorts in a few passes.
    order = np.argsort(slots.astype(np.uint16) if len(content) <= 2**16 else slots, kind="stable")
    by_slot, came = slots[order], incoming[order]
    is_first = np.append(True, by_slot[1:] != by_slot[:-1])
    found = np.empty_like(incoming)
    found[order] = np.where(is_first, content[by_slot], np.append(0, came[:-1]))
    is_last = np.append(is_first[1:], True)
    content[by_slot[is_last]] = came[is_last]
    return found
