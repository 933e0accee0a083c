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
import re
import reprlib
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from adala.data.addresses import display, expand, is_pattern, is_remote, is_shard, local_path, read_text, unescaped
from adala.data.archives import MAX_UNPACKING, UNPACKED_ANYWAY
from adala.data.images import IMAGE_FIELDS, DecodeError, decode_image
from adala.data.labels import Classes, read_classes
from adala.data.positions import Intervals
from adala.data.remote import DEFAULT_OPTIONS, AbsentError, RemoteError, RemoteOptions
from adala.data.tars import Fields, read_samples
from adala.files import is_git_lfs_pointer, write_json

INDEX_NAME = "index.json"
OWN_INDEX_NAME = "adala-index.json"
# Beside the shards; the first that is there counts.
CLASSES_NAMES = ("classes.json", "classes.txt")
# Local shards whose sizes a thread compares in one go.
CHECKED_AT_ONCE = 256
# Of one shard, and of all of a data set together: far above what anybody has, and what planning an epoch can bear.
MAX_SAMPLES, MAX_BYTES = 10**8, 2**63 - 1
MAX_TOTAL_SAMPLES = 2**40
# What stands in no file's name that people gave it.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
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
        source: Which of a mixture's sources it belongs to, counted from 0; None outside a mixture.
    """

    url: str
    samples: int
    bytes: int
    classes: Classes | None = None
    source: int | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def label(self) -> str:
        """What its samples' ids begin with: its name, behind the number of its source in a mixture."""
        return self.name if self.source is None else f"{self.source}:{self.name}"


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Attributes:
        weight: Its part, relative to the others' weights.
        num_shards: Shards that are its own.
    """

    weight: float
    num_shards: int


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one dataset or split, in the order in which they were listed.

    Attributes:
        shards: Of all sources, one source after the other.
        sources: Of a mixture; none where the shards are one data set.
        remote: How shards on other machines are read.
    """

    shards: tuple[Shard, ...]
    sources: tuple[MixtureSource, ...] = ()
    remote: RemoteOptions = DEFAULT_OPTIONS

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def of_source(self, number: int) -> "ShardIndex":
        """The shards of one of a mixture's sources."""
        begin = sum(source.num_shards for source in self.sources[:number])
        return replace(self, shards=self.shards[begin : begin + self.sources[number].num_shards], sources=())

    def first(self, limit: int) -> Intervals:
        """Where the first ``limit`` samples stand among all, one shard after the other; of a mixture the first ones of
        each source in their proportions, as far as there are so many of it."""
        if not self.sources:
            return Intervals.whole(0, min(limit, self.num_samples))
        sizes = [self.of_source(number).num_samples for number in range(len(self.sources))]
        # Of the largest, since a sum of weights may be more than a number can be.
        largest = max(source.weight for source in self.sources)
        weights = [source.weight / largest for source in self.sources]
        begins, asked = [0, *accumulate(sizes)][:-1], [round(limit * weight / sum(weights)) for weight in weights]
        ends = [begin + min(count, size) for begin, count, size in zip(begins, asked, sizes, strict=True)]
        return Intervals.of_bounds(begins, ends)


def mix(data_sets: Sequence[ShardIndex], weights: Sequence[float]) -> ShardIndex:
    """The mixture of some data sets.

    Raises:
        ValueError: A data set without samples, or a shard that two of them have.
    """
    seen: dict[str, int] = {}
    for number, index in enumerate(data_sets):
        if not index.num_samples:
            raise ValueError(f"source {number} of the mixture ({index.shards[0].url}) holds no samples: leave it out")
        for shard, identity in zip(index.shards, _identities(index.shards), strict=True):
            if seen.setdefault(identity, number) != number:
                raise ValueError(
                    f"the shard {shard.url} is in two sources of the mixture: name it in one, with a larger weight"
                )
    return replace(
        data_sets[0],
        shards=tuple(replace(shard, source=number) for number, index in enumerate(data_sets) for shard in index.shards),
        sources=tuple(
            MixtureSource(weight, len(index.shards)) for index, weight in zip(data_sets, weights, strict=True)
        ),
    )


def index_command(folder: str | Path) -> str:
    """The command that writes the index of ``folder``, for error messages."""
    return f"python -m adala.data.index {display(str(folder))}"


