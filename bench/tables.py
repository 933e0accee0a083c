"""The tables of a bench report, their cells as text; among them the paper's rows beside ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from results import Results, Row, resolutions, row_of
from sentences import crossing, number, short_name

# The paper's table, ImageNet-1K, 512 x 512, batch 1: parameters in M, "GFLOPs", peak GB, images/s, top-1 in percent.
PAPER = pd.DataFrame.from_dict(
    {
        "softmax": (304.20, 310.60, 1.3181, 36.52, 86.8),
        "linear": (304.20, 262.19, 1.2163, 41.56, 86.0),
        "hedgehog": (305.77, 265.41, 1.2221, 37.44, 58.8),
        "lolcats": (305.77, 265.41, 1.2221, 37.44, 61.6),
        "linformer": (305.77, 262.19, 1.2221, 45.41, 68.9),
        "performer": (304.20, 265.41, 1.2164, 36.48, 75.2),
        "cosformer": (304.20, 265.41, 1.2226, 39.55, 75.1),
        "nystromformer": (304.20, 265.20, 1.2163, 18.29, 82.4),
        "monarch": (304.20, 269.44, 1.2304, 18.31, 82.7),
    },
    orient="index",
    columns=["paper_params", "paper_gflops", "paper_gb", "paper_img_s", "paper_top1"],
)
# The paper's images/s of softmax and of vanilla linear attention by resolution, one H100, batch 1.
PAPER_RESOLUTIONS = {256: (62.83, 49.28), 512: (36.52, 41.56), 1024: (7.07, 15.95)}
PAPER_BACKBONE = "vit_large_patch16_224"

# Column headings and formats by field.
Columns = Mapping[str, tuple[str, str]]
TEXT, NUMBER, WHOLE, TENTHS, RATIO = "{}", "{:,.2f}", "{:,.0f}", "{:,.1f}", "{:.2f} x"
PERCENT, FINE, GAP, FINE_GAP = "{:.1f} %", "{:.4f}", "{:+,.2f}", "{:+.4f}"
SPEED: Columns = {
    "name": ("mechanism", TEXT),
    "params_m": ("params M", NUMBER),
    "gmacs": ("GMACs", NUMBER),
    "peak_mem_mib": ("peak MiB", WHOLE),
    "weights_mib": ("weights", WHOLE),
    "activations_mib": ("activations", TENTHS),
    "latency_ms_p20": ("ms p20", TENTHS),
    "latency_ms_p50": ("p50", TENTHS),
    "latency_ms_p80": ("p80", TENTHS),
    "throughput_img_s": ("images/s", NUMBER),
    "ratio_vs_softmax": ("vs softmax", RATIO),
    "interval": ("95 % interval", TEXT),
    "ratio_vs_none": ("vs none", RATIO),
    "train_img_s": ("train images/s", NUMBER),
    "train_ratio_vs_softmax": ("train vs softmax", RATIO),
    "energy_mj_per_image": ("mJ/image", WHOLE),
    "gate_said": ("gate", TEXT),
    "said": ("", TEXT),
}
ACCURACY: Columns = {
    "name": ("mechanism", TEXT),
    "conversion": ("conversion", TEXT),
    "steps_said": ("steps by stage", TEXT),
    "top1": ("top-1 %", NUMBER),
    "kept": ("kept of teacher's", PERCENT),
    "feature_cosine": ("cosine", FINE),
    "aligned_top1": ("after Stage 2 top-1 %", NUMBER),
    "aligned_cosine": ("after Stage 2 cosine", FINE),
    "seconds": ("seconds", WHOLE),
    "said": ("", TEXT),
}
PAPER_COSTS: Columns = {
    "name": ("mechanism", TEXT),
    "paper_params": ("params M, paper", NUMBER),
    "parameters": ("params, ours", "{:,}"),
    "paper_gflops": ("GFLOPs, paper", NUMBER),
    "gmacs": ("GMACs, ours", NUMBER),
    "paper_gap": ("minus softmax, paper", GAP),
    "gap": ("minus softmax, ours", GAP),
}
PAPER_MEASURED: Columns = {
    "name": ("mechanism", TEXT),
    "paper_gb": ("peak GB, paper", FINE),
    "own_gb": ("peak GB, ours", FINE),
    "paper_gap": ("minus softmax, paper", FINE_GAP),
    "gap": ("minus softmax, ours", FINE_GAP),
    "paper_img_s": ("images/s, paper", NUMBER),
    "own_img_s": ("images/s, ours", NUMBER),
    "paper_ratio": ("vs softmax, paper", RATIO),
    "ratio_vs_softmax": ("vs softmax, ours", RATIO),
    "paper_kept": ("top-1 kept, paper", PERCENT),
    "native": ("kept, ours native", PERCENT),
    "adala": ("kept, ours AdaLA", PERCENT),
}


@dataclass(frozen=True)
class Table:
    """A table as both reports print it.

    Attributes:
        title: Its heading.
        frame: Cells as text; the first column is text, the others are numbers.
        marks: For each row ``red``, ``strong`` or nothing.
        note: A sentence below it.
    """

    title: str
    frame: pd.DataFrame
    marks: Sequence[str]
    note: str = ""


def as_table(title: str, frame: pd.DataFrame, columns: Columns, note: str = "") -> Table:
    """The named columns of a frame in words, without those that say nothing.

    A column ``mark`` of the frame becomes the rows' marks.
    """
    text = pd.DataFrame(
        {
            heading: ["-" if pd.isna(value) else form.format(value) for value in frame[name]]
            for name, (heading, form) in columns.items()
        }
    )
    told = (~text.isin(["", "-"])).any()
    told.iloc[0] = True
    return Table(title, text.loc[:, told], list(frame.get("mark", [""] * len(frame))), note)


def sections(results: Results) -> list[tuple[str, list[Table]]]:
    """Headings, and the tables below each."""
    found = []
    if results.rows:
        found.append(("Measured", [speed_table(results, res) for res in resolutions(results)]))
    if results.crossover:
        found.append(("Crossover", [crossover_table(results)]))
    if results.accuracy:
        found.append(("Accuracy", [accuracy_table(results)]))
    if results.paper:
        tables = [paper_costs(results), paper_measured(results), paper_resolutions(results)]
        found.append(("The paper's rows beside ours", [table for table in tables if len(table.frame)]))
    return found


def speed_table(results: Results, res: int) -> Table:
    """All rows of a resolution."""
    rows = [row for row in results.rows if row.res == res]
    frame = pd.DataFrame([vars(row) | _said(row) for row in rows])
    tokens = next((row.tokens for row in rows if row.tokens), 0)
    rounds = max((row.rounds or 0 for row in rows), default=0)
    return as_table(f"{res} x {res} px, {tokens:,} tokens", frame, SPEED, f"{rounds} rounds.")


def _said(row: Row) -> dict[str, Any]:
    """What a row's table shows beside its numbers."""
    low, high = row.ratio_vs_softmax_low, row.ratio_vs_softmax_high
    reference = row.mechanism in ("softmax", "none")
    return {
        "name": short_name(row.mechanism),
        "interval": None if row.mechanism == "softmax" or low is None else f"{low:.2f}-{high:.2f}",
        "gate_said": f"{row.gate} {row.gate_error:.0e}" if row.gate_error else row.gate,
        "said": f"{row.error_kind}: {row.error}" if row.error else (row.train_error or ""),
        "mark": "red" if row.error is not None else "strong" if reference else "",
    }


