"""How close a student's features are to its teacher's: the one place where cosine and relative error are computed.

Shapes: B batch, N tokens, D embed dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from adala.attention import accumulation_dtype


@torch.no_grad()
def comparison_sums(ours: Tensor, theirs: Tensor, num_prefix_tokens: int) -> Tensor:
    """What :func:`comparison_metrics` is computed from; sums of several batches, or ranks, are added.

    Args:
        ours: Features (B, N, D) of the student.
        theirs: The teacher's.
        num_prefix_tokens: Class token and registers together.

    Returns:
        (8,) float64: cosines summed and counted over all tokens, over patches and over first tokens, squared
        differences, squared features of the teacher.
    """
    dtype = accumulation_dtype(ours)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    cosine = F.cosine_similarity(ours, theirs, dim=-1).double()
    parts = (cosine, cosine[:, num_prefix_tokens:], cosine[:, 0])
    counted = [value for part in parts for value in (part.sum(), cosine.new_tensor(part.numel()))]
    return torch.stack([*counted, (ours - theirs).double().square().sum(), theirs.double().square().sum()])


def comparison_metrics(sums: Tensor, has_class_token: bool) -> dict[str, Tensor]:
    """Scalars out of the sums of a batch or a whole data set.

    Args:
        sums: (8,), see :func:`comparison_sums`.
        has_class_token: Whether token 0 is a class token.

    Returns:
        ``feature_cosine`` (mean over all tokens), ``patch_cosine``, ``relative_error`` (root of summed squared
        differences over root of summed squared teacher features), and ``cls_cosine`` where there is a class token.
    """
    tiny = torch.finfo(sums.dtype).tiny
    metrics = {
        "feature_cosine": sums[0] / sums[1],
        "patch_cosine": sums[2] / sums[3],
        "relative_error": (sums[6] / sums[7].clamp_min(tiny)).sqrt(),
    }
    return metrics | ({"cls_cosine": sums[4] / sums[5]} if has_class_token else {})


@torch.no_grad()
def relative_error(prediction: Tensor, target: Tensor) -> Tensor:
    """||prediction - target|| / ||target|| over all elements of any two tensors, a scalar without gradient."""
    dtype = accumulation_dtype(prediction)
    difference = prediction.to(dtype) - target.to(dtype)
    return difference.norm() / target.to(dtype).norm().clamp_min(torch.finfo(dtype).tiny)
