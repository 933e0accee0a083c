"""What a bench run leaves behind: ``results.json``, ``report.md`` and ``report.html``, one page with its pictures."""

import argparse
import base64
import dataclasses
import html
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from pictures import LABELS, Lines, draw_lines, draw_scatter, draw_stack
from results import Results, Row, read_results, write_results
from timing import crossover

# The paper's table, ImageNet-1K, 512 x 512, batch 1: parameters in M, "GFLOPs", peak GB, images/s, top-1 in percent.
PAPER_ROWS: dict[str, tuple[float, float, float, float, float]] = {
    "softmax": (304.20, 310.60, 1.3181, 36.52, 86.8),
    "linear": (304.20, 262.19, 1.2163, 41.56, 86.0),
    "hedgehog": (305.77, 265.41, 1.2221, 37.44, 58.8),
    "lolcats": (305.77, 265.41, 1.2221, 37.44, 61.6),
    "linformer": (305.77, 262.19, 1.2221, 45.41, 68.9),
    "performer": (304.20, 265.41, 1.2164, 36.48, 75.2),
    "cosformer": (304.20, 265.41, 1.2226, 39.55, 75.1),
    "nystromformer": (304.20, 265.20, 1.2163, 18.29, 82.4),
    "monarch": (304.20, 269.44, 1.2304, 18.31, 82.7),
}
# The paper's images/s of softmax and of vanilla linear attention by resolution, one H100, batch 1.
PAPER_RESOLUTIONS = {256: (62.83, 49.28), 512: (36.52, 41.56), 1024: (7.07, 15.95)}
PAPER_BACKBONE = "vit_large_patch16_224"
# Within so much of 1 a ratio is called a tie: two runs on an idle machine may differ by 5 %.
TIE = 0.05
# A spread of the latencies, relative to their median, above which the report warns.
RESTLESS = 0.15


@dataclass
class Table:
    """A table as both reports print it.

    Attributes:
        title: Its heading.
        header: Column names; the first column is text, the others are numbers.
        rows: Cells as text.
        marked: ``red`` or ``strong`` by row number.
        note: A sentence below it.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    marked: dict[int, str] = field(default_factory=dict)
    note: str = ""

    def without_empty_columns(self) -> "Table":
        filled = [i for i in range(len(self.header)) if i == 0 or any(row[i] not in ("", "-") for row in self.rows)]
        rows = [[row[i] for i in filled] for row in self.rows]
        return dataclasses.replace(self, header=[self.header[i] for i in filled], rows=rows)


def number(value: float | None, form: str = ",.2f") -> str:
    return "-" if value is None else format(value, form)


def signed(value: float | None, form: str = "+,.2f") -> str:
    return "-" if value is None else format(value, form)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def short_name(mechanism: str) -> str:
    return LABELS.get(mechanism, mechanism)


def resolutions(results: Results) -> list[int]:
    return sorted({row.res for row in results.rows})


def row_of(results: Results, mechanism: str, res: int) -> Row | None:
    return next((row for row in results.rows if (row.mechanism, row.res) == (mechanism, res)), None)


def pixels_of(results: Results, tokens: float) -> float:
    """Side in pixels of a square image with so many tokens."""
    machine = results.machine
    patches = max(1.0, tokens - machine.get("num_prefix_tokens", 1))
    return math.sqrt(patches) * machine.get("patch_size", [16])[0]


def mechanisms_of(results: Results) -> list[str]:
    """Linear mechanisms with a row, in the rows' order: neither softmax nor the ceiling."""
    return list(dict.fromkeys(row.mechanism for row in results.rows if row.mechanism not in ("softmax", "none")))


def verdict(results: Results) -> str:
    """One sentence about vanilla linear attention, or about the first mechanism where it was not measured."""
    timed = [m for m in mechanisms_of(results) if any(r.ratio_vs_softmax for r in results.rows if r.mechanism == m)]
    if not timed:
        return "No linear mechanism was compared with softmax in this run."
    mechanism = "linear" if "linear" in timed else timed[0]
    swept = [r for r in results.crossover if (r.mechanism, r.scope) == (mechanism, "network")]
    rows = [row_of(results, mechanism, res) for res in resolutions(results)]
    where = crossover([(row.tokens, row.ratio_vs_softmax) for row in rows if row is not None and row.tokens])
    kind, tokens = (swept[0].kind, swept[0].tokens) if swept else (where.kind, where.tokens)
    name, best = short_name(mechanism), max(row.ratio_vs_softmax or 0 for row in rows if row is not None)
    said = {
        "within": f"In speed yes, {_crossing(results, kind, tokens)} on; below that softmax is the faster one",
        "always": "In speed yes, at every size measured",
        "never": "In speed no, at no size measured",
    }.get(kind, "That was not measured")
    doubt = " But the machine was not idle: measure again." if _noise(results) else ""
    return f"{said} ({name}, whole network; at best {best:.2f} times softmax's speed).{doubt}"


