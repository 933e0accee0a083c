"""Measures every mechanism under identical conditions: is it worth it, from which size on, and at what loss?

python bench/run_all.py --res 512 1024
python bench/run_all.py --res 256 512 1024 --protocol paper --train --sweep --out runs/bench-paper
python bench/run_all.py --accuracy --out runs/bench

Writes results.json, report.md and report.html into the folder --out. docs/BENCH.md says how to read them.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import (
    DTYPES,
    MECHANISMS,
    NONE,
    SOFTMAX,
    UNFUSED,
    Backbone,
    Case,
    build_model,
    capture_calls,
    check_mechanisms,
    default_backbone,
    describe_error,
    is_out_of_memory,
    make_images,
    mechanism_options,
    randomize,
    rounded_size,
    run_gate,
    share_weights,
)
from cost import MACS_TOLERANCE, MemoryCaseFailed, measure_cost, measure_memory_apart, num_tokens
from report import write_report
from results import CrossoverRow, Results, Row, SweepRow, read_results
from timing import (
    LEAST_ROUNDS,
    SDPA_BACKENDS,
    Nvml,
    Runner,
    Samples,
    bfloat16_pays_on_cpu,
    compiled,
    crossover,
    describe_machine,
    doubling_grids,
    energy_mj_per_image,
    fastest_sdpa_backend,
    forward_runner,
    interleave,
    iterations_for,
    keep_freed_memory,
    measure_for,
    percentile,
    rounds_within,
    speedup,
    train_runner,
    without_tf32,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# The compiled network must give what the eager one gives, up to rounding that adds up over its blocks.
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, with everything that depends on the device filled in.

    Attributes:
        backbone: The network around the mechanisms.
        outline: That network without memory for its weights.
        device: Where everything runs.
        protocol: ``paper`` or ``best``.
        dtype: Name of the dtype of weights and activations.
        batch: Images of one forward pass.
        mechanisms: In the order of the rows.
        most_rounds: Largest number of timed rounds.
        compile: ``auto``, ``on`` or ``off``.
        sdpa: ``auto`` or the name of a backend.
        softmax: By image size, what softmax attention is computed by; see :meth:`softmax_at`.
    """

    backbone: Backbone
    outline: VisionTransformer
    device: torch.device
    protocol: str
    dtype: str
    batch: int
    mechanisms: tuple[str, ...]
    most_rounds: int
    compile: str
    sdpa: str
    softmax: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def patch_size(self) -> tuple[int, int]:
        return tuple(self.outline.patch_embed.patch_size)

    def softmax_at(self, image_size: tuple[int, int]) -> str:
        """``unfused``, the backend asked for, or whichever is fastest at this size, found out once."""
        if self.protocol == "paper":
            return UNFUSED
        if self.sdpa != "auto":
            return self.sdpa
        if image_size not in self.softmax:
            attention = self.outline.blocks[0].attn
            shape = (self.batch, num_tokens(self.outline, image_size), 3, attention.num_heads, attention.head_dim)
            packed = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            q, k, v = packed.to(self.device, DTYPES[self.dtype]).permute(2, 0, 3, 1, 4).unbind(0)
            self.softmax[image_size] = fastest_sdpa_backend(q, k, v)
        return self.softmax[image_size]

    def case(self, mechanism: str, image_size: tuple[int, int]) -> Case:
        softmax = self.softmax_at(image_size) if mechanism == SOFTMAX else None
        options = mechanism_options(mechanism, self.protocol)
        return Case(self.backbone, mechanism, image_size, options, self.batch, self.dtype, softmax)

    def cases(self, image_size: tuple[int, int]) -> dict[str, Case]:
        return {mechanism: self.case(mechanism, image_size) for mechanism in self.mechanisms}


def say(message: str = "") -> None:
    print(message, flush=True)


@dataclass(frozen=True)
class Failure:
    """Why a case has no numbers: the row's ``error`` and ``error_kind``."""

    error: str
    kind: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        out_of_memory = is_out_of_memory(error) or getattr(error, "out_of_memory", False)
        return cls(describe_error(error), OUT_OF_MEMORY if out_of_memory else "exception")


