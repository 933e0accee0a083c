"""What the trainer costs: its images/s over those of a bare PyTorch loop that does the same forward, backward, step.

    python bench/trainer_overhead.py [--stage 2] [--rounds 5] [--steps 10] [any recipe override]

One rank. Both sides train the same student against the same teacher on the same micro-batches' sizes with AdamW and
clipping. The trainer streams, decodes and augments its shards, averages and checks its metrics, and steps through
DeepSpeed; the bare loop has its batches in memory. Rounds alternate, and the ratio is taken within each round, so that
a machine whose speed drifts hits both alike; the median over rounds is the result.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch

from adala.build import (
    build_engine,
    build_stage,
    build_teacher,
    build_train_loader,
    data_index,
    plan_stage,
    starting_student,
)
from adala.config import load_recipe
from adala.data import StreamState
from adala.distributed import close_distributed, device, init_distributed
from adala.optim import build_optimizer
from adala.progress import MetricWriter
from adala.trainer import Trainer


def trainer_seconds(trainer: Trainer, batches: Iterator[dict], steps: int) -> float:
    """Seconds of ``steps`` of the trainer's own steps, with a line of metrics after each tenth as by default."""
    started = time.perf_counter()
    for _ in range(steps):
        metrics = trainer.train_step(batches)
        trainer.step += 1
        if trainer.step % trainer.config.log_every == 0:
            trainer.writer.write("train", trainer.step, metrics)
    return time.perf_counter() - started


def bare_seconds(stage: torch.nn.Module, optimizer, batches: Iterator[dict], steps: int, clipping: float) -> float:
    """Seconds of ``steps`` of plain PyTorch."""
    stage.train()
    started = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        stage(next(batches))["loss"].backward()
        if clipping:
            torch.nn.utils.clip_grad_norm_(stage.parameters(), clipping)
        optimizer.step()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of each side in each round")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args, overrides = parser.parse_known_args()

    init_distributed()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(args.recipe, [*overrides, "--runs_dir", scratch])
        plan = plan_stage(recipe, args.stage)
        teacher = build_teacher(recipe)
        index = data_index(recipe, plan.sources)
        build = partial(build_stage, recipe, args.stage, plan)
        bare_stage = build(starting_student(recipe, args.stage, teacher)[0], teacher).to(device())
        config = plan.config
        bare_optimizer = build_optimizer(bare_stage, config.lr, config.weight_decay, config.betas)
        engine = build_engine(recipe, plan, build(starting_student(recipe, args.stage, teacher)[0], teacher))
        loader = build_train_loader(recipe, args.stage, plan, index, teacher, StreamState())
        writer = MetricWriter(Path(scratch) / "metrics", "trainer", args.steps, recipe.tensorboard)
        trainer = Trainer(engine, config, lambda state: loader, None, writer, Path(scratch) / "checkpoints", {})
        streamed = iter(loader)
        in_memory = cycle(
            list(islice(iter(build_train_loader(recipe, args.stage, plan, index, teacher, StreamState())), 8))
        )

        trainer_seconds(trainer, streamed, 2)
        bare_seconds(bare_stage, bare_optimizer, in_memory, 2, config.gradient_clipping)
        ratios, trainer_rates, bare_rates = [], [], []
        images = args.steps * config.global_batch_size
        for _ in range(args.rounds):
            bare = bare_seconds(bare_stage, bare_optimizer, in_memory, args.steps, config.gradient_clipping)
            ours = trainer_seconds(trainer, streamed, args.steps)
            ratios.append(bare / ours)
            trainer_rates.append(images / ours)
            bare_rates.append(images / bare)
        writer.close()
        engine.close()
    result = {
        "stage": args.stage,
        "trainer_images_per_s": round(statistics.median(trainer_rates), 1),
        "bare_images_per_s": round(statistics.median(bare_rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    close_distributed()


if __name__ == "__main__":
    sys.exit(main())