def answer(results: Results) -> list[str]:
    """Is it worth it, from which size on, and at what loss: in plain sentences."""
    sentences = [_noise(results)] + [_worth(results, res) for res in resolutions(results)]
    sentences += _from_which_size(results)
    sentences += [_memory_answer(results)] if results.rows else []
    sentences.append(_loss(results))
    failed = [row for row in results.rows if row.error is not None]
    if failed:
        said = ", ".join(f"{row.mechanism} at {row.res} px ({row.error_kind})" for row in failed)
        sentences.append(f"Without a result: {said}.")
    return [sentence for sentence in sentences if sentence]


def _noise(results: Results) -> str:
    """A warning where the machine was too restless for what the reader wants to conclude."""
    spreads = [
        (row.latency_ms_p80 - row.latency_ms_p20) / row.latency_ms_p50 for row in results.rows if row.latency_ms_p50
    ]
    beaten = [row for row in results.rows if row.ratio_vs_none is not None and row.ratio_vs_none > 1 + TIE]
    if not spreads or (median(spreads) <= RESTLESS and not beaten):
        return ""
    said = f"from its 20th to its 80th percentile a latency spreads over {100 * median(spreads):.0f} % of its median"
    if beaten:
        said += f", and {len(beaten)} rows seem faster than a network without attention, which cannot be"
    return f"**Take these times with caution: the machine was not idle.** In the median row {said}."


def _worth(results: Results, res: int) -> str:
    timed = {m: row_of(results, m, res) for m in mechanisms_of(results)}
    ratios = {m: row.ratio_vs_softmax for m, row in timed.items() if row is not None and row.ratio_vs_softmax}
    if not ratios:
        return f"At {res} px nothing could be compared with softmax."
    tokens = next(row.tokens for row in timed.values() if row is not None)
    faster = [m for m in ratios if ratios[m] > 1 + TIE]
    slower = [m for m in ratios if ratios[m] < 1 - TIE]
    best = max(ratios, key=ratios.get)
    said = f"{len(faster)} of {len(ratios)} mechanisms are faster than softmax"
    if not faster:
        said = "no mechanism is faster than softmax" if slower else "every mechanism ties with softmax"
    elif len(faster) == len(ratios):
        said = f"all {len(ratios)} mechanisms are faster than softmax"
    said = f"**At {res} px ({tokens:,} tokens) {said}**; the fastest is {short_name(best)} at {ratios[best]:.2f} times"
    if "linear" in ratios and best != "linear":
        said += f", vanilla linear attention, AdaLA's own, is at {ratios['linear']:.2f}"
    ceiling = row_of(results, "none", res)
    if ceiling is not None and ceiling.ratio_vs_softmax:
        said += f". No mechanism could pass {ceiling.ratio_vs_softmax:.2f}: that is a network without any mixing"
    return said + "."


def _from_which_size(results: Results) -> list[str]:
    swept = [row for row in results.crossover if row.scope == "network" and row.mechanism not in ("softmax", "none")]
    if swept:
        low, high = min(r.least_tokens for r in swept), max(r.most_tokens for r in swept)
        said = _grouped_crossings(results, {row.mechanism: (row.kind, row.tokens) for row in swept})
        return [f"**From which size on** (whole network, swept from {low:,} to {high:,} tokens): {said}."]
    sizes = resolutions(results)
    where = {}
    for mechanism in mechanisms_of(results):
        rows = [row_of(results, mechanism, res) for res in sizes]
        found = crossover([(row.tokens, row.ratio_vs_softmax) for row in rows if row is not None and row.tokens])
        if found.kind != "unknown":
            where[mechanism] = (found.kind, found.tokens)
    if len(sizes) < 2 or not where:
        return []
    return [
        f"**From which size on**, interpolated between the {len(sizes)} resolutions measured, {sizes[0]} to "
        f"{sizes[-1]} px (`--sweep` measures it): {_grouped_crossings(results, where)}."
    ]


