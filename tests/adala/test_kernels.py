"""The fused kernels without running one: how work is cut, what is launched, where they refuse, what compiles."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adala.attention.kernels import (
    Launch,
    fused_elu_attention,
    fused_elu_attention_packed,
    is_interpreted,
    packed_launches,
    unsupported_reason,
)
from adala.attention.kernels.plan import TILES, choose_split, choose_tiles
from adala.attention.linear import elu_plus_one, linear_attention

PATIENCE_S = 600
H100_MULTIPROCESSORS = 132
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def launches(
    dtype: torch.dtype, batch: int, num_tokens: int, num_heads: int, head_dim: int
) -> tuple[list[Launch], list[Launch]]:
    qkv = torch.empty(batch, num_tokens, 3, num_heads, head_dim, dtype=dtype, device="meta")
    return packed_launches(qkv, H100_MULTIPROCESSORS)


@pytest.mark.parametrize("num_pairs", [1, 12, 528, 10_000])
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 1025, 5330])
def test_every_token_has_one_program_and_every_program_a_token(num_pairs: int, num_tokens: int) -> None:
    split = choose_split(num_pairs, num_tokens, 64, H100_MULTIPROCESSORS)
    assert split.span % 64 == 0
    assert (split.splits - 1) * split.span < num_tokens <= split.splits * split.span


def test_tokens_are_split_until_the_chip_is_full() -> None:
    def splits(num_pairs: int) -> int:
        return choose_split(num_pairs, 64 * 100, 64, num_multiprocessors=10).splits

    # Four programs for each of the ten multiprocessors.
    assert [splits(num_pairs) for num_pairs in (1, 8, 20, 39, 40, 1000)] == [34, 5, 2, 2, 1, 1]
    assert choose_split(1, 130, 64, num_multiprocessors=10).splits == 3, "no more programs than blocks"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 72, 80, 96, 128])
def test_a_product_has_at_least_sixteen_of_everything(dtype: torch.dtype, head_dim: int) -> None:
    for launch in itertools.chain(*launches(dtype, 1, 5, 1, head_dim)):
        if launch.program != "add_splits":
            padded = launch.constants["PADDED"]
            assert padded >= max(head_dim, 16) and padded & (padded - 1) == 0
            assert launch.constants["BLOCK"] >= 16


def test_launches_and_the_bytes_of_each_in_a_training_step() -> None:
    # DeiT-S at 224 px, 64 images: 384 pairs of 197 tokens, each pair in two programs.
    batch, num_tokens, num_heads, head_dim = 64, 197, 6, 64
    forward, backward = launches(torch.bfloat16, batch, num_tokens, num_heads, head_dim)
    tokens = batch * num_tokens * num_heads * head_dim * 2
    sums = batch * num_heads * (head_dim + 1) * head_dim * 4
    assert [(launch.program, launch.bytes_moved) for launch in forward] == [
        ("sum_keys", 2 * tokens + 2 * sums),
        ("add_splits", 2 * sums + sums),
        ("mix_values", 2 * tokens + sums),
    ]
    assert [(launch.program, launch.bytes_moved) for launch in backward] == [
        ("queries_backward", 3 * tokens + sums + 2 * sums),
        ("add_splits", 2 * sums + sums),
        ("keys_backward", 4 * tokens + sums),
    ]


def test_bytes_per_token_and_channel() -> None:
    """With the sums, which are as large as the tokens' own tensors of 130 tokens, and less beside more tokens."""
    batch, num_tokens, num_heads, head_dim = 64, 1025, 12, 64
    forward, backward = launches(torch.bfloat16, batch, num_tokens, num_heads, head_dim)
    assert [len(forward), len(backward)] == [2, 2]
    elements = batch * num_tokens * num_heads * head_dim
    assert 8 <= sum(launch.bytes_moved for launch in forward) / elements < 8.6
    assert 14 <= sum(launch.bytes_moved for launch in backward) / elements < 14.8


def test_what_is_kept_for_the_backward_pass() -> None:
    """The input and d (d + 1) float32 numbers a pair."""
    kept: list[torch.Tensor] = []
    qkv = torch.empty(2, 197, 3, 6, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = fused_elu_attention_packed(qkv)
    assert (out.shape, out.dtype) == ((2, 197, 384), torch.bfloat16)
    assert [(tensor.shape, tensor.dtype) for tensor in kept] == [
        (qkv.shape, torch.bfloat16),
        ((2, 6, 65, 64), torch.float32),
    ]


def test_flops_are_those_of_the_plain_implementation() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    qkv = torch.randn(2, 5, 3, 3, 16, device="meta", requires_grad=True)

    def plain(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return linear_attention(elu_plus_one(q), elu_plus_one(k), v)

    def separate(qkv: torch.Tensor) -> torch.Tensor:
        return fused_elu_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))

    counts = []
    for function in (plain, fused_elu_attention_packed, separate):
        with FlopCounterMode(display=False) as counter:
            out = function(qkv)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == (4 * 2 * 3 * 5 * 16 * 16 + 2 * 2 * 3 * 5 * 16, 2 * counts[0][0])
    assert counts == counts[:1] * 3


