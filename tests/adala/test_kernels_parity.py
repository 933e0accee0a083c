"""The fused kernels against float64: the output and every gradient, in Triton's interpreter and on a GPU where one is.

Every test has two forms. ``cuda`` runs here and is skipped without a GPU. ``interpreter`` needs ``TRITON_INTERPRET=1``
before Triton is imported, and this process may have imported it long ago: all of those asked for run in one process of
their own, and report what came of each.
"""

import functools
import inspect
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adala.attention.kernels import fused_elu_attention, fused_elu_attention_packed, is_interpreted, packed_launches
from adala.attention.linear import elu_plus_one, linear_attention

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
torch.set_num_threads(1)


def dtype_name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came of this file's interpreted tests by name: nothing, or how it failed."""
    ours = [item for item in request.session.items if item.path == Path(__file__)]
    wanted = [item.nodeid for item in ours if item.callspec.params["form"] == "interpreter"]
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Without the conftest, whose DeepSpeed and timm take longer to import than the tests to run.
    options = ["-q", "--noconftest", "-p", "no:xdist", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *wanted]
    done = subprocess.run(
        command, cwd=request.config.rootpath, env=environment, timeout=PATIENCE_S, text=True, capture_output=True
    )
    assert report.exists(), f"the process of the interpreted tests broke off:\n{done.stdout}\n{done.stderr}"
    cases = ElementTree.parse(report).iter("testcase")
    return {case.get("name"): "\n".join(element.text or "" for element in case) for case in cases}


def on_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Gives a test its two forms; it gets the device that its tensors belong on."""

    @functools.wraps(test)
    def either(request: pytest.FixtureRequest, form: str, **arguments: object) -> None:
        if form == "interpreter" and not is_interpreted():
            failure = request.getfixturevalue("outcomes")[request.node.name]
            if failure:
                pytest.fail(failure, pytrace=False)
        else:
            test(device=torch.device("cpu" if form == "interpreter" else "cuda"), **arguments)

    own = [parameter for parameter in inspect.signature(test).parameters.values() if parameter.name != "device"]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("request", "form")]
    either.__signature__ = inspect.Signature([*added, *(p.replace(kind=p.KEYWORD_ONLY) for p in own)])
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available() or is_interpreted(), reason="no CUDA device")
    return pytest.mark.parametrize("form", ["interpreter", pytest.param("cuda", marks=no_gpu)])(either)


@pytest.fixture(scope="module", autouse=True)
def as_on_the_chip() -> Iterator[None]:
    """Mends two things in the interpreter, which else is wrong about bf16 and too good about tf32.

    It rounds float32 to bf16 towards zero, where the chip rounds to nearest; it multiplies bf16 matrices as if their
    bits were integers; it multiplies tf32 matrices in float32, where the chip leaves their last 13 bits out.
    """
    if not is_interpreted():
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def convert(data: np.ndarray, from_dtype: tl.dtype, to_dtype: tl.dtype, rounding: object) -> np.ndarray:
        if to_dtype == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(data)).to(BF16).view(torch.int16).numpy().view(np.uint16)
        return (data.astype(np.uint32) << 16).view(np.float32)

    def operand(handle: interpreter.TensorHandle, precision: object) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return convert(handle.data, tl.bfloat16, tl.float32, None)
        kept = np.uint32(0xFFFFE000 if "TF32" in str(precision) else 0xFFFFFFFF)
        return (np.ascontiguousarray(handle.data).view(np.uint32) & kept).view(np.float32)

    def dot(self, a, b, total, precision, imprecise):
        product = np.matmul(operand(a, precision), operand(b, precision))
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


# What the kernels may add to the rounding of a result to its own dtype, as rms(error) / rms(reference). To bf16 that
# rounding alone costs 1.66e-3, to fp16 2.1e-4: all but what cancels (see below) stays under 2e-3.
ADDED = {BF16: 1e-4, FP16: 1e-4, FP32: 1e-5}
# Where terms cancel, no float32 computation knows their difference better than to some roundings of what it subtracts.
ROUNDINGS = 4 * torch.finfo(FP32).eps


@dataclass
class Results:
    """What linear attention gives for one input, as (B, N, H, d) each; float64 in the reference."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def reference_of(qkv: Tensor, grad: Tensor, den_added: float = 1e-6) -> tuple[Results, dict[str, float]]:
    """In float64 from the rounded inputs; and the size of the terms that cancel in the gradients of q and k.

    dq is the difference of S g and z (do . o) / den, and dk that of dS v and dz. Little of them is left for one token,
    of which the output is the value whatever the query, and where features are all alike.
    """
    qkv, grad = qkv.detach().double().requires_grad_(), grad.double()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = linear_attention(elu_plus_one(q), elu_plus_one(k), v, den_added).transpose(1, 2)
    (dqkv,) = torch.autograd.grad(out, qkv, grad)
    with torch.no_grad():
        a, b, grad = elu_plus_one(q), elu_plus_one(k), grad.transpose(1, 2)
        g = grad / (a @ b.sum(-2).unsqueeze(-1) + den_added)
        terms = {
            "dq": rms(g @ (b.transpose(-2, -1) @ v).transpose(-2, -1) * a.clamp(max=1)),
            "dk": rms(v @ (a.transpose(-2, -1) @ g).transpose(-2, -1) * b.clamp(max=1)),
        }
    return Results(out.detach(), *dqkv.unbind(2)), terms


