"""Losses on values: they know tensors, not models or recipes. All are computed in float32 (float64 for float64 input).

Shapes: B batch, H heads, N tokens, d head dim, D embed dim, M features.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from adala.attention import accumulation_dtype, full_precision

# (prediction, target, variance of the target: of all its elements, or of each channel) -> scalar
Loss = Callable[[Tensor, Tensor, float | Tensor], Tensor]
# Of `cosine_smooth_l1`: the share of the cosine.
COSINE_SHARE = 0.9
# Least variance of a channel, over the mean of all: one that hardly changes would drown the rest.
CHANNEL_FLOOR = 1e-3


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


def standardized_mse(prediction: Tensor, target: Tensor, variance: float | Tensor) -> Tensor:
    """Mean squared error of features standardised channel by channel, a scalar: 1 is what the target's mean scores.

    Prediction and target are standardised by the target's mean and deviation, so that the means cancel. Channels weigh
    alike however large they are, where ``normalized_mse`` sees little but the largest ones.

    Args:
        prediction: (..., D).
        target: (..., D).
        variance: Of each channel over many images, (D,), see :func:`channel_variance`.

    Paper: arXiv 2410.01680 (PHI-S), its standardised targets.

    Differs: from the paper's loss as ``normalized_mse`` does, in each channel.
    """
    dtype = accumulation_dtype(prediction)
    return ((prediction.to(dtype) - target.to(dtype)).square() / variance).mean()


def channel_variance(variance: Tensor) -> Tensor:
    """Variances of channels (D,) to divide by: none is less than a thousandth of their mean."""
    return variance.clamp_min(CHANNEL_FLOOR * variance.mean().item())


def cosine_smooth_l1(prediction: Tensor, target: Tensor, variance: float) -> Tensor:
    """0.9 of one minus the cosine of each token and 0.1 of the smooth L1 distance, a scalar.

    The cosine is of the features as they are. The smooth L1 is of features divided by the target's standard deviation
    over many images: it is quadratic where they differ by less than one deviation, whatever the scale of the model.

    Args:
        prediction: (..., D).
        target: (..., D).
        variance: Of the target, as for :func:`normalized_mse`.

    Paper: arXiv 2312.06709 (AM-RADIO) for the two terms and their weights.

    Differs: there features are not divided.
    """
    dtype = accumulation_dtype(prediction)
    prediction, target = prediction.to(dtype), target.to(dtype)
    away = (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()
    scale = variance**-0.5
    return COSINE_SHARE * away + (1 - COSINE_SHARE) * F.smooth_l1_loss(scale * prediction, scale * target)


def _plain_mse(prediction: Tensor, target: Tensor, variance: float) -> Tensor:
    return mse(prediction, target)


ALIGNMENT_LOSSES: dict[str, Loss] = {
    "mse": _plain_mse,
    "normalized_mse": normalized_mse,
    "standardized_mse": standardized_mse,
    "cosine_smooth_l1": cosine_smooth_l1,
}
# Losses that need the target's variance, and among them those that need each channel's.
CALIBRATED_LOSSES = ("normalized_mse", "standardized_mse", "cosine_smooth_l1")
CHANNEL_LOSSES = ("standardized_mse",)


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
