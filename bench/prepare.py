"""Networks ready for the clock: built over the same weights, gated, warmed, compiled where that pays."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import (
    DTYPES,
    Case,
    build_model,
    describe_error,
    is_out_of_memory,
    make_images,
    randomize,
    run_gate,
    share_weights,
)
from results import Row, SweepRow
from settings import Settings
from timing import (
    LEAST_ROUNDS,
    Runner,
    Samples,
    compiled,
    forward_runner,
    interleave,
    iterations_for,
    measure_for,
    rounds_within,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# The compiled network must give what the eager one gives, up to rounding that adds up over its blocks.
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
OUT_OF_MEMORY = "out of memory"


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


def build_backbone_on(settings: Settings, image_size: tuple[int, int]) -> VisionTransformer:
    backbone = settings.backbone.build(image_size)
    randomize(backbone)
    return backbone.eval().requires_grad_(False).to(settings.device, DTYPES[settings.dtype])


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
    except Exception as error:
        if settings.compile == "on" or is_out_of_memory(error):
            raise
        say(f"not compiled: {describe_error(error)[:200]}")
        return eager, seconds, False
    # In turns, so that a hiccup of the machine does not decide.
    pairs = [[measure(runner, iterations_for(seconds)) for runner in (fast, eager)] for _ in range(5)]
    fast_seconds, eager_seconds = (min(times) for times in zip(*pairs, strict=True))
    if settings.compile == "on":
        return fast, fast_seconds, True
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
