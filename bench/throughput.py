"""How fast training goes, and what holds it up: over ranks, from shards, and against a bare PyTorch loop.

    python bench/throughput.py scaling --ranks 1 2 4 8 --recipe dinov2_large
    python bench/throughput.py loader --workers 4 8 16 --recipe dinov2_large --run runs/mine
    python bench/throughput.py overhead --rounds 5 --steps 10

Each takes any recipe override besides, prints a table, and writes it as NAME.md and NAME.json into --out.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from command import TrainingFailed, resolved_recipe, run_training

from adala.build import (
    build_engine,
    build_stage,
    build_teacher,
    build_train_loader,
    measure_on_data,
    prepare_student,
    unaligned_student,
)
from adala.checkpoint import Checkpoints
from adala.config import Recipe, load_recipe
from adala.distributed import close_distributed, device, init_distributed
from adala.evaluation import Evaluator
from adala.failures import report_error
from adala.families import Backbone
from adala.files import remove_tree, write_json, write_whole
from adala.metrics import read_metrics
from adala.optim import build_optimizer
from adala.plan import StagePlan, resolve_run
from adala.progress import MetricWriter
from adala.runs import RunFolder
from adala.stages import Stage
from adala.trainer import Trainer

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Batches that the bare loop goes round and round on.
BATCHES_IN_MEMORY = 8

Row = dict[str, Any]


def scaling(options: argparse.Namespace, overrides: list[str]) -> list[Row]:
    """Images/s of each stage on each number of ranks, through the launcher, and the rate per rank against the fewest.

    The rate is the median of what the trainer logs. On a CPU every rank has as many threads whatever their number: one
    rank with all cores could not be beaten.

    Raises:
        ValueError: A recipe that cannot be read, or a fixed global batch that does not divide over the ranks.
    """
    most = torch.cuda.device_count() or CORES
    ranks = sorted(set(options.ranks or [2**i for i in range(most.bit_length()) if 2**i <= most]))
    options.threads_per_rank = None if torch.cuda.is_available() else max(1, CORES // max(ranks))
    on_cpu = {"OMP_NUM_THREADS": str(options.threads_per_rank), "DS_ACCELERATOR": "cpu"}
    rows = scaling_rows(load_recipe(options.recipe, overrides), ranks, options.stages, options.grow)
    for row in rows:
        name, key = f"stage{row['stage']}-{row['ranks']}-ranks", f"--stage{row['stage']}"
        arguments = ["--recipe", options.recipe, *overrides, "--stage", str(row["stage"]), "--tensorboard", "false"]
        arguments += ["--runs_dir", str(options.out.resolve()), "--run_name", name, f"{key}.steps", str(options.steps)]
        arguments += [f"{key}.log_every", "1", f"{key}.global_batch_size", str(row["global_batch_size"])]
        remove_tree(options.out / name)
        try:
            run_training(arguments, row["ranks"], {} if torch.cuda.is_available() else on_cpu)
            row["images_per_s"] = steady_rate(read_metrics(options.out / name / f"stage{row['stage']}", "train"))
        except (TrainingFailed, ValueError) as error:
            row["error"] = str(error)
        print(f"{name}: {row['error'] or row['images_per_s']}", flush=True)
    fill_in_efficiency(rows)
    return rows


def scaling_rows(recipe: Recipe, ranks: Sequence[int], stages: Sequence[int], grow: bool) -> list[Row]:
    """The rows to fill; the global batch stays as it is, or grows with the ranks.

    Raises:
        ValueError: A fixed global batch that does not divide over the ranks.
    """
    rows = []
    for stage, count in product(stages, ranks):
        batch = recipe.stage(stage).global_batch_size
        batch = batch * count // min(ranks) if grow else batch
        if batch % count:
            raise ValueError(f"stage{stage}.global_batch_size {batch} does not divide over {count} ranks")
        row = {"stage": stage, "ranks": count, "global_batch_size": batch}
        rows.append({**row, "images_per_s": None, "efficiency": None, "error": None})
    return rows


def fill_in_efficiency(rows: Sequence[Row]) -> None:
    """Sets each row's rate per rank over that of the first of its stage; rows are in order of ranks."""
    first: dict[int, float] = {}
    for row in rows:
        if row["images_per_s"] is not None:
            per_rank = row["images_per_s"] / row["ranks"]
            row["efficiency"] = per_rank / first.setdefault(row["stage"], per_rank)


