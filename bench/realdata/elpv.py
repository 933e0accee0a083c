"""Makes a set of photographs of solar cells: ``python elpv.py PACKAGE OUT`` (``build.sh`` runs it when asked to).

PACKAGE is PyPI's elpv-dataset, unpacked: electroluminescence photographs of cells, 300 px, grey, with the probability
that a cell is defective. OUT gets ``elpv`` with train, val and test shards and, as its last file, the names of the
classes.
"""

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

from splits import SPLITS, split_of

from adala.data import write_shards

CLASSES = ("functional", "defective")
DEFECTIVE_FROM = 0.5
# Cells of one module follow each other, and look alike: as many at a time are in the same split.
CELLS_TOGETHER = 24
SEED = 0
SAMPLES_PER_SHARD = 512


class Cell(NamedTuple):
    """A photograph of a cell, and its position in ``CLASSES``."""

    path: Path
    label: int


def split_cells(package: Path) -> dict[str, list[Cell]]:
    """All cells by split.

    Raises:
        ValueError: The list of labels is not there.
    """
    folder = package / "elpv_dataset/data"
    if not (folder / "labels.csv").exists():
        raise ValueError(f"there is no {folder / 'labels.csv'}: this is no elpv-dataset, or another release")
    splits: dict[str, list[Cell]] = {split: [] for split in SPLITS}
    for number, line in enumerate((folder / "labels.csv").read_text().splitlines()):
        file, probability, _ = line.split()
        cell = Cell(folder / file, int(float(probability) >= DEFECTIVE_FROM))
        splits[split_of(f"cells from {number // CELLS_TOGETHER * CELLS_TOGETHER}", SEED)].append(cell)
    return splits


def build(package: Path, out: Path) -> None:
    """Writes the shards, and ``classes.json`` as the last file.

    Raises:
        ValueError: ``package`` is something else.
    """
    rng = random.Random(SEED)
    for split, cells in split_cells(package).items():
        rng.shuffle(cells)
        samples = ({"png": cell.path.read_bytes(), "cls": cell.label} for cell in cells)
        write_shards(samples, out, split, SAMPLES_PER_SHARD)
        print(f"elpv, {split}: {len(cells)} cells, {sum(cell.label for cell in cells)} defective")
    (out / "classes.json").write_text(json.dumps(CLASSES) + "\n")


def main(package: str, out: str) -> int:
    try:
        build(Path(package), Path(out) / "elpv")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
