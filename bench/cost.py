"""What a case costs whatever the clock says: parameters, multiply-accumulates, memory.

MACs are multiply-accumulates of matrix products and convolutions alone; exponentials, sums, norms and element-wise
products are not counted. A GFLOP of the usual count is half a GMAC.

Shapes: B batch, H heads, N tokens, d head dim, D = H d, M features or landmarks.
"""

import argparse
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cases import (
    NONE,
    SOFTMAX,
    UNFUSED,
    Backbone,
    Case,
    build_model,
    describe_error,
    is_out_of_memory,
    make_images,
    resolved_options,
)
from timing import pinned_sdpa, process_memory_mib, without_tf32
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adala.distributed import peak_resident_mib

MIB = 2**20
# The formula and the counter may differ by so much of the whole network before a row fails.
MACS_TOLERANCE = 0.01
# Exit code of a memory case that ran out of memory in a way that Python could still tell.
OUT_OF_MEMORY_CODE = 3


@dataclass(frozen=True)
class MixerSize:
    """What the formulas of the mechanisms read.

    Attributes:
        num_tokens: N.
        num_heads: H.
        head_dim: d.
        grid_width: Columns of the patch grid.
    """

    num_tokens: int
    num_heads: int
    head_dim: int
    grid_width: int

    @property
    def embed_dim(self) -> int:
        return self.num_heads * self.head_dim


def linear_form_macs(size: MixerSize, num_features: int) -> int:
    """a (b^T v) and the normaliser a . sum b: 2 N M D + N M H."""
    tokens_by_features = size.num_tokens * num_features
    return 2 * tokens_by_features * size.embed_dim + tokens_by_features * size.num_heads


def softmax_macs(size: MixerSize, options: Any) -> int:
    """Scores and weighted values: 2 N^2 D."""
    return 2 * size.num_tokens**2 * size.embed_dim


def linear_macs(size: MixerSize, options: Any) -> int:
    """2 N D d, and N D for the normaliser."""
    return linear_form_macs(size, size.head_dim)


