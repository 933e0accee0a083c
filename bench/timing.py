"""The clock: interleaved rounds, ratios within a round, energy, and the conditions that a number depends on.

Shapes: B batch, H heads, N tokens, d head dim.
"""

import contextlib
import copy
import datetime
import math
import os
import platform
import subprocess
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adala.stages import FeatureAlignment

LEAST_ROUNDS = 3
# A sample shorter than this says more about the clock and the scheduler than about the case.
SHORTEST_SAMPLE_S = 0.05
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Above so many bytes the N x N matrix of the `math` backend is not even tried.
LARGEST_MAP_BYTES = 2**31

Call = Callable[[], Any]
# (what to call, how often) -> seconds a call.
Measure = Callable[["Runner", int], float]


@dataclass(frozen=True)
class Runner:
    """Something to be timed.

    Attributes:
        call: Does it once.
        context: What it is called in, entered before the clock starts.
    """

    call: Call
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def __call__(self) -> Any:
        with self.context():
            return self.call()


def wall_clock(clock: Callable[[], float] = time.perf_counter) -> Measure:
    """Measures on the host, for devices that finish before they return."""

    def measure(runner: Runner, iterations: int) -> float:
        with runner.context():
            started = clock()
            for _ in range(iterations):
                runner.call()
            return (clock() - started) / iterations

    return measure


