"""Which tokens a head sees."""

import pytest
import torch

from adala.heads import ClassificationHead, pool_tokens

# Two images of a class token, a register and three patches, one feature each.
FEATURES = torch.tensor([[1.0, 50.0, 2.0, 4.0, 9.0], [-1.0, 70.0, 0.0, 0.0, 3.0]])[..., None]


@pytest.mark.parametrize(
    ("pooling", "has_class_token", "expected"),
    [
        ("cls", True, [[1.0], [-1.0]]),
        ("patch", True, [[5.0], [1.0]]),
        ("cls_patch", True, [[1.0, 5.0], [-1.0, 1.0]]),
        *((pooling, False, [[5.0], [1.0]]) for pooling in ("cls", "patch", "cls_patch")),
    ],
    ids=str,
)
def test_pooled_tokens(pooling: str, has_class_token: bool, expected: list[list[float]]) -> None:
    assert pool_tokens(FEATURES, 2, pooling, has_class_token).tolist() == expected


def test_an_unknown_pooling_is_named() -> None:
    with pytest.raises(ValueError, match="unknown pooling 'mean': known are cls, patch, cls_patch"):
        pool_tokens(FEATURES, 2, "mean")


@pytest.mark.parametrize(
    ("pooling", "has_class_token", "width"),
    [("cls", True, 6), ("patch", True, 6), ("cls_patch", True, 12), ("cls_patch", False, 6)],
    ids=str,
)
def test_a_head_is_linear_in_the_normalised_pooled_tokens(pooling: str, has_class_token: bool, width: int) -> None:
    head = ClassificationHead(6, 4, 2, pooling, has_class_token)
    assert head.linear.weight.shape == (4, width) and head.linear.bias.eq(0).all()
    assert 0.005 < head.linear.weight.std().item() < 0.015
    features = 3 + 5 * torch.randn(7, 5, 6)
    pooled = pool_tokens(features, 2, pooling, has_class_token)
    centred = pooled - pooled.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(features), normalised @ head.linear.weight.T + head.linear.bias)
