"""The rows of the page of results, as ``students.yaml`` lists them: what is trained, and on what all are scored."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from adala.config import Recipe, StageConfig, load_recipe
from adala.conversion import STAGE_NAMES
from adala.plan import conversion_of
from adala.runs import RunFolder

TABLE = Path(__file__).with_name("students.yaml")
TEACHER, LINEARIZED = "teacher", "linearized"
SPLITS = ("val", "test")
# Of a budget's pixels, where views are fewer: steps are whole ones.
NEARLY = 0.98

Options = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What a training may take, and has to: as many views, or as many pixels in fewer and larger ones.

    Attributes:
        views: Of training images, over all stages.
        megapixels: Of these views together, as the model sees them, in units of 1,000,000.
        options: Of the recipe, by which the stages have so many.
    """

    views: int
    megapixels: float
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the tables: a model, and the run that it is of.

    Attributes:
        name: ``BUDGET-KEY-sSEED``, or the key alone where nothing is trained.
        label: For people.
        group: Heading that it stands under.
        recipe: Name or path.
        student: ``teacher``, ``linearized`` or ``stageN``.
        stages: Numbers of those that its run is trained in.
        budget: Its name; None where nothing is trained.
        seed: Of the run.
        run: Its name.
        options: Of the recipe, beside its own values.
        budget_of_run: What its run may take; None where nothing is trained.
        large: Whether it is measured at the large sizes, too.
        pictures: Whether features and masks are drawn of it.
        drawn: Whether its curve and its errors by block are among those that are drawn.
        note: What the page says about it.
    """

    name: str
    label: str
    group: str
    recipe: str
    student: str
    stages: tuple[int, ...]
    budget: str | None
    seed: int
    run: str
    options: Options
    budget_of_run: Budget | None
    large: bool
    pictures: bool
    drawn: bool
    note: str

    @property
    def title(self) -> str:
        """The label with what tells it from rows of the same one."""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.label} ({self.budget}{seed})" if self.is_trained else self.label

    @property
    def is_trained(self) -> bool:
        return self.budget is not None

    @property
    def stage(self) -> int | None:
        """The stage whose student it is."""
        return int(self.student.removeprefix("stage")) if self.is_trained else None

    def stages_until(self, number: int | None) -> tuple[int, ...]:
        """Those of its run up to one, that included."""
        return tuple(each for each in self.stages if number is not None and each <= number)


@dataclass(frozen=True)
class EvaluationSet:
    """Samples that rows are scored on, and what is measured there.

    Attributes:
        image_size: Height and width in pixels.
        protocol: Keys of the protocol and their values.
        task: Of its targets, as a recipe has it; None without targets.
        folder: Of its shards; the set's name by default.
        options: Of the recipe.
        large: Whether only rows marked so are scored on it.
        pictures: Whether pictures of marked rows are drawn of it.
    """

    image_size: list[int]
    protocol: Options
    task: Options | None = None
    folder: str = ""
    options: Options = field(default_factory=dict)
    large: bool = False
    pictures: bool = False


@dataclass(frozen=True)
class StudentTable:
    """The whole file.

    Attributes:
        rows: By name, in its order.
        sets: By name.
        runs_dir: Where runs and evaluations lie.
        shards: Pattern of addresses with ``{set}`` and ``{split}``.
        evaluation: Options of the recipe in every evaluation.
        protocol: Options of the protocol in every evaluation.
    """

    rows: dict[str, Row]
    sets: dict[str, EvaluationSet]
    runs_dir: str
    shards: str
    evaluation: Options
    protocol: Options

    def chosen(self, patterns: Sequence[str]) -> list[Row]:
        """The rows that patterns of names (``short-*``) stand for, each once.

        Raises:
            ValueError: A pattern that no row matches.
        """
        found: dict[str, Row] = {}
        for pattern in patterns:
            matching = {name: row for name, row in self.rows.items() if fnmatchcase(name, pattern)}
            if not matching:
                raise ValueError(f"there is no row {pattern}: `python bench/students.py list` prints those there are")
            found |= matching
        return list(found.values())

    def arguments(self, row: Row) -> list[str]:
        """Of the training command, but for the stage."""
        own = {**row.options, "seed": row.seed, "run_name": row.run, "runs_dir": self.runs_dir}
        return ["--recipe", row.recipe, *as_arguments(own)]

    def resolve(self, row: Row) -> Recipe:
        """The recipe of a row's run.

        Raises:
            ValueError: A recipe or a value that there is not, or another number of views than the budget's.
        """
        try:
            recipe = load_recipe(row.recipe, self.arguments(row)[2:])
            if row.is_trained:
                _check_stages(row, recipe)
        except ValueError as error:
            raise ValueError(f"row {row.name}: {error}") from error
        return recipe

    def run(self, row: Row) -> RunFolder:
        return RunFolder(Path(self.runs_dir).expanduser() / row.run)

    def sets_of(self, row: Row) -> dict[str, EvaluationSet]:
        """Those that a row is scored on."""
        return {name: one for name, one in self.sets.items() if row.large or not one.large}


def _check_stages(row: Row, recipe: Recipe) -> None:
    conversion = conversion_of(recipe)
    for number in row.stages:
        if conversion.step(STAGE_NAMES[number]) is None:
            raise ValueError(f"its {conversion.name} conversion has no stage {number}: leave it out")
    views, budget = sum(views_by_stage(row, recipe).values()), row.budget_of_run
    megapixels = sum(megapixels_by_stage(row, recipe).values())
    # Sums of products round.
    if views > budget.views or megapixels > budget.megapixels * (1 + 1e-9):
        raise ValueError(f"its stages see {_amount(views, megapixels)}, {_more_than(row)}: set their steps or sizes")
    if views < budget.views and megapixels < NEARLY * budget.megapixels:
        raise ValueError(
            f"its stages see {_amount(views, megapixels)}, {_more_than(row)}: set their steps or sizes, so that one of "
            "both is used up"
        )


def _amount(views: int, megapixels: float) -> str:
    return f"{views} views of {megapixels:.5g} megapixels together"


def _more_than(row: Row) -> str:
    return f"and the budget {row.budget} has {_amount(row.budget_of_run.views, row.budget_of_run.megapixels)}"


def views_by_stage(row: Row, recipe: Recipe) -> dict[int, int]:
    """Training images that each stage of a row's run sees."""
    return {number: recipe.stage(number).steps * recipe.stage(number).global_batch_size for number in row.stages}