def test_compiled_they_stay_in_one_graph_on_fake_tensors() -> None:
    qkv = torch.empty(2, 5, 3, 2, 16, device="meta", requires_grad=True)
    compiled = torch.compile(lambda x: fused_elu_attention_packed(x * 2).sin(), backend="aot_eager", fullgraph=True)
    compiled(qkv).sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float64, 64, "float64"),
        (torch.bfloat16, 200, "head_dim 200"),
        (torch.bfloat16, 60, "head_dim 60"),
        (torch.bfloat16, 8, "head_dim 8"),
        (torch.int64, 64, "int64"),
    ],
)
def test_what_no_device_can_do(dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert unsupported_reason(torch.device("cuda"), dtype, head_dim) == reason


class Properties:
    """Of a GPU that is not here."""

    def __init__(self, capability: str, shared_kib: int):
        self.major, self.minor = map(int, capability.split("."))
        self.shared_memory_per_block_optin = shared_kib * 1024


@pytest.mark.parametrize(
    ("properties", "head_dim", "reason"),
    [
        (Properties("9.0", 227), 128, None),
        (Properties("8.0", 163), 64, None),
        (Properties("8.9", 99), 64, None),
        (Properties("8.9", 99), 80, "head_dim 80 with 99 KiB of shared memory"),
        (Properties("6.1", 48), 64, "compute capability 6.1"),
    ],
    ids=["H100", "A100", "RTX 4090", "RTX 4090 at 80", "GTX 1080"],
)
def test_what_a_gpu_can_do(
    properties: Properties, head_dim: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    from adala.attention.kernels import support

    support._lack_of_gpu.cache_clear()
    try:
        assert unsupported_reason(torch.device("cuda"), torch.bfloat16, head_dim) == reason
    finally:
        support._lack_of_gpu.cache_clear()


def test_refusals_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert unsupported_reason(torch.device("cpu"), torch.bfloat16, 64) is None
    assert unsupported_reason(torch.device("cpu"), torch.float64, 64) == "float64"
    assert unsupported_reason(torch.device("mps"), torch.bfloat16, 64) == "device mps"
    if not torch.cuda.is_available():
        assert unsupported_reason(torch.device("cuda"), torch.bfloat16, 64) == "no CUDA"
    with pytest.raises(ValueError, match="cannot run: float64"):
        fused_elu_attention_packed(torch.zeros(1, 4, 3, 1, 16, dtype=torch.float64))


def test_the_question_can_be_asked_in_compiled_code() -> None:
    def doubled_where_possible(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if unsupported_reason(x.device, x.dtype, x.shape[-1]) is None else x * 3

    compiled = torch.compile(doubled_where_possible, backend="eager", fullgraph=True)
    x = torch.ones(2, 200)
    assert torch.equal(compiled(x), x * 3)


def test_without_triton_the_package_imports_and_says_so() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import adala
import torch
from adala.attention.kernels import fused_elu_attention_packed, unsupported_reason
assert unsupported_reason(torch.device("cuda"), torch.bfloat16, 64) == "no Triton"
fused_elu_attention_packed(torch.zeros(1, 4, 3, 1, 16, device="meta"))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("shape", [(2, 5, 2, 3, 16), (2, 5, 3, 48), (5, 3, 3, 16)])
def test_packed_projections_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, N, 3, H, d\), not"):
        fused_elu_attention_packed(torch.zeros(shape, device="meta"))


def test_keys_of_another_shape() -> None:
    q = torch.zeros(2, 3, 5, 16, device="meta")
    with pytest.raises(ValueError, match=r"not \(2, 3, 5, 16\), \(2, 3, 4, 16\), \(2, 3, 5, 16\)"):
        fused_elu_attention(q, q[:, :, 1:], q)


# From here on: machine code for an H100, which Triton makes without one. It refuses much that its interpreter accepts.
H100_SHARED_BYTES = 227 * 1024


def compile_for(launch: Launch, capability: int) -> "triton.compiler.CompiledKernel":  # noqa: F821
    """Compiles a launch as Triton's own launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adala.attention.kernels import elu_programs

    program = getattr(elu_programs, launch.program)
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    signature, attributes = {}, {}
    arguments = (*launch.reads, *launch.writes, *launch.numbers)
    for index, (name, value) in enumerate(zip(program.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = names[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (name not in ("num_tokens", "span", "splits") and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    assert list(signature) == program.arg_names, "the arguments of a launch are those of its program"
    source = ASTSource(program, signature, launch.constants, attributes)
    options = {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(kernel: "triton.compiler.CompiledKernel", folder: Path) -> int:  # noqa: F821
    """Local memory of a thread, where spilled registers go."""
    from triton import knobs

    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in usage.splitlines() if "STACK:" in line)
    return int(line.split("STACK:")[1].split()[0])


@pytest.mark.skipif(is_interpreted(), reason="Triton compiles nothing while it interprets")
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.bfloat16, 64),
        (torch.bfloat16, 80),
        (torch.float16, 128),
        (torch.float32, 128),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_they_compile_for_an_h100_and_spill_nothing(
    dtype: torch.dtype, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    # Few pairs, so that all five programs are launched.
    for launch in itertools.chain(*launches(dtype, 1, 1025, 12, head_dim)):
        kernel = compile_for(launch, 90)
        assert stack_bytes(kernel, tmp_path) == 0, launch.program
        assert kernel.metadata.shared <= choose_tiles(dtype, head_dim).shared_bytes <= H100_SHARED_BYTES, launch.program


def test_every_row_of_the_table_fits_an_h100() -> None:
    assert max(tiles.shared_bytes for tiles in TILES.values()) <= H100_SHARED_BYTES