def assert_close(ours: Results, expected: Results, terms: dict[str, float], dtype: torch.dtype) -> None:
    """Each result's error is its own rounding, ``ADDED``, and ``ROUNDINGS`` of what cancelled in it."""
    for name in ("out", "dq", "dk", "dv"):
        got, reference = getattr(ours, name), getattr(expected, name)
        assert got.shape == reference.shape and got.isfinite().all(), name
        error = rms(got.double() - reference)
        rounding = rms(reference.to(got.dtype).double() - reference)
        allowed = rounding + ADDED[dtype] * rms(reference) + ROUNDINGS * terms.get(name, 0.0)
        scale = rms(reference)
        print(f"{name}: error {error / scale:.2e}, rounding {rounding / scale:.2e}, allowed {allowed / scale:.2e}")
        assert error <= allowed, f"{name}: {error / scale:.2e} of its rms, allowed {allowed / scale:.2e}"
        cancelled = rounding + ROUNDINGS * terms.get(name, 0.0) > 1.7e-3 * scale
        assert cancelled or error <= 2e-3 * scale, name


def run_packed(qkv: Tensor, grad: Tensor, den_added: float = 1e-6) -> Results:
    leaf = qkv.detach().requires_grad_()
    out = fused_elu_attention_packed(leaf, den_added)
    assert out.dtype == qkv.dtype and out.is_contiguous()
    (dqkv,) = torch.autograd.grad(out, leaf, grad.flatten(2))
    assert dqkv.dtype == qkv.dtype and dqkv.is_contiguous()
    return Results(out.detach().unflatten(-1, qkv.shape[-2:]), *dqkv.unbind(2))


def check_packed(qkv: Tensor, den_added: float = 1e-6) -> None:
    batch, num_tokens, _, num_heads, head_dim = qkv.shape
    grad = draw((batch, num_tokens, num_heads, head_dim), qkv.dtype, qkv.device, seed=1)
    assert_close(run_packed(qkv, grad, den_added), *reference_of(qkv, grad, den_added), qkv.dtype)


ALL_DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=dtype_name)


@on_kernels
@ALL_DTYPES
@pytest.mark.parametrize(
    ("batch", "num_heads", "num_tokens"),
    [(2, 3, 1), (2, 3, 7), (2, 3, 197), (1, 2, 257), (1, 1, 1025), (1, 1, 5330)],
    ids=["N1", "N7", "N197", "N257", "N1025", "N5330"],
)
def test_lengths(device: torch.device, dtype: torch.dtype, batch: int, num_heads: int, num_tokens: int) -> None:
    check_packed(draw((batch, num_tokens, 3, num_heads, 64), dtype, device))


