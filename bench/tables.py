"""The tables of a bench report, their cells as text; among them the paper's rows beside ours."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from results import Results, Row
from sentences import Sentences, crossing, short_name

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
    columns=["params", "gflops", "gb", "img_s", "top1"],
)
# The paper's images/s of softmax and of vanilla linear attention by resolution, one H100, batch 1.
PAPER_RESOLUTIONS = {256: (62.83, 49.28), 512: (36.52, 41.56), 1024: (7.07, 15.95)}
PAPER_BACKBONE = "vit_large_patch16_224"

NUMBER, WHOLE, TENTHS, FINE, RATIO, PERCENT = "{:,.2f}", "{:,.0f}", "{:,.1f}", "{:.4f}", "{:.2f} x", "{:.1f} %"


@dataclass(frozen=True)
class Table:
    """A table as both reports print it.

    Attributes:
        frame: Cells as text; the first column is text, the others are numbers.
        marks: For each row ``red``, ``strong`` or nothing.
        note: A sentence below it.
    """

    title: str
    frame: pd.DataFrame
    marks: Sequence[str]
    note: str = ""


def words(values: Iterable[Any], form: str = "{}") -> list[str]:
    """Each value in the form given, a dash for what there is not."""
    return ["-" if pd.isna(value) else form.format(value) for value in values]


def as_table(title: str, cells: Mapping[str, Sequence[str]], note: str = "", marks: Sequence[str] = ()) -> Table:
    """A table of columns by heading, without those that say nothing; the first one always stays."""
    frame = pd.DataFrame(cells)
    told = ~frame.isin(["", "-"]).all()
    told.iloc[0] = True
    return Table(title, frame.loc[:, told], marks or [""] * len(frame), note)


def sections(results: Results, say: Sentences) -> list[tuple[str, list[Table]]]:
    """Headings, and the tables below each."""
    found = {
        "Measured": [speed_table(results, res) for res in results.resolutions()],
        "Crossover": [crossover_table(results)] if results.crossover else [],
        "Accuracy": [accuracy_table(results, say)] if results.accuracy else [],
    }
    if results.paper:
        tables = [paper_costs(results, say), paper_measured(results, say), paper_resolutions(results)]
        found["The paper's rows beside ours"] = [table for table in tables if len(table.frame)]
    return [(heading, tables) for heading, tables in found.items() if tables]


def speed_table(results: Results, res: int) -> Table:
    rows = [row for row in results.rows if row.res == res]
    of = pd.DataFrame(map(vars, rows))
    cells = {
        "mechanism": of["mechanism"].map(short_name),
        "params M": words(of["params_m"], NUMBER),
        "GMACs": words(of["gmacs"], NUMBER),
        "peak MiB": words(of["peak_mem_mib"], WHOLE),
        "weights": words(of["weights_mib"], WHOLE),
        "activations": words(of["activations_mib"], TENTHS),
        "ms p20": words(of["latency_ms_p20"], TENTHS),
        "p50": words(of["latency_ms_p50"], TENTHS),
        "p80": words(of["latency_ms_p80"], TENTHS),
        "images/s": words(of["throughput_img_s"], NUMBER),
        "vs softmax": words(of["ratio_vs_softmax"], RATIO),
        "95 % interval": [  # of the ratio to softmax; softmax itself has none
            "-"
            if row.mechanism == "softmax" or row.ratio_vs_softmax_low is None
            else f"{row.ratio_vs_softmax_low:.2f}-{row.ratio_vs_softmax_high:.2f}"
            for row in rows
        ],
        "vs none": words(of["ratio_vs_none"], RATIO),
        "train images/s": words(of["train_img_s"], NUMBER),
        "train vs softmax": words(of["train_ratio_vs_softmax"], RATIO),
        "mJ/image": words(of["energy_mj_per_image"], WHOLE),
        "gate": [f"{row.gate} {row.gate_error:.0e}" if row.gate_error else row.gate for row in rows],
        "": [f"{row.error_kind}: {row.error}" if row.error else (row.train_error or "") for row in rows],
    }
    marks = ["red" if row.error else "strong" if row.mechanism in ("softmax", "none") else "" for row in rows]
    tokens, rounds = (max((count or 0 for count in of[name].fillna(0)), default=0) for name in ("tokens", "rounds"))
    return as_table(f"{res} x {res} px, {tokens:,.0f} tokens", cells, f"{rounds:.0f} rounds.", marks)


def crossover_table(results: Results) -> Table:
    said = {(row.mechanism, row.scope): crossing(results, row.kind, row.tokens) for row in results.crossover}
    names = list(dict.fromkeys(row.mechanism for row in results.crossover if row.mechanism != "none"))
    cells = {
        "mechanism": [short_name(name) for name in names],
        "operator alone": [said.get((name, "operator"), "-") for name in names],
        "whole network": [said.get((name, "network"), "-") for name in names],
    }
    return as_table("Faster than softmax", cells)


def accuracy_table(results: Results, say: Sentences) -> Table:
    rows = results.accuracy
    of = pd.DataFrame(map(vars, rows))
    cells = {
        "mechanism": of["mechanism"].map(short_name),
        "conversion": of["conversion"],
        "steps by stage": [", ".join(f"{stage}: {steps}" for stage, steps in row.steps.items()) for row in rows],
        "top-1 %": words(of["top1"], NUMBER),
        "kept of teacher's": words(100 * pd.to_numeric(of["kept"]), PERCENT),
        "cosine": words(of["feature_cosine"], FINE),
        "after Stage 2 top-1 %": words(of["aligned_top1"], NUMBER),
        "after Stage 2 cosine": words(of["aligned_cosine"], FINE),
        "seconds": words(of["seconds"], WHOLE),
        "": [row.error or "" for row in rows],
    }
    teacher = next((row.teacher_top1 for row in rows if row.teacher_top1 is not None), None)
    (note,) = say("accuracy_note", teacher, {"hedgehog", "lolcats"} <= set(of["mechanism"]))
    return as_table("Accuracy after adaptation", cells, note, ["red" if row.error else "" for row in rows])


def paper_costs(results: Results, say: Sentences) -> Table:
    """Parameters and MACs of the paper's network, whatever was timed."""
    ours = pd.DataFrame(results.paper).set_index("mechanism").loc[PAPER.index]
    cells = {
        "mechanism": PAPER.index.map(short_name),
        "params M, paper": words(PAPER["params"], NUMBER),
        "params, ours": words(ours["parameters"], "{:,}"),
        "GFLOPs, paper": words(PAPER["gflops"], NUMBER),
        "GMACs, ours": words(ours["gmacs"], NUMBER),
        "minus softmax, paper": words(PAPER["gflops"] - PAPER["gflops"]["softmax"], "{:+,.2f}"),
        "minus softmax, ours": words(ours["gmacs"] - ours["gmacs"]["softmax"], "{:+,.2f}"),
    }
    return as_table("Costs, ViT-L/16 with LayerScale at 512 px", cells, *say("costs_note"))


