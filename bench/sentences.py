"""What a bench report says in words: ``report.words.jinja``, filled with what is concluded here."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pictures import LABELS
from results import Results, crossover

# Within so much of 1 a ratio is called a tie: two runs on an idle machine may differ by 5 %.
TIE = 0.05
# A spread of the latencies, relative to their median, above which the report warns.
RESTLESS = 0.15
# By mechanism, from how many tokens on it is faster than softmax: kind and tokens of a CrossoverRow.
Crossovers = Mapping[str, tuple[str, float | None]]


def number(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def short_name(mechanism: str) -> str:
    return LABELS.get(mechanism, mechanism)


WORDS = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True)
WORDS.filters |= {"number": number, "short": short_name, "json": json.dumps}
WORDS.filters |= {"whole": "{:,.0f}".format, "count": "{:,}".format}


class Sentences:
    """What there is to say about some results: a method call is a macro of the template, its value the paragraphs."""

    def __init__(self, results: Results):
        self.macros = WORDS.get_template("report.words.jinja").make_module(conclusions(results))

    def __call__(self, macro: str, *arguments: Any) -> list[str]:
        paragraphs = getattr(self.macros, macro)(*arguments).split("\n\n")
        return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]

    def conditions(self) -> list[tuple[str, str]]:
        """What the numbers were measured under, as pairs for a reader."""
        pairs = [said.partition(":") for said in self("conditions")]
        return [(key, value.strip()) for key, _, value in pairs if value.strip() not in ("", "None")]


def conclusions(results: Results) -> dict[str, Any]:
    """Is it worth it, from which size on, and at what loss: what the template's sentences are about."""
    rows, sizes = results.rows, [_at_size(results, res) for res in results.resolutions()]
    swept, between = _swept(results), _interpolated(results)
    ranges = [row for row in results.crossover if row.mechanism in swept and row.scope == "network"]
    at_most = [results.row(name, sizes[-1]["res"]) for name in ("softmax", "linear")] if sizes else [None]
    return {
        "machine": results.machine,
        "sizes": sizes,
        "judged": _judged(results, {**between, **swept}),
        "noise": _noise(results),
        "swept": swept,
        "interpolated": between,
        "swept_range": ranges and (min(row.least_tokens for row in ranges), max(row.most_tokens for row in ranges)),
        "memory": at_most if all(row and row.activations_mib is not None for row in at_most) else None,
        "scored": [row for row in results.accuracy if row.kept is not None and row.mechanism != "softmax"],
        "failed": [row for row in rows if row.error is not None],
        "pinned": [row for row in rows if row.sdpa_backend is not None],
        "compiled": [row for row in rows if row.compiled],
        "captured": [row for row in rows if row.captured],
        "crossing": partial(crossing, results),
        "crossings": partial(_grouped_crossings, results),
    }


def _at_size(results: Results, res: int) -> dict[str, Any]:
    timed = [row for row in (results.row(name, res) for name in results.mechanisms()) if row is not None]
    ratios = {row.mechanism: row.ratio_vs_softmax for row in timed if row.ratio_vs_softmax}
    ceiling = results.row("none", res)
    return {
        "res": res,
        "tokens": next((row.tokens for row in timed if row.ratio_vs_softmax), None),
        "ratios": ratios,
        "faster": [name for name in ratios if ratios[name] > 1 + TIE],
        "slower": [name for name in ratios if ratios[name] < 1 - TIE],
        "best": max(ratios, key=ratios.get, default=None),
        "ceiling": ceiling and ceiling.ratio_vs_softmax,
    }


def _judged(results: Results, where: Crossovers) -> dict[str, Any] | None:
    """Vanilla linear attention, or the first mechanism where it was not measured."""
    best: dict[str, float] = {}
    for row in results.rows:
        if row.mechanism in results.mechanisms() and row.ratio_vs_softmax:
            best[row.mechanism] = max(row.ratio_vs_softmax, best.get(row.mechanism, 0))
    if not best:
        return None
    mechanism = "linear" if "linear" in best else next(name for name in results.mechanisms() if name in best)
    kind, tokens = where.get(mechanism, ("unknown", None))
    return {"mechanism": mechanism, "kind": kind, "tokens": tokens, "best": best[mechanism]}


def _noise(results: Results) -> dict[str, float] | None:
    """What a warning is due to, where the machine was too restless for what the reader wants to conclude."""
    timed = [row for row in results.rows if row.latency_ms_p50]
    spread = median([(row.latency_ms_p80 - row.latency_ms_p20) / row.latency_ms_p50 for row in timed] or [0])
    beaten = sum(row.ratio_vs_none is not None and row.ratio_vs_none > 1 + TIE for row in results.rows)
    return {"spread": spread, "beaten": beaten} if timed and (spread > RESTLESS or beaten) else None


def _swept(results: Results) -> Crossovers:
    """Of each linear mechanism in the whole network, from the sweep."""
    rows = [row for row in results.crossover if row.scope == "network" and row.mechanism not in ("softmax", "none")]
    return {row.mechanism: (row.kind, row.tokens) for row in rows}


def _interpolated(results: Results) -> Crossovers:
    """The same between the resolutions measured, of those of which there is more to say than ``unknown``."""
    found = {}
    for name in results.mechanisms():
        found[name] = crossover(
            [(r.tokens, r.ratio_vs_softmax) for r in results.rows if r.mechanism == name and r.tokens]
        )
    return {name: where for name, where in found.items() if where[0] != "unknown"}


def _grouped_crossings(results: Results, where: Crossovers) -> str:
    """Crossovers in order of their size, those that are everywhere or never in the range together."""
    parts = []
    for kind in ("always", "within", "never", "unknown"):
        names = [name for name in where if where[name][0] == kind]
        if kind == "within":
            names.sort(key=lambda name: where[name][1])
            parts += [f"{short_name(name)} {crossing(results, *where[name])}" for name in names]
        elif names:
            parts.append(f"{', '.join(map(short_name, names))} {crossing(results, kind, None)}")
    return "; ".join(parts)


def crossing(results: Results, kind: str, tokens: float | None) -> str:
    """A crossover in words, with the side in pixels of a square image of so many tokens."""
    if kind != "within":
        return {"always": "everywhere in the range", "never": "never in the range"}.get(kind, "not measured")
    patches = max(1.0, tokens - results.machine.get("num_prefix_tokens", 1))
    pixels = math.sqrt(patches) * results.machine.get("patch_size", [16])[0]
    return f"from about {tokens:,.0f} tokens ({pixels:,.0f} px)"
