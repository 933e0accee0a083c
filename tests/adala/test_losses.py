"""Losses against their formulas."""

import torch

from adala.losses import attention_map_cross_entropy, attention_map_kl, mean_cosine, mse, normalized_mse, relative_error


def test_normalized_mse_is_one_for_the_mean_and_ignores_scale() -> None:
    target = 100 + 7 * torch.randn(3, 5, 8, dtype=torch.float64)
    constant = target.mean().expand_as(target)
    torch.testing.assert_close(normalized_mse(constant, target), torch.tensor(1.0, dtype=torch.float64))
    prediction = target + torch.randn_like(target)
    torch.testing.assert_close(normalized_mse(1e3 * prediction, 1e3 * target), normalized_mse(prediction, target))
    torch.testing.assert_close(mse(prediction, target), ((prediction - target) ** 2).mean())


def test_a_constant_target_is_no_division_by_zero() -> None:
    assert normalized_mse(torch.ones(4), torch.ones(4)).item() == 0.0


def test_losses_of_bf16_are_computed_in_float32() -> None:
    target = 1000 + torch.randn(10_000)
    loss = mse(target.bfloat16(), target.bfloat16() + 8)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ((target.bfloat16() + 8).float() - target.bfloat16().float()).square().mean())


def test_attention_map_losses_against_the_written_out_maps() -> None:
    q, k = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    phi_q, phi_k = torch.rand(2, 2, 3, 5, 6, dtype=torch.float64)
    target = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    predicted = phi_q @ phi_k.transpose(-2, -1)
    predicted = predicted / predicted.sum(-1, keepdim=True)
    expected = -(target * predicted.log()).sum(-1).mean()
    torch.testing.assert_close(attention_map_cross_entropy(phi_q, phi_k, q, k), expected)
    entropy = -(target * target.log()).sum(-1).mean()
    torch.testing.assert_close(attention_map_kl(phi_q, phi_k, q, k), expected - entropy)


def test_similarities() -> None:
    target = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert mean_cosine(2 * target, target).item() == 1.0
    assert mean_cosine(-target, target).item() == -1.0
    torch.testing.assert_close(relative_error(1.5 * target, target), torch.tensor(0.5))