def megapixels_by_stage(row: Row, recipe: Recipe) -> dict[int, float]:
    """What the training images of each stage are together, as the model sees them, in units of 1,000,000 pixels."""
    return {number: _megapixels(recipe, recipe.stage(number)) for number in row.stages}


def _megapixels(recipe: Recipe, stage: StageConfig) -> float:
    sizes = {0: stage.image_size or recipe.data.image_size}
    sizes |= {change["from_step"]: change["image_size"] for change in stage.image_sizes}
    begins = [*sorted(sizes), stage.steps]
    pixels = sum((end - begin) * math.prod(sizes[begin]) for begin, end in pairwise(begins))
    return stage.global_batch_size * pixels / 1e6


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them; JSON is YAML."""
    pairs = [(f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in options.items()]
    return [text for pair in pairs for text in pair]


def read_table(path: Path = TABLE) -> StudentTable:
    """Reads a table.

    Raises:
        ValueError: It is not as :class:`StudentTable` has it; the message names the row.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    known = ("recipe", "runs_dir", "shards", "options", "budgets", "rows", "evaluation")
    _check_keys(str(path), values, known, required=known)
    evaluation = values["evaluation"]
    _check_keys(f"{path}: evaluation", evaluation, ("options", "protocol", "sets"), required=("sets",))
    budgets = {name: _build(f"{path}: budget {name}", Budget, of) for name, of in values["budgets"].items()}
    sets = {name: _build(f"{path}: set {name}", EvaluationSet, of) for name, of in evaluation["sets"].items()}
    rows: dict[str, Row] = {}
    for key in values["rows"]:
        rows |= _read_rows(key, values, budgets)
    titles = [row.title for row in rows.values()]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"{path}: two rows are called {twice[0]}: give each a label of its own")
    return StudentTable(
        rows,
        {name: dataclasses.replace(one, folder=one.folder or name) for name, one in sets.items()},
        values["runs_dir"],
        values["shards"],
        evaluation.get("options", {}),
        evaluation.get("protocol", {}),
    )


# Beside what :class:`Row` says: ``run`` is the row whose run this one is of, ``with`` are options over those that a row
# has from another by YAML's merge, ``by_budget`` further ones by the budget's name.
ROW_KEYS = (
    *("group", "label", "recipe", "run", "student", "stages", "budgets", "seeds", "options", "with", "by_budget"),
    *("large", "pictures", "drawn", "note"),
)


def _read_rows(key: str, values: Mapping[str, Any], budgets: Mapping[str, Budget]) -> dict[str, Row]:
    """One line of the file, which is a row for each of its budgets and seeds."""
    own, where = values["rows"][key], f"row {key}"
    _check_keys(where, own, ROW_KEYS, required=("group", "label"))
    of_run = own.get("run", key)
    if of_run not in values["rows"]:
        raise ValueError(f"{where}: there is no row {of_run} whose run it could be of")
    # What is trained stands in the row that a run is named after.
    trained = values["rows"][of_run]
    stages = tuple(trained.get("stages", (1, 2)))
    student = own.get("student", f"stage{stages[-1]}")
    shared = {
        "label": own["label"],
        "group": own["group"],
        "recipe": trained.get("recipe", values["recipe"]),
        "student": student,
        "large": own.get("large", False),
        "pictures": own.get("pictures", False),
        "drawn": own.get("drawn", False),
        "note": own.get("note", ""),
    }
    options = {**trained.get("options", {}), **trained.get("with", {})}
    if student in (TEACHER, LINEARIZED):
        untrained = {"stages": (), "budget": None, "seed": 0, "run": key, "budget_of_run": None}
        return {key: Row(name=key, options={**values["options"], **options}, **untrained, **shared)}
    if student not in [f"stage{number}" for number in stages]:
        raise ValueError(f"{where}: student is {student}, and its run has stages {', '.join(map(str, stages))}")
    rows, by_budget = {}, trained.get("by_budget", {})
    for budget in own.get("budgets", ["short"]):
        if budget not in budgets:
            raise ValueError(f"{where}: there is no budget {budget}, only {', '.join(budgets)}")
        for seed in own.get("seeds", [0]):
            name = f"{budget}-{key}-s{seed}"
            rows[name] = Row(
                name=name,
                stages=stages,
                budget=budget,
                seed=seed,
                run=f"{budget}-{of_run}-s{seed}",
                options={**values["options"], **budgets[budget].options, **options, **by_budget.get(budget, {})},
                budget_of_run=budgets[budget],
                **shared,
            )
    return rows


def _build(where: str, built: type, values: Any) -> Any:
    fields = dataclasses.fields(built)
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    _check_keys(where, values, [f.name for f in fields], required)
    return built(**values)


def _check_keys(where: str, values: Any, known: Sequence[str], required: Sequence[str]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping with {', '.join(known)}")
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {key} is unknown; there are {', '.join(known)}")
    for key in required:
        if key not in values:
            raise ValueError(f"{where}: {key} is missing")