def _grouped_crossings(results: Results, where: Mapping[str, tuple[str, float | None]]) -> str:
    """Crossovers in order of their size, those that are everywhere or never in the range together."""
    parts = []
    for kind in ("always", "within", "never", "unknown"):
        names = [name for name in where if where[name][0] == kind]
        if kind == "within":
            names.sort(key=lambda name: where[name][1])
            parts += [f"{short_name(name)} {_crossing(results, *where[name])}" for name in names]
        elif names:
            parts.append(f"{', '.join(map(short_name, names))} {_crossing(results, kind, None)}")
    return "; ".join(parts)


def _crossing(results: Results, kind: str, tokens: float | None) -> str:
    if kind == "within":
        return f"from about {tokens:,.0f} tokens ({pixels_of(results, tokens):,.0f} px)"
    return {"always": "everywhere in the range", "never": "never in the range"}.get(kind, "not measured")


def _memory_answer(results: Results) -> str:
    res = resolutions(results)[-1]
    softmax, linear = row_of(results, "softmax", res), row_of(results, "linear", res)
    if softmax is None or linear is None or None in (softmax.activations_mib, linear.activations_mib):
        return ""
    how = "which builds" if softmax.sdpa_backend in ("math", "unfused") else "with a fused kernel that never builds"
    return (
        f"**Memory** at {res} px: {linear.peak_mem_mib:,.0f} MiB at the peak with vanilla linear attention, "
        f"{softmax.peak_mem_mib:,.0f} MiB with softmax ({how} the N x N matrix); of these are activations "
        f"{linear.activations_mib:,.0f} and {softmax.activations_mib:,.0f} MiB."
    )


def _loss(results: Results) -> str:
    scored = [row for row in results.accuracy if row.kept is not None and row.mechanism != "softmax"]
    if not scored:
        return "**At what loss** was not measured in this run (`--accuracy`)."
    recipe = results.machine.get("recipe", "the recipe")
    by_conversion = []
    for conversion, words in (("adala", "under AdaLA's stages"), ("native", "converted as their authors do")):
        rows = [row for row in scored if row.conversion == conversion]
        if rows:
            best, worst = (pick(rows, key=lambda row: row.kept) for pick in (max, min))
            by_conversion.append(
                f"{words} the mechanisms keep {100 * worst.kept:.1f} % ({short_name(worst.mechanism)}) to "
                f"{100 * best.kept:.1f} % ({short_name(best.mechanism)})"
            )
    teacher, seen = number(scored[0].teacher_top1), number(scored[0].images_seen, ",")
    return (
        f"**At what loss**: of the teacher's top-1 of {teacher} % on recipe {recipe}, with the same {seen} training "
        f"images each, {'; '.join(by_conversion)}. That is a small task: it ranks mechanisms, it does not predict "
        "ImageNet."
    )


def speed_table(results: Results, res: int) -> Table:
    """All rows of a resolution."""
    rows, marked = [], {}
    header = ["mechanism", "params M", "GMACs", "peak MiB", "weights", "activations", "ms p20", "p50", "p80"]
    header += ["images/s", "vs softmax", "vs none", "train images/s", "train vs softmax", "mJ/image", "gate", ""]
    of_size = [row for row in results.rows if row.res == res]
    for row in of_size:
        if row.error is not None:
            marked[len(rows)] = "red"
        elif row.mechanism in ("softmax", "none"):
            marked[len(rows)] = "strong"
        gate = f"{row.gate} {row.gate_error:.0e}" if row.gate_error else row.gate
        said = f"{row.error_kind}: {row.error}" if row.error else (row.train_error or "")
        numbers = [number(row.params_m), number(row.gmacs), number(row.peak_mem_mib, ",.0f")]
        numbers += [number(row.weights_mib, ",.0f"), number(row.activations_mib, ",.1f")]
        numbers += [number(v, ",.1f") for v in (row.latency_ms_p20, row.latency_ms_p50, row.latency_ms_p80)]
        numbers += [number(row.throughput_img_s), ratio(row.ratio_vs_softmax), ratio(row.ratio_vs_none)]
        numbers += [number(row.train_img_s), ratio(row.train_ratio_vs_softmax), number(row.energy_mj_per_image, ",.0f")]
        rows.append([short_name(row.mechanism), *numbers, gate, said])
    tokens = next((row.tokens for row in of_size if row.tokens), 0)
    rounds = max((row.rounds or 0 for row in of_size), default=0)
    return Table(
        f"{res} x {res} px, {tokens:,} tokens", header, rows, marked, f"{rounds} rounds."
    ).without_empty_columns()


