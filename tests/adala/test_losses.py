"""Losses against their formulas."""

import torch

from adala.losses import (
    attention_map_cross_entropy,
    channel_variance,
    cosine_smooth_l1,
    mse,
    normalized_mse,
    standardized_mse,
)


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


def test_standardized_mse_is_the_mse_of_standardised_features() -> None:
    scales = torch.tensor([1.0, 100.0, 0.01, 3.0], dtype=torch.float64)
    target = 5 + scales * torch.randn(50, 7, 4, dtype=torch.float64)
    prediction = target + scales * torch.randn_like(target)
    mean, std = target.mean((0, 1)), target.std((0, 1), correction=0)
    expected = mse((prediction - mean) / std, (target - mean) / std)
    torch.testing.assert_close(standardized_mse(prediction, target, std**2), expected)
    of_mean = standardized_mse(mean.expand_as(target), target, std**2)
    torch.testing.assert_close(of_mean, torch.tensor(1.0, dtype=torch.float64))


def test_a_channel_that_hardly_changes_does_not_drown_the_rest() -> None:
    variance = channel_variance(torch.tensor([3.0, 1.0, 0.0, 0.5]))
    torch.testing.assert_close(variance, torch.tensor([3.0, 1.0, 4.5 / 4 * 1e-3, 0.5]))


def test_cosine_and_smooth_l1_by_their_formula() -> None:
    """Differences of less and of more than a standard deviation; the scale of the features does not matter."""
    target = 3 * torch.randn(2, 5, 8, dtype=torch.float64)
    prediction = target + 4 * torch.randn_like(target)
    away = (prediction - target).abs() / 3
    assert (away < 1).any() and (away > 1).any()
    smooth = torch.where(away < 1, away**2 / 2, away - 0.5).mean()
    cosine = (prediction * target).sum(-1) / prediction.norm(dim=-1) / target.norm(dim=-1)
    expected = 0.9 * (1 - cosine).mean() + 0.1 * smooth
    torch.testing.assert_close(cosine_smooth_l1(prediction, target, 9.0), expected)
    torch.testing.assert_close(cosine_smooth_l1(1e3 * prediction, 1e3 * target, 9e6), expected)


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
