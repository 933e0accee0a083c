"""Losses against their formulas."""

import torch

from adala.losses import attention_map_cross_entropy, mse, normalized_mse


def test_normalized_mse_is_one_for_the_mean_and_ignores_scale() -> None:
    target = 100 + 7 * torch.randn(3, 5, 8, dtype=torch.float64)
    variance = target.var(correction=0).item()
    constant = target.mean().expand_as(target)
    torch.testing.assert_close(normalized_mse(constant, target, variance), torch.tensor(1.0, dtype=torch.float64))
    prediction = target + torch.randn_like(target)
    torch.testing.assert_close(
        normalized_mse(1e3 * prediction, 1e3 * target, 1e6 * variance), normalized_mse(prediction, target, variance)
    )
    torch.testing.assert_close(mse(prediction, target), ((prediction - target) ** 2).mean())


def test_losses_of_bf16_are_computed_in_float32() -> None:
    target = 1000 + torch.randn(10_000)
    loss = mse(target.bfloat16(), target.bfloat16() + 8)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ((target.bfloat16() + 8).float() - target.bfloat16().float()).square().mean())


def test_the_attention_map_loss_against_the_written_out_maps() -> None:
    q, k = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    phi_q, phi_k = torch.rand(2, 2, 3, 5, 6, dtype=torch.float64)
    target = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    predicted = phi_q @ phi_k.transpose(-2, -1)
    predicted = predicted / predicted.sum(-1, keepdim=True)
    expected = -(target * predicted.log()).sum(-1).mean()
    torch.testing.assert_close(attention_map_cross_entropy(phi_q, phi_k, q, k), expected)
