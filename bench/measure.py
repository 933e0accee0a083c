"""The columns of a row: costs, memory, gate, latencies and ratios, energy, training speed.

Networks are made ready for the clock first: built over the same weights, gated, warmed, compiled where that pays.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from cases import (
    NONE,
    OUT_OF_MEMORY,
    SOFTMAX,
    Case,
    CaseFailed,
    Gate,
    build_model,
    failure,
    make_images,
    randomize,
    run_gate,
    share_weights,
)
from cost import measure_cost, measure_memory_apart
from results import Row, SweepRow
from settings import Settings
from timing import (
    LEAST_ROUNDS,
    Runner,
    Samples,
    compiled,
    energy_mj_per_image,
    forward_runner,
    interleave,
    iterations_for,
    measure_for,
    percentile,
    rounds_within,
    train_runner,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# The compiled network must give what the eager one gives, up to rounding that adds up over its blocks.
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def say(message: str = "") -> None:
    print(message, flush=True)


def fail(row: Row | SweepRow, error: BaseException) -> None:
    """Marks a row as failed; the first failure stays."""
    if row.error is None:
        row.error, row.error_kind = failure(error)
        say(f"{row.mechanism:>14}  {row.error_kind}: {row.error}")


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def kept_in(errors: dict[str, Exception], mechanism: str, device: torch.device) -> Iterator[None]:
    """Keeps an exception beside the mechanism's name and goes on behind the block."""
    try:
        yield
    except Exception as error:
        # The traceback would keep the failed network and its activations alive.
        errors[mechanism] = error.with_traceback(None)
        release(device)


@dataclass(frozen=True)
class Network:
    """A network that passed its gate and was warmed.

    Attributes:
        model: The network, eager.
        runner: A forward pass.
        seconds: What one takes, roughly.
        is_compiled: Whether the runner is that of torch.compile.
    """

    model: VisionTransformer
    runner: Runner
    seconds: float
    is_compiled: bool = False


@dataclass
class Prepared:
    """The networks of one image size by mechanism, the gates of those that got so far, and what the others raised."""

    networks: dict[str, Network] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


def build_backbone_on(settings: Settings, image_size: tuple[int, int]) -> VisionTransformer:
    backbone = replace(settings.network, image_size=image_size).build_backbone()
    randomize(backbone)
    return backbone.eval().requires_grad_(False).to(settings.device, settings.network.torch_dtype)


def prepare(settings: Settings, image_size: tuple[int, int], mechanisms: Sequence[str]) -> Prepared:
    """Builds, gates and warms the networks of one image size over the same weights and input."""
    prepared = Prepared()
    backbone = build_backbone_on(settings, image_size)
    images = make_images(replace(settings.network, image_size=image_size), settings.device)
    for mechanism in mechanisms:
        with kept_in(prepared.errors, mechanism, settings.device):
            case = settings.case(mechanism, image_size)
            model = build_model(case, backbone).to(settings.device, case.torch_dtype)
            share_weights(model, backbone)
            runner = forward_runner(lambda model=model: model(images), case.pinned_backend)
            gate = prepared.gates[mechanism] = run_gate(model, runner)
            if not gate.green:
                raise CaseFailed(
                    f"differs from its reference by {gate.error:.2g} (below {gate.tolerance:.0e}), its worst token by "
                    f"{gate.worst_row:.2g}",
                    "gate",
                )
            eager = Network(model, runner, second_call_s(settings, runner))
            prepared.networks[mechanism] = maybe_compile(settings, case, eager, images)
    return prepared


def second_call_s(settings: Settings, runner: Runner) -> float:
    """Seconds of a call after a first one, which warms."""
    measure = measure_for(settings.device)
    measure(runner, 1)
    return measure(runner, 1)


def maybe_compile(settings: Settings, case: Case, eager: Network, images: Tensor) -> Network:
    """The compiled forward pass where it is asked for and, with ``auto``, where it is the faster one for this case.

    Raises:
        RuntimeError: It was asked for, and gives something else than the eager one.
    """
    if settings.compile == "off":
        return eager
    measure = measure_for(settings.device)
    try:
        forward = compiled(eager.model)
        fast = forward_runner(lambda: forward(images), case.pinned_backend)
        expected, found = eager.runner().float(), fast().float()
        error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        if not error <= COMPILED_TOLERANCE[case.torch_dtype]:
            raise RuntimeError(f"torch.compile changes the output by {error:.2g}")
        measure(fast, 2)
    except Exception as error:
        sentence, kind = failure(error)
        if settings.compile == "on" or kind == OUT_OF_MEMORY:
            raise
        say(f"not compiled: {sentence[:200]}")
        return eager
    # In turns, so that a hiccup of the machine does not decide.
    iterations = iterations_for(eager.seconds)
    pairs = [[measure(runner, iterations) for runner in (fast, eager.runner)] for _ in range(5)]
    fast_s, eager_s = (min(times) for times in zip(*pairs, strict=True))
    if settings.compile == "on" or fast_s < eager_s:
        return Network(eager.model, fast, fast_s, is_compiled=True)
    return replace(eager, seconds=eager_s)


def time_rounds(settings: Settings, timed: Mapping[str, tuple[Runner, float]], budget_s: float) -> Samples:
    """Interleaved rounds of runners whose calls take so many seconds, as many rounds as the budget allows."""
    iterations = {name: iterations_for(seconds) for name, (_, seconds) in timed.items()}
    round_s = sum(iterations[name] * seconds for name, (_, seconds) in timed.items())
    rounds = rounds_within(budget_s, round_s, settings.most_rounds)
    deadline = time.monotonic() + budget_s

    def late(done: int) -> bool:
        return done >= LEAST_ROUNDS and time.monotonic() > deadline

    runners = {name: runner for name, (runner, _) in timed.items()}
    return interleave(runners, rounds, iterations, measure_for(settings.device), late)


