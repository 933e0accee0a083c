"""Turns unpacked Debian packages into shards of real images: ``python build.py PACKAGES OUT`` (``build.sh`` runs it).

PACKAGES is the folder that the packages were unpacked into. OUT has the checkpoint and the reference that
``checkpoint.py`` wrote, which are held against each other first, and gets ``photos``, ``stamps``, ``scenes`` and
``fashion``, each with train and val shards, and at last ``classes.json``.
"""

import gzip
import io
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from adala.backbones import load_teacher
from adala.data import write_shards
from adala.similarity import relative_error

BACKBONE, CHECKPOINT, REFERENCE = "vit_small_patch14_dinov2.lvd142m", "dinov2_s14.safetensors", "reference.safetensors"
# Two runtimes in float32 sum in different orders; a wrong weight shows up above 1e-2.
TOLERANCE = 1e-4

# Folders of the stamps. Position = class in `stamps`; in `scenes` that + 1, because 0 is the background.
STAMP_CLASSES = (
    *("animals/mammals", "animals/birds", "animals/insects", "animals/fish", "food/fruit", "food/vegetables"),
    *("plants/flowers", "town/houses", "town/roadsigns", "household/tools", "hobbies/music", "vehicles"),
)
SEED = 0
HELD_OUT_PHOTOGRAPHS = 8
TILE_PIXELS = 1024
SCENE_PIXELS = 448
SCENES = {"train": 1200, "val": 300}
SAMPLES_PER_SHARD = {"photos": 24, "stamps": 64, "scenes": 100, "fashion": 2500}
SMALLEST_BACKGROUND_BYTES = 60_000  # below, a "background" is a logo or a thumbnail
JPEG_QUALITY = 88
OPAQUE = 128  # alpha from which a pixel belongs to a stamp
FASHION_STEMS = {"train": "train", "val": "t10k"}


class Stamp(NamedTuple):
    """A cut-out picture with transparency; ``label`` is a position in ``STAMP_CLASSES``."""

    label: int
    path: Path


def check_checkpoint(out: Path, backbone: str = BACKBONE) -> None:
    """Compares the features of the converted checkpoint with those of the graph it came from, whose file it removes.

    Raises:
        ValueError: They differ.
    """
    expected = load_file(out / REFERENCE)
    teacher = load_teacher(backbone, expected["images"].shape[-2:], out / CHECKPOINT)
    with torch.no_grad():
        difference = relative_error(teacher(expected["images"]), expected["features"]).item()
    print(f"checkpoint: final features differ from the ONNX graph's by {difference:.1e}")
    if difference > TOLERANCE:
        raise ValueError(f"more than {TOLERANCE:.0e}: the conversion does not fit this graph")
    (out / REFERENCE).unlink()


def find_photographs(packages: Path) -> list[Path]:
    """The largest rendition of each of KDE's wallpapers, then all of the other desktops' backgrounds; sorted."""
    renditions = sorted(packages.glob("usr/share/wallpapers/*/contents/images"))
    wallpapers = [max(folder.iterdir(), key=lambda path: path.stat().st_size) for folder in renditions]
    backgrounds = sorted((packages / "usr/share/backgrounds").rglob("*"))
    pictures = [path for path in backgrounds if path.suffix.lower() in (".jpg", ".png")]
    return wallpapers + [path for path in pictures if path.stat().st_size > SMALLEST_BACKGROUND_BYTES]