def accuracy_table(results: Results) -> Table:
    rows, marked = [], {}
    header = [
        "mechanism",
        "conversion",
        "steps by stage",
        "top-1 %",
        "kept of teacher's",
        "cosine",
        "after Stage 2 top-1 %",
    ]
    header += ["after Stage 2 cosine", "seconds", ""]
    for row in results.accuracy:
        if row.error is not None:
            marked[len(rows)] = "red"
        steps = ", ".join(f"{number}: {count}" for number, count in row.steps.items())
        scores = [number(row.top1), percent(row.kept), number(row.feature_cosine, ".4f"), number(row.aligned_top1)]
        scores += [number(row.aligned_cosine, ".4f"), number(row.seconds, ",.0f")]
        rows.append([short_name(row.mechanism), row.conversion, steps, *scores, row.error or ""])
    teacher = next((row.teacher_top1 for row in results.accuracy if row.teacher_top1 is not None), None)
    recipe = results.machine.get("recipe", "tiny")
    note = (
        f"Recipe {recipe}: the same data, number of training images and seed for every row; the teacher's linear probe "
        f"is at {number(teacher)} %. Top-1 is that of the fine-tuned head, after Stage 2 of a linear probe; cosine is "
        "that of the final features to the teacher's."
    )
    return Table("Accuracy after adaptation", header, rows, marked, note).without_empty_columns()


def crossover_table(results: Results) -> Table:
    by_scope = {(row.mechanism, row.scope): row for row in results.crossover}
    rows = []
    for mechanism in dict.fromkeys(row.mechanism for row in results.crossover if row.mechanism != "none"):
        cells = []
        for scope in ("operator", "network"):
            row = by_scope.get((mechanism, scope))
            cells.append("-" if row is None else _crossing(results, row.kind, row.tokens))
        rows.append([short_name(mechanism), *cells])
    return Table("Faster than softmax", ["mechanism", "operator alone", "whole network"], rows)


def paper_comparison(results: Results) -> list[Table]:
    """The paper's numbers beside ours: costs by formula, then what was measured at 512 px, then by resolution."""
    if not results.paper:
        return []
    tables = [paper_costs(results), paper_measured(results), paper_resolutions(results)]
    return [table for table in tables if table.rows]


def paper_costs(results: Results) -> Table:
    ours = {row["mechanism"]: row for row in results.paper}
    header = ["mechanism", "params M, paper", "params, ours", "GFLOPs, paper", "GMACs, ours"]
    header += ["minus softmax, paper", "minus softmax, ours"]
    rows = []
    for mechanism, (params, gflops, *_) in PAPER_ROWS.items():
        own, softmax = ours[mechanism], ours["softmax"]
        cells = [number(params), f"{own['parameters']:,}", number(gflops), number(own["gmacs"])]
        gaps = [signed(gflops - PAPER_ROWS["softmax"][1]), signed(own["gmacs"] - softmax["gmacs"])]
        rows.append([short_name(mechanism), *cells, *gaps])
    note = (
        "Ours by formula and with the paper's options, whatever was timed. The paper's GFLOPs are multiply-accumulates,"
        " "
        "each about 51 below an honest count: compare the differences to softmax. The paper's parameters hold a "
        "mask token (1,024); ours have none. Ours count the linear mechanisms' normaliser (N M H a layer)."
    )
    return Table("Costs, ViT-L/16 with LayerScale at 512 px", header, rows, note=note)


