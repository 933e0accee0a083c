"""The schema of ``results.json``: the dataclasses here, field by field, explained in docs/BENCH.md.

A number that was not measured is None.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


@dataclass
class Row:
    """One mechanism at one resolution."""

    mechanism: str
    res: int
    tokens: int | None = None
    batch: int = 1
    dtype: str = "float32"
    options: dict = field(default_factory=dict)
    params_m: float | None = None
    gmacs: float | None = None
    gmacs_counted: float | None = None
    peak_mem_mib: float | None = None
    weights_mib: float | None = None
    activations_mib: float | None = None
    process_mib: float | None = None
    latency_ms_p20: float | None = None
    latency_ms_p50: float | None = None
    latency_ms_p80: float | None = None
    throughput_img_s: float | None = None
    ratio_vs_softmax: float | None = None
    ratio_vs_softmax_low: float | None = None
    ratio_vs_softmax_high: float | None = None
    ratio_vs_none: float | None = None
    rounds: int | None = None
    compiled: bool | None = None
    captured: bool | None = None
    sdpa_backend: str | None = None
    train_img_s: float | None = None
    train_ratio_vs_softmax: float | None = None
    train_error: str | None = None
    energy_mj_per_image: float | None = None
    gate: str = "not run"
    gate_error: float | None = None
    gate_tolerance: float | None = None
    error: str | None = None
    error_kind: str | None = None


@dataclass
class SweepRow:
    """One mechanism at one number of tokens of the sweep."""

    mechanism: str
    scope: str
    tokens: int
    latency_ms_p50: float | None = None
    ratio_vs_softmax: float | None = None
    error: str | None = None
    error_kind: str | None = None


@dataclass
class CrossoverRow:
    """From how many tokens on a mechanism beats softmax in the sweep."""

    mechanism: str
    scope: str
    kind: str
    tokens: float | None
    least_tokens: int
    most_tokens: int


@dataclass
class AccuracyRow:
    """One adaptation of the recipe's teacher."""

    mechanism: str
    conversion: str
    steps: dict = field(default_factory=dict)
    images_seen: int | None = None
    top1: float | None = None
    aligned_top1: float | None = None
    feature_cosine: float | None = None
    aligned_cosine: float | None = None
    teacher_top1: float | None = None
    kept: float | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass
class Results:
    """Everything that one bench run found; ``sweep``, ``crossover`` and ``accuracy`` are empty unless asked for."""

    machine: dict
    rows: list[Row] = field(default_factory=list)
    sweep: list[SweepRow] = field(default_factory=list)
    crossover: list[CrossoverRow] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)
    paper: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def resolutions(self) -> list[int]:
        return sorted({row.res for row in self.rows})

    def row(self, mechanism: str, res: int) -> Row | None:
        return next((row for row in self.rows if (row.mechanism, row.res) == (mechanism, res)), None)

    def mechanisms(self) -> list[str]:
        """Linear mechanisms with a row, in the rows' order: neither softmax nor the ceiling."""
        return list(dict.fromkeys(row.mechanism for row in self.rows if row.mechanism not in ("softmax", "none")))


ROW_CLASSES = {"rows": Row, "sweep": SweepRow, "crossover": CrossoverRow, "accuracy": AccuracyRow}


def to_json(results: Results) -> dict[str, Any]:
    """JSON has no infinity and no NaN: they become null."""
    written = json.dumps(dataclasses.asdict(results))
    return {"schema": SCHEMA_VERSION, **json.loads(written, parse_constant=lambda name: None)}


def read_results(path: Path) -> Results:
    """Reads ``results.json``.

    Raises:
        ValueError: It has another schema, or a row has other fields than this version writes.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.pop("schema", None) != SCHEMA_VERSION:
        raise ValueError(f"{path} has another schema than {SCHEMA_VERSION}")
    try:
        for name, row_class in ROW_CLASSES.items():
            stored[name] = [row_class(**row) for row in stored[name]]
        return Results(**stored)
    except TypeError as error:
        raise ValueError(f"{path} does not follow the schema: {error}") from error


def crossover(points: Sequence[tuple[int, float | None]]) -> tuple[str, float | None]:
    """Where the ratio to softmax reaches 1 for good, from pairs of tokens and ratio (None where it was not measured).

    Returns:
        ``within`` the range, ``always`` in it, ``never`` in it, or ``unknown`` for want of measurements; and for
        ``within`` the tokens, interpolated on log scales between the counts measured.
    """
    known = sorted((tokens, ratio) for tokens, ratio in points if ratio is not None and ratio > 0)
    slower = [index for index, (_, ratio) in enumerate(known) if ratio < 1]
    if not known or not slower:
        return ("always" if known else "unknown"), None
    if slower[-1] == len(known) - 1:
        return "never", None
    (tokens, ratio), (next_tokens, next_ratio) = known[slower[-1]], known[slower[-1] + 1]
    share = -math.log(ratio) / (math.log(next_ratio) - math.log(ratio))
    return "within", math.exp(math.log(tokens) + share * math.log(next_tokens / tokens))
