"""Linear attention as an operator against softmax: which is faster from how many tokens on, and how near to the memory.

    python bench/attention.py
    python bench/attention.py --tokens 197 1025 5330 65536 --batch 8 --heads 16 --dtype bfloat16 --out runs/attention

Every case mixes the same packed projection (B, N, 3, H, d) into (B, N, H d), all take turns in each round, and a table
is printed and written as attention.md and attention.json into --out. `plain` is linear attention in tensor operations,
`fused` what runs by default (Triton on a GPU, chunks of tokens on a CPU), the rest softmax by each backend of PyTorch
that takes the case. On a GPU cases are captured in CUDA graphs, so that the device is timed and not its launches.

Shapes: B batch, N tokens, H heads, d head dim.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import timing
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import Tensor

from adala.attention.kernels import fused_elu_attention_packed, unsupported_reason
from adala.attention.linear import elu_plus_one, linear_attention
from adala.files import write_json, write_whole
from adala.machine import machine_description

TOKENS = (197, 577, 1025, 2305, 4097, 8193, 16385, 65537)
FUSED, PLAIN, COMPILED = "fused", "plain", "plain, compiled"
COPIED_BYTES = 2**28
# In elements a token and channel: q, k, v read and the output written; the gradient and the input read in two passes,
# and the input's gradient written.
LEAST_MOVED = {"forward": 4, "forward + backward": 4 + 7}

Mix = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        dtype: Of the projection.
        tokens: N.
        what: ``forward`` or ``forward + backward``.
        case: Which operator.
        ms: Median milliseconds; None where it failed.
        against_softmax: Median of the rounds' ratios, how many times as fast as the fastest softmax.
        bandwidth_share: The least that must be moved, a second, over the machine's copy bandwidth.
        error: What it failed with.
    """

    dtype: str
    tokens: int
    what: str
    case: str
    ms: float | None
    against_softmax: float | None
    bandwidth_share: float | None
    error: str | None = None


def plain(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return linear_attention(elu_plus_one(q), elu_plus_one(k), v, den_added=1e-6).transpose(1, 2).flatten(2)


def softmax(backend: str, qkv: Tensor) -> Tensor:
    with timing.pinned_sdpa(backend):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def operators(qkv: Tensor) -> Iterator[tuple[str, Mix]]:
    """What can be tried on such a projection."""
    batch, num_tokens, _, num_heads, head_dim = qkv.shape
    if unsupported_reason(qkv.device, qkv.dtype, head_dim) is None:
        yield FUSED, fused_elu_attention_packed
    yield PLAIN, plain
    yield COMPILED, torch.compile(plain, dynamic=False)
    for backend in timing.SDPA_BACKENDS:
        if backend == "math" and batch * num_heads * num_tokens**2 * qkv.element_size() > timing.LARGEST_MAP_BYTES:
            continue
        yield f"softmax, {backend}", partial(softmax, backend)


def forward_call(mix: Mix, qkv: Tensor) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return mix(qkv)

    return call


def training_call(mix: Mix, qkv: Tensor) -> Callable[[], Any]:
    qkv = qkv.detach().requires_grad_()
    grad = torch.ones_like(mix(qkv))
    return lambda: torch.autograd.grad(mix(qkv), qkv, grad)


CALLS = {"forward": forward_call, "forward + backward": training_call}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, the best of some."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    measure, runner = timing.measure_for(device), timing.Runner(partial(target.copy_, source))
    timing.warmed(runner, measure)
    return 2 * COPIED_BYTES / min(measure(runner, 2) for _ in range(5))


def measure_case(qkv: Tensor, what: str, rounds: int, bandwidth: float, left_out: Sequence[str] = ()) -> list[Row]:
    """Every operator on one projection, but for those that are left out."""
    measure = timing.measure_for(qkv.device)
    runners: dict[str, timing.Runner] = {}
    errors: dict[str, str] = {}
    for name, mix in operators(qkv):
        if name in left_out:
            continue
        try:
            call = timing.captured(timing.Runner(CALLS[what](mix, qkv)), qkv.device).call
            runners[name] = timing.warmed(timing.Runner(call), measure)
        except Exception as error:  # whatever a backend, a compiler or the device's memory refuses is a row
            errors[name] = str(error).strip().splitlines()[0][:120]
    samples = timing.interleave(runners, measure, rounds, budget_s=60.0)
    errors |= {name: str(error).splitlines()[0][:120] for name, error in samples.errors.items()}
    taken = {name: median(samples.seconds[name]) for name in runners if name not in errors}
    fastest = min((name for name in taken if name.startswith("softmax")), key=taken.get, default=None)
    least = LEAST_MOVED[what] * qkv[:, :, 0].numel() * qkv.element_size()
    return [
        Row(
            str(qkv.dtype).removeprefix("torch."),
            qkv.shape[1],
            what,
            name,
            1000 * taken[name] if name in taken else None,
            samples.against(fastest, name)[0] if fastest and name in taken else None,
            least / taken[name] / bandwidth if name in taken and not name.startswith("softmax") else None,
            errors.get(name),
        )
        for name in (*runners, *(name for name in errors if name not in runners))
    ]


def table(rows: list[Row]) -> str:
    lines = ["| dtype | tokens | | operator | ms | against softmax | of copy bandwidth |", f"|{' --- |' * 7}"]
    for row in rows:
        ms = row.error if row.ms is None else f"{row.ms:.3f}"
        speed = "-" if row.against_softmax is None else f"{row.against_softmax:.2f} x"
        share = "-" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f} %"
        lines.append(f"| {row.dtype} | {row.tokens} | {row.what} | {row.case} | {ms} | {speed} | {share} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS if on_gpu else TOKENS[:5], help="N")
    parser.add_argument("--batch", type=int, default=8 if on_gpu else 1, help="B")
    parser.add_argument("--heads", type=int, default=16 if on_gpu else 6, help="H")
    parser.add_argument("--head_dim", type=int, default=64, help="d")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--without", nargs="+", default=[], help=f"operators to leave out ('{COMPILED}', say)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/attention"))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if on_gpu else "cpu")
    bandwidth, rows = copy_bandwidth(device), []
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s", flush=True)
    for dtype, tokens, what in product(options.dtype, options.tokens, CALLS):
        generator = torch.Generator(device).manual_seed(options.seed)
        shape = (options.batch, tokens, 3, options.heads, options.head_dim)
        qkv = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
        found = measure_case(qkv, what, options.rounds, bandwidth, options.without)
        print(table(found), flush=True)
        rows += found
        torch.compiler.reset()
    shape = {"batch": options.batch, "heads": options.heads, "head_dim": options.head_dim, "seed": options.seed}
    found = {"machine": machine_description(), **shape, "copy_bytes_per_s": bandwidth, "rows": list(map(asdict, rows))}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "attention.json", found)
    write_whole(options.out / "attention.md", table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
