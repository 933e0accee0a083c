"""The columns of a row: costs, memory, gate, latencies and ratios, energy, training speed.

Networks are made ready for the clock first: built over the same weights, gated, warmed, compiled where that pays.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import cases
import cost
import timing
import torch
from cases import NONE, SOFTMAX
from results import Row, SweepRow
from settings import Settings
from timing import Runner, percentile
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# The compiled network must give what the eager one gives, up to rounding that adds up over its blocks.
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
ImageSize = tuple[int, int]


def say(message: str = "") -> None:
    print(message, flush=True)


def fail(row: Row | SweepRow, error: BaseException) -> None:
    """Marks a row as failed; the first failure stays."""
    if row.error is None:
        row.error, row.error_kind = cases.failure(error)
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
    """A network that passed its gate.

    Attributes:
        model: The network, eager.
        runner: A forward pass, warmed.
        is_compiled: Whether the runner is that of torch.compile.
    """

    model: VisionTransformer
    runner: Runner
    is_compiled: bool = False


@dataclass
class Prepared:
    """The networks of one image size by mechanism, the gates of those that got so far, and what the others raised."""

    networks: dict[str, Network] = field(default_factory=dict)
    gates: dict[str, cases.Gate] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)

    @property
    def runners(self) -> dict[str, Runner]:
        return {mechanism: network.runner for mechanism, network in self.networks.items()}


def prepare(settings: Settings, image_size: ImageSize, mechanisms: Sequence[str]) -> Prepared:
    """Builds, gates and warms the networks of one image size over the same weights and input."""
    prepared = Prepared()
    backbone = build_backbone_on(settings, image_size)
    images = cases.make_images(replace(settings.network, image_size=image_size), settings.device)
    for mechanism in mechanisms:
        with kept_in(prepared.errors, mechanism, settings.device):
            case = settings.case(mechanism, image_size)
            model = cases.build_model(case, backbone).to(settings.device, case.torch_dtype)
            cases.share_weights(model, backbone)
            runner = timing.forward_runner(lambda model=model: model(images), case.pinned_backend)
            gate = prepared.gates[mechanism] = cases.run_gate(model, runner)
            if not gate.green:
                said = (
                    f"differs from its reference by {gate.error:.2g} (below {gate.tolerance:.0e}), its worst token by"
                )
                raise cases.CaseFailed(f"{said} {gate.worst_row:.2g}", "gate")
            eager = Network(model, timing.warmed(runner, timing.measure_for(settings.device)))
            prepared.networks[mechanism] = maybe_compile(settings, case, eager, images)
    return prepared


def build_backbone_on(settings: Settings, image_size: ImageSize) -> VisionTransformer:
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


def time_rounds(settings: Settings, runners: Mapping[str, Runner], budget_s: float) -> timing.Samples:
    measure = timing.measure_for(settings.device)
    return timing.interleave(runners, measure, settings.options.rounds, budget_s)


def measure_costs(settings: Settings, rows: dict[str, Row], image_size: ImageSize) -> None:
    """Fills in tokens, parameters and MACs of a resolution's rows."""
    for mechanism, row in rows.items():
        try:
            found = cost.measure_cost(settings.case(mechanism, image_size))
        except Exception as error:
            fail(row, error)
            continue
        row.tokens, row.params_m = found.tokens, found.parameters / 1e6
        row.gmacs = row.gmacs_counted = found.macs / 1e9


def measure_memories(settings: Settings, rows: dict[str, Row], image_size: ImageSize) -> None:
    """Fills in the memory of a resolution's rows that stand so far, each from a process of its own."""
    for mechanism, row in rows.items():
        if row.error is None:
            try:
                memory = cost.measure_memory_apart(settings.case(mechanism, image_size), settings.device)
            except cases.CaseFailed as error:
                fail(row, error)
                continue
            for name, mib in memory.items():
                setattr(row, name, mib)


