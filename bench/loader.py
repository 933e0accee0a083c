"""Images/s of the training loader against a bare loop that reads, decodes and augments, with as many processes.

    python bench/loader.py --workers 0 1 2 --rounds 15 --at-least 0.9
    python bench/loader.py --photos ~/pictures --pixels 256 --batch 64

Shards of square JPEG tiles are cut from photographs and lie in a temporary folder; without --photos from the three that
scikit-learn and matplotlib bring along. Beside the loader run, each on the very same shards and transform:

- ``bare``: processes that read tar files, decode and augment, and keep nothing: no order, no state, no batches;
- ``delivered``: the same through torch's DataLoader, so that batches reach the training process;
- ``webdataset``: WebDataset's own pipeline with its own decoder and as large a shuffle buffer.

Rounds alternate, so that a machine whose speed drifts hits all alike, and ratios are those of the medians over rounds.
Where other programs want the same cores, ratios of images per second of the processes' own time say more.
"""

import argparse
import io
import multiprocessing
import os
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata, resources
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import webdataset
from PIL import Image
from throughput import write_table
from timing import median_interval
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from adala.data import ShardIndex, TrainLoader, View, load_index, prepare_images, write_shards
from adala.data.folders import files_below
from adala.data.images import IMAGE_FIELDS, decode_image
from adala.data.loader import worker_place
from adala.data.transforms import ImageTransform
from adala.failures import report_error
from adala.machine import machine_description

# Photographs in packages that the tests need as well.
PACKAGED = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JPEG_QUALITY = 90
# Batches that torch's DataLoader has every worker read ahead.
PREFETCH = 2
# How long processes that waited are given to get under way again.
SETTLE_S = 0.1

Row = dict[str, Any]


@dataclass(frozen=True)
class Rate:
    """What a stretch of work gave: images in a second, and in a second of the processor's time."""

    per_s: float
    per_cpu_s: float


class Contender(Protocol):
    """Something that reads images, and stands still while it is not asked to."""

    def rate(self, seconds: float) -> Rate:
        """Over at least so many seconds of steady work."""

    def close(self) -> None: ...


class Stretch:
    """Counts images from its beginning, and what they took of time, and of the time of this process and of others."""

    def __init__(self, processes: Sequence[int]):
        self.processes = processes
        self.started, self.cpu = time.perf_counter(), self._cpu_s()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def rate(self, images: int) -> Rate:
        return Rate(images / self.seconds, images / max(self._cpu_s() - self.cpu, 1e-9))

    def _cpu_s(self) -> float:
        return time.process_time() + sum(map(cpu_s_of, self.processes))


def cpu_s_of(process: int) -> float:
    """Processor time of another process, user's and system's, as Linux counts it: to 10 ms."""
    behind_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(behind_name[11]) + int(behind_name[12])) / os.sysconf("SC_CLK_TCK")


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


def photographs(folder: Path | None, at_least: int) -> list[Image.Image]:
    """The photographs in a folder, at any depth, or those of packages, whose sides have ``at_least`` so many pixels.

    Raises:
        ValueError: There is none.
    """
    if folder is None:
        contents = [resources.files(package).joinpath(path).read_bytes() for package, path in PACKAGED]
    else:
        paths = (path for path in files_below(folder) if path.suffix.lower().removeprefix(".") in IMAGE_FIELDS)
        contents = [path.read_bytes() for path in paths]
    found = [image for image in map(decode_image, contents) if min(image.size) >= at_least]
    if not found:
        where = folder or "what packages bring along"
        raise ValueError(f"{where} holds no photographs of {at_least} px and more: name a folder of such with --photos")
    return found


def tiles(photos: Sequence[Image.Image], count: int, pixels: int) -> Iterator[dict[str, Any]]:
    """JPEG squares of ``pixels``, cut from the photographs at random and scaled down where they were larger."""
    draw = random.Random(0)
    for _ in range(count):
        photo = draw.choice(photos)
        side = draw.randint(pixels, min(photo.size))
        left, upper = draw.randint(0, photo.width - side), draw.randint(0, photo.height - side)
        stream = io.BytesIO()
        tile = photo.resize((pixels, pixels), Image.Resampling.BICUBIC, (left, upper, left + side, upper + side))
        tile.save(stream, "JPEG", quality=JPEG_QUALITY)
        yield {"jpg": stream.getvalue(), "cls": 0}