def fail(row: Row | SweepRow, failure: Failure) -> None:
    """Marks a row as failed; the first failure stays."""
    if row.error is None:
        row.error, row.error_kind = failure.error, failure.kind
        say(f"{row.mechanism:>14}  {failure.kind}: {failure.error}")


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_costs(settings: Settings, rows: dict[str, Row], image_size: tuple[int, int]) -> None:
    """Fills in tokens, parameters and MACs of a resolution's rows; formula and counter must agree."""
    for mechanism, case in settings.cases(image_size).items():
        row = rows[mechanism]
        try:
            cost = measure_cost(case)
        except Exception as error:
            fail(row, Failure.of(error))
            continue
        row.tokens, row.params_m = cost.tokens, cost.parameters / 1e6
        row.gmacs, row.gmacs_counted = cost.macs / 1e9, cost.macs_counted / 1e9
        if cost.disagreement > MACS_TOLERANCE:
            said = f"the formula says {row.gmacs:.4g} GMACs, the counter {row.gmacs_counted:.4g}"
            fail(row, Failure(f"{said}: they differ by {100 * cost.disagreement:.1f} %", "macs"))


def measure_memories(settings: Settings, rows: dict[str, Row], image_size: tuple[int, int]) -> None:
    """Fills in the memory of a resolution's rows, each from a process of its own."""
    for mechanism, case in settings.cases(image_size).items():
        row = rows[mechanism]
        if row.error is not None:
            continue
        try:
            memory = measure_memory_apart(case, settings.device)
        except MemoryCaseFailed as error:
            kind = OUT_OF_MEMORY if error.out_of_memory else "exception"
            fail(row, Failure(str(error), kind))
            continue
        row.peak_mem_mib, row.weights_mib = memory.peak_mem_mib, memory.weights_mib
        row.activations_mib, row.process_mib = memory.activations_mib, memory.process_mib


@dataclass
class Prepared:
    """The networks of one image size, ready for the clock: gated, warmed, and timed once.

    Attributes:
        runners: A forward pass of each mechanism that passed.
        seconds: What one takes, roughly.
        models: The networks.
        failures: What the others failed with.
        gates: Verdict of each that got so far, with error and tolerance.
        is_compiled: Whether a runner is that of torch.compile.
    """

    runners: dict[str, Runner]
    seconds: dict[str, float]
    models: dict[str, VisionTransformer]
    failures: dict[str, Failure]
    gates: dict[str, Any]
    is_compiled: dict[str, bool]


def build_backbone_on(settings: Settings, image_size: tuple[int, int]) -> VisionTransformer:
    backbone = settings.backbone.build(image_size)
    randomize(backbone)
    return backbone.eval().requires_grad_(False).to(settings.device, DTYPES[settings.dtype])


def prepare(settings: Settings, image_size: tuple[int, int], mechanisms: Sequence[str]) -> Prepared:
    """Builds, gates and warms the networks of one image size over the same weights and input."""
    ready = Prepared({}, {}, {}, {}, {}, {})
    measure = measure_for(settings.device)
    if not mechanisms:
        return ready
    backbone = build_backbone_on(settings, image_size)
    images = make_images(settings.case(mechanisms[0], image_size), settings.device)
    for mechanism in mechanisms:
        case = settings.case(mechanism, image_size)
        try:
            model = build_model(case, backbone).to(settings.device, case.torch_dtype)
            share_weights(model, backbone)
            runner = forward_runner(lambda model=model: model(images), case.pinned_backend)
            gate = run_gate(mechanism, model, runner)
            ready.gates[mechanism] = gate
            if not gate.green:
                said = (
                    f"differs from its reference by {gate.error:.2g} (below {gate.tolerance:.0e}), its worst token by"
                )
                ready.failures[mechanism] = Failure(f"{said} {gate.worst_row:.2g}", "gate")
                continue
            measure(runner, 1)
            seconds = measure(runner, 1)
            runner, seconds, is_compiled = maybe_compile(settings, model, images, runner, seconds, case, measure)
        except Exception as error:
            ready.failures[mechanism] = Failure.of(error)
            # The traceback keeps the failed network and its activations alive.
            error.__traceback__ = None
            release(settings.device)
            continue
        ready.models[mechanism], ready.runners[mechanism] = model, runner
        ready.seconds[mechanism], ready.is_compiled[mechanism] = seconds, is_compiled
    return ready