def paper_measured(results: Results) -> Table:
    """Memory, speed and accuracy; absolute numbers of ours only where they are of the paper's network."""
    machine = results.machine
    same_network = machine.get("backbone") == PAPER_BACKBONE
    softmax_row = row_of(results, "softmax", 512)
    kept = {(row.mechanism, row.conversion): row.kept for row in results.accuracy}
    header = ["mechanism", "peak GB, paper", "peak GB, ours", "minus softmax, paper", "minus softmax, ours"]
    header += ["images/s, paper", "images/s, ours", "vs softmax, paper", "vs softmax, ours"]
    header += ["top-1 kept, paper", "kept, ours native", "kept, ours AdaLA"]
    rows = []
    for mechanism, (_, _, peak, rate, top1) in PAPER_ROWS.items():
        row = row_of(results, mechanism, 512) or Row(mechanism, 512)
        own_peak, softmax_peak = _gigabytes(row), _gigabytes(softmax_row)
        gap = None if own_peak is None or softmax_peak is None else own_peak - softmax_peak
        softmax = PAPER_ROWS["softmax"]
        memory = [number(peak, ".4f"), number(own_peak, ".4f") if same_network else "-"]
        memory += [signed(peak - softmax[2], "+.4f"), signed(gap, "+.4f")]
        speed = [number(rate), number(row.throughput_img_s) if same_network else "-"]
        speed += [ratio(rate / softmax[3]), ratio(row.ratio_vs_softmax)]
        shares = [top1 / softmax[4], kept.get((mechanism, "native")), kept.get((mechanism, "adala"))]
        rows.append([short_name(mechanism), *memory, *speed, *map(percent, shares)])
    network = "the same network" if same_network else f"{machine.get('backbone')}, so that only ratios compare"
    note = (
        "Paper: one H100, weights that fit float32, softmax with its N x N matrix in memory. Ours: "
        f"{machine.get('device')}, {machine.get('dtype')}, softmax {machine.get('softmax')}, {network}. Kept shares of "
        "top-1: the paper's of softmax's on ImageNet-1K, ours of the teacher's on the accuracy table's recipe."
    )
    return Table("Memory, speed and accuracy at 512 px", header, rows, note=note).without_empty_columns()


def _gigabytes(row: Row | None) -> float | None:
    """Peak memory in GB of 10^9 bytes, the paper's unit."""
    return None if row is None or row.peak_mem_mib is None else row.peak_mem_mib * 2**20 / 1e9


def paper_resolutions(results: Results) -> Table:
    rows = []
    for res, (softmax, linear) in PAPER_RESOLUTIONS.items():
        row = row_of(results, "linear", res)
        if row is not None and row.ratio_vs_softmax:
            rows.append([f"{res} px", ratio(linear / softmax), ratio(row.ratio_vs_softmax)])
    return Table("Vanilla linear attention against softmax by resolution", ["", "paper", "ours"], rows)


def conditions(results: Results) -> list[tuple[str, str]]:
    """What the numbers were measured under, as pairs for a reader."""
    m = results.machine
    said = {
        "device": m.get("device"),
        "CPU": f"{m.get('cpu')}, {m.get('cpu_cores')} cores, {m.get('threads')} threads",
        "load average": f"{m.get('load_average')} at the start, {m.get('load_average_end')} at the end",
        "date": m.get("date"),
        "commit": m.get("commit") or "none",
        "backbone": f"{m.get('backbone')} {json.dumps(m.get('model_args'))}",
        "protocol": f"{m.get('protocol')}: {m.get('dtype')}, batch {m.get('batch')}, softmax {m.get('softmax')}",
        "SDPA backend": ", ".join(
            f"{row.sdpa_backend} at {row.res} px" for row in results.rows if row.sdpa_backend is not None
        ),
        "TF32": "on" if m.get("tf32") else "off",
        "torch.compile": _compile_words(results),
        "PyTorch": m.get("torch"),
        "timm": m.get("timm"),
        "Python": m.get("python"),
        "CUDA": " / ".join(str(m[key]) for key in ("cuda", "cudnn", "driver") if m.get(key)),
        "duration": f"{m.get('seconds', 0):,.0f} s",
    }
    return [(key, str(value)) for key, value in said.items() if value not in (None, "")]


def _compile_words(results: Results) -> str:
    asked = results.machine.get("compile", "off")
    used = [f"{row.mechanism} at {row.res} px" for row in results.rows if row.compiled]
    if asked == "off":
        return "off for all"
    return f"{asked}: " + (f"used by {', '.join(used)}; eager where that was faster" if used else "nowhere faster")


