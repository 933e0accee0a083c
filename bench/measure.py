"""The columns of a row: costs, memory, gate, latencies and ratios, energy, training speed.

Networks are made ready for the clock first: built over the same weights, gated, warmed, compiled where that pays.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import cases
import cost
import timing
import torch
from cases import NONE, SOFTMAX
from results import Row, SweepRow
from settings import ImageSize, Settings
from timing import Runner, percentile
from torch import Tensor

from adala.families import Backbone

# The compiled network must give what the eager one gives, up to rounding that adds up over its blocks.
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def say(message: str = "") -> None:
    print(message, flush=True)


def fail(row: Row | SweepRow, error: BaseException) -> None:
    """Marks a row as failed; the first failure stays."""
    if row.error is None:
        row.error, row.error_kind = cases.failure(error)
        say(f"{row.mechanism:>14}  {row.error_kind}: {row.error}")


def fail_training(row: Row, error: BaseException) -> None:
    sentence, kind = cases.failure(error)
    row.train_error = f"{kind}: {sentence}"
    say(f"{row.mechanism:>14}  training: {row.train_error}")


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def failing(row: Row | SweepRow, device: torch.device, mark: Callable[..., None] = fail) -> Iterator[None]:
    """Marks the row with an exception of the block, and goes on behind the block."""
    try:
        yield
    except Exception as error:
        # The traceback would keep the failed network and its activations alive.
        mark(row, error.with_traceback(None))
        release(device)


@dataclass(frozen=True)
class Network:
    """A network that passed its gate, and its warmed forward pass, eager or of torch.compile, on a GPU as a graph."""

    model: Backbone
    runner: Runner
    is_compiled: bool = False
    is_captured: bool = False


def prepare(
    settings: Settings, image_size: ImageSize, rows: Mapping[str, Row | SweepRow]
) -> tuple[dict[str, Network], dict[str, cases.Gate]]:
    """Builds, gates and warms the networks of one image size over the same weights and input.

    Returns:
        Networks by mechanism, without those whose row has failed here, and the gates of all that got so far.
    """
    networks, gates = {}, {}
    backbone = build_backbone_on(settings, image_size)
    images = cases.make_images(replace(settings.network, image_size=image_size), settings.device)
    for mechanism, row in rows.items():
        with failing(row, settings.device):
            case = settings.case(mechanism, image_size)
            model = cases.build_model(case, backbone).to(settings.device, case.torch_dtype)
            cases.share_weights(model, backbone)
            runner = timing.forward_runner(lambda model=model: model(images), case.pinned_backend)
            gate = gates[mechanism] = cases.run_gate(model, runner)
            if not gate.green:
                said = f"{gate.error:.2g} (below {gate.tolerance:.0e}), its worst token by {gate.worst_row:.2g}"
                raise cases.CaseFailed(f"differs from its reference by {said}", "gate")
            eager = Network(model, timing.warmed(runner, timing.measure_for(settings.device)))
            networks[mechanism] = maybe_capture(settings, maybe_compile(settings, case, eager, images))
    return networks, gates


def build_backbone_on(settings: Settings, image_size: ImageSize) -> Backbone:
    backbone = replace(settings.network, image_size=image_size).build_backbone()
    cases.randomize(backbone)
    return backbone.eval().requires_grad_(False).to(settings.device, settings.network.torch_dtype)


def maybe_compile(settings: Settings, case: cases.Case, eager: Network, images: Tensor) -> Network:
    """The compiled forward pass where it is asked for and, with ``auto``, where it is the faster one for this case.

    Raises:
        RuntimeError: It was asked for, and gives something else than the eager one.
    """
    if settings.compile == "off":
        return eager
    measure = timing.measure_for(settings.device)
    try:
        forward = timing.compiled(eager.model)
        fast = timing.forward_runner(lambda: forward(images), case.pinned_backend)
        expected, found = eager.runner().float(), fast().float()
        error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        if not error <= COMPILED_TOLERANCE[case.torch_dtype]:
            raise RuntimeError(f"torch.compile changes the output by {error:.2g}")
        measure(fast, 2)
    except Exception as error:
        sentence, kind = cases.failure(error)
        if settings.compile == "on" or kind == cases.OUT_OF_MEMORY:
            raise
        say(f"not compiled: {sentence[:200]}")
        return eager
    # In turns, so that a hiccup of the machine does not decide.
    pairs = [[measure(runner, eager.runner.iterations) for runner in (fast, eager.runner)] for _ in range(5)]
    fast_s, eager_s = (min(times) for times in zip(*pairs, strict=True))
    if settings.compile == "on" or fast_s < eager_s:
        return Network(eager.model, replace(fast, seconds=fast_s), is_compiled=True)
    return replace(eager, runner=replace(eager.runner, seconds=eager_s))


def maybe_capture(settings: Settings, network: Network) -> Network:
    """The forward pass as a CUDA graph, where there is a GPU and the graph gives what the pass itself does."""
    if settings.device.type != "cuda":
        return network
    try:
        expected = network.runner().clone()
        runner = timing.captured(network.runner, settings.device)
        if not torch.equal(runner(), expected):
            raise RuntimeError("the CUDA graph gives another output")
        return replace(network, runner=timing.warmed(runner, timing.measure_for(settings.device)), is_captured=True)
    except Exception as error:
        sentence, kind = cases.failure(error)
        if kind == cases.OUT_OF_MEMORY:
            raise
        say(f"not captured in a CUDA graph: {sentence[:200]}")
        return network


def time_rounds(
    settings: Settings,
    runners: Mapping[str, Runner],
    rows: Mapping[str, Row | SweepRow],
    budget_s: float,
    mark: Callable[..., None] = fail,
) -> timing.Samples:
    samples = timing.interleave(runners, timing.measure_for(settings.device), settings.options.rounds, budget_s)
    for mechanism, error in samples.errors.items():
        mark(rows[mechanism], error)
    return samples


def measure_costs(settings: Settings, rows: Mapping[str, Row], image_size: ImageSize) -> None:
    """Fills in tokens, parameters and MACs of a resolution's rows."""
    for mechanism, row in rows.items():
        with failing(row, settings.device):
            found = cost.measure_cost(settings.case(mechanism, image_size))
            row.tokens, row.params_m = found.tokens, found.parameters / 1e6
            row.gmacs = row.gmacs_counted = found.macs / 1e9


