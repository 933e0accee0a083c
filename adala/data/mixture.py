"""A mixture of sources as one endless sequence of positions, of which every epoch is the next stretch. No I/O.

Each source is read through in an order of its own, then in the next, and so on without end; the sequence interleaves
them so evenly that every stretch has them in their proportions. Which sample a position means follows from the position
alone. Nothing is dropped between epochs: each goes on where the one before stopped, and of each source every sample has
come equally often, or once more than the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from adala.data.index import ShardIndex
from adala.data.positions import Intervals

# What whole numbers that stand for weights add up to at most, so that their products with places fit 64 bits.
MOST_PARTS = 2**31 - 1


@dataclass(frozen=True)
class Mixture:
    """Which source stands at which position.

    Attributes:
        sizes: Samples of each source.
        parts: Whole numbers, in whose proportions the sources come.
    """

    sizes: tuple[int, ...]
    parts: tuple[int, ...]

    @classmethod
    def of(cls, index: ShardIndex) -> "Mixture":
        """The mixture that an index of weighted sources describes."""
        sizes = tuple(index.of_source(number).num_samples for number in range(len(index.sources)))
        return cls(sizes, whole_parts([source.weight for source in index.sources]))

    @property
    def shares(self) -> tuple[float, ...]:
        """Part of all samples that comes from each source; they add up to 1."""
        return tuple(part / sum(self.parts) for part in self.parts)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each of ``positions`` (n,), and how many samples of that source stand before it; both (n,)."""
        sources = np.full(len(positions), len(self.parts) - 1)
        numbers = np.empty_like(positions)
        open_places, places = np.arange(len(positions)), positions
        for source, (part, total) in enumerate(self._chain()):
            before = _multiple(places, part, total)
            is_here = _multiple(places + 1, part, total) > before
            sources[open_places[is_here]] = source
            numbers[open_places[is_here]] = before[is_here]
            open_places, places = open_places[~is_here], (places - before)[~is_here]
        return sources, numbers

    def counts(self, positions: np.ndarray) -> np.ndarray:
        """How many samples of each source stand before each of ``positions`` (n,): integer (sources, n)."""
        counts, places = [], positions
        for part, total in self._chain():
            counts.append(_multiple(places, part, total))
            places = places - counts[-1]
        return np.stack(counts)

    def numbers(self, positions: Intervals) -> list[Intervals]:
        """Those samples that stand at ``positions``, by source, as numbers in the endless sequence of each."""
        begins, ends = self.counts(positions.starts), self.counts(positions.ends)
        return [Intervals.of_bounds(begin, end) for begin, end in zip(begins, ends, strict=True)]

    def _chain(self) -> list[tuple[int, int]]:
        """Each source's parts, and the parts of it and all behind it: it has so much of what those before it left."""
        return [(part, sum(self.parts[source:])) for source, part in enumerate(self.parts)]


def _multiple(numbers: np.ndarray, part: int, total: int) -> np.ndarray:
    """``numbers`` (n,) times ``part`` / ``total``, rounded half up, without a product that would overflow."""
    whole, rest = np.divmod(numbers, total)
    return whole * part + (rest * part + total // 2) // total


def whole_parts(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportions of ``weights``: exactly those of the decimal numbers that were written, unless
    these have too many digits, when they are rounded to about nine."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = Fraction(math.lcm(*(weight.denominator for weight in exact)))
    whole = [int(weight * scale) for weight in exact]
    parts = [number // math.gcd(*whole) for number in whole]
    if sum(parts) > MOST_PARTS:
        # Room for the sources that would be rounded to nothing, and for rounding up.
        room = MOST_PARTS - 2 * len(parts)
        parts = [max(1, round(Fraction(part * room, sum(parts)))) for part in parts]
    return tuple(parts)