def paper_measured(results: Results, say: Sentences) -> Table:
    """Memory, speed and accuracy at 512 px; absolute numbers of ours only where they are of the paper's network."""
    same_network = results.machine.get("backbone") == PAPER_BACKBONE
    rows = [results.row(mechanism, 512) or Row(mechanism, 512) for mechanism in PAPER.index]
    ours = pd.DataFrame(map(vars, rows), index=PAPER.index)
    gigabytes = pd.to_numeric(ours["peak_mem_mib"]) * 2**20 / 1e9  # of 10^9 bytes, the paper's unit
    kept = {(row.mechanism, row.conversion): row.kept for row in results.accuracy if row.kept is not None}
    own = {how: [100 * kept.get((name, how), math.nan) for name in PAPER.index] for how in ("native", "adala")}
    cells = {
        "mechanism": PAPER.index.map(short_name),
        "peak GB, paper": words(PAPER["gb"], FINE),
        "peak GB, ours": words(gigabytes, FINE) if same_network else "-",
        "minus softmax, paper": words(PAPER["gb"] - PAPER["gb"]["softmax"], "{:+.4f}"),
        "minus softmax, ours": words(gigabytes - gigabytes["softmax"], "{:+.4f}"),
        "images/s, paper": words(PAPER["img_s"], NUMBER),
        "images/s, ours": words(ours["throughput_img_s"], NUMBER) if same_network else "-",
        "vs softmax, paper": words(PAPER["img_s"] / PAPER["img_s"]["softmax"], RATIO),
        "vs softmax, ours": words(ours["ratio_vs_softmax"], RATIO),
        "top-1 kept, paper": words(100 * PAPER["top1"] / PAPER["top1"]["softmax"], PERCENT),
        "kept, ours native": words(own["native"], PERCENT),
        "kept, ours AdaLA": words(own["adala"], PERCENT),
    }
    return as_table("Memory, speed and accuracy at 512 px", cells, *say("measured_note", same_network))


def paper_resolutions(results: Results) -> Table:
    rows = {res: results.row("linear", res) for res in PAPER_RESOLUTIONS}
    ours = {res: row.ratio_vs_softmax for res, row in rows.items() if row is not None and row.ratio_vs_softmax}
    paper = [linear / softmax for softmax, linear in map(PAPER_RESOLUTIONS.get, ours)]
    cells = {"": words(ours, "{} px"), "paper": words(paper, RATIO), "ours": words(ours.values(), RATIO)}
    return as_table("Vanilla linear attention against softmax by resolution", cells)