@on_kernels
@ALL_DTYPES
@pytest.mark.parametrize("head_dim", [16, 32, 48, 72, 80, 96, 128], ids=lambda d: f"d{d}")
def test_head_dims(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    check_packed(draw((1, 70, 3, 2, head_dim), dtype, device))


@on_kernels
@ALL_DTYPES
@pytest.mark.parametrize("scale", [1e-3, 8.0], ids=["tiny", "large"])
def test_scales(device: torch.device, dtype: torch.dtype, scale: float) -> None:
    check_packed(draw((1, 197, 3, 2, 64), FP32, device).mul(scale).to(dtype))


@on_kernels
@ALL_DTYPES
def test_values_with_a_mean(device: torch.device, dtype: torch.dtype) -> None:
    """Which cancels in the gradients of q and k."""
    qkv = draw((1, 197, 3, 2, 64), FP32, device)
    qkv[:, :, 2] += 10
    check_packed(qkv.to(dtype))


@on_kernels
@ALL_DTYPES
def test_keys_so_negative_that_only_den_added_is_left(device: torch.device, dtype: torch.dtype) -> None:
    qkv = draw((1, 70, 3, 2, 64), FP32, device)
    qkv[:, :, 1] -= 26
    check_packed(qkv.to(dtype))
    qkv[:, :, :2] = -60_000
    assert all(torch.equal(result, torch.zeros_like(result)) for result in vars(run_packed_alike(qkv, dtype)).values())


def run_packed_alike(qkv: Tensor, dtype: torch.dtype) -> Results:
    batch, num_tokens, _, num_heads, head_dim = qkv.shape
    return run_packed(qkv.to(dtype), draw((batch, num_tokens, num_heads, head_dim), dtype, qkv.device, seed=1))


@on_kernels
def test_the_largest_fp16_numbers_overflow_nothing(device: torch.device) -> None:
    """Sums are of 64 tokens of 60,000 times 60,000, beyond fp16; the outputs are weighted means of values."""
    qkv = draw((1, 64, 3, 1, 32), FP32, device).sign().mul(60_000).to(FP16)
    out = fused_elu_attention_packed(qkv)
    expected, _ = reference_of(qkv, torch.ones_like(qkv[:, :, 0]))
    assert rms(out.double() - expected.out.flatten(2)) <= (ADDED[FP16] + 2.1e-4) * rms(expected.out)


@on_kernels
@pytest.mark.parametrize("den_added", [0.0, 0.5])
def test_den_added(device: torch.device, den_added: float) -> None:
    check_packed(draw((1, 5, 3, 2, 16), FP32, device), den_added)


@on_kernels
@ALL_DTYPES
def test_at_zero_the_feature_rises_by_one(device: torch.device, dtype: torch.dtype) -> None:
    qkv = draw((1, 33, 3, 1, 32), dtype, device)
    qkv[:, ::2, :2] = 0
    check_packed(qkv)


@on_kernels
def test_what_is_not_a_number_stays_so(device: torch.device) -> None:
    qkv = draw((1, 40, 3, 1, 16), FP16, device)
    qkv[0, 3, 0, 0, 5] = float("nan")
    out = fused_elu_attention_packed(qkv)
    assert out[0, 3].isnan().all() and out[0, :3].isfinite().all() and out[0, 4:].isfinite().all()
    qkv[0, 3, 1, 0, 5] = float("nan")
    assert fused_elu_attention_packed(qkv).isnan().all()
    # The form that a GPU's own functions return, which the smallest step upwards turns into -0.
    q, k, v = draw((3, 1, 1, 40, 16), FP32, device)
    q.view(torch.int32)[0, 0, 3, 5] = 0x7FFFFFFF
    assert fused_elu_attention(q, k, v.to(BF16))[0, 0, 3].isnan().all()


def wide_rows(qkv: Tensor) -> Tensor:
    """As columns of a larger matrix."""
    batch, num_tokens, _, num_heads, head_dim = qkv.shape
    columns = 3 * num_heads * head_dim
    wide = torch.full((batch, num_tokens, columns + 24), float("nan"), dtype=qkv.dtype, device=qkv.device)
    wide[..., 8 : columns + 8] = qkv.flatten(2)
    return wide[..., 8 : columns + 8].view(qkv.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns of a wider matrix": wide_rows,
    "heads before tokens": lambda qkv: qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
    "tokens before images": lambda qkv: qkv.transpose(0, 1).contiguous().transpose(0, 1),
    "channels apart": lambda qkv: qkv.transpose(3, 4).contiguous().transpose(3, 4),
    "one image for all": lambda qkv: qkv[:1].expand(qkv.shape),
}


@on_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, layout: str) -> None:
    qkv = LAYOUTS[layout](draw((2, 70, 3, 3, 32), BF16, device))
    assert not qkv.is_contiguous()
    check_packed(qkv)


@on_kernels
def test_a_gradient_that_is_one_number_in_memory(device: torch.device) -> None:
    qkv = draw((1, 20, 3, 2, 32), FP32, device).requires_grad_()
    fused_elu_attention_packed(qkv).sum().backward()
    expected, terms = reference_of(qkv, torch.ones(1, 20, 2, 32, device=device))
    assert_close(Results(expected.out, *qkv.grad.unbind(2)), expected, terms, FP32)


