"""Stage 2: the whole student learns the frozen teacher's final features.

Shapes: B batch, N tokens, D embed dim.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adala.compilation import CompiledModules
from adala.families import Backbone
from adala.losses import ALIGNMENT_LOSSES, CALIBRATED_LOSSES, CHANNEL_LOSSES, normalized_mse
from adala.stages.base import Stage
from adala.students import LinearizedModel


class FeatureAlignment(Stage):
    """Compares the outputs of the final norm over all tokens, prefix and patches.

    Paper: arXiv 2603.16063, Stage 2: it undoes the error that the blocks' approximations accumulate.

    Differs: see ``normalized_mse``.
    """

    def __init__(
        self,
        student: LinearizedModel,
        teacher: Backbone,
        loss: str = "normalized_mse",
        global_weight: float = 0.0,
        intermediate_weight: float = 0.0,
        intermediate_blocks: Sequence[int] | int = 4,
    ):
        """Builds the stage.

        Args:
            student: The linearized model.
            teacher: Its softmax counterpart.
            loss: Name of an alignment loss.
            global_weight: Of the same loss of the global feature beside that of all tokens: the class token, or the
                mean of the patches where there is none.
            intermediate_weight: Of the normalised MSE of what comes out of some blocks, the mean over these.
            intermediate_blocks: Which, counted from 0; or every so many of them, the last of each.

        Raises:
            ValueError: An unknown loss, or a block that the model does not have.
        """
        super().__init__(student, teacher)
        if loss not in ALIGNMENT_LOSSES:
            raise ValueError(f"unknown Stage 2 loss {loss!r}: known are {', '.join(ALIGNMENT_LOSSES)}")
        self.feature_loss = ALIGNMENT_LOSSES[loss]
        self.global_weight = global_weight
        self.intermediate_weight = intermediate_weight
        self.blocks = _chosen(intermediate_blocks, len(student.blocks)) if intermediate_weight else ()
        targets = ("features", *(("global",) if global_weight else ()))
        self._of_loss = targets if loss in CALIBRATED_LOSSES else ()
        self._by_channel = targets if loss in CHANNEL_LOSSES else ()

    @property
    def calibrated_targets(self) -> tuple[str, ...]:
        return (*self._of_loss, *map(_name, self.blocks))

    @property
    def channel_targets(self) -> tuple[str, ...]:
        return self._by_channel

    def compile_blocks(self) -> None:
        super().compile_blocks()
        self._compiled.append(CompiledModules(self.teacher.blocks))

    def targets(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        with _streams(self.teacher, self.blocks) as streams:
            features = self.teacher(self.images_for(self.teacher, batch))
        yield "features", features
        if self.global_weight:
            yield "global", self._global(features)
        for index, stream in streams.items():
            yield _name(index), stream

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss``, where it has several terms also these (``feature_loss``, ``global_loss``, ``intermediate_loss`` and
        ``block03_loss``, ...), and the features' cosines and relative error; in eval mode the features themselves."""
        images, teacher_images = self.images_for_both(batch)
        with torch.no_grad(), _streams(self.teacher, self.blocks) as teacher_streams:
            teacher_features = self.teacher(teacher_images)
        with _streams(self.student, self.blocks) as streams:
            features = self.student(images)
        loss = self.feature_loss(features, teacher_features, self.variance_of("features"))
        losses = {"loss": loss}
        if self.global_weight or self.blocks:
            losses["feature_loss"] = loss.detach()
        if self.global_weight:
            ours, theirs = self._global(features), self._global(teacher_features)
            of_global = self.feature_loss(ours, theirs, self.variance_of("global"))
            losses["loss"] = losses["loss"] + self.global_weight * of_global
            losses["global_loss"] = of_global.detach()
        if self.blocks:
            of_blocks = self._compare_streams(streams, teacher_streams)
            mean = torch.stack(list(of_blocks.values())).mean()
            losses["loss"] = losses["loss"] + self.intermediate_weight * mean
            losses["intermediate_loss"] = mean.detach()
            losses |= {name: value.detach() for name, value in of_blocks.items()}
        if self.training:
            return {**losses, **self.feature_metrics(features, teacher_features)}
        return {**losses, "features": features, "teacher_features": teacher_features}

    def _compare_streams(self, ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {
            f"{_name(index)}_loss": normalized_mse(ours[index], theirs[index], self.variance_of(_name(index)))
            for index in self.blocks
        }

    def _global(self, features: Tensor) -> Tensor:
        """(B, 1, D) of features (B, N, D)."""
        if self.student.has_class_token:
            return features[:, :1]
        return features[:, self.student.num_prefix_tokens :].mean(1, keepdim=True)


def _chosen(blocks: Sequence[int] | int, depth: int) -> tuple[int, ...]:
    """Numbers of blocks."""
    if isinstance(blocks, int):
        if blocks > depth:
            raise ValueError(f"intermediate_blocks is {blocks}: the model has {depth} blocks; choose fewer, or a list")
        return tuple(range(blocks - 1, depth, blocks))
    outside = [index for index in blocks if index >= depth]
    if outside:
        raise ValueError(f"intermediate_blocks: the model has the blocks 0 to {depth - 1}, not {outside[0]}")
    return tuple(sorted(blocks))


def _name(index: int) -> str:
    return f"block{index:02d}"


@contextmanager
def _streams(model: Backbone, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What comes out of each of ``blocks`` (B, N, D) while the model runs within.

    Hooks stay outside of what is compiled, and of what a backward pass computes again.
    """
    found: dict[int, Tensor] = {}
    handles = [model.blocks[index].register_forward_hook(partial(_keep, found, index)) for index in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: dict[int, Tensor], index: int, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    found[index] = output
