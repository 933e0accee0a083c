"""Scores a row against its teacher by the evaluation command, set after set, and puts together what is kept of it."""

import shlex
import time
from pathlib import Path
from typing import Any

from cost import measure_model_cost
from student_results import (
    Cost,
    RowResult,
    append_tried,
    read_result,
    results_folder,
    without_home,
    write_result,
)
from student_table import (
    LINEARIZED,
    TEACHER,
    EvaluationSet,
    Row,
    StudentTable,
    as_arguments,
    megapixels_by_stage,
    views_by_stage,
)
from student_training import attempts, conditions, folder_of

from adala.build import build_teacher
from adala.config import Recipe
from adala.contenders import Contender, build_teacher_contender, linearize_contender, load_contender
from adala.distributed import say
from adala.evaluate import run_evaluation
from adala.evaluation_command import parse_evaluation
from adala.evaluation_report import EvaluationDocument, read_document
from adala.families import Backbone
from adala.files import read_json, value_digest, write_json, write_whole
from adala.machine import machine_description, now
from adala.metrics import held_out_splits, read_metrics
from adala.plan import ModelPlan, index_digest, resolve_run

PICTURES = ("features", "masks")


def evaluate(table: StudentTable, row: Row, split: str, docs: Path, again: bool = False) -> None:
    """Scores a row on ``split`` and writes it down, unless that has been done already.

    On ``test`` its file is one that the page is made of; on ``val`` it stays with the runs, and a line is added to what
    was tried.

    Args:
        table: The rows.
        row: Which one.
        split: ``val`` or ``test``.
        docs: Folder of the page.
        again: Scores it once more, although nothing has changed.

    Raises:
        ValueError: The row is not trained under its recipe, or data or models cannot be used.
    """
    recipe, student = table.resolve(row), folder_of(table, row) if row.is_trained else None
    commands = {name: _arguments(table, row, name, split) for name in table.sets_of(row)}
    plan = resolve_run(parse_evaluation(next(iter(commands.values()))).recipe, ()).model
    contender = _contender(row, student, plan)
    keys = {name: _key(contender, arguments) for name, arguments in commands.items()}
    path = (results_folder(docs) if split == "test" else Path(table.runs_dir).expanduser() / "val") / f"{row.name}.json"
    before = read_result(path)
    if before is not None and before.identity == value_digest(keys) and not again:
        say(f"{row.name}: scored on {split} already, {before.looks[-1]}")
        return
    folder = Path(table.runs_dir).expanduser() / "evaluations" / row.name
    looks = [*(before.looks if before else ()), now()]
    # Of an evaluation that was cut off, the sets that were through are taken as they are; of one that is asked for
    # once more nothing.
    made_by = value_digest([keys, machine_description()["commit"], len(looks)])[7:23]
    documents, seconds = {}, {}
    for name, arguments in commands.items():
        place = folder / f"{split}-{made_by}" / name
        documents[name], seconds[name] = _measure(place, arguments, f"{row.name} on {name}, {split}")
        if row.pictures and split == "test" and table.sets[name].pictures:
            _keep_pictures(place, docs, row, name)
    result = RowResult(
        name=row.name,
        split=split,
        recipe=row.recipe,
        options=row.options,
        conditions=conditions(recipe, row.stages_until(row.stage)),
        seed=row.seed,
        weights=contender.identity["weights"],
        views=_until(row, views_by_stage(row, recipe)),
        megapixels=_until(row, megapixels_by_stage(row, recipe)),
        training=[each for each in attempts(table.run(row)) if each["stage"] in row.stages_until(row.stage)],
        commands=[_training_command(table, row, number) for number in row.stages_until(row.stage)],
        curve={str(n): _curve(table, row, n, recipe) for n in row.stages_until(row.stage)},
        costs=_costs(table, row, contender.model, plan),
        documents=documents,
        evaluation_seconds=seconds,
        identity=value_digest(keys),
        looks=looks,
    )
    write_result(path, result)
    if split == "val":
        append_tried(docs, tried(result))
    say(f"{row.name}: wrote {path}, after {sum(seconds.values()):.0f} s of evaluation")


def _until(row: Row, by_stage: dict[int, Any]) -> dict[str, Any]:
    """What a row's student has had, by stage."""
    return {str(number): value for number, value in by_stage.items() if number in row.stages_until(row.stage)}


def tried(result: RowResult) -> dict[str, Any]:
    """A line of what was tried on val."""
    machine = next(iter(result.documents.values())).machine
    return {
        "name": result.name,
        "recipe": result.recipe,
        "options": result.options,
        "seed": result.seed,
        "views": sum(result.views.values()),
        "megapixels": sum(result.megapixels.values()),
        "val": {of_set: result.measures(of_set) for of_set in result.documents},
        "date": result.looks[-1],
        "commit": machine["commit"],
        "weights": result.weights,
    }