def find_stamps(packages: Path, rng: random.Random) -> dict[str, list[Stamp]]:
    """Stamps by split: of each class a quarter, three at least, is held out."""
    splits: dict[str, list[Stamp]] = {"train": [], "val": []}
    for label, name in enumerate(STAMP_CLASSES):
        paths = sorted((packages / "usr/share/tuxpaint/stamps" / name).rglob("*.png"))
        rng.shuffle(paths)
        held_out = max(3, len(paths) // 4)
        splits["val"] += [Stamp(label, path) for path in paths[:held_out]]
        splits["train"] += [Stamp(label, path) for path in paths[held_out:]]
    return splits


def tile_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Squares of a picture as (left, upper, right, lower): three columns by two rows, then the largest central one."""
    side = min(width // 3, height // 2)
    corners = [((width - side) * column // 2, (height - side) * row) for row in range(2) for column in range(3)]
    boxes = [(left, upper, left + side, upper + side) for left, upper in corners]
    whole = min(width, height)
    left, upper = (width - whole) // 2, (height - whole) // 2
    return [*boxes, (left, upper, left + whole, upper + whole)]


def cut_tiles(path: Path) -> list[Image.Image]:
    """The tiles of a photograph, each scaled down to ``TILE_PIXELS`` where it is larger."""
    with Image.open(path) as image:
        photograph = image.convert("RGB")
    tiles = [photograph.crop(box) for box in tile_boxes(*photograph.size)]
    for tile in tiles:
        tile.thumbnail((TILE_PIXELS, TILE_PIXELS), Image.Resampling.LANCZOS)
    return tiles


def load_stamp(path: Path, pixels: int) -> Image.Image:
    """A stamp as RGBA, its transparent margin cut off, no side longer than ``pixels``."""
    with Image.open(path) as image:
        stamp = image.convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    stamp.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return stamp


def paste_on_white(path: Path) -> Image.Image:
    """A stamp in the middle of a white square."""
    picture = load_stamp(path, SCENE_PIXELS)
    canvas = Image.new("RGB", (SCENE_PIXELS, SCENE_PIXELS), "white")
    corner = ((SCENE_PIXELS - picture.width) // 2, (SCENE_PIXELS - picture.height) // 2)
    canvas.paste(picture, corner, picture.getchannel("A"))
    return canvas


def compose_scene(rng: random.Random, tile: Image.Image, stamps: list[Stamp]) -> tuple[Image.Image, Image.Image]:
    """A random square of ``tile`` with one to four stamps on it, and its map of classes (mode L, 0 = background)."""
    smallest = min(tile.size)
    side = rng.randint(SCENE_PIXELS, smallest) if smallest > SCENE_PIXELS else smallest
    left, upper = rng.randint(0, tile.width - side), rng.randint(0, tile.height - side)
    square = tile.crop((left, upper, left + side, upper + side))
    scene = square.resize((SCENE_PIXELS, SCENE_PIXELS), Image.Resampling.BICUBIC)
    class_map = Image.new("L", scene.size, 0)
    for _ in range(rng.randint(1, 4)):
        stamp = rng.choice(stamps)
        picture = load_stamp(stamp.path, int(SCENE_PIXELS * rng.uniform(0.25, 0.7)))
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        corner = (rng.randint(0, SCENE_PIXELS - picture.width), rng.randint(0, SCENE_PIXELS - picture.height))
        alpha = picture.getchannel("A")
        scene.paste(picture, corner, alpha)
        class_map.paste(stamp.label + 1, corner, alpha.point(lambda value: 255 if value >= OPAQUE else 0))
    return scene, class_map


def read_fashion(packages: Path, split: str) -> Iterator[tuple[Image.Image, int]]:
    """Fashion-MNIST's images (28 x 28, mode L) and labels, out of its IDX files."""
    prefix = packages / "usr/share/datasets/fashion-mnist" / FASHION_STEMS[split]
    pixels, classes = (
        np.frombuffer(gzip.decompress(Path(f"{prefix}-{part}-ubyte.gz").read_bytes()), np.uint8, offset=header)
        for part, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    for image, label in zip(pixels.reshape(-1, 28, 28), classes, strict=True):
        yield Image.fromarray(image), int(label)


def as_jpeg(image: Image.Image) -> bytes:
    return _encode(image, "JPEG", quality=JPEG_QUALITY)


def as_png(image: Image.Image) -> bytes:
    return _encode(image, "PNG")


def _encode(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def build(packages: Path, out: Path) -> None:
    """Writes all shards, and ``classes.json`` as the last file.

    Raises:
        ValueError: ``packages`` holds fewer photographs than are held out, or no stamps of a class.
    """

    def write(folder: str, split: str, samples: Iterable[dict[str, Any]]) -> None:
        write_shards(samples, out / folder, split, SAMPLES_PER_SHARD[folder])

    # One generator throughout: who draws first decides what the others get, so this order is part of the seed.
    rng = random.Random(SEED)
    photographs = find_photographs(packages)
    if len(photographs) <= HELD_OUT_PHOTOGRAPHS:
        raise ValueError(f"{packages} holds {len(photographs)} photographs: the wallpaper packages are not all there")
    rng.shuffle(photographs)
    held_out, rest = photographs[:HELD_OUT_PHOTOGRAPHS], photographs[HELD_OUT_PHOTOGRAPHS:]
    tiles = {"train": [tile for path in rest for tile in cut_tiles(path)]}
    rng.shuffle(tiles["train"])
    tiles["val"] = [tile for path in held_out for tile in cut_tiles(path)]
    for split in tiles:
        write("photos", split, ({"jpg": as_jpeg(tile)} for tile in tiles[split]))
    print(f"photos: {len(rest)} + {len(held_out)} photographs, {len(tiles['train'])} + {len(tiles['val'])} tiles")

    stamps = find_stamps(packages, rng)
    for split in tiles:
        missing = set(range(len(STAMP_CLASSES))) - {stamp.label for stamp in stamps[split]}
        if missing:
            raise ValueError(f"{packages} holds no {split} stamps of {STAMP_CLASSES[min(missing)]}")
        rng.shuffle(stamps[split])
        write("stamps", split, ({"jpg": as_jpeg(paste_on_white(s.path)), "cls": s.label} for s in stamps[split]))
    print(f"stamps: {len(stamps['train'])} + {len(stamps['val'])}")

    for split, count in SCENES.items():
        scenes = (compose_scene(rng, rng.choice(tiles[split]), stamps[split]) for _ in range(count))
        write("scenes", split, ({"jpg": as_jpeg(scene), "seg.png": as_png(labels)} for scene, labels in scenes))
    print(f"scenes: {SCENES['train']} + {SCENES['val']}")

    for split in FASHION_STEMS:
        fashion = read_fashion(packages, split)
        write("fashion", split, ({"png": as_png(image), "cls": label} for image, label in fashion))
    print("fashion: 60000 + 10000")
    (out / "classes.json").write_text(json.dumps(STAMP_CLASSES) + "\n")


def main(packages: str, out: str) -> int:
    Image.MAX_IMAGE_PIXELS = None  # some wallpapers are large enough to be taken for decompression bombs
    try:
        check_checkpoint(Path(out))
        build(Path(packages), Path(out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
