"""The tables of a bench report; among them the paper's rows beside ours."""

import dataclasses
from dataclasses import dataclass, field

from results import Results, Row, resolutions, row_of
from sentences import crossing, number, percent, short_name

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


def signed(value: float | None, form: str = "+,.2f") -> str:
    return "-" if value is None else format(value, form)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def interval(row: Row) -> str:
    """Of the ratio to softmax; softmax itself has none."""
    if row.mechanism == "softmax" or row.ratio_vs_softmax_low is None:
        return "-"
    return f"{row.ratio_vs_softmax_low:.2f}-{row.ratio_vs_softmax_high:.2f}"


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


def speed_table(results: Results, res: int) -> Table:
    """All rows of a resolution."""
    rows, marked = [], {}
    header = ["mechanism", "params M", "GMACs", "peak MiB", "weights", "activations", "ms p20", "p50", "p80"]
    header += [
        "images/s",
        "vs softmax",
        "95 % interval",
        "vs none",
        "train images/s",
        "train vs softmax",
        "mJ/image",
        "gate",
        "",
    ]
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
        numbers += [number(row.throughput_img_s), ratio(row.ratio_vs_softmax), interval(row), ratio(row.ratio_vs_none)]
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
    if {"hedgehog", "lolcats"} <= {row.mechanism for row in results.accuracy}:
        note += (
            " Hedgehog and LoLCATs share their feature maps and differ in how they are converted: under AdaLA's stages "
            "they are the same."
        )
    return Table("Accuracy after adaptation", header, rows, marked, note).without_empty_columns()


def crossover_table(results: Results) -> Table:
    by_scope = {(row.mechanism, row.scope): row for row in results.crossover}
    rows = []
    for mechanism in dict.fromkeys(row.mechanism for row in results.crossover if row.mechanism != "none"):
        cells = []
        for scope in ("operator", "network"):
            row = by_scope.get((mechanism, scope))
            cells.append("-" if row is None else crossing(results, row.kind, row.tokens))
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