DEFINITIONS = (
    "Every ratio is a quotient of speeds, larger is faster; it is taken within a round, and the median over rounds is "
    "shown. All cases of a resolution are timed in one process, once a round each, every round beginning with another "
    "one; they share weights and input.",
    "`none` passes the values through: the same network without any mixing of tokens, which no mechanism can beat.",
    "GMACs are multiply-accumulates of matrix products in 1e9 for one image, by formula, confirmed by PyTorch's "
    "counter to 1 %. Memory is that of a forward pass in a process of its own, run eagerly.",
    "The gate compares each mechanism on the very q, k and v of the case with its dense reference in float64, before "
    "the clock starts; beside it stands the relative error. Without a green gate there is no speed.",
)


def line_data(results: Results, value: str) -> Lines:
    """(tokens, value) by mechanism, of rows that have it."""
    lines: Lines = {}
    for row in results.rows:
        if row.tokens and getattr(row, value):
            lines.setdefault(row.mechanism, []).append((row.tokens, getattr(row, value)))
    return lines


def sweep_lines(results: Results, scope: str) -> Lines:
    lines: Lines = {}
    for row in results.sweep:
        # No mixing at all is a thousand times faster than mixing, which would leave the others no room.
        if row.scope == scope and row.ratio_vs_softmax and (scope, row.mechanism) != ("operator", "none"):
            lines.setdefault(row.mechanism, []).append((row.tokens, row.ratio_vs_softmax))
    return lines


def pictures(results: Results) -> list[tuple[str, str]]:
    """Captions and SVGs, those that there are data for."""
    found = []
    throughput = line_data(results, "throughput_img_s")
    if throughput:
        found.append(("Throughput against tokens (higher is better).", draw_lines(throughput, "images/s (log scale)")))
    if throughput and "softmax" in throughput:
        speeds = line_data(results, "ratio_vs_softmax")
        caption = "The same against softmax: above 1 a mechanism is worth it."
        found.append((caption, draw_lines(speeds, "speed against softmax (log scale)", level=1.0)))
    for scope, words in (("network", "whole network"), ("operator", "mixing of one layer alone")):
        lines = sweep_lines(results, scope)
        if lines:
            caption = f"Sweep over token counts, {words}: where a line crosses 1, the mechanism begins to pay."
            found.append((caption, draw_lines(lines, "speed against softmax (log scale)", level=1.0)))
    memory = line_data(results, "activations_mib")
    if memory:
        caption = "Memory for activations against tokens (lower is better); weights come on top."
        found.append((caption, draw_lines(memory, "activations, MiB (log scale)")))
        largest = [row for row in results.rows if row.res == resolutions(results)[-1] and row.activations_mib]
        found.append(
            (
                f"Weights and activations at {largest[0].res} px.",
                draw_stack(
                    [row.mechanism for row in largest],
                    [row.weights_mib for row in largest],
                    [row.activations_mib for row in largest],
                    "MiB",
                ),
            )
        )
    points, res = accuracy_points(results)
    if points:
        caption = (
            f"Accuracy against speed: top-1 on recipe {results.machine.get('recipe', 'tiny')} (another, smaller "
            f"network) over images/s of {results.machine.get('backbone')} at {res} px."
        )
        found.append((caption, draw_scatter(points, f"images/s at {res} px", "top-1 (%)")))
    return found


def accuracy_points(results: Results) -> tuple[dict[tuple[str, str], tuple[float, float]], int]:
    """(images/s at the largest resolution, top-1) by mechanism and conversion, and that resolution."""
    points = {}
    res = resolutions(results)[-1] if results.rows else 0
    for row in results.accuracy:
        timed = row_of(results, row.mechanism, res)
        if row.top1 is not None and timed is not None and timed.throughput_img_s:
            points[row.mechanism, row.conversion] = (timed.throughput_img_s, row.top1)
    return points, res


def markdown(results: Results) -> str:
    """The report without pictures."""
    parts = [
        "# Is linear attention worth it?",
        "",
        f"**{verdict(results)}**",
        "",
        *[f"- {sentence}" for sentence in answer(results)],
    ]
    for heading, tables in sections(results):
        parts += ["", f"## {heading}"]
        for table in tables:
            parts += ["", f"### {table.title}", "", *_markdown_table(table)]
            parts += ["", table.note] if table.note else []
    parts += ["", "## Conditions", "", *[f"- {key}: {value}" for key, value in conditions(results)]]
    parts += [f"- {note}" for note in results.notes]
    parts += ["", "## How to read it", "", *[f"- {text}" for text in DEFINITIONS]]
    return "\n".join(parts) + "\n"