def crossover_table(results: Results) -> Table:
    said = {(row.mechanism, row.scope): crossing(results, row.kind, row.tokens) for row in results.crossover}
    names = dict.fromkeys(row.mechanism for row in results.crossover if row.mechanism != "none")
    columns = {"name": ("mechanism", TEXT), "operator": ("operator alone", TEXT), "network": ("whole network", TEXT)}
    scopes = ("operator", "network")
    rows = [{"name": short_name(name)} | {scope: said.get((name, scope)) for scope in scopes} for name in names]
    return as_table("Faster than softmax", pd.DataFrame(rows, columns=list(columns)), columns)


def accuracy_table(results: Results) -> Table:
    frame = pd.DataFrame(map(vars, results.accuracy))
    frame["name"] = frame["mechanism"].map(short_name)
    frame["steps_said"] = [", ".join(f"{stage}: {n}" for stage, n in steps.items()) for steps in frame["steps"]]
    frame["kept"] = 100 * pd.to_numeric(frame["kept"])
    frame["said"] = [row.error or "" for row in results.accuracy]
    frame["mark"] = ["red" if row.error is not None else "" for row in results.accuracy]
    teacher = next((row.teacher_top1 for row in results.accuracy if row.teacher_top1 is not None), None)
    note = (
        f"Recipe {results.machine.get('recipe', 'tiny')}: the same data, number of training images and seed for every "
        f"row; the teacher's linear probe is at {number(teacher)} %. Top-1 is that of the fine-tuned head, after Stage "
        "2 of a linear probe; cosine is that of the final features to the teacher's."
    )
    if {"hedgehog", "lolcats"} <= set(frame["mechanism"]):
        note += (
            " Hedgehog and LoLCATs share their feature maps and differ in how they are converted: under AdaLA's stages "
            "they are the same."
        )
    return as_table("Accuracy after adaptation", frame, ACCURACY, note)


