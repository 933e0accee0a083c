"""Pictures of rows: quality against speed, closeness against views, errors by block."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from student_results import RowResult

from adala.evaluation import BlockReport
from adala.evaluation.block_errors import BlockErrors
from adala.evaluation_pictures import block_error_picture

Point = tuple[float | None, float | None, float | None]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points that no other is at least as good as in both and better in one, by their first value."""
    best = set(points)
    beaten = {(x, y) for x, y in best if any(u >= x and v >= y and (u, v) != (x, y) for u, v in best)}
    return sorted(best - beaten)


def draw_front(points: Mapping[str, Point]) -> Figure:
    """How many times the teacher's speed, against patch cosine and against the mean share of scores, by row."""
    figure = Figure(figsize=(15, max(6, 0.19 * len(points))), layout="constrained")
    panels = figure.subplots(1, 2)
    # Names beside the points would cover each other, and run out of the picture.
    numbers = {name: number for number, name in enumerate(points, 1)}
    for axis, place, title in zip(panels, (1, 2), ("patch cosine", "mean share of the teacher's scores"), strict=True):
        known = {name: (of[0], of[place]) for name, of in points.items() if None not in (of[0], of[place])}
        _draw_points(axis, known, numbers)
        axis.set(xlabel="times the teacher's images a second", ylabel=title)
        axis.grid(alpha=0.3)
    labels = [f"{number}  {name.replace('`', '')}" for name, number in numbers.items()]
    nothing = [Line2D([], [], linestyle="") for _ in labels]
    figure.legend(nothing, labels, loc="outside right center", handlelength=0, handletextpad=0, fontsize=8)
    return figure


def _draw_points(axis: Axes, points: Mapping[str, tuple[float, float]], numbers: Mapping[str, int]) -> None:
    front = pareto_front(list(points.values()))
    if front:
        axis.plot(*zip(*front, strict=True), "-", color="#c8102e", alpha=0.5)
    for name, point in points.items():
        on_front = point in front
        axis.plot(*point, "o", color="#c8102e" if on_front else "#2b6cb0", markersize=5)
        axis.annotate(str(numbers[name]), point, xytext=(4, 3), textcoords="offset points", fontsize=8)


def draw_curves(results: Mapping[str, RowResult]) -> Figure:
    """Patch cosine on a run's held-out images against the views it has had, over all its stages."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for name, result in results.items():
        measured = [row for of_stage in result.curve.values() for row in of_stage if "patch_cosine" in row]
        axis.plot(
            [row["views"] for row in measured],
            [row["patch_cosine"] for row in measured],
            marker="o",
            markersize=3,
            label=name,
        )
    axis.set(xlabel="views", ylabel="patch cosine on held-out images, at the size of training")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def draw_blocks(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Errors by block of rows' students, each from a report of its own against the same teacher.

    Args:
        reports: :class:`adala.evaluation.BlockReport` as JSON, by row.
    """
    students = {name: BlockErrors(**_only_student(report)) for name, report in reports.items()}
    first = next(iter(reports.values()))
    return block_error_picture(BlockReport(first["images"], first["outliers"], students))


def _only_student(report: Mapping[str, Any]) -> Mapping[str, Any]:
    (student,) = report["students"].values()
    return student
