"""A run's report: one table, as text and JSON, and one picture of loss curves and scores."""

from dataclasses import asdict, dataclass, field
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from adala.files import read_json, write_json
from adala.metrics import held_out_splits, read_metrics
from adala.runs import RunFolder

STAGE_TITLES = {1: "Stage 1: attention alignment", 2: "Stage 2: feature alignment", 3: "Stage 3: fine-tuning"}


@dataclass(frozen=True)
class Scores:
    """One model's scores on one held-out set.

    Attributes:
        score: By the task's metric; of a probe on frozen features, after Stage 3 of the fine-tuned head. None without
            targets, or where the task knows no probe.
        feature_cosine: Mean cosine of its final features to the teacher's, over all tokens.
    """

    score: float | None
    feature_cosine: float


@dataclass(frozen=True)
class ReportRow:
    """One model's scores on the held-out data.

    Attributes:
        model: Which one.
        score: See :class:`Scores`; of several held-out sets on the first.
        feature_cosine: Likewise.
        sets: Scores by the name of the held-out set, where sets have names.
    """

    model: str
    score: float | None
    feature_cosine: float
    sets: dict[str, Scores] = field(default_factory=dict)

    def by_set(self) -> dict[str, Scores]:
        """By the name of the set, which is empty where it has none."""
        return self.sets or {"": Scores(self.score, self.feature_cosine)}


@dataclass(frozen=True)
class Report:
    """A run's scores.

    Attributes:
        rows: One a model.
        score: Name of the task's metric.
        score_title: The same for people, with its unit.
        identity: Digests and conditions of what was scored: a report of other students than those there is stale.
        unusable_samples: Held-out samples that could not be used, and are left out of all rows alike.
    """

    rows: list[ReportRow]
    score: str
    score_title: str
    identity: dict[str, Any]
    unusable_samples: int = 0


def write_report(run: RunFolder, report: Report) -> None:
    """Writes ``report.json``: ``{"rows": [{"model", "top1", "feature_cosine"}, ...], "score": "top1", ...}``, where the
    score goes by the name of the task's metric. Where held-out sets have names, a row has ``"sets": {"photos": {"top1",
    "feature_cosine"}, ...}``, too."""
    rows = []
    for row in report.rows:
        first = _scores_to_json(Scores(row.score, row.feature_cosine), report.score)
        named = {name: _scores_to_json(scores, report.score) for name, scores in row.sets.items()}
        rows.append({"model": row.model, **first, **({"sets": named} if named else {})})
    write_json(run.report, {**asdict(report), "rows": rows})


def _scores_to_json(scores: Scores, score: str) -> dict[str, float | None]:
    return {score: _rounded(scores.score, 2), "feature_cosine": _rounded(scores.feature_cosine, 5)}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def read_report(run: RunFolder) -> Report | None:
    """The run's report; None where there is none, or one that cannot be read: it can be made again."""
    try:
        stored = read_json(run.report)
        if stored is None:
            return None
        rows, score = [], stored["score"]
        for row in stored.pop("rows"):
            named = {name: Scores(one[score], one["feature_cosine"]) for name, one in row.get("sets", {}).items()}
            rows.append(ReportRow(row["model"], row[score], row["feature_cosine"], named))
        return Report(rows, **stored)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def print_report(report: Report, title: str) -> None:
    """Prints the rows as one table, with two columns for each held-out set."""
    table = Table(title=title)
    table.add_column("model")
    names = list(report.rows[0].by_set())
    for name in names:
        table.add_column(_titled(name, report.score_title), justify="right")
        table.add_column(_titled(name, "feature cosine"), justify="right")
    for row in report.rows:
        cells = []
        for scores in row.by_set().values():
            cells += ["-" if scores.score is None else f"{scores.score:.2f}", f"{scores.feature_cosine:.4f}"]
        table.add_row(row.model, *cells)
    Console(width=48 + 24 * len(names)).print(table)


def _titled(name: str, title: str) -> str:
    """A title of what was measured on a held-out set, which may have a name."""
    return f"{name}: {title}" if name else title


def draw_report(run: RunFolder, report: Report | None) -> None:
    """Draws each stage's loss over its steps, training and held-out, and the rows' scores where there are any; of each
    held-out set by itself."""
    rows = report.rows if report else []
    sets = list(rows[0].by_set()) if rows else []
    stages = [number for number in STAGE_TITLES if read_metrics(run.stage(number).path, "train")]
    panels = len(stages) + 2 * len(sets)
    figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, number in zip(axes, stages, strict=False):
        for split in ("train", *held_out_splits(run.stage(number).path)):
            # Of a step that was left out there may be none.
            metrics = [row for row in read_metrics(run.stage(number).path, split) if "loss" in row]
            style = "-" if split == "train" else "o--"
            axis.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], style, label=split, markersize=4)
        axis.set(title=STAGE_TITLES[number], xlabel="optimizer step", ylabel="loss")
        if any(value > 0 for line in axis.lines for value in line.get_ydata()):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    names = [row.model for row in rows]
    for number, name in enumerate(sets):
        scored, compared = axes[len(stages) + 2 * number :][:2]
        found = [row.by_set()[name] for row in rows]
        _draw_bars(scored, names, [one.score or 0.0 for one in found], _titled(name, report.score_title), "{:.1f}")
        title = _titled(name, "feature cosine to the teacher")
        _draw_bars(compared, names, [one.feature_cosine for one in found], title, "{:.3f}")
    run.path.mkdir(parents=True, exist_ok=True)
    partial = run.picture.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(run.picture)


def _draw_bars(axis, names: list[str], values: list[float], title: str, form: str) -> None:
    bars = axis.barh(names[::-1], values[::-1], color="#4878a8")
    axis.bar_label(bars, [form.format(value) for value in values[::-1]], padding=3)
    axis.set(title=title, xlim=(min(0.0, *values), max(values) * 1.2))