def cuda_events(device: torch.device) -> Measure:
    """Measures on the GPU, between two events around all iterations: time in which it waits for the host counts."""

    def measure(runner: Runner, iterations: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with runner.context(), torch.cuda.device(device):
            torch.cuda.synchronize(device)
            first.record()
            for _ in range(iterations):
                runner.call()
            last.record()
            torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000 / iterations

    return measure


def measure_for(device: torch.device) -> Measure:
    return cuda_events(device) if device.type == "cuda" else wall_clock()


@dataclass
class Samples:
    """What interleaved rounds gave.

    Attributes:
        seconds: A value for each round of each case, None from the round on in which it failed.
        errors: What a case failed with.
        rounds: How many there were.
    """

    seconds: dict[str, list[float | None]]
    errors: dict[str, Exception] = field(default_factory=dict)
    rounds: int = 0

    def against(self, baseline: str, name: str) -> tuple[float | None, float | None, float | None]:
        """:func:`speedup` of a case over another one; None where there is no such one or it failed."""
        if baseline not in self.seconds or baseline in self.errors:
            return None, None, None
        return speedup(self.seconds[baseline], self.seconds[name])


def interleave(
    cases: Mapping[str, Runner],
    rounds: int,
    iterations: Mapping[str, int],
    measure: Measure,
    stop: Callable[[int], bool] = lambda done: False,
) -> Samples:
    """Times every case once a round, each round beginning with another case, so that a drifting machine hits all alike.

    Args:
        cases: By name.
        rounds: How many at most.
        iterations: Calls of a case in one round.
        measure: Times one case.
        stop: Called with the number of rounds done before another begins.
    """
    samples = Samples({name: [] for name in cases})
    names = list(cases)
    while samples.rounds < rounds and not stop(samples.rounds):
        first = samples.rounds % len(names) if names else 0
        for name in names[first:] + names[:first]:
            seconds = None
            if name not in samples.errors:
                try:
                    seconds = measure(cases[name], iterations[name])
                except Exception as error:
                    samples.errors[name] = error
            samples.seconds[name].append(seconds)
        samples.rounds += 1
    return samples


def speedup(
    baseline: Sequence[float | None], case: Sequence[float | None]
) -> tuple[float | None, float | None, float | None]:
    """How many times faster ``case`` is: the median of the ratios within a round, and :func:`median_interval` of it.

    None where no round has both.
    """
    ratios = [b / c for b, c in zip(baseline, case, strict=True) if b is not None and c is not None]
    return (median(ratios), *median_interval(ratios)) if ratios else (None, None, None)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median from the values' ranks alone, whatever their distribution.

    How many values lie below the true median is binomial with probability 1/2. Of fewer than six values even the
    smallest and the largest, which are then returned, do not reach 95 %.
    """
    ordered, n = sorted(values), len(values)
    beyond, tail = 0, 2.0**-n
    while tail + math.comb(n, beyond + 1) / 2**n <= 0.025:
        beyond += 1
        tail += math.comb(n, beyond) / 2**n
    return ordered[beyond], ordered[n - 1 - beyond]


def percentile(values: Sequence[float | None], percent: float) -> float:
    """Of those there are, linearly interpolated between the sorted values."""
    return float(np.percentile([value for value in values if value is not None], percent))


def iterations_for(seconds: float, shortest_s: float = SHORTEST_SAMPLE_S) -> int:
    """Calls that a sample is made of, for a case that takes ``seconds``."""
    return max(1, math.ceil(shortest_s / max(seconds, 1e-9)))


def rounds_within(budget_s: float, round_s: float, most: int) -> int:
    """Rounds that fit into a budget, but never fewer than :data:`LEAST_ROUNDS`, and never more than ``most``."""
    return max(min(LEAST_ROUNDS, most), min(most, int(budget_s / max(round_s, 1e-9))))


def forward_runner(call: Call, sdpa_backend: str | None = None) -> Runner:
    """``call`` without gradients, softmax's kernel pinned where there is one to pin."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with torch.inference_mode(), pinned_sdpa(sdpa_backend):
            yield

    return Runner(call, context)


def pinned_sdpa(backend: str | None) -> AbstractContextManager:
    """Only this backend of scaled_dot_product_attention, which then fails where it cannot run; None leaves them all."""
    return contextlib.nullcontext() if backend is None else sdpa_kernel(SDPA_BACKENDS[backend])


def fastest_sdpa_backend(q: Tensor, k: Tensor, v: Tensor, budget_s: float = 0.5) -> str:
    """The backend that takes least time over these very inputs (B, H, N, d): softmax is to be at its best."""
    measure, taken = measure_for(q.device), {}
    for name in SDPA_BACKENDS:
        batch, heads, num_tokens, _ = q.shape
        if name == "math" and taken and batch * heads * num_tokens**2 * q.element_size() > LARGEST_MAP_BYTES:
            continue

        def call(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        runner = forward_runner(call, name)
        try:
            with warnings.catch_warnings():
                # PyTorch explains at length why a backend cannot run.
                warnings.simplefilter("ignore")
                measure(runner, 1)
                once = measure(runner, 1)
                more = min(20, 1 + int(budget_s / max(once, 1e-6)))
                taken[name] = min(once, *(measure(runner, 1) for _ in range(more)))
        except RuntimeError:
            # Not for this device, dtype or size.
            continue
    if not taken:
        raise RuntimeError(f"no backend of scaled_dot_product_attention takes {tuple(q.shape)} in {q.dtype}")
    return min(taken, key=taken.get)


class CompiledBlock(nn.Module):
    """A transformer block that is called through a compiled function."""

    def __init__(self, block: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.block, self.call = block, call

    def forward(self, *inputs: Any, **arguments: Any) -> Tensor:
        return self.call(self.block, *inputs, **arguments)


def compiled_call(backend: str = "inductor") -> Callable[..., Any]:
    """A compiled ``call(module, *inputs)`` with a cache of its own.

    torch.compile keeps what it compiled at the code object of the function: ten networks through one function would
    search each other's entries at every call, and fall back to eager at the eighth.
    """

    def call(module: nn.Module, *inputs: Any, **arguments: Any) -> Any:
        return module(*inputs, **arguments)

    own = types.FunctionType(call.__code__.replace(co_name="call_of_one_case"), call.__globals__)
    return torch.compile(own, backend=backend, dynamic=False)


def compiled(model: VisionTransformer, backend: str = "inductor") -> VisionTransformer:
    """The model over the same weights with its blocks under torch.compile, all of which share one compiled graph.

    A graph of the whole network would hold the same block 24 times over and take a minute to compile instead of
    seconds; what is left outside, the patch embedding and the last norm, is no part of any mechanism.
    """
    call = compiled_call(backend)
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    twin.blocks = nn.Sequential(*(CompiledBlock(block, call) for block in twin.blocks))
    return twin


def switch_off_tf32() -> None:
    """Makes float32 float32 on a GPU as well, in matrix products and convolutions, from here on."""
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.cudnn, "conv"):  # since PyTorch 2.9, where the older switch must not be used beside it
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = False


def train_runner(student: VisionTransformer, teacher: VisionTransformer, images: Tensor, lr: float = 1e-5) -> Runner:
    """One Stage 2 step in plain PyTorch: frozen teacher, student, loss on all tokens, backward, AdamW."""
    stage = FeatureAlignment(student.requires_grad_(True).train(), teacher, "mse").train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)

    def step() -> None:
        stage({"image": images})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Runner(step)


def crossover(points: Sequence[tuple[int, float | None]]) -> tuple[str, float | None]:
    """Where the ratio to softmax reaches 1 for good.

    Args:
        points: Tokens and how many times faster than softmax, None where that could not be measured.

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


def doubling_grids(most_tokens: int, least_tokens: int = 64) -> list[tuple[int, int]]:
    """Patch grids (rows, columns), each twice the last, square or twice as wide as high."""
    grids, rows, columns = [], 8, 8
    while rows * columns <= most_tokens:
        if rows * columns >= least_tokens:
            grids.append((rows, columns))
        rows, columns = (rows, 2 * columns) if rows == columns else (2 * rows, columns)
    return grids


def nvml(device: torch.device, function: str) -> Any:
    """What NVIDIA's management library answers about a GPU (or its system); None where it gives no answer.

    Args:
        device: Where it is none of NVIDIA's, there is no answer.
        function: Name of one of its functions, which takes the GPU's handle, or nothing if it is an ``nvmlSystem...``.
    """
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        handle = () if function.startswith("nvmlSystem") else (pynvml.nvmlDeviceGetHandleByUUID(name.encode()),)
        return getattr(pynvml, function)(*handle)
    except pynvml.NVMLError:
        # No driver library, no permission, a part of a GPU: a number that is missing, not a failure of the bench.
        return None


def energy_mj_per_image(
    runner: Runner, batch: int, seconds: float, device: torch.device, window_s: float = 2.0
) -> float | None:
    """Energy of the whole GPU over at least ``window_s`` of nothing but this case, in millijoules an image.

    NVML's counter moves about ten times a second, so that the window must be long against that.
    """
    if nvml(device, "nvmlDeviceGetTotalEnergyConsumption") is None:
        return None
    iterations = max(1, math.ceil(window_s / seconds))
    torch.cuda.synchronize(device)
    before = nvml(device, "nvmlDeviceGetTotalEnergyConsumption")
    measure_for(device)(runner, iterations)
    after = nvml(device, "nvmlDeviceGetTotalEnergyConsumption")
    return None if before is None or after is None else (after - before) / (iterations * batch)


def bfloat16_pays_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 matrices clearly faster than float32 ones; without instructions for it not.

    A linear layer of ViT-S at 512 px: twice as fast or several times slower, so that the answer does not waver.
    """
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(1025, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        runner = Runner(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
        taken[dtype] = min(wall_clock()(runner, 1) for _ in range(5))
    return taken[torch.bfloat16] < 0.8 * taken[torch.float32]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads and precision switches, as they are recorded beside the numbers."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "device_type": device.type,
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "driver": nvml(device, "nvmlSystemGetDriverVersion"),
    }


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()


def _commit() -> str | None:
    """The commit of the project, with ``+`` where its files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
