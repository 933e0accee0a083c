"""The pictures of a bench report, as SVG text."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from results import Results, Row, SweepRow

# Softmax and the ceiling are what everything is held against: black, and grey dashes. AdaLA's own mechanism is thick.
STYLES: dict[str, dict] = {
    "softmax": {"color": "black", "linewidth": 2.4, "marker": "o"},
    "linear": {"color": "#c8102e", "linewidth": 2.4, "marker": "o"},
    "hedgehog": {"color": "#1f77b4", "marker": "s"},
    "lolcats": {"color": "#17becf", "marker": "s", "linestyle": "--"},
    "linformer": {"color": "#2ca02c", "marker": "^"},
    "performer": {"color": "#ff7f0e", "marker": "v"},
    "cosformer": {"color": "#8c564b", "marker": "D"},
    "nystromformer": {"color": "#9467bd", "marker": "P"},
    "monarch": {"color": "#e377c2", "marker": "X"},
    "none": {"color": "#888888", "linewidth": 2.0, "marker": "o", "linestyle": ":"},
}
LABELS = {"linear": "linear (AdaLA)", "none": "none (ceiling)"}
# By mechanism, its points (tokens, value).
Lines = dict[str, list[tuple[float, float]]]


def lines_of(rows: Iterable[Row | SweepRow], value: str) -> Lines:
    """(tokens, value) by mechanism, of rows that have it."""
    lines: Lines = {}
    for row in rows:
        if row.tokens and getattr(row, value):
            lines.setdefault(row.mechanism, []).append((row.tokens, getattr(row, value)))
    return lines


def pictures(results: Results) -> list[tuple[str, str]]:
    """Captions and SVGs, those that there are data for."""
    rows, res = results.rows, max((row.res for row in results.rows), default=0)
    throughput, memory = (lines_of(rows, value) for value in ("throughput_img_s", "activations_mib"))
    compared = lines_of(rows if "softmax" in throughput else [], "ratio_vs_softmax")
    # No mixing at all is a thousand times faster than mixing, which would leave the others no space.
    operators = [row for row in results.sweep if row.scope == "operator" and row.mechanism != "none"]
    networks = [row for row in results.sweep if row.scope == "network"]
    swept, crosses = "Sweep over token counts", "where a line crosses 1, the mechanism begins to pay."
    speed_at = {row.mechanism: row.throughput_img_s for row in rows if row.res == res}
    scored = {(row.mechanism, row.conversion): row.top1 for row in results.accuracy if row.top1 is not None}
    points = {key: (speed_at[key[0]], top1) for key, top1 in scored.items() if speed_at.get(key[0])}
    scatter = (
        f"Accuracy against speed: top-1 on recipe {results.machine.get('recipe', 'tiny')} (another, smaller "
        f"network) over images/s of {results.machine.get('backbone')} at {res} px."
    )
    images, speed, mib = (f"{what} (log scale)" for what in ("images/s", "speed against softmax", "activations, MiB"))
    ratios = partial(draw_lines, ylabel=speed, level=1.0)
    lowest = "Memory for activations against tokens (lower is better); weights come on top."
    largest = [row for row in rows if row.res == res and row.activations_mib]
    found = [
        ("Throughput against tokens (higher is better).", throughput, partial(draw_lines, ylabel=images)),
        ("The same against softmax: above 1 a mechanism is worth it.", compared, ratios),
        (f"{swept}, whole network: {crosses}", lines_of(networks, "ratio_vs_softmax"), ratios),
        (f"{swept}, mixing of one layer alone: {crosses}", lines_of(operators, "ratio_vs_softmax"), ratios),
        (lowest, memory, partial(draw_lines, ylabel=mib)),
        (f"Weights and activations at {res} px.", largest, draw_memory),
        (scatter, points, partial(draw_scatter, xlabel=f"images/s at {res} px", ylabel="top-1 (%)")),
    ]
    return [(caption, draw(data)) for caption, data, draw in found if data]


def as_svg(fill: Callable[..., None]) -> Callable[..., str]:
    """Turns a function that fills axes into one that gives the SVG; letters are drawn as curves, alike everywhere."""

    @wraps(fill)
    def draw(data: Any, **labels: Any) -> str:
        style = {"font.size": 11, "svg.hashsalt": "adala", "axes.spines.top": False, "axes.spines.right": False}
        with rc_context(style):
            figure, written = Figure(figsize=(8.0, 4.6), layout="constrained"), io.StringIO()
            fill(figure.subplots(), data, **labels)
            figure.savefig(written, format="svg", metadata={"Date": None})
        return written.getvalue()

    return draw


@as_svg
def draw_lines(axis: Axes, lines: Lines, ylabel: str, level: float | None = None) -> None:
    """Values against tokens on log scales, one line a mechanism; ``level`` is marked by a horizontal line."""
    for name, points in lines.items():
        style = {"linewidth": 1.4, "markersize": 5} | STYLES.get(name, {})
        axis.plot(*zip(*sorted(points), strict=True), label=LABELS.get(name, name), **style)
    counts = sorted({tokens for points in lines.values() for tokens, _ in points})
    axis.set(xscale="log", yscale="log", xlabel="tokens of one image (log scale)", ylabel=ylabel)
    axis.xaxis.set_major_locator(FixedLocator(counts))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _minor_label(axis, value)))
    if level is not None:
        axis.axhline(level, color="black", linewidth=0.8, alpha=0.6)
    axis.grid(alpha=0.25, which="both")
    # The order of the legend is that of the lines' ends.
    ends = [max(points)[1] for points in lines.values()]
    entries = zip(ends, *axis.get_legend_handles_labels(), strict=True)
    _, handles, labels = zip(*sorted(entries, key=lambda entry: -entry[0]), strict=True)
    axis.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _minor_label(axis: Axes, value: float) -> str:
    """Labels 2, 3 and 5 of each decade too, where less than two decades are shown."""
    low, high = axis.get_ylim()
    leading = float(f"{value:e}".partition("e")[0])
    return f"{value:g}" if high < 100 * low and round(leading, 6) in (2, 3, 5) else ""


@as_svg
def draw_scatter(axis: Axes, points: Mapping[tuple[str, str], tuple[float, float]], xlabel: str, ylabel: str) -> None:
    """One point for each (mechanism, conversion), filled for ``adala``, hollow for ``native``, joined by a line."""
    for (name, conversion), (x, y) in points.items():
        style = STYLES.get(name, {})
        color = style.get("color", "black")
        face = color if conversion == "adala" else "white"
        marker = {"marker": style.get("marker", "o"), "markerfacecolor": face, "markersize": 9, "markeredgewidth": 1.6}
        axis.plot(x, y, linestyle="", color=color, **marker)
        if (name, "native") in points and conversion == "adala":
            axis.plot([x, x], [y, points[name, "native"][1]], color=color, linewidth=0.8, alpha=0.6)
    for (name, conversion), point in points.items():
        if conversion == "adala" or (name, "adala") not in points:
            axis.annotate(LABELS.get(name, name), point, xytext=(8, 4), textcoords="offset points", fontsize=9.5)
    axis.plot([], [], "o", color="#555555", label="AdaLA's stages")
    axis.plot([], [], "o", color="#555555", markerfacecolor="white", label="its authors' conversion")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.margins(x=0.16, y=0.12)
    axis.grid(alpha=0.25)
    axis.legend(loc="best", frameon=False)


@as_svg
def draw_memory(axis: Axes, rows: Sequence[Row]) -> None:
    """Horizontal bars of two parts: weights, and activations on top of them."""
    axis.figure.set_figheight(0.36 * len(rows) + 1.5)
    labels = [LABELS.get(row.mechanism, row.mechanism) for row in rows[::-1]]
    weights, activations = ([getattr(row, part) for row in rows[::-1]] for part in ("weights_mib", "activations_mib"))
    axis.barh(labels, weights, color="#b8c4d0", label="weights")
    bars = axis.barh(labels, activations, left=weights, color="#c8102e", alpha=0.75, label="activations")
    axis.bar_label(bars, [f"{a:,.0f} + {b:,.0f}" for a, b in zip(weights, activations, strict=True)], padding=4)
    axis.set_xlabel("MiB")
    axis.margins(x=0.18)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