def sections(results: Results) -> list[tuple[str, list[Table]]]:
    found = []
    if results.rows:
        found.append(("Measured", [speed_table(results, res) for res in resolutions(results)]))
    if results.crossover:
        found.append(("Crossover", [crossover_table(results)]))
    if results.accuracy:
        found.append(("Accuracy", [accuracy_table(results)]))
    if results.paper:
        found.append(("The paper's rows beside ours", paper_comparison(results)))
    return found


def _markdown_table(table: Table) -> list[str]:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.8rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; border-bottom: 1px solid #ccc; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1.05rem; }
.lead { color: #555; margin-top: 0; }
.verdict { font-size: 1.25rem; font-weight: 600; margin: 1.2rem 0 .8rem; }
.answer { background: #f5f3ee; border-left: 5px solid #c8102e; padding: .6rem 1.2rem .6rem 2.2rem; }
.answer li { margin: .45rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid #e2e2e2; white-space: nowrap; }
th { border-bottom: 2px solid #999; font-weight: 600; white-space: normal; vertical-align: bottom; max-width: 6.5rem; }
th:first-child, td:first-child { text-align: left; }
td.said { text-align: left; white-space: normal; max-width: 26rem; }
tr.strong td { background: #f3f3f3; font-weight: 600; }
tr.red td { background: #fde3e3; color: #8c0000; }
.note { color: #555; font-size: .86rem; max-width: 60rem; margin: .4rem 0 0; }
figure { display: inline-block; margin: 1rem 1rem 0 0; width: 560px; max-width: 100%; vertical-align: top; }
figure img { width: 100%; } figcaption { font-size: .9rem; color: #333; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; }
"""


def page(results: Results) -> str:
    """The report as one page that needs nothing from elsewhere."""
    machine = results.machine
    lead = (
        f"{machine.get('backbone')} on {machine.get('device')}, {machine.get('dtype')}, batch {machine.get('batch')}, "
    )
    lead += f"protocol {machine.get('protocol')}, {machine.get('date')}"
    parts = ["<h1>Is linear attention worth it?</h1>", f'<p class="lead">{html.escape(lead)}</p>']
    parts.append(f'<p class="verdict">{html.escape(verdict(results))}</p>')
    parts += ['<ul class="answer">', *[f"<li>{_inline(sentence)}</li>" for sentence in answer(results)], "</ul>"]
    drawn = [
        f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(svg.encode()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for caption, svg in pictures(results)
    ]
    for index, (heading, tables) in enumerate(sections(results)):
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for table in tables:
            parts += [f"<h3>{html.escape(table.title)}</h3>", _html_table(table)]
            parts += [f'<p class="note">{html.escape(table.note)}</p>'] if table.note else []
        if index == 0 and drawn:
            parts += ["<h2>Pictures</h2>", *drawn]
    pairs = [f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in conditions(results)]
    parts += ["<h2>Conditions</h2>", "<dl>", *pairs, "</dl>"]
    parts += ["<ul>", *[f"<li>{html.escape(note)}</li>" for note in results.notes], "</ul>"] if results.notes else []
    parts += ["<h2>How to read it</h2>", "<ul>", *[f"<li>{_inline(text)}</li>" for text in DEFINITIONS], "</ul>"]
    head = f'<meta charset="utf-8"><title>Is linear attention worth it?</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _inline(text: str) -> str:
    """The little markup of the sentences above: **strong** and `code`."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _html_table(table: Table) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell.strip())}</th>" for cell in table.header) + "</tr>"]
    for index, row in enumerate(table.rows):
        mark = f' class="{table.marked[index]}"' if index in table.marked else ""
        cells = [
            f'<td class="said">{html.escape(cell)}</td>' if name == "" else f"<td>{html.escape(cell)}</td>"
            for name, cell in zip(table.header, row, strict=True)
        ]
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def write_report(folder: Path, results: Results) -> None:
    """Writes ``results.json``, ``report.md`` and ``report.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.json", results)
    (folder / "report.md").write_text(markdown(results))
    (folder / "report.html").write_text(page(results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes report.md and report.html anew from a stored results.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a results.json")
    folder = parser.parse_args(arguments).folder
    try:
        write_report(folder, read_results(folder / "results.json"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
