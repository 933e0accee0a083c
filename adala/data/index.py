"""The shard index: which shards there are and how many samples each holds.

Each shard folder has one ``index.json``, ``{"shards": [{"name": "train-00000.tar", "samples": 24, "bytes": 91136}]}``.
With it every rank knows the length of an epoch and its own part of it before a byte is read.

Other programs write files of that name. WebDataset's (wids) says what is needed, and is read; beside any that is not
ours, ours is ``adala-index.json``.
"""

import argparse
import fnmatch
import functools
import json
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adala.data.addresses import display, expand, is_pattern, is_remote, is_shard, local_path, read_text, unescaped
from adala.data.images import IMAGE_FIELDS, DecodeError, decode_image
from adala.data.labels import Classes, read_classes
from adala.data.tars import Fields, read_samples
from adala.files import is_git_lfs_pointer, write_json

INDEX_NAME = "index.json"
OWN_INDEX_NAME = "adala-index.json"
# Beside the shards; the first that is there counts.
CLASSES_NAMES = ("classes.json", "classes.txt")
# Samples of each shard whose images are decoded when it is counted.
TRIED_SAMPLES = 8


@dataclass(frozen=True)
class Shard:
    """One tar file of samples.

    Attributes:
        url: Path or URL.
        samples: How many samples it holds.
        bytes: Its size; 0 where a remote index does not say.
        classes: Names of the classes of its labels, where its folder lists them.
    """

    url: str
    samples: int
    bytes: int
    classes: Classes | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one dataset or split, in the order in which they were listed."""

    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def index_command(folder: str | Path) -> str:
    """The command that writes the index of ``folder``, for error messages."""
    return f"python -m adala.data.index {display(str(folder))}"


def load_index(sources: Sequence[str], classes: str | None = None) -> ShardIndex:
    """The shards that ``sources`` name, one source after the other, with counts from the index beside them.

    Args:
        sources: Each a path, a folder, a glob (``/x/train-*.tar``, ``/x/*/train-*.tar``), a brace pattern
            (``/x/train-{00000..00007}.tar``), or a URL in one of these forms; a path may begin with ``~`` or ``file:``.
            A remote glob is matched against the names in the index.
        classes: File with the names of classes that text labels name; None takes the one beside the shards.

    Raises:
        ValueError: No source; no readable index; a shard that the index does not list, that is listed twice, or that is
            missing on disk or of another size there; a glob that matches nothing.
    """
    if not sources:
        raise ValueError("no shards were named: give at least one path, glob or brace pattern of tar files")
    read = functools.cache(read_index)
    places = [place for source in sources for place in expand(source)]
    shards = [shard for folder, pattern in places for shard in _resolve(folder, pattern, read)]
    seen: set[str] = set()
    for shard in shards:
        identity = shard.url if is_remote(shard.url) else os.path.realpath(shard.url)
        if identity in seen:
            raise ValueError(f"the shard {shard.url} is named twice: name each shard once, an epoch reads it once")
        seen.add(identity)
        if not is_remote(shard.url):
            _check_file(shard)
    named = None if classes is None else load_classes(classes)
    return ShardIndex(tuple(replace(shard, classes=named) if named else shard for shard in shards))


def _resolve(folder: str, pattern: str, read: Callable[[str], dict[str, Shard]]) -> list[Shard]:
    """The shards of a folder whose names match."""
    listed = read(folder)
    matches = sorted(fnmatch.filter(listed, pattern))
    if not matches:
        name = unescaped(pattern)
        fault = f"matches {name!r}" if is_pattern(name) else f"is called {name!r}"
        raise ValueError(
            f"no shard in {folder}{INDEX_NAME} {fault}: it lists {_examples(listed)}; correct the pattern, or write "
            f"the index anew with `{index_command(folder)}`"
        )
    return [listed[match] for match in matches]


def _examples(listed: dict[str, Shard]) -> str:
    names = sorted(listed)
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]]) or "no shards"


def read_index(folder: str) -> dict[str, Shard]:
    """The shards of a folder by name. ``folder`` ends in a slash, or is empty for the working directory.

    Raises:
        ValueError: There is no index, or none that says what is needed.
    """
    shards, problem = _find_listing(folder)
    if shards is None:
        raise ValueError(
            f"{problem}: write it with `{index_command(folder)}`"
            + (" where the shards lie, and put it beside them" if is_remote(folder) else "")
        )
    classes = _classes_beside(folder)
    return {shard.name: replace(shard, classes=classes) for shard in shards}


def listed_shards(folder: str) -> list[Shard]:
    """The shards that a folder's index lists, whoever's it is; none where no index tells. See :func:`read_index`."""
    return _find_listing(folder)[0] or []


def _find_listing(folder: str) -> tuple[list[Shard] | None, str | None]:
    """As :func:`_read_listing`, of whichever index counts."""
    shards, problem = _read_listing(folder, INDEX_NAME)
    if problem is not None:
        own, _ = _read_listing(folder, OWN_INDEX_NAME)
        shards = shards if own is None else own
    return shards, problem


def _read_listing(folder: str, name: str) -> tuple[list[Shard] | None, str | None]:
    """The shards of one index file, None where it does not tell; and what is wrong with it as an index of ours."""
    address = folder + name
    try:
        content = json.loads(read_text(address))
    except OSError as error:
        return None, f"cannot read the shard index {address} ({error})"
    except ValueError as error:
        return None, f"{address} is not a shard index ({error})"
    if _is_own(content):
        return [Shard(folder + e["name"], e["samples"], e["bytes"]) for e in content["shards"]], None
    try:
        return [_wids_shard(folder, entry) for entry in content["shardlist"]], "it is WebDataset's (wids)"
    except (KeyError, TypeError, ValueError, OSError):
        return None, f"{address} is not a shard index that says how many samples each *.tar holds"


def _is_own(content: Any) -> bool:
    """Whether a JSON value is an index in our form."""
    entries = content.get("shards") if isinstance(content, dict) else None
    return isinstance(entries, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and all(type(entry.get(key)) is int and entry[key] >= 0 for key in ("samples", "bytes"))
        for entry in entries
    )


def _wids_shard(folder: str, entry: dict[str, Any]) -> Shard:
    """A shard of WebDataset's index, which lies beside it."""
    url = folder + entry["url"].rpartition("/")[2]
    size = entry.get("filesize")
    if not size:
        size = 0 if is_remote(url) else os.path.getsize(url)
    return Shard(url, int(entry["nsamples"]), int(size))


def _classes_beside(folder: str) -> Classes | None:
    if is_remote(folder):
        return None
    present = [name for name in CLASSES_NAMES if os.path.isfile(folder + name)]
    return load_classes(folder + present[0]) if present else None


def load_classes(address: str) -> Classes:
    """The names of classes that a file lists, see :func:`adala.data.labels.read_classes`.

    Raises:
        ValueError: It cannot be read, or lists none.
    """
    address = local_path(address)
    try:
        return read_classes(read_text(address), address)
    except OSError as error:
        raise ValueError(f"cannot read the names of classes in {address} ({error})") from error


def _check_file(shard: Shard) -> None:
    """Refuses a local shard that is not what the index says, at start-up rather than in the middle of an epoch."""
    command = index_command(os.path.dirname(shard.url))
    if not os.path.isfile(shard.url):
        raise ValueError(
            f"the index lists the shard {shard.url}, but there is no such file: fetch it, or write the index anew with "
            f"`{command}`"
        )
    size = os.path.getsize(shard.url)
    if size != shard.bytes:
        raise ValueError(
            f"the shard {shard.url} has {size} bytes, but the index says {shard.bytes}: fetch it again, or write the "
            f"index anew with `{command}`"
        )


@dataclass(frozen=True)
class Census:
    """What one shard holds.

    Attributes:
        samples: How many samples.
        without_image: How many of them have no file that is an image.
        tried: How many images were decoded.
        broken: How many of these could not be.
        example: A sample that cannot be used, and why; empty where there is none.
    """

    samples: int = 0
    without_image: int = 0
    tried: int = 0
    broken: int = 0
    example: str = ""

    def __add__(self, other: "Census") -> "Census":
        mine, theirs = self, other
        return Census(
            mine.samples + theirs.samples,
            mine.without_image + theirs.without_image,
            mine.tried + theirs.tried,
            mine.broken + theirs.broken,
            mine.example or theirs.example,
        )


def count_samples(path: Path) -> Census:
    """Counts the samples of a local tar file, grouped by key as reading does it.

    Raises:
        ValueError: The file is not a tar of samples, or truncated, or see :func:`adala.data.tars.read_samples`.
    """
    census = Census()
    with open(path, "rb") as stream:
        if is_git_lfs_pointer(stream.read(100)):
            raise ValueError(f"{path} is a Git LFS pointer instead of a shard: fetch it with `git lfs pull`")
    try:
        with open(path, "rb") as stream:
            for key, fields in read_samples(stream, str(path)):
                census += take_census(f"{path.name}/{key}", fields, try_image=census.tried < TRIED_SAMPLES)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the shard {path} is damaged ({error}): fetch it or write it again") from error
    return census


def take_census(sample: str, fields: Fields, try_image: bool = True) -> Census:
    """What one sample is, without and with a look at its image."""
    image = image_field(fields)
    if image is None:
        return Census(1, without_image=1, example=f"{sample} has the files {', '.join(sorted(fields))}")
    if not try_image:
        return Census(1)
    try:
        decode_image(fields[image])
    except DecodeError as error:
        return Census(1, tried=1, broken=1, example=f"{sample}.{image}: {error}")
    return Census(1, tried=1)


def image_field(fields: Fields, besides: str | None = None) -> str | None:
    """Which of a sample's files is its image: one with a plain extension, so that ``seg.png`` is none.

    ``besides`` is a file known to be something else, as the ``png`` beside a ``webp`` whose mask it is.
    """
    return next((name for name in IMAGE_FIELDS if name in fields and name != besides), None)


def build_index(folder: str | Path) -> Path:
    """Counts the samples of every shard in a local folder and writes its index.

    Returns:
        Path of the index.

    Raises:
        ValueError: The folder holds no tar file, a damaged one, or mostly samples that cannot be used.
    """
    folder = Path(local_path(str(folder)))
    return write_index(folder, [shard for shard, _ in count_shards(folder)])


def count_shards(folder: Path) -> list[tuple[Shard, Census]]:
    """The shards in a local folder and what each holds.

    Raises:
        ValueError: See :func:`build_index`.
    """
    paths = sorted(path for path in folder.iterdir() if is_shard(path.name)) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"{folder} holds no *.tar: name the folder in which the shards lie")
    censuses = [count_samples(path) for path in paths]
    refuse_unusable(sum(censuses, Census()), str(folder))
    shards = [Shard(str(path), of.samples, path.stat().st_size) for path, of in zip(paths, censuses, strict=True)]
    return list(zip(shards, censuses, strict=True))


def refuse_unusable(census: Census, where: str) -> None:
    """Refuses a data set of which nothing much is left.

    Raises:
        ValueError: More than half of the samples have no image, or of the images that were tried cannot be decoded.
    """
    if not census.samples:
        raise ValueError(f"the shards in {where} hold no samples")
    for unusable, of, what in (
        (census.without_image, census.samples, "samples have no image"),
        (census.broken, census.tried, "images that were tried cannot be decoded"),
    ):
        if 2 * unusable > of:
            raise ValueError(
                f"{unusable} of {of} {what} in {where} ({census.example}): an image is a file "
                f".{', .'.join(IMAGE_FIELDS)}; see docs/DATA.md for what shards look like"
            )


def write_index(folder: str | Path, shards: Sequence[Shard]) -> Path:
    """Writes the index of ``folder``, complete or not at all, over none but our own. Returns its path."""
    entries = [
        {"name": shard.name, "samples": shard.samples, "bytes": shard.bytes}
        for shard in sorted(shards, key=lambda shard: shard.name)
    ]
    path = own_index(folder)
    try:
        write_json(path, {"shards": entries})
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error}): where the shards' folder is not yours, link them into one that is "
            "(`ln -s`), and index and name that"
        ) from error
    return path


def own_index(folder: str | Path) -> Path:
    """Where our index of a folder is, or would be."""
    path = Path(folder) / INDEX_NAME
    try:
        is_free = _is_own(json.loads(read_text(str(path))))
    except FileNotFoundError:
        is_free = True
    except ValueError:
        is_free = False
    return path if is_free else Path(folder) / OWN_INDEX_NAME


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code is 1 after a mistake, which is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m adala.data.index", description="Write a shard folder's index.")
    parser.add_argument("folder", help="folder of *.tar shards")
    folder = Path(local_path(parser.parse_args(arguments).folder))
    try:
        counted = count_shards(folder)
        path = write_index(folder, [shard for shard, _ in counted])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    census = sum((of for _, of in counted), Census())
    print(f"wrote {path}: {len(counted)} shards, {census.samples} samples")
    if census.without_image:
        print(f"{census.without_image} samples have no image, and will be left out ({census.example})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