def load_index(
    sources: Sequence[str],
    classes: str | None = None,
    remote: RemoteOptions = DEFAULT_OPTIONS,
) -> ShardIndex:
    """The shards that ``sources`` name, one source after the other, with counts from the index beside them.

    Args:
        sources: Each a path, a folder, a glob (``/x/train-*.tar``, ``/x/*/train-*.tar``), a brace pattern
            (``/x/train-{00000..00007}.tar``), or a URL in one of these forms; a path may begin with ``~`` or ``file:``.
            A remote glob is matched against the names in the index.
        classes: File with the names of classes that text labels name; None takes the one beside the shards.
        remote: How remote shards, and their indexes, are read.

    Raises:
        ValueError: No source; no readable index; a shard that the index does not list, that is listed twice, or that is
            missing on disk or of another size there; a glob that matches nothing.
    """
    if not sources:
        raise ValueError("no shards were named: give at least one path, glob or brace pattern of tar files")
    read = functools.cache(functools.partial(read_index, remote=remote))
    places = [place for source in sources for place in expand(source)]
    shards = [shard for folder, pattern in places for shard in _resolve(folder, pattern, read)]
    seen: set[str] = set()
    for shard, identity in zip(shards, _identities(shards), strict=True):
        if identity in seen:
            raise ValueError(f"the shard {shard.url} is named twice: name each shard once, an epoch reads it once")
        seen.add(identity)
    local = [shard for shard in shards if not is_remote(shard.url)]
    parts = [local[begin : begin + CHECKED_AT_ONCE] for begin in range(0, len(local), CHECKED_AT_ONCE)]
    # A network's file system takes its time for each of what may be 100,000 shards.
    with ThreadPoolExecutor() as pool:
        list(pool.map(_check_files, parts))
    total = sum(shard.samples for shard in shards)
    if total > MAX_TOTAL_SAMPLES:
        raise ValueError(f"the indexes list {total} samples together, more than {MAX_TOTAL_SAMPLES}: one is damaged")
    named = None if classes is None else load_classes(classes, remote)
    return ShardIndex(tuple(replace(shard, classes=named) if named else shard for shard in shards), remote=remote)


def _identities(shards: Sequence[Shard]) -> Iterator[str]:
    """What tells each from other shards, whatever links lead to it."""
    real_folder = functools.cache(os.path.realpath)
    for shard in shards:
        folder, name = os.path.split(shard.url)
        if is_remote(shard.url):
            yield shard.url
        elif os.path.islink(shard.url):
            yield os.path.realpath(shard.url)
        else:
            yield os.path.join(real_folder(folder), name)


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
    _refuse_unlisted(folder, pattern, listed)
    return [listed[match] for match in matches]


def _refuse_unlisted(folder: str, pattern: str, listed: Container[str]) -> None:
    """Refuses a local folder with shards that its index does not know: they would be left out without a word."""
    if is_remote(folder):
        return
    unlisted = sorted(
        name
        for name in os.listdir(folder or ".")
        if is_shard(name) and fnmatch.fnmatchcase(name, pattern) and name not in listed
    )
    if unlisted:
        raise ValueError(
            f"{folder}{unlisted[0]} is not in the index beside it: write the index anew with "
            f"`{index_command(folder)}`, or name the shards that are meant"
        )


def _examples(listed: dict[str, Shard]) -> str:
    names = sorted(listed)
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]]) or "no shards"


def read_index(
    folder: str,
    remote: RemoteOptions = DEFAULT_OPTIONS,
) -> dict[str, Shard]:
    """The shards of a folder by name. ``folder`` ends in a slash, or is empty for the working directory.

    Raises:
        ValueError: There is no index, or none that says what is needed, or it cannot be reached.
    """
    shards, problem = _find_listing(folder, remote)
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


def _find_listing(
    folder: str,
    remote: RemoteOptions = DEFAULT_OPTIONS,
) -> tuple[list[Shard] | None, str | None]:
    """As :func:`_read_listing`, of whichever index counts."""
    shards, problem = _read_listing(folder, INDEX_NAME, remote)
    if problem is not None:
        own, _ = _read_listing(folder, OWN_INDEX_NAME, remote)
        shards = shards if own is None else own
    return shards, problem


def _read_listing(folder: str, name: str, remote: RemoteOptions) -> tuple[list[Shard] | None, str | None]:
    """The shards of one index file, None where it does not tell; and what is wrong with it as an index of ours.

    Raises:
        ValueError: It may be there, and cannot be reached.
    """
    address = folder + name
    try:
        content = _from_json(read_text(address, remote))
        if isinstance(content, dict) and isinstance(content.get("shardlist"), list):
            return _distinct([_wids_shard(folder, e) for e in content["shardlist"]]), "it is WebDataset's (wids)"
        return _own_shards(folder, content), None
    except OSError as error:
        if isinstance(error, RemoteError) and not isinstance(error, AbsentError):
            raise ValueError(f"cannot read the shard index {address}: {error}") from error
        return None, f"cannot read the shard index {address} ({error})"
    except ValueError as error:
        return None, f"{address} is not a shard index that says how many samples each *.tar holds ({error})"