def measure_costs(settings: Settings, rows: dict[str, Row], image_size: tuple[int, int]) -> None:
    """Fills in tokens, parameters and MACs of a resolution's rows."""
    for mechanism, case in settings.cases(image_size).items():
        row = rows[mechanism]
        try:
            cost = measure_cost(case)
        except Exception as error:
            fail(row, error)
            continue
        row.tokens, row.params_m = cost.tokens, cost.parameters / 1e6
        row.gmacs = row.gmacs_counted = cost.macs / 1e9


def measure_memories(settings: Settings, rows: dict[str, Row], image_size: tuple[int, int]) -> None:
    """Fills in the memory of a resolution's rows, each from a process of its own."""
    for mechanism, case in settings.cases(image_size).items():
        if rows[mechanism].error is None:
            try:
                memory = measure_memory_apart(case, settings.device)
            except CaseFailed as error:
                fail(rows[mechanism], error)
                continue
            for name, mib in asdict(memory).items():
                setattr(rows[mechanism], name, mib)


def time_size(
    settings: Settings, rows: dict[str, Row], image_size: tuple[int, int], deadline: float, later: Sequence[float]
) -> None:
    """Fills in gate, latencies, ratios and energy of a resolution's rows.

    Args:
        settings: The bench's.
        rows: By mechanism.
        image_size: Height and width.
        deadline: By the monotonic clock, for this size and all later ones.
        later: What a pass over all cases costs at each later size, relative to this one.
    """
    prepared = prepare(settings, image_size, [name for name in settings.mechanisms if rows[name].error is None])
    for mechanism, gate in prepared.gates.items():
        row = rows[mechanism]
        row.gate, row.gate_error, row.gate_tolerance = "green" if gate.green else "red", gate.error, gate.tolerance
    networks = prepared.networks
    # What is left after the later sizes' gates and warm-ups (about four passes each), shared evenly.
    reserved = 4 * sum(network.seconds for network in networks.values()) * sum(later)
    budget_s = max(0.0, deadline - time.monotonic() - reserved) / (1 + len(later))
    timed = {mechanism: (network.runner, network.seconds) for mechanism, network in networks.items()}
    samples = time_rounds(settings, timed, budget_s)
    for mechanism, error in (prepared.errors | samples.errors).items():
        fail(rows[mechanism], error)
    for mechanism, network in networks.items():
        row = rows[mechanism]
        if row.error is None:
            fill_in_times(row, samples)
            row.compiled = network.is_compiled
            row.sdpa_backend = settings.case(mechanism, image_size).softmax
            row.energy_mj_per_image = energy_mj_per_image(network.runner, row.batch, network.seconds, settings.device)
            ratio = "" if row.ratio_vs_softmax is None else f"  {row.ratio_vs_softmax:6.2f} x softmax"
            say(f"{mechanism:>14}  {row.latency_ms_p50:9.1f} ms  {row.throughput_img_s:8.2f} images/s{ratio}")
    say(f"{'':>14}  {samples.rounds} rounds, softmax {settings.softmax_at(image_size)}")
    del prepared, networks, timed
    release(settings.device)


def fill_in_times(row: Row, samples: Samples) -> None:
    seconds = samples.seconds[row.mechanism]
    row.latency_ms_p20, row.latency_ms_p50, row.latency_ms_p80 = (
        1000 * percentile(seconds, percent) for percent in (20, 50, 80)
    )
    row.throughput_img_s = 1000 * row.batch / row.latency_ms_p50
    row.rounds = len(seconds)
    speeds = samples.against(SOFTMAX, row.mechanism)
    row.ratio_vs_softmax, row.ratio_vs_softmax_low, row.ratio_vs_softmax_high = speeds
    row.ratio_vs_none, _, _ = samples.against(NONE, row.mechanism)


def train_size(settings: Settings, rows: dict[str, Row], image_size: tuple[int, int], budget_s: float) -> None:
    """Fills in the training speed of a resolution's rows that stand so far."""
    backbone = build_backbone_on(settings, image_size)
    for block in backbone.blocks:
        block.attn.fused_attn = settings.protocol == "best"
    timed: dict[str, tuple[Runner, float]] = {}
    errors: dict[str, Exception] = {}
    for mechanism, case in settings.cases(image_size).items():
        if rows[mechanism].error is None:
            with kept_in(errors, mechanism, settings.device):
                student = build_model(case, backbone).to(settings.device, case.torch_dtype)
                runner = train_runner(student, backbone, make_images(case, settings.device))
                timed[mechanism] = runner, second_call_s(settings, runner)
    samples = time_rounds(settings, timed, budget_s)
    for mechanism, error in (errors | samples.errors).items():
        sentence, kind = failure(error)
        rows[mechanism].train_error = f"{kind}: {sentence}"
        say(f"{mechanism:>14}  training: {kind}: {sentence}")
    for mechanism in (name for name in timed if name not in samples.errors):
        row = rows[mechanism]
        row.train_img_s = row.batch / percentile(samples.seconds[mechanism], 50)
        row.train_ratio_vs_softmax, _, _ = samples.against(SOFTMAX, mechanism)
        say(f"{mechanism:>14}  {row.train_img_s:8.3f} training images/s")
    del timed
    release(settings.device)
