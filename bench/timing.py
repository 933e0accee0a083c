"""The clock: interleaved rounds, ratios within a round, energy, and what is put under it.

Shapes: B batch, H heads, N tokens, d head dim.
"""

import contextlib
import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adala.compilation import CompiledModules
from adala.families import Backbone
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


@dataclass(frozen=True)
class Runner:
    """Something to be timed, called in a context that is entered before the clock starts.

    Attributes:
        seconds: What a call takes, roughly; known of a runner that is :func:`warmed`.
    """

    call: Callable[[], Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    seconds: float = math.nan

    def __call__(self) -> Any:
        with self.context():
            return self.call()

    @property
    def iterations(self) -> int:
        """Calls that one sample is made of."""
        return max(1, math.ceil(SHORTEST_SAMPLE_S / max(self.seconds, 1e-9)))


# (what to call, how often) -> seconds a call.
Measure = Callable[[Runner, int], float]
# A ratio of speeds and the ends of its confidence interval.
Speedup = tuple[float | None, float | None, float | None]


def measure_for(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Measure:
    """By the host's clock; on a GPU between two events around all calls, so that its waiting for the host counts."""

    def on_host(runner: Runner, iterations: int) -> float:
        with runner.context():
            started = clock()
            for _ in range(iterations):
                runner.call()
            return (clock() - started) / iterations

    def on_gpu(runner: Runner, iterations: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with runner.context(), torch.cuda.device(device):
            torch.cuda.synchronize(device)
            first.record()
            for _ in range(iterations):
                runner.call()
            last.record()
            torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000 / iterations

    return on_gpu if device.type == "cuda" else on_host


def warmed(runner: Runner, measure: Measure) -> Runner:
    """The runner after a first call, with the seconds of its second."""
    measure(runner, 1)
    return replace(runner, seconds=measure(runner, 1))


@dataclass
class Samples:
    """What interleaved rounds gave.

    Attributes:
        seconds: A value for each round of each case, None from the round on in which it failed.
        errors: What a case failed with.
    """

    seconds: dict[str, list[float | None]]
    errors: dict[str, Exception] = field(default_factory=dict)
    rounds: int = 0

    def against(self, baseline: str, name: str) -> Speedup:
        """:func:`speedup` of a case over another one; None where there is no such one or it failed."""
        if baseline not in self.seconds or baseline in self.errors:
            return None, None, None
        return speedup(self.seconds[baseline], self.seconds[name])


def interleave(
    cases: Mapping[str, Runner],
    measure: Measure,
    most_rounds: int,
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Samples:
    """Times every case once a round, each round beginning with another case, so that a drifting machine hits all alike.

    A round begins if it is expected to end within the budget; :data:`LEAST_ROUNDS` there are in any case. ``cases``
    are warmed.
    """
    samples, names = Samples({name: [] for name in cases}), list(cases)
    deadline = clock() + budget_s - sum(runner.iterations * runner.seconds for runner in cases.values())
    while names and samples.rounds < most_rounds and (samples.rounds < LEAST_ROUNDS or clock() <= deadline):
        first = samples.rounds % len(names)
        for name in names[first:] + names[:first]:
            seconds = None
            if name not in samples.errors:
                try:
                    seconds = measure(cases[name], cases[name].iterations)
                except Exception as error:
                    samples.errors[name] = error
            samples.seconds[name].append(seconds)
        samples.rounds += 1
    return samples


def speedup(baseline: Sequence[float | None], case: Sequence[float | None]) -> Speedup:
    """How many times faster ``case`` is: median of rounds' ratios, and its interval; None where no round has both."""
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


def forward_runner(call: Callable[[], Any], sdpa_backend: str | None = None) -> Runner:
    """``call`` without gradients, softmax's kernel pinned where there is one to pin."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with torch.inference_mode(), pinned_sdpa(sdpa_backend):
            yield

    return Runner(call, context)


def captured(runner: Runner, device: torch.device) -> Runner:
    """The runner's call as a CUDA graph, so that a GPU is timed and not the host that launches its work.

    Below some 1,000 tokens an image a GPU is through with an operation before the host has launched the next. What the
    call reads must stay where it is. On a CPU it is the runner itself.

    Raises:
        RuntimeError: The call cannot be captured: it waits for the device, say.
    """
    if device.type != "cuda":
        return runner
    with torch.cuda.device(device), runner.context():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # What libraries set up in a first call must not become part of the graph.
        with torch.cuda.stream(stream):
            for _ in range(3):
                runner.call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = runner.call()

    def replay() -> Any:
        graph.replay()
        return output

    return replace(runner, call=replay)


def pinned_sdpa(backend: str | None) -> contextlib.AbstractContextManager:
    """Only this backend of scaled_dot_product_attention, which then fails where it cannot run; None leaves them all."""
    return contextlib.nullcontext() if backend is None else sdpa_kernel(SDPA_BACKENDS[backend])


def fastest_sdpa_backend(q: Tensor, k: Tensor, v: Tensor, budget_s: float = 0.5) -> str:
    """The backend that takes least time over these very inputs (B, H, N, d): softmax is to be at its best."""
    measure, taken = measure_for(q.device), {}
    batch, heads, num_tokens, _ = q.shape
    for name in SDPA_BACKENDS:
        if name == "math" and taken and batch * heads * num_tokens**2 * q.element_size() > LARGEST_MAP_BYTES:
            continue
        runner = forward_runner(functools.partial(F.scaled_dot_product_attention, q, k, v), name)
        # A RuntimeError means that it is not for this device, dtype or size; PyTorch warns at length why.
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore")
            once = warmed(runner, measure).seconds
            more = min(20, 1 + int(budget_s / max(once, 1e-6)))
            taken[name] = min(once, *(measure(runner, 1) for _ in range(more)))
    if not taken:
        raise RuntimeError(f"no backend of scaled_dot_product_attention takes {tuple(q.shape)} in {q.dtype}")
    return min(taken, key=taken.get)


def compiled(model: Backbone, backend: str = "inductor") -> Backbone:
    """The model over the same weights with its blocks under torch.compile, all of which share one compiled graph.

    What is left outside, the patch embedding and the last norm, is no part of any mechanism.
    """
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    CompiledModules(twin.blocks, backend=backend).is_on = True
    return twin


def switch_off_tf32() -> None:
    """Makes float32 float32 on a GPU as well, in matrix products and convolutions, from here on."""
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.cudnn, "conv"):  # since PyTorch 2.9, where the older switch must not be used beside it
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = False


def train_runner(student: Backbone, teacher: Backbone, images: Tensor) -> Runner:
    """One Stage 2 step in plain PyTorch: frozen teacher, student, loss on all tokens, backward, AdamW."""
    stage = FeatureAlignment(student.requires_grad_(True).train(), teacher, "mse").train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def step() -> None:
        stage({"image": images})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Runner(step)


def nvml(device: torch.device, function: str) -> Any:
    """What a function of NVIDIA's management library says of a GPU, or of its system if it is an ``nvmlSystem...``.

    None where it gives no answer, as for anything but NVIDIA's GPUs.
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


def energy_mj_per_image(runner: Runner, batch: int, device: torch.device, window_s: float = 2.0) -> float | None:
    """Energy of the whole GPU in millijoules an image, over a window that is long against the counter's 0.1 s."""
    counter = "nvmlDeviceGetTotalEnergyConsumption"
    if nvml(device, counter) is None:
        return None
    iterations = max(1, math.ceil(window_s / runner.seconds))
    torch.cuda.synchronize(device)
    before = nvml(device, counter)
    measure_for(device)(runner, iterations)
    after = nvml(device, counter)
    return None if before is None or after is None else (after - before) / (iterations * batch)


def bfloat16_pays_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 matrices clearly faster: a layer of ViT-S at 512 px, so that it is clear."""
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(1025, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        runner = Runner(functools.partial(F.linear, x, weight))
        taken[dtype] = min(measure_for(x.device)(runner, 1) for _ in range(5))
    return taken[torch.bfloat16] < 0.8 * taken[torch.float32]