def paper_costs(results: Results) -> Table:
    """Parameters and MACs of the paper's network, whatever was timed."""
    frame = PAPER.join(pd.DataFrame(results.paper).set_index("mechanism"))
    frame["name"] = frame.index.map(short_name)
    frame["paper_gap"] = frame["paper_gflops"] - frame["paper_gflops"]["softmax"]
    frame["gap"] = frame["gmacs"] - frame["gmacs"]["softmax"]
    note = (
        "Ours by PyTorch's counter and with the paper's options, whatever was timed. The paper's GFLOPs are "
        "multiply-accumulates, each about 51 below an honest count: compare the differences to softmax. The paper's "
        "parameters hold a mask token (1,024); ours have none. Ours count the linear mechanisms' normaliser (N M H a "
        "layer)."
    )
    return as_table("Costs, ViT-L/16 with LayerScale at 512 px", frame, PAPER_COSTS, note)


def paper_measured(results: Results) -> Table:
    """Memory, speed and accuracy at 512 px; absolute numbers of ours only where they are of the paper's network."""
    machine = results.machine
    same_network = machine.get("backbone") == PAPER_BACKBONE
    rows = [row_of(results, mechanism, 512) or Row(mechanism, 512) for mechanism in PAPER.index]
    frame = PAPER.join(pd.DataFrame(map(vars, rows)).set_index("mechanism"))
    frame["name"] = frame.index.map(short_name)
    gigabytes = pd.to_numeric(frame["peak_mem_mib"]) * 2**20 / 1e9  # of 10^9 bytes, the paper's unit
    frame["own_gb"] = gigabytes if same_network else None
    frame["own_img_s"] = frame["throughput_img_s"] if same_network else None
    frame["paper_gap"] = frame["paper_gb"] - frame["paper_gb"]["softmax"]
    frame["gap"] = gigabytes - gigabytes["softmax"]
    frame["paper_ratio"] = frame["paper_img_s"] / frame["paper_img_s"]["softmax"]
    frame["paper_kept"] = 100 * frame["paper_top1"] / frame["paper_top1"]["softmax"]
    for name in ("native", "adala"):
        kept = {row.mechanism: row.kept for row in results.accuracy if row.conversion == name}
        frame[name] = 100 * pd.to_numeric(frame.index.to_series().map(kept))
    network = "the same network" if same_network else f"{machine.get('backbone')}, so that only ratios compare"
    note = (
        "Paper: one H100, weights that fit float32, softmax with its N x N matrix in memory. Ours: "
        f"{machine.get('device')}, {machine.get('dtype')}, softmax {machine.get('softmax')}, {network}. Kept shares of "
        "top-1: the paper's of softmax's on ImageNet-1K, ours of the teacher's on the accuracy table's recipe."
    )
    return as_table("Memory, speed and accuracy at 512 px", frame, PAPER_MEASURED, note)


def paper_resolutions(results: Results) -> Table:
    columns = {"res": ("", "{} px"), "paper": ("paper", RATIO), "ours": ("ours", RATIO)}
    rows = []
    for res, (softmax, linear) in PAPER_RESOLUTIONS.items():
        row = row_of(results, "linear", res)
        if row is not None and row.ratio_vs_softmax:
            rows.append((res, linear / softmax, row.ratio_vs_softmax))
    frame = pd.DataFrame(rows, columns=list(columns))
    return as_table("Vanilla linear attention against softmax by resolution", frame, columns)