def _from_json(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: It is none, or lists within lists a thousand deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _own_shards(folder: str, content: Any) -> list[Shard]:
    """The shards that an index in our form lists.

    Raises:
        ValueError: It is in another one, or holds what no shard can be.
    """
    entries = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError('it has no list of "shards"')
    return _distinct([_shard(folder, entry, ("name", "samples", "bytes")) for entry in entries])


def _wids_shard(folder: str, entry: Any) -> Shard:
    """A shard of WebDataset's index, which lies beside it."""
    keys = ("url", "nsamples", "filesize")
    if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
        return _shard(folder, entry, keys)
    name = entry["url"].rpartition("/")[2]
    size = entry.get("filesize")
    if not size and size is not False:
        size = 0 if is_remote(folder) or not name else os.path.getsize(folder + name)
    return _shard(folder, {"url": name, "nsamples": entry.get("nsamples"), "filesize": size}, keys)


def _shard(folder: str, entry: Any, keys: tuple[str, str, str]) -> Shard:
    """A shard of an index's entry, whose name, samples and bytes stand under ``keys``.

    Raises:
        ValueError: One of them is missing, or what it cannot be.
    """
    name, samples, size = (entry.get(key) if isinstance(entry, dict) else None for key in keys)
    # What an index lists lies beside it.
    if not isinstance(name, str) or "/" in name or name in ("", ".", "..") or _CONTROL.search(name):
        raise ValueError(f"{reprlib.repr(name)} is not the name of a file beside it")
    for key, value, largest in ((keys[1], samples, MAX_SAMPLES), (keys[2], size, MAX_BYTES)):
        if type(value) is not int or not 0 <= value <= largest:
            raise ValueError(
                f'"{key}" of {reprlib.repr(name)} is {reprlib.repr(value)}: it must be a whole number up to {largest}'
            )
    unpacked = size if name.lower().endswith(".tar") else MAX_UNPACKING * size + UNPACKED_ANYWAY
    if size and samples * tarfile.BLOCKSIZE > unpacked:
        raise ValueError(f"{reprlib.repr(name)} cannot hold {samples} samples in {size} bytes")
    if not samples and size > tarfile.RECORDSIZE:
        raise ValueError(f"{reprlib.repr(name)} has {size} bytes, and no samples: leave only shards in the folder")
    return Shard(folder + name, samples, size)


def _distinct(shards: list[Shard]) -> list[Shard]:
    """The shards themselves.

    Raises:
        ValueError: One of them is there twice.
    """
    twice = [url for url, count in Counter(shard.url for shard in shards).items() if count > 1]
    if twice:
        raise ValueError(f"it lists {twice[0]} twice")
    return shards


def _classes_beside(folder: str) -> Classes | None:
    if is_remote(folder):
        return None
    present = [name for name in CLASSES_NAMES if os.path.isfile(folder + name)]
    return load_classes(folder + present[0]) if present else None


def load_classes(
    address: str,
    remote: RemoteOptions = DEFAULT_OPTIONS,
) -> Classes:
    """The names of classes that a file lists, see :func:`adala.data.labels.read_classes`.

    Raises:
        ValueError: It cannot be read, or lists none.
    """
    address = local_path(address)
    try:
        text = read_text(address, remote)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the names of classes in {address} ({error})") from error
    return read_classes(text, address)


def _check_files(shards: Sequence[Shard]) -> None:
    """Refuses local shards that are not what the index says, at start-up rather than in the middle of an epoch."""
    for shard in shards:
        try:
            found = os.stat(shard.url)
        except OSError:
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise ValueError(
                f"the index lists the shard {shard.url}, but there is no such file: fetch it, or write the index anew "
                f"with `{index_command(os.path.dirname(shard.url))}`"
            )
        if found.st_size != shard.bytes:
            raise ValueError(
                f"the shard {shard.url} has {found.st_size} bytes, but the index says {shard.bytes}: fetch it again, "
                f"or write the index anew with `{index_command(os.path.dirname(shard.url))}`"
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
    for path in paths:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is no file: leave only shards under such names")
    censuses = [count_samples(path) for path in paths]
    refuse_unusable(sum(censuses, Census()), str(folder))
    shards = [Shard(str(path), of.samples, path.stat().st_size) for path, of in zip(paths, censuses, strict=True)]
    for shard in shards:
        if not shard.samples and shard.bytes > tarfile.RECORDSIZE:
            raise ValueError(f"{shard.url} holds no samples: leave only shards in the folder")
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
        _own_shards(str(folder), _from_json(read_text(str(path))))
    except FileNotFoundError:
        pass
    except ValueError:
        return Path(folder) / OWN_INDEX_NAME
    return path


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
