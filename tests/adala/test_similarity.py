"""Cosines and relative error against their formulas, however a data set is cut into batches."""

import pytest
import torch

from adala.similarity import comparison_metrics, comparison_sums, relative_error


def test_metrics_do_not_depend_on_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(7, 6, 4, generator=generator) * torch.arange(1, 8)[:, None, None]
    ours = theirs + torch.randn(7, 6, 4, generator=generator)
    cosine = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    expected = {
        "feature_cosine": cosine.mean(),
        "patch_cosine": cosine[:, 2:].mean(),
        "cls_cosine": cosine[:, 0].mean(),
        "relative_error": (ours - theirs).norm() / theirs.norm(),
    }
    for cut in ([7], [1, 6], [3, 3, 1]):
        sums = sum(comparison_sums(a, b, 2) for a, b in zip(ours.split(cut), theirs.split(cut), strict=True))
        found = comparison_metrics(sums, has_class_token=True)
        assert {name: value.item() for name, value in found.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-6
        )
    assert "cls_cosine" not in comparison_metrics(sums, has_class_token=False)


def test_relative_error() -> None:
    target = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(relative_error(1.5 * target, target), torch.tensor(0.5))
    assert relative_error(torch.zeros(2), torch.zeros(2)).item() == 0.0
