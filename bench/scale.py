"""What ImageNet-22K takes on many GPUs: shards, reading, traffic, checkpoints and hours, recomputed from assumptions.

    python bench/scale.py                                     # the tables of docs/SCALE.md; --write puts them there
    python bench/scale.py --utilization 0.5 --shard_mb 1000   # the same with figures of your own
    python bench/scale.py --measure                           # what this machine decodes and writes

Parameters and FLOPs are counted on the meta device, traffic and checkpoints computed by ``adala.memory``. There is no
GPU behind it: how fast one is, is an assumption among the others.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import pinned_sdpa
from torch.utils.flop_counter import FlopCounterMode

from adala.build import outline_stage
from adala.config import load_recipe
from adala.data import View
from adala.data.images import decode_image
from adala.ds_config import load_ds_config
from adala.machine import machine_description
from adala.memory.planner import next_multiple
from adala.memory.states import ParameterCounts, checkpoint_bytes, count_parameters, step_traffic
from adala.plan import StagePlan, outline_run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "SCALE.md"
BEGIN = "<!-- what follows is written by `python bench/scale.py --write` -->\n"
MODELS = {"ViT-L/14": "vit_large_patch14_dinov2.lvd142m", "ViT-g/14": "vit_giant_patch14_dinov2.lvd142m"}
GPUS = (8, 64, 512)
STAGES = (1, 2)
ZERO = (1, 2, 3)
# Each with its unit and where it comes from; the page says the same.
ASSUMPTIONS = {
    "images": (14_200_000, "images of the data set (published)"),
    "image_kb": (92, "kB of an image (published: 1.3 TB in all)"),
    "shard_mb": (100, "MB of a shard (chosen)"),
    "workers": (6, "data workers of a GPU (the recipe's)"),
    "gpus_per_node": (8, "GPUs of a node"),
    "peak_tflops": (989, "TFLOP/s of a GPU in bf16 (data sheet of the H100 SXM)"),
    "utilization": (0.35, "part of that which is reached (ASSUMED)"),
    "nvlink_gb_per_s": (450, "GB/s that a GPU sends within a node (data sheet)"),
    "network_gb_per_s": (400, "GB/s that a node sends, its adapters together (8 x 400 Gbit/s; ASSUMED)"),
    "host_gb_per_s": (25, "GB/s that a GPU copies into pinned memory (half of PCIe 5 x16; ASSUMED)"),
    "disk_gb_per_s": (2, "GB/s that a node writes to the shared file system (ASSUMED)"),
    "decoded_per_core": (250, "images/s that a core decodes and augments (measured, see below)"),
}
# Views of a measurement, and bytes of a file that is written for it.
MEASURED_IMAGES, MEASURED_BYTES = 60, 2**28


@dataclass(frozen=True)
class Load:
    """One stage of one model, whatever the GPUs.

    Attributes:
        model: For people.
        plan: Of the stage.
        counts: Its parameters.
        flops: Of one image in a training step: the teacher's forward pass, the student's and its backward pass.
    """

    model: str
    plan: StagePlan
    counts: ParameterCounts
    flops: int

    @property
    def views(self) -> int:
        """Images that the recipe trains on."""
        return self.plan.config.steps * self.plan.config.global_batch_size

    def checkpoint_gb(self) -> float:
        return checkpoint_bytes(self.counts, self.plan.model.precision) / 1e9


@dataclass(frozen=True)
class Scale:
    """A stage on a number of GPUs, under assumptions.

    Attributes:
        load: What is computed.
        gpus: How many.
        assumed: By name, see ``ASSUMPTIONS``.
    """

    load: Load
    gpus: int
    assumed: argparse.Namespace

    @cached_property
    def global_batch_size(self) -> int:
        """The recipe's, or the next that divides into the GPUs."""
        return next_multiple(self.load.plan.config.global_batch_size, self.gpus)

    @property
    def images(self) -> int:
        """Of a GPU in a step."""
        return self.global_batch_size // self.gpus

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        micro = min(self.load.plan.config.micro_batch_size or self.images, self.images)
        return -(-self.images // micro)

    def sent_gb(self, zero_stage: int) -> float:
        """GB that a GPU sends in a step."""
        config = load_ds_config(f"zero{zero_stage}_bf16")
        traffic = step_traffic(self.load.counts, config, self.gpus, self.accumulation)
        return (traffic.gradients + traffic.weights) / 1e9

    @property
    def compute_s(self) -> float:
        """Seconds of a step's arithmetic."""
        return self.images * self.load.flops / (self.assumed.peak_tflops * 1e12 * self.assumed.utilization)

    @property
    def sending_s(self) -> float:
        """Seconds of a step's traffic under ZeRO-1, none of it behind arithmetic."""
        # Rings leave a node once for all of its GPUs, over all its adapters.
        rate = self.assumed.nvlink_gb_per_s
        if self.gpus > self.assumed.gpus_per_node:
            rate = min(rate, self.assumed.network_gb_per_s)
        return self.sent_gb(1) / rate

    @property
    def images_per_s(self) -> float:
        """Of all GPUs."""
        return self.global_batch_size / (self.compute_s + self.sending_s)

    @property
    def skipped(self) -> float:
        """What is read and passed over for each byte that is used: half a shard a worker and epoch."""
        return self.gpus * self.assumed.workers * self.assumed.shard_mb / 2 / data_mb(self.assumed)

    @property
    def read_mb_per_s(self) -> float:
        """Of a node."""
        of_node = self.images_per_s * min(self.assumed.gpus_per_node, self.gpus) / self.gpus
        return of_node * self.assumed.image_kb / 1000 * (1 + self.skipped)

    @property
    def cores(self) -> float:
        """That decode, for each GPU."""
        return self.images_per_s / self.gpus / self.assumed.decoded_per_core

    @property
    def pause_s(self) -> float:
        """Of a checkpoint: each GPU copies its share into the machine's memory."""
        return self.load.checkpoint_gb() / self.gpus / self.assumed.host_gb_per_s

    @property
    def writing_s(self) -> float:
        """Until a checkpoint is complete, while training goes on: all nodes write their shares at once."""
        nodes = max(1, self.gpus // self.assumed.gpus_per_node)
        return self.load.checkpoint_gb() / (nodes * self.assumed.disk_gb_per_s)

    def hours(self, views: int) -> float:
        return views / self.images_per_s / 3600


def data_mb(assumed: argparse.Namespace) -> float:
    return assumed.images * assumed.image_kb / 1000


def loads() -> list[Load]:
    """Stages 1 and 2 of both models under the recipe ``dinov2_large``."""
    found = []
    for model, name in MODELS.items():
        plans = outline_run(load_recipe("dinov2_large", ["--teacher.name", name]))
        for plan in plans:
            if plan.number in STAGES:
                found.append(Load(model, plan, count_parameters(outline_stage(plan)), count_flops(plan)))
    return found


def count_flops(plan: StagePlan) -> int:
    """FLOPs of matrix products and convolutions of one image, forward and backward, teacher and student."""
    stage = outline_stage(plan).train()
    stage.target_variance = dict.fromkeys(stage.calibrated_targets, 1.0)
    image = torch.empty(1, 3, *plan.data.view.image_size, device="meta")
    with pinned_sdpa("math"), FlopCounterMode(display=False) as counter:
        stage({"image": image})["loss"].backward()
    return counter.get_total_flops()


def tables(assumed: argparse.Namespace) -> str:
    """The page's tables, in Markdown."""
    every = loads()
    return "\n".join(
        [
            *assumption_table(assumed),
            "",
            *shard_table(assumed),
            "",
            *stage_table(every),
            "",
            *gpu_table([Scale(load, gpus, assumed) for load in every for gpus in GPUS]),
            "",
        ]
    )


def assumption_table(assumed: argparse.Namespace) -> list[str]:
    rows = [f"| `--{name}` | {getattr(assumed, name):,} | {text} |" for name, (_, text) in ASSUMPTIONS.items()]
    return ["| assumption | value | what it is |", "| --- | ---: | --- |", *rows]


def shard_table(assumed: argparse.Namespace) -> list[str]:
    """What shards of several sizes cost."""
    lines = ["| MB a shard | shards | images each | " + " | ".join(f"passed over, {n} GPUs" for n in GPUS) + " |"]
    lines.append("| ---: " * (3 + len(GPUS)) + "|")
    for size in sorted({30, 100, 300, 1000, assumed.shard_mb}):
        passed_over = [n * assumed.workers * size / 2 / data_mb(assumed) for n in GPUS]
        cells = [f"{size:,}", f"{data_mb(assumed) / size:,.0f}", f"{1000 * size / assumed.image_kb:,.0f}"]
        lines.append("| " + " | ".join([*cells, *(f"{part:.1%}" for part in passed_over)]) + " |")
    return lines


def stage_table(every: Sequence[Load]) -> list[str]:
    lines = [
        "| model | stage | trained, M | frozen, M | teacher, M | GFLOP an image | recipe's views, M | checkpoint, GB |"
    ]
    lines.append("| --- " + "| ---: " * 7 + "|")
    for load in every:
        counts = load.counts
        sizes = " | ".join(f"{count / 1e6:,.1f}" for count in (counts.trained, counts.frozen, counts.teacher))
        lines.append(
            f"| {load.model} | {load.plan.number} | {sizes} | {load.flops / 1e9:,.0f} | {load.views / 1e6:.2f} | "
            f"{load.checkpoint_gb():.1f} |"
        )
    return lines


def gpu_table(scales: Sequence[Scale]) -> list[str]:
    heads = ["model", "stage", "GPUs", "batch", "images a GPU", *(f"ZeRO-{zero}, GB sent" for zero in ZERO)]
    heads += ["arithmetic, ms", "sending, ms", "images/s", "MB/s a node", "cores a GPU", "pause, ms", "written in, s"]
    heads += ["recipe, minutes", "one pass, hours"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for scale in scales:
        load = scale.load
        cells = [load.model, str(load.plan.number), str(scale.gpus), f"{scale.global_batch_size:,}", str(scale.images)]
        cells += [f"{scale.sent_gb(zero):.2f}" for zero in ZERO]
        cells += [f"{1000 * scale.compute_s:,.0f}", f"{1000 * scale.sending_s:,.0f}", f"{scale.images_per_s:,.0f}"]
        cells += [f"{scale.read_mb_per_s:,.0f}", f"{scale.cores:.1f}", f"{1000 * scale.pause_s:.1f}"]
        cells += [f"{scale.writing_s:.2f}"]
        cells += [f"{60 * scale.hours(load.views):.1f}", f"{scale.hours(scale.assumed.images):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def measure(image_kb: int) -> str:
    """What this machine does of what the page assumes; decoding in the processor's own seconds, whoever shares it."""
    encoded = photo_like_jpeg(1000 * image_kb)
    prepare = View((518, 518), (0.5,) * 3, (0.5,) * 3, (14, 14)).image_transform("crop", as_uint8=True)
    torch.set_num_threads(1)
    begin = time.process_time()
    for _ in range(MEASURED_IMAGES):
        prepare(decode_image(encoded))
    rate = MEASURED_IMAGES / (time.process_time() - begin)
    with tempfile.NamedTemporaryFile(dir=".") as file:
        block, begin = os.urandom(2**20), time.perf_counter()
        for _ in range(MEASURED_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = MEASURED_BYTES / (time.perf_counter() - begin)
    machine = machine_description()
    return (
        f"{machine['cpu']}, {machine['cpu_cores']} cores, {machine['date']}\n"
        f"{rate:.0f} images/s a core: JPEG of {len(encoded) / 1000:.0f} kB, 500 x 375, decoded, cropped to 518 x 518\n"
        f"{written / 1e9:.2f} GB/s written to the current folder, with fsync"
    )


def photo_like_jpeg(size: int) -> bytes:
    """A JPEG of 500 x 375 pixels and about so many bytes: smooth colours with as much noise as that takes."""
    generator = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((500, 375), 3))
    noise = generator.normal(size=smooth.shape)
    for amplitude in range(0, 120, 4):
        stream = io.BytesIO()
        pixels = np.clip(smooth + amplitude * noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        if stream.tell() >= size:
            break
    return stream.getvalue()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, (value, text) in ASSUMPTIONS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    parser.add_argument("--measure", action="store_true", help="print what this machine decodes and writes instead")
    parser.add_argument("--write", action="store_true", help="also write the tables into docs/SCALE.md")
    options = parser.parse_args(arguments)
    for name in ASSUMPTIONS:
        if not getattr(options, name) > 0:
            parser.error(f"--{name} is {getattr(options, name)}: it must be above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    text = measure(options.image_kb) if options.measure else tables(options)
    print(text)
    if options.write:
        PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(BEGIN)[0] + BEGIN + "\n" + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
