"""The pictures of a bench report, as SVG text."""

import io
from collections.abc import Callable, Iterable, Sequence

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
SPEED = "speed against softmax (log scale)"
# Mechanism, and its points (tokens, value).
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
    found = []
    throughput, speeds = (lines_of(results.rows, value) for value in ("throughput_img_s", "ratio_vs_softmax"))
    if throughput:
        found.append(("Throughput against tokens (higher is better).", draw_lines(throughput, "images/s (log scale)")))
    if "softmax" in throughput:
        caption = "The same against softmax: above 1 a mechanism is worth it."
        found.append((caption, draw_lines(speeds, SPEED, level=1.0)))
    for scope, words in (("network", "whole network"), ("operator", "mixing of one layer alone")):
        # No mixing at all is a thousand times faster than mixing, which would leave the others no room.
        left_out = ("operator", "none")
        swept = [row for row in results.sweep if row.scope == scope and (scope, row.mechanism) != left_out]
        lines = lines_of(swept, "ratio_vs_softmax")
        if lines:
            caption = f"Sweep over token counts, {words}: where a line crosses 1, the mechanism begins to pay."
            found.append((caption, draw_lines(lines, SPEED, level=1.0)))
    memory, res = lines_of(results.rows, "activations_mib"), max((row.res for row in results.rows), default=0)
    if memory:
        caption = "Memory for activations against tokens (lower is better); weights come on top."
        found.append((caption, draw_lines(memory, "activations, MiB (log scale)")))
        largest = [row for row in results.rows if row.res == res and row.activations_mib]
        found.append((f"Weights and activations at {res} px.", draw_memory(largest)))
    speed_at = {row.mechanism: row.throughput_img_s for row in results.rows if row.res == res}
    scored = [row for row in results.accuracy if row.top1 is not None and speed_at.get(row.mechanism)]
    if scored:
        caption = (
            f"Accuracy against speed: top-1 on recipe {results.machine.get('recipe', 'tiny')} (another, smaller "
            f"network) over images/s of {results.machine.get('backbone')} at {res} px."
        )
        points = {(row.mechanism, row.conversion): (speed_at[row.mechanism], row.top1) for row in scored}
        found.append((caption, draw_scatter(points, f"images/s at {res} px", "top-1 (%)")))
    return found


def draw(fill: Callable[[Axes], None], size: tuple[float, float] = (8.0, 4.6)) -> str:
    """One picture as SVG; letters are drawn as curves, so that it looks the same everywhere."""
    with rc_context({"font.size": 11, "svg.hashsalt": "adala", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure.subplots())
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def draw_lines(lines: Lines, ylabel: str, level: float | None = None) -> str:
    """Values against tokens on log scales, one line a mechanism.

    Args:
        lines: By mechanism.
        ylabel: What the values are, with their unit.
        level: A value that is marked by a horizontal line.
    """

    def fill(axis: Axes) -> None:
        for name, points in lines.items():
            style = {"linewidth": 1.4, "markersize": 5} | STYLES.get(name, {})
            axis.plot(*zip(*sorted(points), strict=True), label=LABELS.get(name, name), **style)
        counts = sorted({tokens for points in lines.values() for tokens, _ in points})
        axis.set(xscale="log", yscale="log", xlabel="tokens of one image (log scale)", ylabel=ylabel)
        axis.xaxis.set_major_locator(FixedLocator(counts))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(_minor_label(axis)))
        if level is not None:
            axis.axhline(level, color="black", linewidth=0.8, alpha=0.6)
        axis.grid(alpha=0.25, which="both")
        # The order of the legend is that of the lines' ends.
        ends = [max(points)[1] for points in lines.values()]
        entries = zip(ends, *axis.get_legend_handles_labels(), strict=True)
        _, handles, labels = zip(*sorted(entries, key=lambda entry: -entry[0]), strict=True)
        axis.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)

    return draw(fill)


def _minor_label(axis: Axes) -> Callable[[float, int], str]:
    """Labels 2 and 5 of each decade too, where less than two decades are shown."""

    def label(value: float, _: int) -> str:
        low, high = axis.get_ylim()
        leading = float(f"{value:e}".partition("e")[0])
        return f"{value:g}" if high < 100 * low and round(leading, 6) in (2, 3, 5) else ""

    return label


def draw_scatter(points: dict[tuple[str, str], tuple[float, float]], xlabel: str, ylabel: str) -> str:
    """One point for each (mechanism, conversion), filled for ``adala``, hollow for ``native``, joined by a line."""

    def fill(axis: Axes) -> None:
        for (name, conversion), (x, y) in points.items():
            style = STYLES.get(name, {})
            color = style.get("color", "black")
            face = color if conversion == "adala" else "white"
            axis.plot(
                x, y, style.get("marker", "o"), color=color, markerfacecolor=face, markersize=9, markeredgewidth=1.6
            )
            if (name, "native") in points and conversion == "adala":
                axis.plot([x, x], [y, points[name, "native"][1]], color=color, linewidth=0.8, alpha=0.6)
        for (name, conversion), (x, y) in points.items():
            if conversion == "adala" or (name, "adala") not in points:
                text = LABELS.get(name, name)
                axis.annotate(text, (x, y), xytext=(8, 4), textcoords="offset points", fontsize=9.5)
        axis.plot([], [], "o", color="#555555", label="AdaLA's stages")
        axis.plot([], [], "o", color="#555555", markerfacecolor="white", label="its authors' conversion")
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.margins(x=0.16, y=0.12)
        axis.grid(alpha=0.25)
        axis.legend(loc="best", frameon=False)

    return draw(fill)


def draw_memory(rows: Sequence[Row]) -> str:
    """Horizontal bars of two parts: weights, and activations on top of them."""

    def fill(axis: Axes) -> None:
        labels = [LABELS.get(row.mechanism, row.mechanism) for row in rows[::-1]]
        weights, activations = (
            [getattr(row, part) for row in rows[::-1]] for part in ("weights_mib", "activations_mib")
        )
        axis.barh(labels, weights, color="#b8c4d0", label="weights")
        bars = axis.barh(labels, activations, left=weights, color="#c8102e", alpha=0.75, label="activations")
        axis.bar_label(bars, [f"{a:,.0f} + {b:,.0f}" for a, b in zip(weights, activations, strict=True)], padding=4)
        axis.set_xlabel("MiB")
        axis.margins(x=0.18)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)

    return draw(fill, (8.0, 0.36 * len(rows) + 1.5))
