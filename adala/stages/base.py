"""A stage: an nn.Module that turns a batch into named scalar losses, with the frozen teacher beside it.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adala.attention import TokenMixer
from adala.compilation import CompiledModules
from adala.distributed import all_reduce_sum
from adala.families import Backbone
from adala.losses import channel_variance
from adala.similarity import comparison_metrics, comparison_sums
from adala.students import LinearizedModel


class Stage(nn.Module):
    """The student and, outside the registered modules, its teacher.

    The engine casts, partitions and saves registered modules; the teacher is none of them, so it keeps its weights to
    the bit. It stays in eval mode whatever mode the stage is put into.

    Attributes:
        target_variance: Of each target that the loss compares with, where it needs that, see :meth:`calibrate`: a
            number, or a tensor (D,) of each channel's.
        normalise: From uint8 images (B, 3, height, width) on their device to what the models are to see; None where
            only normalised ones come.
    """

    normalise: Callable[[Tensor], Tensor] | None = None

    def __init__(self, student: LinearizedModel, teacher: Backbone):
        super().__init__()
        self.student = student
        self.target_variance: dict[str, float | Tensor] = {}
        self._compiled: list[CompiledModules] = []
        # Not an attribute assignment, which nn.Module would register as a child.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))

    def train(self, mode: bool = True) -> "Stage":
        super().train(mode)
        self.teacher.eval()
        for modules in self._compiled:
            modules.is_on = mode
        return self

    def checkpoint_activations(self) -> None:
        """Has activations of the student's blocks computed again in the backward pass instead of being held."""
        self.student.set_grad_checkpointing(True)

    def compile_blocks(self) -> None:
        """Has the blocks run under torch.compile from the next ``train()`` on, as long as the stage trains."""
        self._compiled.append(CompiledModules(self.student.blocks, "compute"))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Named scalars of a micro-batch; ``loss`` is the one to minimise.

        In eval mode also what an :class:`adala.evaluation.Evaluator` reads: ``features`` and ``teacher_features``
        (B, N, D), and ``decision`` and ``target`` where there is a task.

        Args:
            batch: ``image`` (B, 3, height, width), normalised or uint8, and what else the stage reads.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def begin_step(self, step: int) -> None:
        """Tells the mixers which optimizer step begins, counted from 0."""
        for module in self.modules():
            if isinstance(module, TokenMixer):  # a head may have some, too
                module.begin_step(step)

    @property
    def calibrated_targets(self) -> tuple[str, ...]:
        """Names of the targets whose variance the loss needs; none by default."""
        return ()

    @property
    def channel_targets(self) -> tuple[str, ...]:
        """Those among the calibrated targets of which each channel's variance is needed; none by default."""
        return ()

    def targets(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The calibrated targets of a batch, by name."""
        raise NotImplementedError(f"{type(self).__name__} does not implement targets")

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measures the variance of every calibrated target over all ranks' batches; every rank calls it.

        Six digits are kept: the order in which ranks and batches are added up does not reach them.
        """
        names = self.calibrated_targets
        # Count, sum and squares of each channel, of which all elements' follow.
        sums = torch.zeros(len(names), 3, self.student.embed_dim, dtype=torch.float64)
        for batch in batches if names else ():
            for name, target in self.targets(batch):
                values = target.double().flatten(0, -2)
                found = (torch.full_like(values[0], len(values)), values.sum(0), values.square().sum(0))
                sums[names.index(name)] += torch.stack(found).cpu()
        device = next(self.student.parameters()).device
        sums = all_reduce_sum(sums.to(device)).cpu()
        for name, of_target in zip(names, sums, strict=True):
            by_channel = name in self.channel_targets
            count, total, squares = of_target if by_channel else of_target.sum(-1, keepdim=True)
            variances = (squares / count - (total / count).square()).clamp_min(torch.finfo(torch.float32).tiny)
            rounded = [float(f"{variance:.6g}") for variance in variances]
            self.target_variance[name] = (
                channel_variance(torch.tensor(rounded)).to(device) if by_channel else rounded[0]
            )

    def variance_of(self, target: str) -> float | Tensor:
        """The measured variance of a target; 1 where the loss needs none.

        Raises:
            ValueError: It has not been measured.
        """
        if target not in self.calibrated_targets:
            return 1.0
        if target not in self.target_variance:
            raise ValueError(
                f"{type(self).__name__} needs the variance of its targets for this loss: call calibrate(batches) "
                "first, or use the loss mse"
            )
        return self.target_variance[target]

    def images_for(self, model: Backbone, batch: Mapping[str, Any]) -> Tensor:
        """The batch's images, normalised, on the device and in the dtype of ``model``'s weights.

        Raises:
            ValueError: They are uint8, and the stage does not know how to normalise them.
        """
        (images,) = self._images_for(batch, model)
        return images

    def images_for_both(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The same for the student and for the teacher: one tensor, which is held once, where their dtypes are one."""
        ours, theirs = self._images_for(batch, self.student, self.teacher)
        return ours, theirs

    def _images_for(self, batch: Mapping[str, Any], *models: Backbone) -> list[Tensor]:
        weights, images = [model.patch_embed.proj.weight for model in models], batch["image"]
        if not images.is_floating_point():
            if self.normalise is None:
                raise ValueError(
                    f"images of {images.dtype} are not normalised: set the stage's normalise, or do it before"
                )
            images = self.normalise(images.to(weights[0].device, non_blocking=True))
        return [images.to(weight.device, weight.dtype, non_blocking=True) for weight in weights]

    def feature_metrics(self, features: Tensor, teacher_features: Tensor) -> dict[str, Tensor]:
        """Cosines and relative error of a batch's features (B, N, D), for the log."""
        sums = comparison_sums(features, teacher_features, self.student.num_prefix_tokens)
        return comparison_metrics(sums, self.student.has_class_token)