def steady_rate(metrics: Sequence[Mapping[str, float]]) -> float:
    """Median images/s of a stage's training lines without the first third, in which everything is set up.

    Raises:
        ValueError: There are no lines.
    """
    if not metrics:
        raise ValueError("the run logged no training step")
    return median(line["images_per_s"] for line in metrics[len(metrics) // 3 :])


def loader(options: argparse.Namespace, overrides: list[str]) -> list[Row]:
    """Samples/s streamed, decoded, augmented and batched, for each number of workers of one rank.

    ``headroom`` is that over what is consumed: by a run, over all its ranks, or by a step in plain PyTorch here. Below
    1 the model waits for data.

    Raises:
        ValueError: Recipe, teacher or data are at fault, or the run has no metrics.
    """
    consumed = consumed_here(options, overrides) if options.run is None else consumed_in_run(options.run)
    options.consumed_images_per_s = consumed
    print(f"consumed, images/s: {consumed}")
    rows = []
    for workers in options.workers:
        plan = plan_of(options, [*overrides, "--data.num_workers", str(workers)])
        with closing(iter(build_train_loader(plan))) as batches:
            rate, first_batch_s = stream_rate(batches, options.seconds)
        headroom = rate / max(consumed.values())
        rows.append({"workers": workers, "samples_per_s": rate, "first_batch_s": first_batch_s, "headroom": headroom})
    return rows


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


def consumed_in_run(folder: Path) -> dict[str, float]:
    """Images/s by stage of a run, over all its ranks.

    Raises:
        ValueError: No stage of it has logged a training step.
    """
    metrics = {number: read_metrics(RunFolder(folder).stage(number).path, "train") for number in (1, 2, 3)}
    found = {f"stage {number}": steady_rate(lines) for number, lines in metrics.items() if lines}
    if not found:
        raise ValueError(f"{folder} has no stage with metrics")
    return found


def consumed_here(options: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Images/s of the stage's step in plain PyTorch."""
    plan = plan_of(options, overrides)
    bare = BareLoop(plan, build_teacher(plan.model.teacher))
    bare.seconds(2)
    steps = max(1, int(options.seconds / bare.seconds(1)))
    return {f"stage {plan.number} step": steps * plan.config.global_batch_size / bare.seconds(steps)}


def overhead(options: argparse.Namespace, overrides: list[str]) -> list[Row]:
    """The trainer's images/s over those of a bare loop that takes the same steps, on one rank.

    The trainer streams, decodes and augments its shards, averages and checks its metrics, and steps through DeepSpeed;
    the bare loop has its batches in memory. Rounds alternate, and the ratio is taken within each, so that a machine
    whose speed drifts hits both alike; the medians over rounds are the result.

    Raises:
        ValueError: Recipe, teacher or data are at fault.
    """
    init_distributed()
    plan = plan_of(options, overrides)
    teacher = build_teacher(plan.model.teacher)
    bare = BareLoop(plan, teacher)
    with tempfile.TemporaryDirectory() as scratch, closing(TrainerLoop(plan, teacher, Path(scratch))) as trainer:
        # The first round warms up.
        rounds = [(bare.seconds(steps), trainer.seconds(steps)) for steps in (2, *[options.steps] * options.rounds)][1:]
    close_distributed()
    bare_s, trainer_s = (median(seconds) for seconds in zip(*rounds, strict=True))
    ratios = [of_bare / of_trainer for of_bare, of_trainer in rounds]
    images = options.steps * plan.config.global_batch_size
    row = {"stage": plan.number, "trainer_images_per_s": images / trainer_s, "bare_images_per_s": images / bare_s}
    return [{**row, "ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}]


def plan_of(options: argparse.Namespace, overrides: list[str]) -> StagePlan:
    """The plan of the stage asked for. Its head is a random one: to fit a probe takes long, and a step is as fast."""
    recipe = load_recipe(options.recipe, [*overrides, "--stage3.head_init", "random"])
    return resolve_run(recipe, (options.stage,)).stages[0]


def ready_stage(plan: StagePlan, teacher: Backbone) -> Stage:
    """The stage as it is trained, from the linearized teacher."""
    student = unaligned_student(plan.model, teacher)
    prepare_student(plan, student)
    stage = build_stage(plan, student, teacher)
    measure_on_data(plan, stage)
    return stage


class BareLoop:
    """A stage's optimizer steps in plain PyTorch, in the plan's precision, on batches in memory."""

    def __init__(self, plan: StagePlan, teacher: Backbone):
        config, precision = plan.config, plan.model.precision
        self.clipping, self.accumulation = config.gradient_clipping, plan.gradient_accumulation_steps
        self.stage = ready_stage(plan, teacher).to(device(), precision.dtype).train()
        self.optimizer = build_optimizer(self.stage, config.lr, config.weight_decay, config.betas)
        autocast = precision.autocast_dtype
        self.precision = partial(torch.autocast, device().type, autocast, enabled=autocast is not None)
        with closing(iter(build_train_loader(plan))) as batches:
            self.batches = cycle(list(islice(batches, BATCHES_IN_MEMORY)))

    def seconds(self, steps: int) -> float:
        """How long ``steps`` take."""
        started = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            for batch in islice(self.batches, self.accumulation):
                with self.precision():
                    loss = self.stage(batch)["loss"]
                (loss / self.accumulation).backward()
            if self.clipping:
                torch.nn.utils.clip_grad_norm_(self.stage.parameters(), self.clipping)
            self.optimizer.step()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


class TrainerLoop:
    """The trainer's own steps of a stage, with a line of metrics as often as the recipe says."""

    def __init__(self, plan: StagePlan, teacher: Backbone, folder: Path):
        stage = ready_stage(plan, teacher)
        self.engine, self.loader = build_engine(plan, stage), build_train_loader(plan)
        self.batches = iter(self.loader)
        self.writer = MetricWriter(folder, "trainer", plan.config.steps)
        evaluator = partial(Evaluator, stage.student, plan.task)
        kept = Checkpoints(folder, self.engine)
        self.trainer = Trainer(self.engine, plan.config, lambda _: self.loader, {}, evaluator, self.writer, kept)

    def seconds(self, steps: int) -> float:
        """How long ``steps`` take."""
        started = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.batches)
            if self.trainer.step % self.trainer.config.log_every == 0:
                self._log()
        if self.trainer.has_unread_steps:
            self._log()
        return time.perf_counter() - started

    def _log(self) -> None:
        self.writer.write("train", self.trainer.step, self.trainer.read_steps(self.loader))

    def close(self) -> None:
        self.batches.close()
        self.writer.close()
        self.engine.close()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")

    def add(measure: Callable[..., list[Row]]) -> Callable[..., argparse.Action]:
        command = commands.add_parser(measure.__name__, help=measure.__doc__.partition("\n")[0], allow_abbrev=False)
        command.set_defaults(measure=measure)
        command.add_argument("--recipe", default="tiny")
        command.add_argument("--out", type=Path, default=Path("runs/throughput"), help="folder (runs/throughput)")
        if measure is not scaling:
            command.add_argument("--stage", type=int, choices=[1, 2, 3], default=2, help="its step and data (2)")
        return command.add_argument

    option = add(scaling)
    option("--ranks", type=int, nargs="+", help="numbers of ranks (1, 2, 4, ... up to GPUs or cores)")
    option("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    option("--steps", type=int, default=30, help="optimizer steps of each run (30)")
    option("--grow", action="store_true", help="let the global batch grow with the ranks")
    option = add(loader)
    option("--workers", type=int, nargs="+", default=[0, 1, 2])
    option("--seconds", type=float, default=10, help="of streaming for each number of workers (10)")
    option("--run", type=Path, help="folder of a run whose consumption is compared")
    option = add(overhead)
    option("--rounds", type=int, default=5)
    option("--steps", type=int, default=10, help="of each side in each round (10)")
    return parser


def write_table(out: Path, name: str, rows: Sequence[Row], conditions: Mapping[str, Any]) -> None:
    """Writes rows of equal keys as NAME.json and, as a table, NAME.md, and prints the table."""
    cells = [
        [f"{v:.4g}" if isinstance(v, float) else "-" if v is None else str(v) for v in row.values()] for row in rows
    ]
    lines = [list(rows[0]), ["---:"] * len(rows[0]), *cells]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", {"conditions": dict(conditions), "rows": rows})
    write_whole(out / f"{name}.md", table)
    print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    options, overrides = build_parser().parse_known_args(arguments)
    options.recipe = resolved_recipe(options.recipe)
    try:
        rows = options.measure(options, overrides)
    except (ValueError, OSError) as error:
        report_error(error)
        return 2
    conditions = {key: value for key, value in vars(options).items() if key not in ("measure", "out", "run")}
    conditions["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    conditions |= {"cores": CORES, "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_table(options.out, options.command, rows, {**conditions, "overrides": overrides})
    return int(any(row.get("error") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
