"""What a case costs whatever the clock says: parameters, multiply-accumulates, memory.

MACs are multiply-accumulates as :mod:`adala.macs` counts them. A GFLOP of the usual count is half a GMAC.
"""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from cases import OUT_OF_MEMORY, Case, CaseFailed, build_model, failure, make_images, num_tokens
from timing import nvml, pinned_sdpa, switch_off_tf32
from torch import nn

from adala.families import Backbone
from adala.macs import count_macs
from adala.resident import forget_peak, resident_mib

MIB = 2**20
# Exit code of a memory case that ran out of memory in a way that Python could still tell.
OUT_OF_MEMORY_CODE = 3


@dataclass(frozen=True)
class Cost:
    """Of one image: N, parameters of the network without a head, the mechanism's own included, and MACs."""

    tokens: int
    parameters: int
    macs: int


def measure_cost(case: Case) -> Cost:
    """Without memory or data, on the meta device."""
    with torch.device("meta"):
        return measure_model_cost(build_model(case), case.image_size)


def measure_model_cost(model: Backbone, image_size: Sequence[int]) -> Cost:
    """The same of a model of any make, on the meta device: a student with several mechanisms, say.

    Args:
        model: In eval mode.
        image_size: Height and width in pixels.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(num_tokens(model, image_size), parameters, count_macs(model, image_size))


def measure_memory_apart(case: Case, device: torch.device, timeout_s: float = 1800) -> dict[str, float | None]:
    """A row's memory in MiB by field, from a process of its own: what one case leaves behind would count for the next.

    Raises:
        CaseFailed: The process failed, for want of memory or for another reason.
    """
    command = [sys.executable, __file__, json.dumps(asdict(case)), device.type]
    # Freed blocks go back to the system at once: else glibc keeps them, and later peaks hide in what it kept.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise CaseFailed(f"the memory case took more than {timeout_s:.0f} s", "exception") from error
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -signal.SIGKILL:
        raise CaseFailed("the memory case was killed, as the system does when memory runs out", OUT_OF_MEMORY)
    said = done.stderr.strip().splitlines() or [f"the memory case ended with code {done.returncode}"]
    raise CaseFailed(said[-1], OUT_OF_MEMORY if done.returncode == OUT_OF_MEMORY_CODE else "exception")


def main(case_json: str, device_type: str) -> int:
    """The process of one memory case, started by :func:`measure_memory_apart`: prints a line of JSON."""
    device, stored = torch.device(device_type), json.loads(case_json)
    case = Case(**stored | {"image_size": tuple(stored["image_size"])})
    switch_off_tf32()
    try:
        with torch.inference_mode(), pinned_sdpa(case.pinned_backend):
            measured = _measure_cuda(case, device) if device.type == "cuda" else _measure_cpu(case)
    except Exception as error:
        sentence, kind = failure(error)
        print(sentence, file=sys.stderr, flush=True)
        return OUT_OF_MEMORY_CODE if kind == OUT_OF_MEMORY else 1
    print(json.dumps(measured), flush=True)
    return 0


def _memory(model: nn.Module, peak: float, activations: float, process: float | None) -> dict[str, float | None]:
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / MIB
    return {"peak_mem_mib": peak, "weights_mib": weights, "activations_mib": activations, "process_mib": process}


def _measure_cuda(case: Case, device: torch.device) -> dict[str, float | None]:
    model, images = build_model(case).to(device, case.torch_dtype), make_images(case, device)
    for _ in range(2):
        model(images)
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device) / MIB
    model(images)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / MIB
    processes = nvml(device, "nvmlDeviceGetComputeRunningProcesses") or []
    own = next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
    return _memory(model, peak, peak - resting, None if own is None else own / MIB)


def _measure_cpu(case: Case) -> dict[str, float | None]:
    # The libraries' code is paged in by a network of no size, so that it is not taken for memory of the case.
    small = Case("test_vit", image_size=(32, 32), dtype=case.dtype, softmax=case.softmax)
    build_model(small).to(case.torch_dtype)(make_images(small, torch.device("cpu")))
    _give_back_freed()
    baseline = resident_mib("VmRSS")
    model = build_model(case).to(case.torch_dtype)
    images = make_images(case, torch.device("cpu"))
    model(images)
    _give_back_freed()
    resting = resident_mib("VmRSS")
    # Where the system cannot, the peak is that of the process's whole life.
    forget_peak()
    model(images)
    peak = resident_mib("VmHWM")
    return _memory(model, peak - baseline, max(0.0, peak - resting), peak)


def _give_back_freed() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