def _contender(row: Row, student: Path | None, plan: ModelPlan) -> Contender:
    if student is not None:
        return load_contender(student, with_head=False)
    teacher = build_teacher_contender(plan)
    return teacher if row.student == TEACHER else linearize_contender(plan, teacher)


def _arguments(table: StudentTable, row: Row, name: str, split: str) -> list[str]:
    """Of the evaluation command, but for where results lie."""
    of_set = table.sets[name]
    # A trained student is what it is; how it was made would only be in the way of other data and tasks.
    options: dict[str, Any] = {} if row.is_trained else dict(row.options)
    options |= {**table.evaluation, **of_set.options, "data.image_size": of_set.image_size}
    options |= {"data.val": [_shards(table, of_set, split)], "runs_dir": table.runs_dir}
    if of_set.task is not None:
        options |= {"evaluation.probe_train": [_shards(table, of_set, "train")], "stage3.task": of_set.task}
    options |= table.protocol | {f"protocol.{key}": value for key, value in of_set.protocol.items()}
    models = {TEACHER: [], LINEARIZED: [LINEARIZED]}.get(row.student)
    models = [str(table.run(row).stage(row.stage).path)] if models is None else models
    pictures = ["--pictures"] if row.pictures and split == "test" and of_set.pictures else []
    named = ["--models", *models] if models else []
    return ["--recipe", row.recipe, *as_arguments(options), *pictures, *named]


def _shards(table: StudentTable, of_set: EvaluationSet, split: str) -> str:
    return table.shards.format(set=of_set.folder, split=split)


def _key(contender: Contender, arguments: list[str]) -> str:
    """What a set's numbers depend on: student, samples, and how these are scored."""
    plan = resolve_run(parse_evaluation(arguments).recipe, ())
    fitted_on = plan.evaluation.probe_train
    data = [index_digest(index, labelled=True) for index in plan.evaluation.held_out_sets.values()]
    data += [index_digest(fitted_on, labelled=True)] if fitted_on is not None else []
    return value_digest([contender.identity, data, arguments])


def _measure(place: Path, arguments: list[str], title: str) -> tuple[EvaluationDocument, float]:
    """What the evaluation command finds, and how long it took: computed once for a ``place``."""
    timed = place / "seconds.json"
    if not timed.is_file():
        say(title)
        started = time.monotonic()
        run_evaluation(parse_evaluation([*arguments, "--out", str(place)]))
        write_json(timed, time.monotonic() - started)
    return read_document(place / "evaluation.json"), read_json(timed)


def _keep_pictures(place: Path, docs: Path, row: Row, of_set: str) -> None:
    for picture in PICTURES:
        if (drawn := place / f"{picture}.png").is_file():
            kept = picture_path(docs, row.name, of_set, picture)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, drawn.read_bytes())


def picture_path(docs: Path, row: str, of_set: str, picture: str) -> Path:
    """Where a picture of a row lies beside the page."""
    return docs / "students" / f"{row}-{of_set}-{picture}.png"


def _training_command(table: StudentTable, row: Row, number: int) -> str:
    command = ["deepspeed", "launchers/train.py", "--stage", str(number), *table.arguments(row)]
    return without_home(shlex.join(command))


def _curve(table: StudentTable, row: Row, number: int, recipe: Recipe) -> list[dict[str, Any]]:
    """What the run measured on held-out samples while a stage trained."""
    views, folder = views_by_stage(row, recipe), table.run(row).stage(number).path
    before = sum(views[earlier] for earlier in row.stages if earlier < number)
    batch = recipe.stage(number).global_batch_size
    rows = [measured for split in held_out_splits(folder) for measured in read_metrics(folder, split)]
    return [{"views": before + measured["step"] * batch, **measured} for measured in rows]


def _costs(table: StudentTable, row: Row, student: Backbone, plan: ModelPlan) -> dict[str, dict[str, Cost]]:
    """At each size that the row is timed at; the student goes to the meta device for it."""
    timed = [one for one in table.sets_of(row).values() if "speed" in one.protocol["measures"]]
    models = {"student": student.to("meta"), "teacher": build_teacher(plan.teacher).to("meta")}
    costs = {}
    for size in (tuple(one.image_size) for one in timed):
        found = {who: measure_model_cost(model, size) for who, model in models.items()}
        costs[str(size[0])] = {who: Cost(one.tokens, one.parameters, one.macs) for who, one in found.items()}
    return costs