def measure_memories(settings: Settings, rows: Mapping[str, Row], image_size: ImageSize) -> None:
    """Fills in the memory of a resolution's rows that stand so far, each from a process of its own."""
    for mechanism, row in standing(rows).items():
        with failing(row, settings.device):
            vars(row).update(cost.measure_memory_apart(settings.case(mechanism, image_size), settings.device))


def standing(rows: Mapping[str, Row]) -> dict[str, Row]:
    return {mechanism: row for mechanism, row in rows.items() if row.error is None}


def time_size(
    settings: Settings, rows: Mapping[str, Row], image_size: ImageSize, deadline: float, later: Sequence[float]
) -> None:
    """Fills in gate, latencies, ratios and energy of a resolution's rows that stand so far.

    Args:
        deadline: By the monotonic clock, for this size and all later ones.
        later: What a pass over all cases costs at each later size, relative to this one.
    """
    networks, gates = prepare(settings, image_size, standing(rows))
    for mechanism, gate in gates.items():
        row = rows[mechanism]
        row.gate, row.gate_error, row.gate_tolerance = "green" if gate.green else "red", gate.error, gate.tolerance
    runners = {mechanism: network.runner for mechanism, network in networks.items()}
    # What is left after the later sizes' gates and warm-ups (about four passes each), shared evenly.
    reserved = 4 * sum(runner.seconds for runner in runners.values()) * sum(later)
    budget_s = max(0.0, deadline - time.monotonic() - reserved) / (1 + len(later))
    samples = time_rounds(settings, runners, rows, budget_s)
    for mechanism, row in standing({name: rows[name] for name in networks}).items():
        fill_in_times(row, samples)
        row.compiled, row.captured = networks[mechanism].is_compiled, networks[mechanism].is_captured
        row.sdpa_backend = settings.case(mechanism, image_size).softmax
        row.energy_mj_per_image = timing.energy_mj_per_image(runners[mechanism], row.batch, settings.device)
        ratio = "" if row.ratio_vs_softmax is None else f"  {row.ratio_vs_softmax:6.2f} x softmax"
        say(f"{mechanism:>14}  {row.latency_ms_p50:9.1f} ms  {row.throughput_img_s:8.2f} images/s{ratio}")
    say(f"{'':>14}  {samples.rounds} rounds, softmax {settings.softmax_at(image_size)}")
    del networks, runners
    release(settings.device)


def fill_in_times(row: Row, samples: timing.Samples) -> None:
    seconds = samples.seconds[row.mechanism]
    p20, p50, p80 = (1000 * percentile(seconds, percent) for percent in (20, 50, 80))
    row.latency_ms_p20, row.latency_ms_p50, row.latency_ms_p80 = p20, p50, p80
    row.throughput_img_s, row.rounds = 1000 * row.batch / p50, len(seconds)
    speeds = samples.against(SOFTMAX, row.mechanism)
    row.ratio_vs_softmax, row.ratio_vs_softmax_low, row.ratio_vs_softmax_high = speeds
    row.ratio_vs_none, _, _ = samples.against(NONE, row.mechanism)


def train_size(settings: Settings, rows: Mapping[str, Row], image_size: ImageSize, budget_s: float) -> None:
    """Fills in the training speed of a resolution's rows that stand so far."""
    backbone = build_backbone_on(settings, image_size)
    for block in backbone.blocks:
        block.attn.fused_attn = settings.options.protocol == "best"
    runners: dict[str, Runner] = {}
    for mechanism, row in standing(rows).items():
        with failing(row, settings.device, fail_training):
            case = settings.case(mechanism, image_size)
            student = cases.build_model(case, backbone).to(settings.device, case.torch_dtype)
            runner = timing.train_runner(student, backbone, cases.make_images(case, settings.device))
            runners[mechanism] = timing.warmed(runner, timing.measure_for(settings.device))
    samples = time_rounds(settings, runners, rows, budget_s, fail_training)
    for mechanism in (name for name in runners if name not in samples.errors):
        row = rows[mechanism]
        row.train_img_s = row.batch / percentile(samples.seconds[mechanism], 50)
        row.train_ratio_vs_softmax, _, _ = samples.against(SOFTMAX, mechanism)
        say(f"{mechanism:>14}  {row.train_img_s:8.3f} training images/s")
    del runners
    release(settings.device)