@on_kernels
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Three images 2^30 elements apart, a stride that 32 bits hold; most of the memory between is never touched."""
    contiguous = draw((3, 5, 3, 1, 16), BF16, device)
    memory = torch.empty(2**31 + 1024, dtype=BF16, device=device)
    qkv = memory.as_strided(contiguous.shape, (2**30, *contiguous.stride()[1:]))
    qkv.copy_(contiguous)
    assert torch.equal(fused_elu_attention_packed(qkv), fused_elu_attention_packed(contiguous))


def check_separate(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k, v are (B, H, N, d)."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = fused_elu_attention(*leaves)
    assert out.shape == v.shape and out.dtype == v.dtype and out.transpose(1, 2).is_contiguous()
    grad = draw(tuple(v.shape), v.dtype, v.device, seed=1)
    gradients = torch.autograd.grad(out, leaves, grad)
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in (q, k, v)]
    assert all(gradient.transpose(1, 2).is_contiguous() for gradient in gradients)
    together = torch.stack([tensor.transpose(1, 2).double() for tensor in (q, k, v)], dim=2)
    ours = Results(*(tensor.detach().transpose(1, 2) for tensor in (out, *gradients)))
    assert_close(ours, *reference_of(together, grad.transpose(1, 2)), v.dtype)


@on_kernels
@ALL_DTYPES
def test_separate_tensors_each_in_its_own_layout(device: torch.device, dtype: torch.dtype) -> None:
    q = draw((2, 3, 70, 48), dtype, device, seed=2)
    k = draw((2, 70, 3, 48), dtype, device, seed=3).transpose(1, 2)
    v = draw((2, 70, 3, 3, 48), dtype, device, seed=4)[:, :, 2].transpose(1, 2)
    check_separate(q, k, v)


@on_kernels
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=dtype_name)
def test_queries_and_keys_may_be_of_another_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """As a LayerNorm gives them under autocast."""
    q, k, v = (draw((1, 2, 70, 64), dtype, device, seed) for dtype, seed in ((FP32, 2), (FP32, 3), (dtype, 4)))
    check_separate(q, k, v)


@on_kernels
def test_autocast_changes_nothing(device: torch.device) -> None:
    qkv = draw((1, 20, 3, 2, 32), FP32, device)
    plain = fused_elu_attention_packed(qkv)
    with torch.autocast(device.type, torch.bfloat16):
        inside = fused_elu_attention_packed(qkv)
    assert inside.dtype == FP32 and torch.equal(inside, plain)


@on_kernels
@ALL_DTYPES
def test_twice_the_same_bits_with_tokens_split(device: torch.device, dtype: torch.dtype) -> None:
    qkv, grad = draw((1, 300, 3, 1, 32), dtype, device), draw((1, 300, 1, 32), dtype, device, seed=1)
    forward, backward = packed_launches(qkv, 1)
    assert [launch.program for launch in (*forward, *backward)].count("add_splits") == 2
    first, second = (vars(run_packed(qkv, grad)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_kernels
def test_an_empty_batch(device: torch.device) -> None:
    qkv = torch.zeros(0, 5, 3, 2, 16, device=device, requires_grad=True)
    out = fused_elu_attention_packed(qkv)
    out.sum().backward()
    assert out.shape == (0, 5, 32) and qkv.grad.shape == qkv.shape


@on_kernels
def test_second_derivatives_are_refused(device: torch.device) -> None:
    qkv = draw((1, 5, 3, 1, 16), FP32, device).requires_grad_()
    (gradient,) = torch.autograd.grad(fused_elu_attention_packed(qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        gradient.sum().backward()


@on_kernels
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=dtype_name)
def test_they_are_operators_as_pytorch_wants_them(device: torch.device, dtype: torch.dtype) -> None:
    from adala.attention.kernels import elu

    qkv = draw((2, 5, 3, 2, 16), dtype, device).requires_grad_()
    torch.library.opcheck(elu._attention_packed, (qkv, 1e-6))
    separate = [draw((2, 2, 5, 16), dtype, device, seed).requires_grad_() for seed in range(3)]
    torch.library.opcheck(elu._attention, (*separate, 1e-6))


@on_kernels
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_they_give_the_same_in_one_graph(device: torch.device, dynamic: bool) -> None:
    def function(qkv: Tensor) -> Tensor:
        return fused_elu_attention_packed(qkv * 2).sin()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for num_tokens in (5, 9):
        qkv = draw((2, num_tokens, 3, 2, 16), FP32, device).requires_grad_()
        results = [(out := run(qkv), *torch.autograd.grad(out.sum(), qkv)) for run in (function, compiled)]
        assert all(torch.equal(plain, other) for plain, other in zip(*results, strict=True))
