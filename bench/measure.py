"""The columns of a row: costs, memory, gate, latencies and ratios, energy, training speed."""

from collections.abc import Callable, Sequence
from statistics import median

from cases import NONE, SOFTMAX, build_model, make_images
from cost import MACS_TOLERANCE, MemoryCaseFailed, measure_cost, measure_memory_apart
from prepare import OUT_OF_MEMORY, Failure, build_backbone_on, fail, prepare, release, say, time_rounds
from results import Row
from settings import Settings
from timing import (
    Nvml,
    Samples,
    energy_mj_per_image,
    measure_for,
    median_interval,
    percentile,
    round_ratios,
    speedup,
    train_runner,
)


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
    if SOFTMAX in samples.seconds and SOFTMAX not in samples.errors:
        ratios = round_ratios(samples.seconds[SOFTMAX], seconds)
        row.ratio_vs_softmax = median(ratios)
        row.ratio_vs_softmax_low, row.ratio_vs_softmax_high = median_interval(ratios)
    if NONE in samples.seconds and NONE not in samples.errors:
        row.ratio_vs_none = speedup(samples.seconds[NONE], seconds)


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