def maybe_compile(
    settings: Settings,
    model: VisionTransformer,
    images: Tensor,
    eager: Runner,
    seconds: float,
    case: Case,
    measure: Callable[[Runner, int], float],
) -> tuple[Runner, float, bool]:
    """The compiled forward pass where it is asked for and, with ``auto``, where it is the faster one for this case.

    Raises:
        RuntimeError: It was asked for, and gives something else than the eager one.
    """
    if settings.compile == "off":
        return eager, seconds, False
    try:
        forward = compiled(model)
        fast = forward_runner(lambda: forward(images), case.pinned_backend)
        expected, found = eager().float(), fast().float()
        error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        if not error <= COMPILED_TOLERANCE[DTYPES[settings.dtype]]:
            raise RuntimeError(f"torch.compile changes the output by {error:.2g}")
        measure(fast, 2)
        fast_seconds = min(measure(fast, iterations_for(seconds)) for _ in range(3))
    except Exception as error:
        if settings.compile == "on" or is_out_of_memory(error):
            raise
        say(f"not compiled: {describe_error(error)[:200]}")
        return eager, seconds, False
    if settings.compile == "on":
        return fast, fast_seconds, True
    eager_seconds = min(measure(eager, iterations_for(seconds)) for _ in range(3))
    return (fast, fast_seconds, True) if fast_seconds < eager_seconds else (eager, eager_seconds, False)


def time_rounds(
    settings: Settings, runners: dict[str, Runner], seconds: dict[str, float], budget_s: float
) -> Samples:  # fmt: skip
    """Interleaved rounds of what was prepared, as many as the budget allows."""
    iterations = {name: iterations_for(seconds[name]) for name in runners}
    round_s = sum(iterations[name] * seconds[name] for name in runners)
    rounds = rounds_within(budget_s, round_s, settings.most_rounds)
    deadline = time.monotonic() + budget_s

    def late(done: int) -> bool:
        return done >= LEAST_ROUNDS and time.monotonic() > deadline

    return interleave(runners, rounds, iterations, measure_for(settings.device), late)


def time_size(
    settings: Settings, rows: dict[str, Row], image_size: tuple[int, int], budget: Callable[[float], float]
) -> None:
    """Fills in gate, latencies, ratios and energy of a resolution's rows.

    Args:
        settings: The bench's.
        rows: By mechanism.
        image_size: Height and width.
        budget: From what one pass over all cases takes to the seconds that the rounds may.
    """
    ready = prepare(settings, image_size, [name for name in settings.mechanisms if rows[name].error is None])
    for mechanism, row in rows.items():
        gate = ready.gates.get(mechanism)
        if gate is not None:
            row.gate, row.gate_error, row.gate_tolerance = "green" if gate.green else "red", gate.error, gate.tolerance
        if mechanism in ready.failures:
            fail(row, ready.failures[mechanism])
    samples = time_rounds(settings, ready.runners, ready.seconds, budget(sum(ready.seconds.values())))
    for mechanism, error in samples.errors.items():
        fail(rows[mechanism], Failure.of(error))
    nvml = Nvml(settings.device)
    for mechanism, seconds in samples.seconds.items():
        row = rows[mechanism]
        if row.error is None:
            fill_in_times(row, seconds, samples)
            row.compiled = ready.is_compiled[mechanism]
            row.sdpa_backend = settings.case(mechanism, image_size).softmax
            row.energy_mj_per_image = energy_mj_per_image(
                ready.runners[mechanism], row.batch, ready.seconds[mechanism], nvml, settings.device
            )
            ratio = "" if row.ratio_vs_softmax is None else f"  {row.ratio_vs_softmax:6.2f} x softmax"
            say(f"{mechanism:>14}  {row.latency_ms_p50:9.1f} ms  {row.throughput_img_s:8.2f} images/s{ratio}")
    say(f"{'':>14}  {samples.rounds} rounds, softmax {settings.softmax_at(image_size)}")
    del ready
    release(settings.device)