def hedgehog_macs(size: MixerSize, options: Any) -> int:
    """2 N D f for the feature maps, 4 N D f for the linear form over 2f features, 2 N f H for the normaliser."""
    columns = options.feature_dim or max(1, size.head_dim // 2)
    features = columns if options.half else 2 * columns
    return 2 * size.num_tokens * size.embed_dim * columns + linear_form_macs(size, features)


def linformer_macs(size: MixerSize, options: Any) -> int:
    """Projected keys and values, scores, weighted values: 4 N M D."""
    return 4 * size.num_tokens * min(options.num_landmarks, size.num_tokens) * size.embed_dim


def performer_macs(size: MixerSize, options: Any) -> int:
    """2 N D M for the projections, 2 N D M for the linear form, N M H for the normaliser."""
    features = options.num_features
    return 2 * size.num_tokens * size.embed_dim * features + linear_form_macs(size, features)


def cosformer_macs(size: MixerSize, options: Any) -> int:
    """4 N D d over 2d features (8 N D d in two dimensions), and the normaliser."""
    return linear_form_macs(size, size.head_dim * (4 if options.two_dimensional else 2))


def nystromformer_macs(size: MixerSize, options: Any) -> int:
    """4 N M D + 2 M^2 D, 4 M^3 H for each step of the pseudo-inverse; the convolution's N D kernel; means are free."""
    tokens, landmarks, dim = size.num_tokens, options.num_landmarks, size.embed_dim
    convolution = tokens * dim * (options.conv_kernel or 0)
    if tokens <= landmarks:
        return softmax_macs(size, None) + convolution
    inverse = 4 * options.pinv_iterations * landmarks**3 * size.num_heads
    return 4 * tokens * landmarks * dim + 2 * landmarks**2 * dim + inverse + convolution


def monarch_macs(size: MixerSize, options: Any) -> int:
    """M b D ((2T + 1) b + 2 T M) for T steps, M blocks of b tokens, padding included.

    All of them are batched matrix products of the implementation; its entropies and guards are element-wise.
    """
    block = options.block_size or size.grid_width
    blocks, steps = -(-size.num_tokens // block), options.num_steps
    return blocks * block * size.embed_dim * ((2 * steps + 1) * block + 2 * steps * blocks)


MIXER_MACS: dict[str, Callable[[MixerSize, Any], int]] = {
    SOFTMAX: softmax_macs,
    "linear": linear_macs,
    "hedgehog": hedgehog_macs,
    "lolcats": hedgehog_macs,
    "linformer": linformer_macs,
    "performer": performer_macs,
    "cosformer": cosformer_macs,
    "nystromformer": nystromformer_macs,
    "monarch": monarch_macs,
    NONE: lambda size, options: 0,
}


def build_meta_model(case: Case) -> VisionTransformer:
    """The network of a case without memory for its weights, softmax in three operations so that it can be counted."""
    with torch.device("meta"):
        return build_model(replace(case, softmax=UNFUSED))


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_tokens(model: VisionTransformer, image_size: tuple[int, int]) -> int:
    patches = [size // patch for size, patch in zip(image_size, model.patch_embed.patch_size, strict=True)]
    return patches[0] * patches[1] + model.num_prefix_tokens


def analytic_macs(case: Case, model: VisionTransformer) -> int:
    """MACs of one image by formula: patch embedding, every linear layer of the blocks, and the mixing.

    Args:
        case: Mechanism, options and image size.
        model: Where the dimensions are read from; it may lie on the meta device.
    """
    tokens = num_tokens(model, case.image_size)
    patches = tokens - model.num_prefix_tokens
    linear_layers = sum(m.in_features * m.out_features for m in model.blocks.modules() if isinstance(m, nn.Linear))
    grid_width = case.image_size[1] // model.patch_embed.patch_size[1]
    options = resolved_options(case.mechanism, case.options)
    mixing = sum(
        MIXER_MACS[case.mechanism](MixerSize(tokens, block.attn.num_heads, block.attn.head_dim, grid_width), options)
        for block in model.blocks
    )
    return patches * model.patch_embed.proj.weight.numel() + tokens * linear_layers + mixing


def counted_macs(case: Case, model: VisionTransformer) -> int:
    """MACs of one image as PyTorch's counter sees the operations that are really called, with no data behind them.

    Args:
        case: Image size.
        model: From :func:`build_meta_model`.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_fused_softmax_flops())
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, *case.image_size, device="meta"))
    return counter.get_total_flops() // 2


def _fused_softmax_flops() -> dict[Any, Callable[..., int]]:
    """The counter's formula for PyTorch's fused attention on a CPU, which some versions count as nothing.

    Softmax itself is counted unfused; Nystromformer calls the fused kernel where N does not exceed its landmarks.
    """
    operation = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if operation is None:
        return {}

    def flops(query: tuple, key: tuple, value: tuple, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch, heads, queries, head_dim = query
        return 2 * batch * heads * queries * key[-2] * (head_dim + value[-1])

    return {operation: flops}


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs of a case.

    Attributes:
        tokens: N of one image.
        parameters: Of the network without a head, the mechanism's own included.
        macs: By formula, one image.
        macs_counted: By PyTorch's counter, one image.
    """

    tokens: int
    parameters: int
    macs: int
    macs_counted: int

    @property
    def disagreement(self) -> float:
        return abs(self.macs - self.macs_counted) / self.macs_counted


def measure_cost(case: Case) -> Cost:
    model = build_meta_model(case)
    tokens, parameters, macs = num_tokens(model, case.image_size), num_parameters(model), analytic_macs(case, model)
    return Cost(tokens, parameters, macs, counted_macs(case, model))


@dataclass(frozen=True)
class Memory:
    """Memory of one case, measured in a process of its own, in MiB of 2^20 bytes.

    Attributes:
        peak_mem_mib: Highest during a forward pass, above what the process held before the network was built.
        weights_mib: Parameters and buffers, by their bytes.
        activations_mib: Highest during a forward pass, above what rests between two of them.
        process_mib: Of the whole process: by NVML on a GPU, its resident set's highest on a CPU.
    """

    peak_mem_mib: float
    weights_mib: float
    activations_mib: float
    process_mib: float | None


class MemoryCaseFailed(RuntimeError):
    """A memory case ended without a measurement.

    Attributes:
        out_of_memory: Whether for want of memory.
    """

    def __init__(self, message: str, out_of_memory: bool):
        super().__init__(message)
        self.out_of_memory = out_of_memory


def measure_memory_apart(case: Case, device: torch.device, timeout_s: float = 1800) -> Memory:
    """Measures in a process of its own: what one case leaves behind would count for the next.

    Raises:
        MemoryCaseFailed: The process failed; ``out_of_memory`` says whether for that reason.
    """
    command = [sys.executable, str(Path(__file__)), case.to_json(), "--device", device.type]
    # Freed blocks go back to the system at once: else glibc keeps them, and later peaks hide in what it kept.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise MemoryCaseFailed(f"the memory case took more than {timeout_s:.0f} s", False) from error
    if done.returncode == 0:
        return Memory(**json.loads(done.stdout.splitlines()[-1]))
    if done.returncode == -signal.SIGKILL:
        raise MemoryCaseFailed("the memory case was killed, as the system does when memory runs out", True)
    said = done.stderr.strip().splitlines() or [f"the memory case ended with code {done.returncode}"]
    raise MemoryCaseFailed(said[-1], done.returncode == OUT_OF_MEMORY_CODE)


def memory_case(text: str, device: torch.device) -> int:
    """What the process of one memory case does: prints a line of JSON; returns the exit code.

    Args:
        text: The case as JSON.
        device: Where it runs.
    """
    try:
        case = Case.from_json(text)
        with torch.inference_mode(), without_tf32(), pinned_sdpa(case.pinned_backend):
            measured = _measure_cuda(case, device) if device.type == "cuda" else _measure_cpu(case, device)
    except Exception as error:
        print(describe_error(error), file=sys.stderr, flush=True)
        return OUT_OF_MEMORY_CODE if is_out_of_memory(error) else 1
    print(json.dumps(asdict(measured)), flush=True)
    return 0


def _weights_mib(model: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / MIB


def _measure_cuda(case: Case, device: torch.device) -> Memory:
    model = build_model(case).to(device, case.torch_dtype)
    images = make_images(case, device)
    gc.collect()
    torch.cuda.empty_cache()
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
    return Memory(peak, _weights_mib(model), peak - resting, process_memory_mib(device))


def _measure_cpu(case: Case, device: torch.device) -> Memory:
    # The libraries' code is paged in by a network of no size, so that it is not taken for memory of the case.
    small = replace(case, backbone=Backbone("test_vit"), mechanism=SOFTMAX, image_size=(32, 32), options={}, batch=1)
    build_model(small).to(case.torch_dtype)(make_images(small, device))
    _give_back_freed()
    baseline = _resident_mib()
    model = build_model(case).to(device, case.torch_dtype)
    images = make_images(case, device)
    model(images)
    _give_back_freed()
    resting = _resident_mib()
    _reset_peak()
    model(images)
    peak = _peak_mib()
    return Memory(peak - baseline, _weights_mib(model), max(0.0, peak - resting), peak)


def _give_back_freed() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak() -> None:
    """Resets the resident set's high-water mark where the system can; else it is that of the process's whole life."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _status_mib(key: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(key)), None)


def _peak_mib() -> float:
    peak = _status_mib("VmHWM:")
    return peak_resident_mib() if peak is None else peak


def _resident_mib() -> float:
    """The resident set now, or where the system does not say, its highest so far."""
    resident = _status_mib("VmRSS:")
    return _peak_mib() if resident is None else resident


def main(arguments: Sequence[str] | None = None) -> int:
    """The process of one memory case, started by :func:`measure_memory_apart`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("case", help="the case as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    return memory_case(options.case, torch.device(options.device))


if __name__ == "__main__":
    sys.exit(main())
