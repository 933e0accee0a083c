"""Which pictures are the same one: resized, mirrored, cut off at the edges, or in other colours.

A picture is described by the gradients of a small grey copy of it, whatever its shape. Each of two in all its variants
(as it is, mirrored, with up to a tenth cut off) is compared with the other as it is; the largest cosine counts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

GRID = 16  # cells along a side, between whose neighbours differences are taken
THUMBNAIL_PIXELS = 128  # what variants are cut from; several pixels a cell
KEPT_SHARES = (1.0, 0.95, 0.9)  # of a side
# Of what different photographs reach and what copies fall to, see README.md.
SAME_PICTURE = 0.8


def _descriptor(grey: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
    cells = np.asarray(grey.resize((GRID + 1, GRID + 1), Image.Resampling.BOX, box), np.float32)
    gradients = np.concatenate([np.diff(cells, axis=axis).ravel() for axis in (0, 1)])
    # A picture of one colour is like no other, itself included.
    return gradients / max(float(np.linalg.norm(gradients)), 1.0)


def _boxes() -> Iterator[tuple[float, float, float, float]]:
    """What may be left of a thumbnail: all of it first, then the parts in its corners, at its edges and its centre."""
    for share in KEPT_SHARES:
        side = share * THUMBNAIL_PIXELS
        offsets = sorted({(THUMBNAIL_PIXELS - side) * step / 2 for step in range(3)})
        yield from ((left, upper, left + side, upper + side) for upper in offsets for left in offsets)


def fingerprint(image: Image.Image) -> np.ndarray:
    """The descriptors of a picture and of its variants, float32 (variants, values); the first is the picture's own."""
    grey = image.convert("L").resize((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.BOX)
    return np.stack([_descriptor(side, box) for side in (grey, ImageOps.mirror(grey)) for box in _boxes()])


def similarities(ones: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    """The largest cosine of each picture with each other one, (ones, others), from their fingerprints."""
    if not ones or not others:
        return np.zeros((len(ones), len(others)), np.float32)

    def as_they_are_with_variants(plain: Sequence[np.ndarray], varied: Sequence[np.ndarray]) -> np.ndarray:
        own = np.stack([variants[0] for variants in plain])
        return np.stack([(own @ variants.T).max(1) for variants in varied], axis=1)

    return np.maximum(as_they_are_with_variants(ones, others), as_they_are_with_variants(others, ones).T)


def groups(num_items: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Items 0 to ``num_items - 1``, those together that pairs connect; in the order of each group's first item."""
    group_of = list(range(num_items))
    for one, other in pairs:
        kept, left = sorted((group_of[one], group_of[other]))
        group_of = [kept if group == left else group for group in group_of]
    members: dict[int, list[int]] = {}
    for item, group in enumerate(group_of):
        members.setdefault(group, []).append(item)
    return list(members.values())
