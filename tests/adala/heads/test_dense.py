"""Normalisation over all ranks against PyTorch's on all of the batch, and the linear head against its formula."""

import math

import pytest
import torch
from ranks import on_ranks
from tiny_teacher import build_tiny_teacher
from torch import Tensor, nn

from adala.attention import TokenLayout
from adala.distributed import all_reduce_sum, rank, world_size
from adala.heads import build_segmentation_head
from adala.heads.dense import SharedBatchNorm, patch_map


def tokens(seed: int = 0, batch: int = 4) -> Tensor:
    """(B, 6, 3) whose channels lie far from zero, and are spread unequally."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, 6, 3, generator=generator)
    return values * torch.tensor([0.01, 1.0, 30.0]) + torch.tensor([5.0, -2.0, 200.0])


def test_patches_become_a_map_in_raster_order() -> None:
    features = torch.arange(8.0).reshape(1, 8, 1)
    assert patch_map(features, TokenLayout((2, 3), 2)).tolist() == [[[[2, 3, 4], [5, 6, 7]]]]


def test_batch_statistics_are_those_of_pytorch() -> None:
    """Output and every gradient, in training and afterwards in evaluation."""
    ours, theirs = SharedBatchNorm(3), nn.BatchNorm1d(3, momentum=None)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
            module.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    weights = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(9))
    output, expected = ours(x), theirs(y.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=1e-4)
    for result in (output, expected):
        (result * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    for seed in range(1, 6):
        ours(tokens(seed)), theirs(tokens(seed).transpose(1, 2))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_gradients_in_float64() -> None:
    norm = SharedBatchNorm(3).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


def test_a_new_batch_counts_for_at_least_a_tenth() -> None:
    """Batches whose means are 1, 2, 3, ...: a plain mean of the first ten, then a tenth of each."""
    norm = SharedBatchNorm(1)
    expected = 0.0
    for number in range(1, 21):
        norm(torch.full((2, 3, 1), float(number)))
        expected += (number - expected) * max(1 / number, 0.1)
    assert norm.running_mean.item() == pytest.approx(expected)
    assert norm.running_variance.item() == 0.0


def test_evaluation_leaves_the_statistics_alone() -> None:
    norm = SharedBatchNorm(3)
    norm(tokens())
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm.eval()(tokens(1))
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_does_not_stay(value: float) -> None:
    norm = SharedBatchNorm(3)
    norm(tokens())
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    damaged = tokens(1)
    damaged[0, 0, 1] = value
    assert not norm(damaged).isfinite().all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


def test_statistics_stay_float32_in_a_module_in_bf16() -> None:
    norm = SharedBatchNorm(3)
    norm(tokens())
    exact = norm.running_mean.clone()
    norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16 and torch.equal(norm.running_mean, exact)
    assert norm(tokens().bfloat16()).dtype == torch.bfloat16
    assert norm.running_variance.dtype == norm.running_mean.dtype == torch.float32


def own_part(over_ranks: bool = True) -> dict[str, Tensor]:
    """Loss, gradients (as an engine averages them) and buffers of two training steps on this rank's images."""
    head = build_segmentation_head("linear", build_tiny_teacher(), 3, {"over_ranks": over_ranks})
    nn.init.ones_(head.classifier.weight[1:, :5])
    generator = torch.Generator().manual_seed(0)
    result = {}
    for _ in range(2):
        features = (3 * torch.randn(4, 9, 32, generator=generator) + 7).chunk(world_size())[rank()].requires_grad_()
        target = torch.randint(3, (4, 2, 4), generator=generator).chunk(world_size())[rank()]
        loss = nn.functional.cross_entropy(head(features, TokenLayout((2, 4), 1)), target)
        head.zero_grad()
        loss.backward()
        result = {name: p.grad for name, p in head.named_parameters()} | {"loss": loss.detach()}
        result = {name: all_reduce_sum(value / world_size()) for name, value in result.items()}
        result["features"] = features.grad / world_size()
    return result | dict(head.named_buffers())


def test_two_ranks_give_what_one_gives() -> None:
    torch.manual_seed(0)
    alone = own_part()
    torch.manual_seed(0)
    first, second = on_ranks(2, own_part)
    features = torch.cat([first.pop("features"), second.pop("features")])
    torch.testing.assert_close(features, alone.pop("features"), atol=1e-7, rtol=1e-4)
    for name, expected in alone.items():
        torch.testing.assert_close(first[name], expected, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        assert torch.equal(first[name], second[name]), name


def own_statistics() -> Tensor:
    norm = SharedBatchNorm(1, over_ranks=False)
    norm(torch.tensor([[[1.0], [3.0]]]) + rank())
    return norm.running_mean


def test_a_head_may_be_trained_on_one_rank_alone() -> None:
    assert [mean.item() for mean in on_ranks(2, own_statistics)] == [2.0, 3.0]
    head = build_segmentation_head("linear", build_tiny_teacher(), 3, {"over_ranks": False})
    assert not head.norm.over_ranks


@pytest.mark.parametrize("changes", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}], ids=str)
def test_the_linear_head_sees_each_patch_beside_the_whole(changes: dict) -> None:
    model = build_tiny_teacher(**changes)
    head = build_segmentation_head("linear", model, 3)
    assert 0.009 < head.classifier.weight.std() < 0.011 and head.classifier.bias.eq(0).all()
    layout = TokenLayout((2, 3), model.num_prefix_tokens)
    features = 2 + torch.randn(4, layout.num_tokens, 32, generator=torch.Generator().manual_seed(0))
    patches = features[:, layout.num_prefix_tokens :].double()
    whole = features[:, 0].double() if model.has_class_token else patches.mean(1)
    wide = torch.cat([patches, whole[:, None].expand(-1, 6, -1)], dim=2)
    normalised = (wide - wide.mean((0, 1))) / (wide.var((0, 1), unbiased=False) + 1e-5).sqrt()
    weight, bias = head.classifier.weight.double(), head.classifier.bias.double()
    expected = nn.functional.conv2d(normalised.transpose(1, 2).reshape(4, 64, 2, 3), weight[:, :, None, None], bias)
    torch.testing.assert_close(head(features, layout).double(), expected, atol=1e-6, rtol=1e-4)
