"""Queries and patches of the plain mask head against dense attention, and what it costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_teacher import build_tiny_teacher
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adala.attention import AttentionShape, TokenLayout, build_mixer
from adala.heads.pmt import DecoderBlock, QueryAttention, attention_mask, build_patch_mixer
from adala.students import linearize
from adala.tasks.mask_loss import mask_classification_loss

LAYOUT = TokenLayout((2, 3), 1)


def dense_attention(attention: QueryAttention, x: Tensor, num_queries: int, mask: Tensor | None) -> Tensor:
    """The attention as one matrix of (Q + N) x (Q + N) weights a head."""
    batch, tokens, width = x.shape
    q, k, v = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        scores[:, :, :num_queries] = scores[:, :, :num_queries].masked_fill(~mask, -torch.inf)
    weights = torch.zeros_like(scores)
    weights[:, :, :num_queries] = scores[:, :, :num_queries].softmax(-1)
    rows = slice(num_queries, None)
    if attention.token_mixer.__class__.__name__ == "SoftmaxMixer":
        weights[:, :, rows, rows] = scores[:, :, rows, rows].softmax(-1)
    else:
        features = [torch.where(part > 0, part + 1, part.exp())[:, :, rows] for part in (q, k)]
        product = features[0] @ features[1].transpose(2, 3)
        weights[:, :, rows, rows] = product / product.sum(-1, keepdim=True)
    return attention.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("mechanism", ["softmax", "linear"])
@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
def test_attention_is_that_of_the_dense_matrix(mechanism: str, masked: bool) -> None:
    torch.manual_seed(0)
    attention = QueryAttention(12, 3, build_mixer(mechanism, AttentionShape(3, 4, LAYOUT))).double()
    x = torch.randn(2, 4 + LAYOUT.num_tokens, 12, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 11) > 0.5 if masked else None
    if masked:
        mask[..., 0] = True
    expected = dense_attention(attention, x, 4, mask)
    torch.testing.assert_close(attention(x, 4, LAYOUT, mask), expected, atol=1e-5, rtol=1e-5)


def test_a_block_adds_to_what_it_gets() -> None:
    block = DecoderBlock(12, 3, 0.5, build_mixer("linear", AttentionShape(3, 4, LAYOUT)))
    assert block.mlp.fc1.weight.shape == (6, 12)
    x = torch.randn(2, 4 + LAYOUT.num_tokens, 12)
    attended = x + block.attention(block.norm1(x), 4, LAYOUT)
    torch.testing.assert_close(block(x, 4, LAYOUT), attended + block.mlp(block.norm2(attended)))


def test_patches_do_not_see_queries(build_head: Callable[..., nn.Module], student) -> None:
    """Neither their number nor their weights change what becomes of the patches."""
    block = build_head("pmt", student).blocks[0]
    tokens = torch.randn(2, LAYOUT.num_tokens, 32)
    few, many = (block(torch.cat([torch.randn(2, n, 32), tokens], 1), n, LAYOUT)[:, n:] for n in (1, 9))
    torch.testing.assert_close(few, many)


def test_a_query_attends_to_its_mask_to_all_queries_and_to_prefix_tokens() -> None:
    logits = torch.full((1, 2, 2, 3), -1.0)
    logits[0, 0, 1, 2] = 0.5
    logits[0, 0, 0, 1] = 0.0
    mask = attention_mask(logits.repeat_interleave(2, 2).repeat_interleave(2, 3), TokenLayout((2, 3), 5))
    assert mask.shape == (1, 1, 2, 2 + 5 + 6)
    assert mask[0, 0, 0].tolist() == [True] * 7 + [False, False, False, False, False, True]
    # The second has no patch above zero.
    assert mask[0, 0, 1].all()


def test_masked_attention_follows_the_masks(build_head: Callable[..., nn.Module], student, monkeypatch) -> None:
    head, features = build_head("pmt", student, masked_attention=True).eval(), torch.randn(1, 17, 32)
    layout, masks = TokenLayout((4, 4), 1), []
    for block in head.blocks:
        block.register_forward_pre_hook(lambda module, arguments: masks.append(arguments[3]))
    head(features, layout)
    assert [mask.shape for mask in masks] == [(1, 1, 6, 23)] * 2
    head.train()
    auxiliary = head(features, layout)["auxiliary"]
    assert all(
        torch.equal(mask, attention_mask(output["mask_logits"], layout))
        for mask, output in zip(masks[2:], auxiliary, strict=True)
    )
    masks.clear()
    head.masked_attention = False
    head(features, layout)
    assert masks == [None, None]


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("teacher", {}, "SoftmaxMixer(scale=None)"),
        ("linear", {}, "LinearMixer(den_added=0.5)"),
        ("hybrid", {}, "LinearMixer(den_added=0.5)"),
        ("mixed", {}, "LinearMixer(den_added=0.5)"),
        ("all kept", {}, "SoftmaxMixer(scale=None)"),
        ("linear", {"patch_attention": "softmax"}, "SoftmaxMixer(scale=None)"),
        ("teacher", {"patch_attention": "linear"}, "LinearMixer(den_added=1e-06)"),
        (
            "teacher",
            {"patch_attention": "linear", "patch_attention_options": {"den_added": 0.1}},
            "LinearMixer(den_added=0.1)",
        ),
    ],
    ids=str,
)
def test_patches_attend_by_the_students_mechanism_unless_told(
    build_head: Callable[..., nn.Module], model: str, options: dict[str, Any], expected: str
) -> None:
    teacher = build_tiny_teacher()
    kept = {"hybrid": [0, 2], "all kept": [0, 1, 2]}.get(model, [])
    others = {0: "window"} if model == "mixed" else {}
    source = teacher if model == "teacher" else linearize(teacher, "linear", kept, {"den_added": 0.5}, 0, others)
    mixers = [block.attention.token_mixer for block in build_head("pmt", source, **options).blocks]
    found = {f"{type(mixer).__name__}({str(mixer.options).split('(')[1]}" for mixer in mixers}
    assert found == {expected} and len(set(map(id, mixers))) == 2


@pytest.mark.parametrize("mechanism", ["hedgehog", "linformer", "performer", "cosformer", "nystromformer", "monarch"])
def test_any_mechanism_will_do(build_head: Callable[..., nn.Module], mechanism: str) -> None:
    student = linearize(build_tiny_teacher(reg_tokens=4), mechanism)
    mixer = build_patch_mixer(student)
    assert type(mixer) is type(student.blocks[0].attn.token_mixer) and mixer.shape.layout.num_tokens == 21
    shared = {id(parameter) for parameter in student.parameters()} & {id(parameter) for parameter in mixer.parameters()}
    assert shared == set()
    prediction = build_head("pmt", student)(torch.randn(2, 21, 32), TokenLayout((4, 4), 5))
    mask_classification_loss(prediction, torch.zeros(2, 8, 8, dtype=torch.int64)).backward()


@pytest.mark.parametrize(
    ("patch_size", "embed_dim", "mask_width", "doublings", "channels"),
    [(4, 32, 256, 1, 32), (8, 32, 16, 1, 16), (14, 64, 48, 1, 48), (16, 32, 16, 2, 16), (32, 32, 8, 3, 8)],
)
def test_masks_come_at_a_stride_of_about_four(
    build_head: Callable[..., nn.Module],
    patch_size: int,
    embed_dim: int,
    mask_width: int,
    doublings: int,
    channels: int,
) -> None:
    model = build_tiny_teacher((patch_size * 2, patch_size * 2), patch_size=patch_size, embed_dim=embed_dim)
    head = build_head("pmt", model, mask_width=mask_width)
    assert len(head.upscale) == doublings and head.mask_mlp[-1].out_features == channels
    prediction = head(torch.randn(1, 5, embed_dim), TokenLayout((2, 2), 1))
    assert prediction["mask_logits"].shape[2:] == (2 * 2**doublings, 2 * 2**doublings)


def flops(head: nn.Module, layout: TokenLayout) -> int:
    """Of a forward pass with every attention written out, since fused kernels are not counted on CPUs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        head(torch.randn(1, layout.num_tokens, 32), layout)
    return counter.get_total_flops()


def saved_bytes(head: nn.Module, layout: TokenLayout) -> int:
    """Of all tensors kept for the backward pass, each storage once."""
    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        head(torch.randn(1, layout.num_tokens, 32), layout)
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize("measure", [flops, saved_bytes])
@pytest.mark.parametrize("masked_attention", [False, True])
def test_cost_is_linear_in_the_tokens(build_head: Callable[..., nn.Module], measure: Callable, masked_attention: bool):
    """Four times the tokens cost at most four times as much; with softmax among patches, a good deal more."""
    small, large = TokenLayout((12, 12), 1), TokenLayout((24, 24), 1)

    def growth(mechanism: str) -> float:
        head = build_head(
            "pmt", build_tiny_teacher(), patch_attention=mechanism, masked_attention=masked_attention, mask_width=8
        )
        return measure(head, large) / measure(head, small)

    # A little less than four times, because weights and queries stay as many.
    assert 3.5 < growth("linear") <= 4.0
    assert growth("softmax") > 6.0