def fill_in_times(row: Row, seconds: Sequence[float | None], samples: Samples) -> None:
    ms = [1000 * value for value in seconds if value is not None]
    row.latency_ms_p20, row.latency_ms_p50, row.latency_ms_p80 = (percentile(ms, p) for p in (20, 50, 80))
    row.throughput_img_s = 1000 * row.batch / row.latency_ms_p50
    row.rounds = len(ms)
    for name, attribute in ((SOFTMAX, "ratio_vs_softmax"), (NONE, "ratio_vs_none")):
        if name in samples.seconds and name not in samples.errors:
            setattr(row, attribute, speedup(samples.seconds[name], seconds))


def train_size(settings: Settings, rows: dict[str, Row], image_size: tuple[int, int], budget_s: float) -> None:
    """Fills in the training speed of a resolution's rows that stand so far."""
    backbone = build_backbone_on(settings, image_size)
    for block in backbone.blocks:
        block.attn.fused_attn = settings.protocol == "best"
    measure = measure_for(settings.device)
    runners, seconds, errors = {}, {}, {}
    for mechanism, row in rows.items():
        if row.error is not None:
            continue
        case = settings.case(mechanism, image_size)
        try:
            student = build_model(case, backbone).to(settings.device, case.torch_dtype)
            runner = train_runner(student, backbone, make_images(case, settings.device))
            measure(runner, 1)
            seconds[mechanism] = measure(runner, 1)
            runners[mechanism] = runner
        except Exception as error:
            errors[mechanism] = error
            error.__traceback__ = None
            release(settings.device)
    samples = time_rounds(settings, runners, seconds, budget_s)
    for mechanism, error in (errors | samples.errors).items():
        failure = Failure.of(error)
        rows[mechanism].train_error = f"{failure.kind}: {failure.error}"
        say(f"{mechanism:>14}  training: {rows[mechanism].train_error}")
    for mechanism, values in samples.seconds.items():
        if mechanism not in samples.errors:
            row = rows[mechanism]
            row.train_img_s = row.batch / percentile([value for value in values if value is not None], 50)
            if SOFTMAX in samples.seconds and SOFTMAX not in samples.errors:
                row.train_ratio_vs_softmax = speedup(samples.seconds[SOFTMAX], values)
            say(f"{mechanism:>14}  {row.train_img_s:8.3f} training images/s")
    del runners
    release(settings.device)


def run_sweep(settings: Settings, most_tokens: int, budget_s: float) -> tuple[list[SweepRow], list[CrossoverRow]]:
    """Every mechanism against softmax over doubling token counts, alone and in the network."""
    rows: list[SweepRow] = []
    grids = doubling_grids(most_tokens)
    deadline = time.monotonic() + budget_s
    for index, grid in enumerate(grids):
        image_size = tuple(count * patch for count, patch in zip(grid, settings.patch_size, strict=True))
        say(f"sweep: {image_size[0]} x {image_size[1]} px, {grid[0] * grid[1]} patches")
        ready = prepare(settings, image_size, settings.mechanisms)
        tokens = grid[0] * grid[1] + settings.outline.num_prefix_tokens
        for scope in ("operator", "network"):
            runners, seconds = ready.runners, ready.seconds
            if scope == "operator":
                runners, seconds = operator_runners(settings, ready, image_size)
            # What is left, shared such that each count may take twice as long as the one before.
            share = max(0.0, deadline - time.monotonic()) / (2 ** (len(grids) - index + 1) - 2)
            samples = time_rounds(settings, runners, seconds, share)
            rows += sweep_rows(settings, ready, samples, scope, tokens)
        del ready, runners, samples
        release(settings.device)
    return rows, crossover_rows(settings, rows)


