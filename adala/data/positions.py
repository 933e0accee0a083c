"""Ascending whole numbers as intervals: what is left of an epoch is a few long stretches and some single positions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Intervals:
    """Ascending numbers, as the half-open intervals that they fill.

    Attributes:
        starts: Integer (I,): the first number of each interval.
        ends: Integer (I,): the number after its last one; no interval is empty, and none begins before the last ends.
    """

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def whole(cls, begin: int, end: int) -> "Intervals":
        """begin .. end-1."""
        return cls.of_bounds([begin], [end])

    @classmethod
    def of_bounds(cls, starts: Iterable[int], ends: Iterable[int]) -> "Intervals":
        """Intervals of which some may be empty."""
        starts, ends = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)
        filled = starts < ends
        return cls(starts[filled], ends[filled])

    @classmethod
    def of(cls, numbers: np.ndarray) -> "Intervals":
        """Those of ascending, different ``numbers``."""
        numbers = np.asarray(numbers, dtype=np.int64)
        begins = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        return cls(numbers[begins], numbers[np.append(begins[1:], len(numbers)) - 1] + 1 if len(numbers) else numbers)

    @classmethod
    def joined(cls, parts: Iterable["Intervals"]) -> "Intervals":
        """Parts one after the other, each above the one before; what touches becomes one interval."""
        parts = [part for part in parts if len(part)] or [cls.whole(0, 0)]
        starts, ends = np.concatenate([part.starts for part in parts]), np.concatenate([part.ends for part in parts])
        apart = starts[1:] != ends[:-1]
        return cls(starts[np.append(True, apart)[: len(starts)]], ends[np.append(apart, True)[: len(ends)]])

    @cached_property
    def _before(self) -> np.ndarray:
        """Integer (I + 1,): how many numbers stand before each interval, and how many there are."""
        return np.append(0, np.cumsum(self.ends - self.starts))

    def __len__(self) -> int:
        return int(self._before[-1])

    def at(self, places: np.ndarray) -> np.ndarray:
        """The numbers at ``places``, counted from 0."""
        interval = np.searchsorted(self._before, places, side="right") - 1
        return self.starts[interval] + (places - self._before[interval])

    def slice(self, begin: int, end: int) -> "Intervals":
        """Those at the places begin .. end-1."""
        first = int(np.searchsorted(self._before, begin, side="right")) - 1
        last = int(np.searchsorted(self._before, end, side="left"))
        if begin >= end:
            return Intervals.whole(0, 0)
        starts, ends = self.starts[first:last].copy(), self.ends[first:last].copy()
        starts[0] += begin - self._before[first]
        ends[-1] -= self._before[last] - end
        return Intervals(starts, ends)

    def shifted(self, by: int) -> "Intervals":
        """Each of them plus ``by``."""
        return Intervals(self.starts + by, self.ends + by)

    def take(self, places: "Intervals") -> "Intervals":
        """Those at ``places``."""
        # A piece of the result begins wherever an interval of either begins.
        inner = self._before[1:-1]
        holders = np.searchsorted(places.starts, inner, side="right") - 1
        inner = inner[(holders >= 0) & (inner < places.ends[holders])] if len(places) else inner[:0]
        begins = np.union1d(places.starts, inner)
        ends = np.append(begins[1:], np.iinfo(np.int64).max)[: len(begins)]
        if len(begins):
            ends = np.minimum(ends, places.ends[np.searchsorted(places.starts, begins, side="right") - 1])
        starts = self.at(begins)
        return Intervals(starts, starts + (ends - begins))

    def below(self, bound: int) -> int:
        """How many of them are less than ``bound``."""
        interval = int(np.searchsorted(self.starts, bound, side="left")) - 1
        if interval < 0:
            return 0
        return int(self._before[interval] + min(bound, self.ends[interval]) - self.starts[interval])

    def numbers(self) -> np.ndarray:
        """All of them, integer (len(self),)."""
        return self.at(np.arange(len(self)))

    def __iter__(self) -> Iterator[int]:
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield from range(start, end)

    def split(self, every: int) -> Iterator[tuple[int, "Intervals"]]:
        """Those between multiples of ``every``: (k, the ones from k * every on, less k * every), in sequence."""
        place = 0
        while place < len(self):
            first = int(self.at(np.array(place)))
            base = first // every * every
            end = self.below(base + every)
            part = self.slice(place, end)
            yield first // every, part.shifted(-base)
            place = end