def bare_images(paths: Sequence[str], transform: ImageTransform, at_once: int) -> Iterator[list[Tensor]]:
    """Read, decoded and augmented, without end: what nobody who reads shards gets around.

    Each is done to so many images at once, which is a fifth faster than all of it to one after the other: a processor's
    caches do not hold the code of all three.
    """
    contents = bare_contents(paths)
    while True:
        images = [decode_image(content) for content in list(islice(contents, at_once))]
        yield [transform(image) for image in images]


def bare_contents(paths: Sequence[str]) -> Iterator[bytes]:
    for path in cycle(paths):
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    yield tar.extractfile(member).read()


@dataclass(frozen=True)
class BareStream(IterableDataset):
    """Bare images of one worker in batches, from its part of the shards."""

    paths: Sequence[str]
    transform: ImageTransform
    batch_size: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker, workers = worker_place()
        for images in bare_images(self.paths[worker::workers], self.transform, self.batch_size):
            yield {"image": default_collate(images)}


class Batches:
    """A stream of batches through torch's DataLoader, or in this process."""

    def __init__(self, start: Callable[[], Iterator[Any]], batch_size: int, workers: int):
        others = children()
        self.batches = start()
        self.batch_size = batch_size
        self.ahead = 2 * PREFETCH * workers
        next(self.batches)
        self.processes = sorted(children() - others)

    def rate(self, seconds: float) -> Rate:
        # What was read ahead while others were timed, and as much again until the workers are in step.
        for _ in range(self.ahead):
            next(self.batches)
        stretch, images = Stretch(self.processes), 0
        while stretch.seconds < seconds:
            next(self.batches)
            images += self.batch_size
        return stretch.rate(images)

    def close(self) -> None:
        if hasattr(self.batches, "close"):
            self.batches.close()


class BareHere:
    """Bare images in this process."""

    def __init__(self, paths: Sequence[str], transform: ImageTransform, at_once: int):
        self.images = bare_images(paths, transform, at_once)

    def rate(self, seconds: float) -> Rate:
        stretch, images = Stretch([]), 0
        while stretch.seconds < seconds:
            images += len(next(self.images))
        return stretch.rate(images)

    def close(self) -> None:
        self.images.close()


class BareProcesses:
    """Bare images in processes that count them, and go on while a gate is open."""

    def __init__(self, paths: Sequence[str], transform: ImageTransform, at_once: int, workers: int):
        context = multiprocessing.get_context("fork")
        self.gate = context.Event()
        self.counts = context.Array("q", workers, lock=False)
        self.processes = [
            context.Process(target=self._count, args=(number, paths[number::workers], transform, at_once), daemon=True)
            for number in range(workers)
        ]
        for process in self.processes:
            process.start()

    def _count(self, number: int, paths: Sequence[str], transform: ImageTransform, at_once: int) -> None:
        torch.set_num_threads(1)
        for images in bare_images(paths, transform, at_once):
            self.counts[number] += len(images)
            self.gate.wait()

    def rate(self, seconds: float) -> Rate:
        self.gate.set()
        time.sleep(SETTLE_S)
        stretch, before = Stretch([process.pid for process in self.processes]), sum(self.counts)
        time.sleep(seconds)
        rate = stretch.rate(sum(self.counts) - before)
        self.gate.clear()
        return rate

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def delivered_batches(paths: Sequence[str], transform: ImageTransform, batch: int, workers: int) -> Iterator[Any]:
    """Bare images through torch's own DataLoader."""
    stream = BareStream(paths, transform, batch)
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, worker_init_fn=one_thread))


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def webdataset_batches(paths: Sequence[str], transform: ImageTransform, batch: int, workers: int, buffer: int) -> Any:
    """WebDataset's own pipeline: its order of shards, its shuffle buffer, its decoder, its loader."""
    dataset = webdataset.WebDataset(list(paths), shardshuffle=len(paths), seed=0).repeat().shuffle(buffer)
    images = dataset.decode("pilrgb").to_tuple("jpg").map_tuple(transform).batched(batch, partial=False)
    return iter(webdataset.WebLoader(images, batch_size=None, num_workers=workers, worker_init_fn=one_thread))