def operator_runners(
    settings: Settings, ready: Prepared, image_size: tuple[int, int]
) -> tuple[dict[str, Runner], dict[str, float]]:
    """The mixing of the first block alone, over q, k, v as strided views of one packed projection."""
    measure = measure_for(settings.device)
    runners, seconds = {}, {}
    images = make_images(settings.case(NONE, image_size), settings.device)
    for name, model in ready.models.items():
        pinned = settings.case(name, image_size).pinned_backend
        call = capture_calls(model, forward_runner(lambda model=model: model(images), pinned))[0]
        packed = torch.stack([x.transpose(1, 2) for x in (call.q, call.k, call.v)], dim=2)  # (B, N, 3, H, d)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        runners[name] = forward_runner(partial(call.mixer, q, k, v, call.layout), pinned)
        measure(runners[name], 1)
        seconds[name] = measure(runners[name], 1)
    return runners, seconds


def sweep_rows(settings: Settings, ready: Prepared, samples: Samples, scope: str, tokens: int) -> Iterator[SweepRow]:
    for mechanism in settings.mechanisms:
        row = SweepRow(mechanism, scope, tokens)
        failure = ready.failures.get(mechanism)
        if mechanism in samples.errors:
            failure = Failure.of(samples.errors[mechanism])
        if failure is not None:
            fail(row, failure)
        else:
            seconds = samples.seconds[mechanism]
            row.latency_ms_p50 = 1000 * percentile([value for value in seconds if value is not None], 50)
            if SOFTMAX in samples.seconds and SOFTMAX not in samples.errors:
                row.ratio_vs_softmax = speedup(samples.seconds[SOFTMAX], seconds)
        yield row


def crossover_rows(settings: Settings, rows: Sequence[SweepRow]) -> list[CrossoverRow]:
    found = []
    for mechanism in settings.mechanisms:
        for scope in ("operator", "network"):
            points = [
                (row.tokens, row.ratio_vs_softmax) for row in rows if (row.mechanism, row.scope) == (mechanism, scope)
            ]
            if mechanism != SOFTMAX and points:
                where, counts = crossover(points), [tokens for tokens, _ in points]
                found.append(CrossoverRow(mechanism, scope, where.kind, where.tokens, min(counts), max(counts)))
    return found


