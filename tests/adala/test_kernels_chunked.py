"""Linear attention on a CPU, a chunk of tokens at a time: against float64, and chosen where it can run."""

import pytest
import torch

from adala.attention import AttentionShape, TokenLayout, build_mixer, set_kernel
from adala.attention.kernels import (
    chunked,
    describe_kernel,
    fused_elu_attention,
    fused_elu_attention_packed,
    is_interpreted,
    uses_kernel,
)
from adala.attention.linear import LinearMixer, elu_attention_reference, elu_plus_one

pytestmark = pytest.mark.skipif(is_interpreted(), reason="Triton's interpreter takes the CPU's tensors")

# rms(reference - found) / rms(reference), the reference in float64 of the same, rounded input. In half precision it is
# the rounding of what is written, 2^-9 and 2^-12 at most.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
SIZES = [(1, 1), (3, 7), (2, 197), (1, 257), (1, 1025), (1, 5330)]


# Of terms that cancel, float32 knows the difference to some roundings of what it subtracts.
ROUNDINGS = 8 * torch.finfo(torch.float32).eps


def rms(values: torch.Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())


def rms_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return rms(found.double() - expected) / rms(expected)


def packed(batch: int, num_tokens: int, dtype: torch.dtype, head_dim: int = 32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return (scale * torch.randn(batch, num_tokens, 3, 2, head_dim, generator=generator)).to(dtype)


def reference(qkv: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient in float64, by way of the N x N matrix, in pieces of queries."""
    exact = qkv.double().requires_grad_()
    q, k, v = exact.permute(2, 0, 3, 1, 4).unbind(0)
    out = torch.cat([elu_attention_reference(part, k, v) for part in q.split(512, dim=2)], 2)
    out = out.transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, exact, grad.double())[0]


def what_cancels(qkv: torch.Tensor, grad: torch.Tensor) -> dict[str, float]:
    """How large the two parts are whose difference the gradients of q and k are: S g of dq, and dS v of dk."""
    q, k, v = qkv.detach().double().permute(2, 0, 3, 1, 4).unbind(0)
    a, b = elu_plus_one(q), elu_plus_one(k)
    grad = grad.double().unflatten(-1, (2, -1)).transpose(1, 2)
    scaled = grad / (a @ b.sum(-2).unsqueeze(-1) + 1e-6)
    return {
        "q": rms(scaled @ (v.transpose(-2, -1) @ b)),
        "k": rms(v @ (scaled.transpose(-2, -1) @ a)),
    }


@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0])
@pytest.mark.parametrize(("batch", "num_tokens"), SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_and_gradient_are_those_of_the_reference(
    dtype: torch.dtype, batch: int, num_tokens: int, scale: float
) -> None:
    qkv = packed(batch, num_tokens, dtype, scale=scale).requires_grad_()
    grad = packed(batch, num_tokens, dtype)[:, :, 0].flatten(2)
    out = fused_elu_attention_packed(qkv)
    out.backward(grad)
    expected, expected_grad = reference(qkv.detach(), grad)
    assert (out.dtype, out.shape, qkv.grad.is_contiguous()) == (dtype, expected.shape, True)
    floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2  # of numbers that are not normal
    assert rms(out.double() - expected) < TOLERANCE[dtype] * rms(expected) + floor
    subtracted = {"v": 0.0} | what_cancels(qkv, grad)
    for name, found, exact in zip("qkv", qkv.grad.unbind(2), expected_grad.unbind(2), strict=True):
        allowed = 2 * TOLERANCE[dtype] * rms(exact) + ROUNDINGS * subtracted[name] + floor
        assert rms(found.double() - exact) < allowed, name


@pytest.mark.parametrize("elements", [1, 64, 448, 1000, 10**6])
def test_chunks_change_nothing_but_rounding(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 images with 7 tokens of 64 channels: one token at a time, one image, some of them, all."""
    qkv, grad = packed(5, 7, torch.float32).requires_grad_(), packed(5, 7, torch.float32)[:, :, 0].flatten(2)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", elements)
    out = fused_elu_attention_packed(qkv)
    out.backward(grad)
    expected, expected_grad = reference(qkv.detach(), grad)
    assert rms_error(out, expected) < 1e-6 and rms_error(qkv.grad, expected_grad) < 1e-6


@pytest.mark.parametrize(("batch", "num_tokens", "width"), [(1, 1, 64), (5, 7, 64), (3, 40_000, 64), (2, 9, 10**6)])
def test_every_token_of_every_image_is_in_one_chunk(batch: int, num_tokens: int, width: int) -> None:
    seen = torch.zeros(batch, num_tokens, dtype=torch.long)
    for images, pieces in chunked.chunks(batch, num_tokens, width):
        for tokens in pieces:
            seen[images, tokens] += 1
    assert (seen == 1).all()


def test_an_images_result_does_not_depend_on_its_batch() -> None:
    qkv = packed(6, 197, torch.float32)
    together = fused_elu_attention_packed(qkv)
    assert torch.equal(together[2:3], fused_elu_attention_packed(qkv[2:3]))


def test_separate_inputs_of_other_dtypes_and_strides() -> None:
    qkv = packed(2, 33, torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    out = fused_elu_attention(q.float(), k.float().contiguous(), v)
    assert out.dtype == torch.bfloat16 and out.transpose(1, 2).is_contiguous()
    expected, _ = reference(qkv, torch.zeros(2, 33, 64))
    assert rms_error(out.transpose(1, 2).flatten(2), expected) < TOLERANCE[torch.bfloat16]


@pytest.fixture
def mixer():
    yield build_mixer("linear", AttentionShape(2, 32, TokenLayout((4, 4), 1)))
    set_kernel("auto")


def calls_of_the_kernel(mixer, qkv: torch.Tensor) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mixer.mix_packed(qkv, mixer.shape.layout)
        mixer(*qkv.permute(2, 0, 3, 1, 4).unbind(0), mixer.shape.layout)
    return sum(event.count for event in profile.key_averages() if event.key.startswith("adala::elu_attention"))


def test_the_mixer_takes_the_kernel_where_there_is_one(mixer) -> None:
    assert calls_of_the_kernel(mixer, packed(1, 17, torch.float32)) == 2
    # Gradient checks want float64, which has none.
    assert calls_of_the_kernel(mixer, packed(1, 17, torch.float64)) == 0
    set_kernel("reference")
    assert calls_of_the_kernel(mixer, packed(1, 17, torch.float32)) == 0


def test_a_subclass_with_another_forward_is_heard() -> None:
    class Doubled(LinearMixer):
        def forward(self, q, k, v, layout):
            return 2 * super().forward(q, k, v, layout)

    shape, qkv = AttentionShape(2, 32, TokenLayout((4, 4), 1)), packed(2, 17, torch.float32)
    once, twice = (mixer(shape).mix_packed(qkv, shape.layout) for mixer in (LinearMixer, Doubled))
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_forms_agree(mixer, dtype: torch.dtype) -> None:
    qkv = packed(2, 17, dtype)
    fused = mixer.mix_packed(qkv, mixer.shape.layout)
    set_kernel("reference")
    torch.testing.assert_close(fused, mixer.mix_packed(qkv, mixer.shape.layout))


def test_which_form_is_taken_is_told(mixer) -> None:
    device = torch.device("cpu")
    kind = "float32 and 32 channels a head on cpu"
    assert mixer.describe_kernel(device, torch.float32) == f"a chunk of tokens at a time ({kind})"
    assert describe_kernel(device, torch.float64, 32).startswith("plain tensor operations, no fused kernel for float64")
    set_kernel("reference")
    assert mixer.describe_kernel(device, torch.float32).startswith("plain tensor operations, as kernel: reference")
    assert not uses_kernel(device, torch.float32, 32)


def test_another_kernel_is_refused(mixer) -> None:
    with pytest.raises(ValueError, match="unknown kernel 'fast': known are auto, fused, reference"):
        set_kernel("fast")


def test_compiled_it_gives_way_to_plain_operations(mixer: LinearMixer) -> None:
    """Of which the compiler makes better than of an operator that it cannot look into; the values are the same."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    qkv, layout = packed(1, 17, torch.float32), TokenLayout((4, 4), 1)
    eager = mixer.mix_packed(qkv, layout)
    compiled = torch.compile(lambda x: mixer.mix_packed(x, layout), backend=backend, fullgraph=True)(qkv)
    torch.testing.assert_close(compiled, eager)
    assert len(graphs) == 1 and "elu_attention" not in graphs[0] and "exp" in graphs[0]
