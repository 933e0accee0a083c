"""Training images/s of the three stages on 1, 2, 4, ... ranks of one machine, and the efficiency of each.

python bench/scaling.py --ranks 1 2 4 8 --recipe dinov2_large --steps 40 --out runs/scaling

Every run goes through the deepspeed launcher like any other. The rate is the median of what the trainer logs, without
the first third of the steps. With ``--grow`` the global batch grows with the ranks (weak scaling), else it stays.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from command import TrainingFailed, resolved_recipe, run_training

from adala.config import Recipe, load_recipe
from adala.metrics import read_metrics


@dataclass
class ScalingRow:
    """One stage on so many ranks.

    Attributes:
        stage: 1, 2 or 3.
        ranks: Processes, one a GPU where there are GPUs.
        global_batch_size: Samples per optimizer step over all ranks.
        images_per_s: Over all ranks, median over the timed steps.
        efficiency: Rate per rank over that of the smallest number of ranks.
        error: One sentence, where the run failed.
    """

    stage: int
    ranks: int
    global_batch_size: int
    images_per_s: float | None = None
    efficiency: float | None = None
    error: str | None = None


def steady_rate(metrics: Sequence[Mapping[str, float]]) -> float:
    """Median images/s of a stage's training lines without the first third, in which everything is set up.

    Raises:
        ValueError: There are no lines.
    """
    rates = [line["images_per_s"] for line in metrics]
    if not rates:
        raise ValueError("the run logged no training step")
    return median(rates[len(rates) // 3 :])


def fill_in_efficiency(rows: Sequence[ScalingRow]) -> None:
    """Sets each row's efficiency against the row of its stage with the fewest ranks."""
    for row in rows:
        measured = [r for r in rows if r.stage == row.stage and r.images_per_s is not None]
        if row.images_per_s is not None:
            base = min(measured, key=lambda r: r.ranks)
            row.efficiency = (row.images_per_s / row.ranks) / (base.images_per_s / base.ranks)


def train(row: ScalingRow, recipe_name: str, steps: int, folder: Path, threads: int | None) -> None:
    """Runs one stage and fills in its rate, or its error."""
    run_name = f"stage{row.stage}-{row.ranks}-ranks"
    arguments = ["--recipe", recipe_name, "--stage", str(row.stage), "--overwrite"]
    arguments += ["--runs_dir", str(folder), "--run_name", run_name, "--tensorboard", "false"]
    arguments += [f"--stage{row.stage}.steps", str(steps), f"--stage{row.stage}.log_every", "1"]
    arguments += [f"--stage{row.stage}.global_batch_size", str(row.global_batch_size)]
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    try:
        run_training(arguments, row.ranks, environment)
        row.images_per_s = steady_rate(read_metrics(folder / run_name / f"stage{row.stage}", "train"))
    except (TrainingFailed, ValueError, KeyError, OSError) as error:
        row.error = f"{type(error).__name__}: {error}"


def plan(recipe: Recipe, ranks: Sequence[int], stages: Sequence[int], grow: bool) -> list[ScalingRow]:
    """The rows to fill, each stage on each number of ranks.

    Raises:
        ValueError: A fixed global batch that does not divide over the ranks.
    """
    rows = []
    for stage in stages:
        batch = recipe.stage(stage).global_batch_size
        for count in ranks:
            own = batch * count // min(ranks) if grow else batch
            if own % count:
                raise ValueError(f"stage{stage}.global_batch_size {own} does not divide over {count} ranks")
            rows.append(ScalingRow(stage, count, own))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (1, 2, 4, ... up to GPUs or cores)")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run (30)")
    parser.add_argument("--grow", action="store_true", help="let the global batch grow with the ranks")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder (runs/scaling)")
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = torch.cuda.device_count() or cores
    ranks = sorted(set(options.ranks or [2**i for i in range(most.bit_length()) if 2**i <= most]))
    # As many threads for a rank whatever their number: else one rank would have all cores and could not be beaten.
    threads = None if torch.cuda.is_available() else max(1, cores // max(ranks))
    try:
        recipe = resolved_recipe(options.recipe)
        rows = plan(load_recipe(recipe), ranks, options.stages, options.grow)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        train(row, recipe, options.steps, options.out.resolve(), threads)
        print(f"stage {row.stage}, {row.ranks} ranks: {row.error or f'{row.images_per_s:.1f} images/s'}", flush=True)
    fill_in_efficiency(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    conditions = {
        "recipe": Path(options.recipe).stem,
        "steps": options.steps,
        "threads_per_rank": threads,
        "grow": options.grow,
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {"conditions": conditions | {"device": device}, "rows": [asdict(row) for row in rows]}
    (options.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "scaling.md").write_text(table(rows))
    print(table(rows))
    return int(any(row.error is not None for row in rows))


def table(rows: Sequence[ScalingRow]) -> str:
    lines = ["| stage | ranks | global batch | images/s | efficiency |", "| ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        rate = row.error or f"{row.images_per_s:.1f}"
        share = "-" if row.efficiency is None else f"{100 * row.efficiency:.0f} %"
        lines.append(f"| {row.stage} | {row.ranks} | {row.global_batch_size} | {rate} | {share} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