def paper_table() -> list[dict[str, Any]]:
    """Our parameters and MACs of the network in the paper's table, whatever was measured: they need no clock."""
    backbone = Backbone("vit_large_patch16_224", {"init_values": 1e-5})
    table = []
    for mechanism in MECHANISMS:
        cost = measure_cost(Case(backbone, mechanism, (512, 512), mechanism_options(mechanism, "paper")))
        table.append({"mechanism": mechanism, "parameters": cost.parameters, "gmacs": cost.macs / 1e9})
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--res", type=int, nargs="*", default=None, help="pixels, height and width (512 1024)")
    parser.add_argument("--mechanisms", nargs="+", default=list(MECHANISMS), help=", ".join(MECHANISMS))
    parser.add_argument("--backbone", help="any plain timm ViT (ViT-L/16 on a GPU, ViT-S/16 on a CPU)")
    parser.add_argument("--model-args", type=json.loads, help="JSON, further arguments of timm's constructor")
    parser.add_argument("--protocol", choices=["paper", "best"], default="best", help="see docs/BENCH.md (best)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of weights and activations")
    parser.add_argument("--batch", type=int, default=1, help="images of one forward pass (1)")
    parser.add_argument("--rounds", type=int, default=30, help="most timed rounds; the budget may allow fewer (30)")
    parser.add_argument("--time-budget-s", type=float, default=780, help="seconds for all of --res together (780)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="threads on a CPU (PyTorch's choice)")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile")
    parser.add_argument("--sdpa", choices=["auto", *SDPA_BACKENDS], default="auto", help="kernel of fused softmax")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of each case")
    parser.add_argument("--train", action="store_true", help="also time a Stage 2 step, teacher included")
    parser.add_argument("--sweep", action="store_true", help="also look for the crossover over token counts")
    parser.add_argument("--sweep-max-tokens", type=int, help="largest patch count (4096 on a CPU, 16384 on a GPU)")
    parser.add_argument("--sweep-budget-s", type=float, default=900, help="seconds for the rounds of --sweep (900)")
    parser.add_argument("--accuracy", action="store_true", help="also adapt every mechanism and score it")
    parser.add_argument("--recipe", default="tiny", help="recipe of --accuracy (tiny)")
    parser.add_argument(
        "--accuracy-images", type=int, default=9600, help="training images of one adaptation, all stages (9600)"
    )
    parser.add_argument(
        "--accuracy-set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe (stage1.lr=1e-3)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the report (runs/bench)")
    parser.add_argument("--add", action="store_true", help="keep what the report in --out has and this run does not")
    return parser


def build_settings(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Settings, and notes about what was chosen; the first says which network.

    Raises:
        ValueError: A mechanism that the bench does not know, or a backbone that is none.
    """
    check_mechanisms(options.mechanisms)
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    backbone = default_backbone(device)
    if options.backbone is not None:
        backbone = Backbone(options.backbone, options.model_args or {})
    elif options.model_args is not None:
        backbone = replace(backbone, model_args=backbone.model_args | options.model_args)
    model = backbone.build_outline()
    why = "as asked for"
    if options.backbone is None:
        why = "the default on a GPU" if on_gpu else "the default on a CPU; on a GPU it is ViT-L/16"
    patch = tuple(model.patch_embed.patch_size)
    arguments = f" {json.dumps(backbone.model_args)}" if backbone.model_args else ""
    notes = [
        f"backbone {backbone.name}{arguments}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"patch {patch[0]} ({why})"
    ]
    dtype, reason = options.dtype, "as asked for"
    if dtype == "auto" and options.protocol == "paper":
        dtype, reason = "float32", "the protocol's"
    elif dtype == "auto":
        pays = on_gpu or bfloat16_pays_on_cpu()
        dtype = "bfloat16" if pays else "float32"
        reason = "the protocol's" if pays else "this CPU has no fast bfloat16"
    notes.append(f"protocol {options.protocol}, batch {options.batch}, {dtype} ({reason})")
    compile_mode = options.compile
    if compile_mode == "auto" and (options.protocol == "paper" or not on_gpu):
        compile_mode = "off"
    settings = Settings(
        backbone=backbone,
        outline=model,
        device=device,
        protocol=options.protocol,
        dtype=dtype,
        batch=options.batch,
        mechanisms=tuple(name for name in MECHANISMS if name in options.mechanisms),
        most_rounds=options.rounds,
        compile=compile_mode,
        sdpa=options.sdpa,
    )
    return settings, notes


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def image_sizes(settings: Settings, resolutions: Sequence[int], notes: list[str]) -> list[tuple[int, int]]:
    """Sizes that the patch divides, in ascending order; rounding is noted."""
    sizes = []
    for res in sorted(set(resolutions)):
        size = rounded_size(res, settings.patch_size)
        if size != (res, res):
            patch = settings.patch_size
            notes.append(f"{res} px is not divisible by the patch of {patch[0]} px: rounded down to {size[0]} px")
        if size not in sizes:
            sizes.append(size)
    return sizes


def measure_rows(
    settings: Settings, options: argparse.Namespace, results: Results, sizes: Sequence[tuple[int, int]], started: float
) -> None:
    """All rows of all resolutions, within the time budget but for the least number of rounds."""
    by_size = {}
    for size in sizes:
        by_size[size] = {
            name: Row(name, size[0], batch=case.batch, dtype=case.dtype, options=case.options)
            for name, case in settings.cases(size).items()
        }
        results.rows += by_size[size].values()
        measure_costs(settings, by_size[size], size)
    if not options.no_memory:
        for size in sizes:
            say(f"memory at {size[0]} px, one process a case")
            measure_memories(settings, by_size[size], size)
    deadline = started + options.time_budget_s
    for index, size in enumerate(sizes):
        rows = by_size[size]
        say(f"times at {size[0]} px, {next(iter(rows.values())).tokens} tokens")
        later = [sum(row.gmacs or 0 for row in by_size[s].values()) for s in sizes[index + 1 :]]
        own = sum(row.gmacs or 0 for row in rows.values()) or 1.0

        def budget(pass_s: float, later: list[float] = later, own: float = own) -> float:
            # What is left after the later sizes' gates and warm-ups (about four passes each), shared evenly.
            reserved = 4 * pass_s * sum(later) / own
            return max(0.0, deadline - time.monotonic() - reserved) / (1 + len(later))

        time_size(settings, rows, size, budget)
        write_report(options.out, results)
    if options.train:
        for size in sizes:
            say(f"training at {size[0]} px")
            train_size(settings, by_size[size], size, options.time_budget_s / len(sizes))


def exit_code(results: Results) -> int:
    """1 if a row is red or failed for another reason than memory."""
    rows = [*results.rows, *results.sweep]
    failed = any(row.error is not None and row.error_kind != OUT_OF_MEMORY for row in rows)
    failed |= any(row.train_error is not None and not row.train_error.startswith(OUT_OF_MEMORY) for row in results.rows)
    return int(failed or any(row.error is not None for row in results.accuracy))


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        settings, notes = build_settings(options)
        resolutions = options.res
        if resolutions is None:
            resolutions = [] if options.accuracy or options.sweep else [512, 1024]
        sizes = image_sizes(settings, resolutions, notes)
        earlier = read_results(options.out / "results.json") if options.add else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in notes:
        say(note)
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)
    freed_memory_kept = settings.device.type == "cpu" and keep_freed_memory()
    machine = describe_machine(settings.device) | {
        "backbone": settings.backbone.name,
        "model_args": settings.backbone.model_args,
        "patch_size": list(settings.patch_size),
        "num_prefix_tokens": settings.outline.num_prefix_tokens,
        "protocol": settings.protocol,
        "dtype": settings.dtype,
        "batch": settings.batch,
        "tf32": False,
        "compile": settings.compile,
        "softmax": "fused" if settings.protocol == "best" else UNFUSED,
        "time_budget_s": options.time_budget_s,
        "freed_memory_kept": freed_memory_kept,
    }
    results = Results(machine, notes=notes)
    with without_tf32():
        if sizes:
            measure_rows(settings, options, results, sizes, started)
        if options.sweep:
            most = options.sweep_max_tokens or (16384 if settings.device.type == "cuda" else 4096)
            results.sweep, results.crossover = run_sweep(settings, most, options.sweep_budget_s)
    results.paper = paper_table()
    if options.accuracy:
        # Only here: it brings deepspeed, which takes seconds and memory.
        from accuracy import measure_accuracy

        machine["recipe"] = Path(options.recipe).stem
        write_report(options.out, results if earlier is None else merged(earlier, results))
        try:
            results.accuracy = measure_accuracy(
                options.recipe,
                [name for name in settings.mechanisms if name != NONE],
                options.accuracy_images,
                options.out / "accuracy",
                options.accuracy_set,
            )
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    machine["seconds"] = round(time.monotonic() - started, 1)
    machine["load_average_end"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    write_report(options.out, results if earlier is None else merged(earlier, results))
    say(f"{options.out / 'report.html'} and report.md, results.json beside it, after {machine['seconds']:.0f} s")
    return exit_code(results)


def merged(earlier: Results, found: Results) -> Results:
    """The earlier report with everything that this run measured in its place; conditions are those of the rows."""
    whole = replace(earlier)
    if found.rows:
        whole = replace(whole, rows=found.rows, machine=found.machine, notes=found.notes)
    elif "recipe" in found.machine:
        whole = replace(whole, machine=earlier.machine | {"recipe": found.machine["recipe"]})
    for name in ("sweep", "crossover", "accuracy", "paper"):
        if getattr(found, name):
            whole = replace(whole, **{name: getattr(found, name)})
    return whole


if __name__ == "__main__":
    sys.exit(main())