def time_size(
    settings: Settings, rows: dict[str, Row], image_size: ImageSize, deadline: float, later: Sequence[float]
) -> None:
    """Fills in gate, latencies, ratios and energy of a resolution's rows that stand so far.

    Args:
        settings: The bench's.
        rows: By mechanism.
        image_size: Height and width.
        deadline: By the monotonic clock, for this size and all later ones.
        later: What a pass over all cases costs at each later size, relative to this one.
    """
    prepared = prepare(settings, image_size, [name for name in rows if rows[name].error is None])
    for mechanism, gate in prepared.gates.items():
        row = rows[mechanism]
        row.gate, row.gate_error, row.gate_tolerance = "green" if gate.green else "red", gate.error, gate.tolerance
    # What is left after the later sizes' gates and warm-ups (about four passes each), shared evenly.
    reserved = 4 * sum(runner.seconds for runner in prepared.runners.values()) * sum(later)
    budget_s = max(0.0, deadline - time.monotonic() - reserved) / (1 + len(later))
    samples = time_rounds(settings, prepared.runners, budget_s)
    for mechanism, error in (prepared.errors | samples.errors).items():
        fail(rows[mechanism], error)
    for mechanism, network in prepared.networks.items():
        row = rows[mechanism]
        if row.error is None:
            fill_in_times(row, samples)
            row.compiled = network.is_compiled
            row.sdpa_backend = settings.case(mechanism, image_size).softmax
            row.energy_mj_per_image = timing.energy_mj_per_image(network.runner, row.batch, settings.device)
            ratio = "" if row.ratio_vs_softmax is None else f"  {row.ratio_vs_softmax:6.2f} x softmax"
            say(f"{mechanism:>14}  {row.latency_ms_p50:9.1f} ms  {row.throughput_img_s:8.2f} images/s{ratio}")
    say(f"{'':>14}  {samples.rounds} rounds, softmax {settings.softmax_at(image_size)}")
    del prepared
    release(settings.device)


def fill_in_times(row: Row, samples: timing.Samples) -> None:
    seconds = samples.seconds[row.mechanism]
    p20, p50, p80 = (1000 * percentile(seconds, percent) for percent in (20, 50, 80))
    row.latency_ms_p20, row.latency_ms_p50, row.latency_ms_p80 = p20, p50, p80
    row.throughput_img_s = 1000 * row.batch / p50
    row.rounds = len(seconds)
    speeds = samples.against(SOFTMAX, row.mechanism)
    row.ratio_vs_softmax, row.ratio_vs_softmax_low, row.ratio_vs_softmax_high = speeds
    row.ratio_vs_none, _, _ = samples.against(NONE, row.mechanism)


def train_size(settings: Settings, rows: dict[str, Row], image_size: ImageSize, budget_s: float) -> None:
    """Fills in the training speed of a resolution's rows that stand so far."""
    backbone = build_backbone_on(settings, image_size)
    for block in backbone.blocks:
        block.attn.fused_attn = settings.options.protocol == "best"
    runners: dict[str, Runner] = {}
    errors: dict[str, Exception] = {}
    for mechanism in (name for name in rows if rows[name].error is None):
        with kept_in(errors, mechanism, settings.device):
            case = settings.case(mechanism, image_size)
            student = cases.build_model(case, backbone).to(settings.device, case.torch_dtype)
            runner = timing.train_runner(student, backbone, cases.make_images(case, settings.device))
            runners[mechanism] = timing.warmed(runner, timing.measure_for(settings.device))
    samples = time_rounds(settings, runners, budget_s)
    for mechanism, error in (errors | samples.errors).items():
        sentence, kind = cases.failure(error)
        rows[mechanism].train_error = f"{kind}: {sentence}"
        say(f"{mechanism:>14}  training: {kind}: {sentence}")
    for mechanism in (name for name in runners if name not in samples.errors):
        row = rows[mechanism]
        row.train_img_s = row.batch / percentile(samples.seconds[mechanism], 50)
        row.train_ratio_vs_softmax, _, _ = samples.against(SOFTMAX, mechanism)
        say(f"{mechanism:>14}  {row.train_img_s:8.3f} training images/s")
    del runners
    release(settings.device)
