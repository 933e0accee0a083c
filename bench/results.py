"""The schema of ``results.json``: the dataclasses here, field by field. docs/BENCH.md explains it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


@dataclass
class Row:
    """One mechanism at one resolution. What was not measured is None.

    Attributes:
        mechanism: Its name; ``none`` passes values through.
        res: Height and width in pixels, after rounding down to the patch.
        tokens: N of one image, prefix tokens included.
        batch: Images of one forward pass.
        dtype: Of weights and activations.
        options: Options of the mechanism that are not its defaults.
        params_m: Parameters of the network without a head, in millions.
        gmacs: Multiply-accumulates of one image by formula, in 1e9.
        gmacs_counted: The same by PyTorch's counter.
        peak_mem_mib: Highest memory during a forward pass; on a CPU above the process before the network was built.
        weights_mib: Of that, parameters and buffers.
        activations_mib: Highest during a forward pass above what rests between two of them.
        process_mib: Memory of the whole process (NVML on a GPU, resident set on a CPU).
        latency_ms_p20: A forward pass of the whole batch, 20th percentile over rounds.
        latency_ms_p50: Median over rounds.
        latency_ms_p80: 80th percentile over rounds.
        throughput_img_s: Images a second at the median latency.
        ratio_vs_softmax: How many times faster than softmax; median over rounds of the ratio within a round.
        ratio_vs_softmax_low: Lower end of that median's 95 % confidence interval over rounds.
        ratio_vs_softmax_high: Its upper end.
        ratio_vs_none: Share of the speed of a network without attention, taken alike; at most about 1.
        rounds: Timed rounds.
        compiled: Whether the forward pass was that of torch.compile.
        sdpa_backend: Backend that softmax was pinned to; ``unfused`` where it is three operations.
        train_img_s: Images a second of a Stage 2 step, teacher included.
        train_ratio_vs_softmax: How many times faster than a step of a softmax student.
        train_error: Why there is no training speed although it was asked for.
        energy_mj_per_image: Of the whole GPU, in millijoules.
        gate: ``green``, ``red``, or ``not run`` (the row failed before).
        gate_error: rms(reference - out) / rms(reference) on the inputs of the case.
        gate_tolerance: Largest permitted.
        error: One sentence, where the row failed.
        error_kind: ``out of memory``, ``macs`` (formula and counter disagree), ``gate`` or ``exception``.
    """

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
    """One mechanism at one number of tokens of the sweep.

    Attributes:
        mechanism: Its name.
        scope: ``operator`` (the mixing of one layer) or ``network``.
        tokens: N of one image.
        latency_ms_p50: Median over rounds.
        ratio_vs_softmax: How many times faster than softmax.
        error: One sentence, where it failed.
        error_kind: As in :class:`Row`.
    """

    mechanism: str
    scope: str
    tokens: int
    latency_ms_p50: float | None = None
    ratio_vs_softmax: float | None = None
    error: str | None = None
    error_kind: str | None = None


@dataclass
class CrossoverRow:
    """From how many tokens on a mechanism beats softmax in the sweep.

    Attributes:
        mechanism: Its name.
        scope: ``operator`` or ``network``.
        kind: ``within`` the range, ``always`` or ``never`` in it, or ``unknown``.
        tokens: Interpolated; None unless ``kind`` is ``within``.
        least_tokens: Where the range begins.
        most_tokens: Where it ends.
    """

    mechanism: str
    scope: str
    kind: str
    tokens: float | None
    least_tokens: int
    most_tokens: int


@dataclass
class AccuracyRow:
    """One adaptation of the recipe's teacher.

    Attributes:
        mechanism: Its name.
        conversion: ``adala`` or ``native``.
        steps: Optimizer steps by stage number.
        images_seen: Training images over all stages; the same for every row to within half a batch for each stage.
        top1: Of the last stage on the held-out split, in percent.
        aligned_top1: Of a linear probe on the features after Stage 2, in percent; only ``adala`` has that stage.
        feature_cosine: Of the last stage's final features to the teacher's, mean over tokens.
        aligned_cosine: The same after Stage 2.
        teacher_top1: Of a linear probe on the teacher's features, in percent.
        kept: ``top1`` over ``teacher_top1``.
        seconds: Wall time of the whole adaptation.
        error: One sentence, where it failed.
    """

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
    """Everything that one bench run found.

    Attributes:
        machine: Conditions, see docs/BENCH.md.
        rows: Mechanism by resolution.
        sweep: Empty without ``--sweep``.
        crossover: Empty without ``--sweep``.
        accuracy: Empty without ``--accuracy``.
        paper: Our parameters and MACs of the paper's table (ViT-L/16 at 512 px), by formula.
        notes: What the run said about itself: rounded resolutions, choices made.
    """

    machine: dict
    rows: list[Row] = field(default_factory=list)
    sweep: list[SweepRow] = field(default_factory=list)
    crossover: list[CrossoverRow] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)
    paper: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


LISTS = {"rows": Row, "sweep": SweepRow, "crossover": CrossoverRow, "accuracy": AccuracyRow}


def to_json(results: Results) -> dict[str, Any]:
    return {"schema": SCHEMA_VERSION, **_finite(dataclasses.asdict(results))}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_results(path: Path) -> Results:
    """Reads ``results.json``.

    Raises:
        ValueError: It has another schema, or a row has other fields than this version writes.
    """
    stored = json.loads(path.read_text())
    if stored.pop("schema", None) != SCHEMA_VERSION:
        raise ValueError(f"{path} has another schema than {SCHEMA_VERSION}")
    try:
        for name, row_class in LISTS.items():
            stored[name] = [row_class(**row) for row in stored[name]]
        return Results(**stored)
    except TypeError as error:
        raise ValueError(f"{path} does not follow the schema: {error}") from error


def write_results(path: Path, results: Results) -> None:
    """Writes ``results.json``, whole or not at all.

    Args:
        path: Of the file; its folder exists.
        results: What a run found.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(to_json(results), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


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
