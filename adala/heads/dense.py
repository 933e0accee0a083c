"""The linear segmentation head, and what all dense heads need: patches as a map, normalisation over all ranks.

Shapes: B batch, N tokens, n patches, D embed dim, C channels, K classes, h x w patch grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adala.attention import TokenLayout, accumulation_dtype
from adala.distributed import all_reduce_sum
from adala.families import Backbone


def patch_map(features: Tensor, layout: TokenLayout) -> Tensor:
    """The patch tokens of features (B, N, D) as an image (B, D, h, w)."""
    return features[:, layout.num_prefix_tokens :].transpose(1, 2).unflatten(2, layout.grid_size)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks; its gradient is summed alike, because every rank's loss depends on the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format))


class SharedBatchNorm(nn.Module):
    """Batch normalisation of tokens by the statistics of all ranks' batches.

    Two ranks with half a batch each give what one rank gives with all of it, forwards and backwards, on CPUs too, for
    which PyTorch's SyncBatchNorm is not made. In training mode every forward pass is a collective, and every backward
    pass that reaches the features. The running statistics are computed from sums that all ranks have, so that they
    are equal on all of them although DeepSpeed neither partitions nor averages buffers.

    Paper: arXiv 1502.03167.
    Differs: until the momentum takes over, running statistics are the plain mean over the batches so far, so that
        a short training leaves nothing of their start in them; a batch that is not finite, whose gradient the engine
        passes over, does not enter them; they stay float32 when the module is cast.
    """

    running_mean: Tensor
    running_variance: Tensor
    num_batches: Tensor

    def __init__(self, num_channels: int, over_ranks: bool = True, eps: float = 1e-5, momentum: float = 0.1):
        """Starts as the identity on normalised input.

        Args:
            num_channels: C.
            over_ranks: Whether statistics are summed over ranks; false for a module that one rank trains alone.
            eps: Added to the variance.
            momentum: Least share of a new batch in the running statistics.
        """
        super().__init__()
        self.over_ranks = over_ranks
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_variance", torch.ones(num_channels))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SharedBatchNorm":
        exact = {name: getattr(self, name) for name in ("running_mean", "running_variance")}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                # A step of a tenth or less would be rounded away in bf16.
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) in and out, computed in float32 and returned in the dtype of ``x``."""
        values = x.to(accumulation_dtype(x))
        mean, variance = self._batch_statistics(values) if self.training else (self.running_mean, self.running_variance)
        scale = self.weight.to(values.dtype) * (variance + self.eps).rsqrt()
        return ((values - mean) * scale + self.bias).to(x.dtype)

    def _sum(self, tensor: Tensor) -> Tensor:
        return _SumOverRanks.apply(tensor) if self.over_ranks else tensor

    def _batch_statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) over the tokens of all ranks."""
        own_count = values.new_full((1,), values.shape[0] * values.shape[1])
        total, count = self._sum(torch.cat([values.sum((0, 1)), own_count])).split([values.shape[2], 1])
        mean = total / count
        # Around the mean, not as a difference of squares: features lie many standard deviations from zero.
        variance = self._sum((values - mean).square().sum((0, 1))) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        return mean, variance

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        is_finite = torch.isfinite(mean).all() & torch.isfinite(variance).all()
        self.num_batches += is_finite
        share = (1 / self.num_batches).clamp(self.momentum, 1)
        for running, new in ((self.running_mean, mean), (self.running_variance, variance)):
            running.copy_(torch.where(is_finite, running.lerp(new.to(running.dtype), share), running))


@dataclass(frozen=True)
class LinearHeadOptions:
    """Options of the head ``linear``.

    Attributes:
        over_ranks: Whether batch statistics are taken over all ranks; false for a head that one rank trains alone.
    """

    over_ranks: bool = True


class LinearSegmentationHead(nn.Module):
    """Batch normalisation and a 1 x 1 convolution on each patch token beside the image's global token.

    The global token is the class token, or the mean over patches where the model has none.

    Paper: arXiv 2304.07193 (DINOv2), its linear evaluation of segmentation.
    Differs: the global token stands beside the patch token; see :class:`SharedBatchNorm` for the normalisation.
    """

    Options = LinearHeadOptions

    def __init__(self, student: Backbone, num_classes: int, options: LinearHeadOptions):
        super().__init__()
        self.has_class_token = student.has_class_token
        self.norm = SharedBatchNorm(2 * student.embed_dim, options.over_ranks)
        # On tokens, where a 1 x 1 convolution is a linear map, and the wide features need not be transposed.
        self.classifier = nn.Linear(2 * student.embed_dim, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Tensor, layout: TokenLayout) -> Tensor:
        """Logits (B, K, h, w) of the features (B, N, D) of all tokens."""
        patches = features[:, layout.num_prefix_tokens :]
        whole = features[:, :1] if self.has_class_token else patches.mean(dim=1, keepdim=True)
        logits = self.classifier(self.norm(torch.cat([patches, whole.expand_as(patches)], dim=-1)))
        return logits.transpose(1, 2).unflatten(2, layout.grid_size)
