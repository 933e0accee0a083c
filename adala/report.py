"""A run's report: one table, as text and JSON, and one picture of loss curves and scores."""

from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from adala.files import read_json, write_json
from adala.metrics import read_metrics
from adala.runs import RunFolder

STAGE_TITLES = {1: "Stage 1: attention alignment", 2: "Stage 2: feature alignment", 3: "Stage 3: fine-tuning"}


@dataclass(frozen=True)
class ReportRow:
    """One model's scores on the held-out split.

    Attributes:
        model: Which one.
        score: By the task's metric; of a probe on frozen features, after Stage 3 of the fine-tuned head. None without
            targets, or where the task knows no probe.
        feature_cosine: Mean cosine of its final features to the teacher's, over all tokens.
    """

    model: str
    score: float | None
    feature_cosine: float


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
    score goes by the name of the task's metric."""
    rows = [
        {"model": row.model, report.score: _rounded(row.score, 2), "feature_cosine": _rounded(row.feature_cosine, 5)}
        for row in report.rows
    ]
    write_json(run.report, {**asdict(report), "rows": rows})


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def read_report(run: RunFolder) -> Report | None:
    """The run's report; None where there is none, or one that cannot be read: it can be made again."""
    try:
        stored = read_json(run.report)
        if stored is None:
            return None
        rows, score = stored.pop("rows"), stored["score"]
        return Report([ReportRow(row["model"], row[score], row["feature_cosine"]) for row in rows], **stored)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def print_report(report: Report, title: str) -> None:
    """Prints the rows as one table."""
    table = Table(title=title)
    table.add_column("model")
    table.add_column(report.score_title, justify="right")
    table.add_column("feature cosine", justify="right")
    for row in report.rows:
        table.add_row(row.model, "-" if row.score is None else f"{row.score:.2f}", f"{row.feature_cosine:.4f}")
    Console(width=72).print(table)


def draw_report(run: RunFolder, report: Report | None) -> None:
    """Draws each stage's loss over its steps, training and held-out, and the rows' scores where there are any."""
    rows = report.rows if report else []
    stages = [number for number in STAGE_TITLES if read_metrics(run.stage(number).path, "train")]
    panels = len(stages) + (2 if rows else 0)
    figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, number in zip(axes, stages, strict=False):
        for split, style in (("train", "-"), ("val", "o--")):
            metrics = read_metrics(run.stage(number).path, split)
            axis.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], style, label=split, markersize=4)
        axis.set(title=STAGE_TITLES[number], xlabel="optimizer step", ylabel="loss")
        if any(value > 0 for line in axis.lines for value in line.get_ydata()):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    if rows:
        names = [row.model for row in rows]
        _draw_bars(axes[-2], names, [row.score or 0.0 for row in rows], report.score_title, "{:.1f}")
        _draw_bars(axes[-1], names, [row.feature_cosine for row in rows], "feature cosine to the teacher", "{:.3f}")
    run.path.mkdir(parents=True, exist_ok=True)
    partial = run.picture.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(run.picture)


def _draw_bars(axis, names: list[str], values: list[float], title: str, form: str) -> None:
    bars = axis.barh(names[::-1], values[::-1], color="#4878a8")
    axis.bar_label(bars, [form.format(value) for value in values[::-1]], padding=3)
    axis.set(title=title, xlim=(min(0.0, *values), max(values) * 1.2))
