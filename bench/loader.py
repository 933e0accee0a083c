"""Samples/s that the training loader streams from shards, for several numbers of workers, against what a stage eats.

python bench/loader.py --recipe tiny --workers 0 1 2
python bench/loader.py --recipe dinov2_large --workers 4 8 16 --run runs/mine
python bench/loader.py --recipe dinov2_large --workers 8 --set data.train=/data/in22k/train-*.tar

What the trainer consumes comes from a run's metrics (``--run``), over all its ranks; without one, a Stage 2 step in
plain PyTorch is timed here.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scaling import steady_rate
from timing import measure_for, train_runner

from adala.build import build_teacher, build_train_loader, data_index, plan_stage, unaligned_student
from adala.config import Recipe, load_recipe
from adala.data import ShardIndex, StreamState
from adala.distributed import device
from adala.metrics import read_metrics
from adala.runs import RunFolder


@dataclass
class LoaderRow:
    """One number of workers.

    Attributes:
        workers: Data workers of the rank; 0 reads in the training process.
        samples_per_s: Streamed, decoded, augmented and batched, once the workers are up.
        first_batch_s: From the start to the first batch.
        headroom: Over what the trainer consumes; below 1 the GPU waits for data.
    """

    workers: int
    samples_per_s: float
    first_batch_s: float
    headroom: float | None = None


def stream_rate(
    batches: Iterator[dict[str, Any]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Samples/s over at least ``seconds`` after the first batch, and the seconds that the first took."""
    started = clock()
    next(batches)
    first = clock()
    samples = 0
    while clock() - first < seconds:
        samples += len(next(batches)["id"])
    return samples / (clock() - first), first - started


def measure_loader(
    recipe: Recipe, stage: int, index: ShardIndex, teacher: Any, workers: int, seconds: float
) -> LoaderRow:
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_workers=workers))
    loader = build_train_loader(recipe, stage, plan_stage(recipe, stage), index, teacher, StreamState())
    batches = iter(loader)
    try:
        return LoaderRow(workers, *stream_rate(batches, seconds))
    finally:
        batches.close()


def consumed_in_run(folder: Path) -> dict[str, float]:
    """Images/s by stage of a run, over all its ranks.

    Raises:
        ValueError: No stage of it has logged a training step.
    """
    run = RunFolder(folder)
    found = {}
    for number in (1, 2, 3):
        metrics = read_metrics(run.stage(number), "train")
        if metrics:
            found[f"stage {number}"] = steady_rate(metrics)
    if not found:
        raise ValueError(f"{folder} has no stage with metrics")
    return found


def consumed_here(recipe: Recipe, teacher: Any, seconds: float = 5.0) -> dict[str, float]:
    """Images/s of a Stage 2 step with the recipe's micro-batch, model and mechanism, in this one process."""
    batch = plan_stage(recipe, 2).micro_batch_size
    images = torch.randn(batch, 3, *recipe.data.image_size, device=device())
    runner = train_runner(unaligned_student(recipe, teacher), teacher, images)
    measure = measure_for(device())
    measure(runner, 1)
    once = measure(runner, 1)
    return {"stage 2 step": batch / measure(runner, max(1, int(seconds / once)))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2, help="whose data and augmentation (2)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="of streaming for each number of workers (10)")
    parser.add_argument("--run", type=Path, help="folder of a run whose consumption is compared")
    parser.add_argument("--out", type=Path, default=Path("runs/loader"), help="folder (runs/loader)")
    options = parser.parse_args(arguments)
    overrides = [part for text in options.set for part in (f"--{text.partition('=')[0]}", text.partition("=")[2])]
    try:
        recipe = load_recipe(options.recipe, overrides)
        plan = plan_stage(recipe, options.stage)
        teacher = build_teacher(recipe)
        index = data_index(recipe, plan.sources)
        rows = [
            measure_loader(recipe, options.stage, index, teacher, workers, options.seconds)
            for workers in options.workers
        ]
        consumed = consumed_in_run(options.run) if options.run else consumed_here(recipe, teacher)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        row.headroom = row.samples_per_s / max(consumed.values())
    options.out.mkdir(parents=True, exist_ok=True)
    conditions = {
        "recipe": Path(options.recipe).stem,
        "stage": options.stage,
        "image_size": recipe.data.image_size,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device().type,
    }
    found = {"conditions": conditions, "consumed_img_s": consumed, "rows": [asdict(row) for row in rows]}
    (options.out / "loader.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "loader.md").write_text(table(rows, consumed))
    print(table(rows, consumed))
    return 0


def table(rows: Sequence[LoaderRow], consumed: dict[str, float]) -> str:
    lines = ["| workers | samples/s | first batch s | of what is consumed |", "| ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(f"| {row.workers} | {row.samples_per_s:.0f} | {row.first_batch_s:.2f} | {row.headroom:.1f} x |")
    eaten = ", ".join(f"{name} {rate:.1f}" for name, rate in consumed.items())
    return "\n".join([*lines, "", f"Consumed, images/s: {eaten}. Below 1 x the model waits for data."]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
