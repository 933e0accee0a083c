"""How fast models are and what memory they take, side by side on the same images."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from adala.distributed import device

# Of the profiler's own log, which says on a machine without a GPU that there is none.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# A sample shorter than this says more about the clock and the scheduler than about the model.
SHORTEST_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Speed:
    """One model's forward pass.

    Attributes:
        images_per_s: Median over rounds.
        images_per_s_p20: A fifth of the rounds were slower.
        images_per_s_p80: A fifth of the rounds were faster.
        against_first: How many times as fast as the first model: the median of the rounds' ratios, in which a machine
            that slows down or speeds up in between has no part.
        peak_memory_mib: What the model would need alone: its weights, the images, and the most that one forward pass
            holds besides. On a GPU by PyTorch's counter; on a CPU by what PyTorch's profiler saw allocated, which is
            not what libraries such as oneDNN allocate for themselves. None if the profiler saw nothing.
    """

    images_per_s: float
    images_per_s_p20: float
    images_per_s_p80: float
    against_first: float
    peak_memory_mib: float | None


def measure_speed(
    models: Mapping[str, nn.Module], images: Tensor, rounds: int = 10, warmup: int = 2
) -> dict[str, Speed]:
    """Times forward passes of models in turn, round by round, each round beginning with another model.

    Args:
        models: In eval mode on the device; the first is what the others are compared with. Autocast is theirs to enter.
        images: (B, 3, height, width), normalised.
        rounds: Samples of each model; a sample is as many forward passes as take 0.05 s.
        warmup: Forward passes before, in which kernels are chosen and memory is reserved; at least one.

    Raises:
        ValueError: No model, no image, or no round.
    """
    if not models or not len(images) or rounds < 1:
        raise ValueError(f"{len(models)} models, {len(images)} images and {rounds} rounds: speed needs one of each")
    images, names = images.to(device()), list(models)
    with torch.inference_mode():
        passes = {name: _warmed(model, images, warmup) for name, model in models.items()}
        peaks = {name: _peak_memory_mib(model, images) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_seconds(models[name], images, passes[name]))
    return {name: _speed(len(images), seconds[name], seconds[names[0]], peaks[name]) for name in names}


def _speed(images: int, seconds: list[float], of_first: list[float], peak_memory_mib: float | None) -> Speed:
    p20, middle, p80 = np.percentile([images / taken for taken in seconds], [20, 50, 80]).tolist()
    ratio = median(theirs / ours for theirs, ours in zip(of_first, seconds, strict=True))
    return Speed(middle, p20, p80, ratio, peak_memory_mib)


def _seconds(model: nn.Module, images: Tensor, passes: int) -> float:
    """Of one forward pass, by the host's clock around ``passes`` of them."""
    _synchronize()
    started = perf_counter()
    for _ in range(passes):
        model(images)
    _synchronize()
    return (perf_counter() - started) / passes


def _synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize(device())


def _warmed(model: nn.Module, images: Tensor, warmup: int) -> int:
    """Runs the model a few times; then, of how many forward passes a sample is made."""
    for _ in range(max(1, warmup)):
        model(images)
    return max(1, math.ceil(SHORTEST_SAMPLE_S / _seconds(model, images, 1)))


def _peak_memory_mib(model: nn.Module, images: Tensor) -> float | None:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), images)}
    peak = _peak_on_gpu(model, images) if device().type == "cuda" else _peak_on_cpu(model, images)
    return None if peak is None else (sum(tensors.values()) + peak) / 2**20


def _peak_on_gpu(model: nn.Module, images: Tensor) -> int:
    """Bytes that one forward pass holds at most, besides what was there before."""
    _synchronize()
    torch.cuda.reset_peak_memory_stats(device())
    before = torch.cuda.memory_allocated(device())
    model(images)
    _synchronize()
    return torch.cuda.max_memory_allocated(device()) - before


def _peak_on_cpu(model: nn.Module, images: Tensor) -> int | None:
    """Likewise, from the allocations and releases that the profiler lists; None if it lists none."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(images)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda change: change[0])
    held = np.cumsum([size for _, size in changes])
    return max(0, int(held.max())) if len(held) else None