def contenders(index: ShardIndex, options: argparse.Namespace, workers: int) -> dict[str, Callable[[], Contender]]:
    """How each of them is started."""
    view = View((options.pixels, options.pixels), MEAN, STD, (16, 16))
    transform = view.image_transform(options.augmentation, as_uint8=not options.floats)
    paths, batch = [shard.url for shard in index.shards], options.batch
    bare = (paths, transform, batch)

    def loader() -> Contender:
        stream = TrainLoader(
            index,
            prepare_images(transform),
            global_batch_size=batch,
            micro_batch_size=batch,
            seed=0,
            num_workers=workers,
            shuffle_buffer=options.shuffle_buffer,
        )
        return Batches(lambda: iter(stream), batch, workers)

    return {
        "loader": loader,
        "bare": partial(BareProcesses, *bare, workers) if workers else partial(BareHere, *bare),
        "delivered": lambda: Batches(partial(delivered_batches, *bare, workers), batch, workers),
        "webdataset": lambda: Batches(
            partial(webdataset_batches, *bare, workers, options.shuffle_buffer), batch, workers
        ),
    }


def compare(index: ShardIndex, options: argparse.Namespace, workers: int) -> list[Row]:
    """A row for each contender: medians over rounds, and the loader's over them."""
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(closing(start())) for name, start in contenders(index, options, workers).items()
        }
        names, rates = list(running), {name: [] for name in running}
        # The first round warms up.
        for number in range(options.rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                rate = running[name].rate(options.seconds)
                rates[name] += [rate] if number else []
    return [row_of(workers, name, rates["loader"], rates[name]) for name in names]


def row_of(workers: int, name: str, loader: Sequence[Rate], other: Sequence[Rate]) -> Row:
    """Images/s of a contender, the loader's over these with a 95 % interval of the rounds' ratios, and the same of
    images per second of processor time."""
    lowest, highest = median_interval([mine.per_s / theirs.per_s for mine, theirs in zip(loader, other, strict=True)])
    per_s, per_cpu_s = (
        [median(getattr(rate, kind) for rate in rates) for rates in (loader, other)] for kind in ("per_s", "per_cpu_s")
    )
    return {
        "workers": workers,
        "contender": name,
        "images_per_s": per_s[1],
        "loader_over_it": per_s[0] / per_s[1],
        "interval": f"{lowest:.2f} .. {highest:.2f}",
        "of_processor_time": per_cpu_s[0] / per_cpu_s[1],
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--workers", type=int, nargs="+", default=[0, 1, 2], help="data workers; 0 reads in the process itself")
    option("--rounds", type=int, default=15, help="of all contenders in turn (15)")
    option("--seconds", type=float, default=1.0, help="of each contender in each round (1)")
    option("--batch", type=int, default=32)
    option("--pixels", type=int, default=224, help="side of the images, in the shards and for the model (224)")
    option("--samples", type=int, default=2048, help="images in all shards together (2048)")
    option("--shards", type=int, default=8)
    option("--shuffle-buffer", type=int, default=1000)
    option("--augmentation", default="crop")
    option("--floats", action="store_true", help="normalised images in place of the uint8 that training gets")
    option("--photos", type=Path, help="folder of photographs (those of scikit-learn and matplotlib)")
    option("--at-least", type=float, help="fail where the loader has less of the bare loop's images/s")
    option("--out", type=Path, default=Path("runs/loader"), help="folder of the table (runs/loader)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            photos = photographs(options.photos, options.pixels)
            write_shards(
                tiles(photos, options.samples, options.pixels), folder, "train", -(-options.samples // options.shards)
            )
            index = load_index([folder])
            rows = [row for workers in options.workers for row in compare(index, options, workers)]
    except (ValueError, OSError) as error:
        report_error(error)
        return 2
    versions = {name: metadata.version(name) for name in ("torchvision", "pillow", "webdataset")}
    conditions = {key: value for key, value in vars(options).items() if key not in ("out", "photos")}
    machine = {**machine_description(torch.device("cpu")), **versions}
    write_table(
        options.out, "loader", rows, {**conditions, "machine": machine, "command": ["bench/loader.py", *sys.argv[1:]]}
    )
    print(f"{machine['device']}, {machine['cpu_cores']} cores, load {machine['load_average']}, {machine['date']}")
    if options.at_least is None:
        return 0
    return int(any(row["contender"] == "bare" and row["loader_over_it"] < options.at_least for row in rows))


if __name__ == "__main__":
    sys.exit(main())
