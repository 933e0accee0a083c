"""Trains the runs that rows are of, through the training command, and keeps what that took."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from command import resolved_recipe, run_training
from student_table import Row, StudentTable

from adala.config import Recipe, load_recipe
from adala.conversion import STAGE_NAMES
from adala.distributed import say
from adala.files import read_json, write_json
from adala.machine import machine_description
from adala.plan import MAY_CHANGE, conversion_of, under_conversion
from adala.runs import RunFolder

# Every start of the training command in a run's folder, with its time.
TRAINING = "training.json"
# They say where a run lies and what it says, not what it is.
NO_CONDITION = ("run_name", "runs_dir", "tensorboard", "hang_minutes", "over_conversion", "evaluation")


def default_ranks() -> int:
    """A rank for each GPU, else for each core."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def train(table: StudentTable, row: Row, ranks: int) -> None:
    """Trains the stages of a row's run that are not finished under its recipe.

    Raises:
        ValueError: See :meth:`StudentTable.resolve`.
        TrainingFailed: A stage did, or was finished under another recipe or on other data; the message is its own.
    """
    recipe, run = table.resolve(row), table.run(row)
    if not row.is_trained:
        say(f"{row.name}: there is nothing to train")
        return
    is_behind = False
    for number in row.stages:
        # A later stage may be stale by an earlier one, which the command finds out.
        if not is_behind and is_finished(row, run, number, recipe):
            say(f"{row.name}: stage {number} is finished")
            continue
        is_behind = True
        say(f"{row.name}: training stage {number} on {ranks} ranks")
        _train_stage(table, row, number, ranks)


def _train_stage(table: StudentTable, row: Row, number: int, ranks: int) -> None:
    """One start of the training command, whose time is kept whether it ends well or not."""
    recipe, *options = table.arguments(row)[1:]
    arguments = ["--recipe", resolved_recipe(recipe), "--stage", str(number), *options]
    path, started = table.run(row).path / TRAINING, time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = {"stage": number, "ranks": ranks, "machine": machine_description(), "ended": "before its end"}
    try:
        run_training(arguments, ranks, {"OMP_NUM_THREADS": "1"})
        attempt["ended"] = "well"
    finally:
        attempt["seconds"] = time.monotonic() - started
        write_json(path, [*attempts(table.run(row)), attempt])


def attempts(run: RunFolder) -> list[dict[str, Any]]:
    """Every start of the training command in a run: its stage, ranks, machine, seconds, and how it ended."""
    return read_json(run.path / TRAINING) or []


def is_finished(row: Row, run: RunFolder, number: int, recipe: Recipe) -> bool:
    """Whether a stage was finished under this very recipe."""
    return run.stage(number).record() is not None and not _changed_since(row, run, number, recipe)


def _changed_since(row: Row, run: RunFolder, number: int, recipe: Recipe) -> list[str]:
    """The keys by which a stage was trained otherwise than its row says now."""
    before = load_recipe(str(run.stage(number).config))
    return changed_keys(*(conditions(each, row.stages_until(number)) for each in (before, recipe)))


def conditions(recipe: Recipe, stages: Sequence[int]) -> dict[str, Any]:
    """By dotted key what decides the student after ``stages``, as the recipe's conversion has it."""
    recipe = under_conversion(recipe, conversion_of(recipe))[0]
    values = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in NO_CONDITION}
    sections = [key for key, value in values.items() if dataclasses.is_dataclass(getattr(recipe, key))]
    counted = [name for name in sections if not name.startswith("stage") or int(name[-1]) in stages]
    below = {f"{name}.{key}": value for name in counted for key, value in values[name].items() if key not in MAY_CHANGE}
    return {key: value for key, value in values.items() if key not in sections} | below


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys by which a recipe that was stored differs from one of today; a key that is new since then means what it
    meant where it has its default."""
    defaults = conditions(Recipe(), STAGE_NAMES)
    old = {key: before.get(key, defaults.get(key)) for key in [*now, *before]}
    return [key for key, value in old.items() if now.get(key, defaults.get(key)) != value]


def folder_of(table: StudentTable, row: Row) -> Path:
    """Where a row's student lies.

    Raises:
        ValueError: It is not trained, or not under the row's recipe.
    """
    recipe, run = table.resolve(row), table.run(row)
    stage = run.stage(row.stage)
    if stage.record() is None:
        raise ValueError(f"row {row.name} is not trained: run `python bench/students.py train {row.name}` first")
    if changed := _changed_since(row, run, row.stage, recipe):
        raise ValueError(
            f"the student of row {row.name} in {stage.path} was trained under another {changed[0]}: move that folder "
            f"away and run `python bench/students.py train {row.name}`"
        )
    return stage.path
