"""Losses on values: they know tensors, not models or recipes. All are computed in float32 (float64 for float64 input).

Shapes: B batch, H heads, N tokens, d head dim, M features.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from adala.attention import accumulation_dtype, full_precision

# (prediction, target, variance of the target) -> scalar
Loss = Callable[[Tensor, Tensor, float], Tensor]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, a scalar.

    Paper: arXiv 2603.16063, Stages 1 and 2.
    """
    dtype = accumulation_dtype(prediction)
    return F.mse_loss(prediction.to(dtype), target.to(dtype))


def normalized_mse(prediction: Tensor, target: Tensor, variance: float) -> Tensor:
    """Mean squared error in units of the target's variance, a scalar: 1 is what a constant scores.

    The variance is a constant, measured once over many images (:meth:`adala.stages.Stage.calibrate`): that of each
    batch would weigh images by their batch-mates, and the gradient would depend on ranks and micro-batches.

    Differs: the paper's loss is not normalised; here blocks and models whose activations differ by orders of magnitude
    (DINOv2's outlier channels) weigh alike and one learning rate serves them.
    """
    return mse(prediction, target) / variance


def _plain_mse(prediction: Tensor, target: Tensor, variance: float) -> Tensor:
    return mse(prediction, target)


ALIGNMENT_LOSSES: dict[str, Loss] = {"mse": _plain_mse, "normalized_mse": normalized_mse}
# Losses that need the target's variance.
CALIBRATED_LOSSES = ("normalized_mse",)


def attention_map_cross_entropy(
    query_features: Tensor, key_features: Tensor, teacher_q: Tensor, teacher_k: Tensor, clamp_min: float = 1e-12
) -> Tensor:
    """Cross-entropy of a linear attention's weights against the softmax map, mean over all B H N rows.

    One layer's N x N maps are built here, and only here. Its minimum is the entropy of the softmax map.

    Paper: arXiv 2402.04347 (Hedgehog), its attention distillation loss.

    Args:
        query_features: phi(q), (B, H, N, M), non-negative.
        key_features: phi(k), (B, H, N, M).
        teacher_q: The softmax attention's queries, (B, H, N, d), unscaled.
        teacher_k: Its keys, (B, H, N, d).
        clamp_min: Lower clamp of the predicted weights before the logarithm.
    """
    dtype = accumulation_dtype(query_features)
    with full_precision(query_features):
        target = _scores(teacher_q, teacher_k).softmax(-1)
        weights = query_features.to(dtype) @ key_features.to(dtype).transpose(-2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return -(target * weights.clamp_min(clamp_min).log()).sum(-1).mean()


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """d^-1/2 q k^T, (B, H, N, N)."""
    dtype = accumulation_dtype(q)
    return q.shape[-1] ** -0.5 * q.to(dtype) @ k.to(dtype).transpose(-2, -1)
