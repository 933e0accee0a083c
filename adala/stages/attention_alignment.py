"""Stage 1: each block's linear attention learns its frozen softmax counterpart's output, on the latter's input.

Shapes: B batch, H heads, N tokens, d head dim, D embed dim.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adala.attention import AttentionShell, TokenLayout
from adala.compilation import CompiledModules
from adala.families import Backbone
from adala.losses import ALIGNMENT_LOSSES, CALIBRATED_LOSSES, Loss, attention_map_cross_entropy, mse
from adala.stages.base import Stage
from adala.students import LinearizedModel, linearized_blocks


@dataclass(frozen=True)
class Comparison:
    """One block's attention as the teacher passes it.

    Attributes:
        x: Common input of both attentions, (B, N, D), in the student's dtype.
        layout: Of its tokens.
        positions: What else the student's attention is told of positions, by argument (a rotary embedding, say).
        attention: The teacher's softmax attention.
        its_positions: What that is told of positions.
        target: Its output, (B, N, D).
        variance: Of the target over many images; 1 where the loss needs none.
    """

    x: Tensor
    layout: TokenLayout
    positions: Mapping[str, Any]
    attention: nn.Module
    its_positions: Mapping[str, Any]
    target: Tensor
    variance: float

    def project(self, student: AttentionShell) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, d) of the student's attention."""
        return student.project(self.x, **self.positions)

    def project_teacher(self, student: AttentionShell) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the teacher's, whose submodules have the names of the student's."""
        with torch.no_grad():
            x = self.x.to(self.attention.proj.weight.dtype)
            return type(student).project(self.attention, x, **self.its_positions)


BlockLoss = Callable[[AttentionShell, Comparison], Tensor]


def _after_projection(loss: Loss) -> BlockLoss:
    def block_loss(student: AttentionShell, at: Comparison) -> Tensor:
        return loss(student(at.x, at.layout, **at.positions), at.target, at.variance)

    return block_loss


def _per_head_output(student: AttentionShell, at: Comparison) -> Tensor:
    """1000 x MSE of the mixed values before the output projection (LoLCATS, arXiv 2410.10254, attention transfer)."""
    expected = nn.functional.scaled_dot_product_attention(*at.project_teacher(student))
    return 1000 * mse(student.mix(*at.project(student), at.layout), expected)


def _attention_maps(student: AttentionShell, at: Comparison) -> Tensor:
    """Cross-entropy of the attention maps (Hedgehog, arXiv 2402.04347); one layer's N x N maps at a time."""
    teacher_q, teacher_k, _ = at.project_teacher(student)
    q, k, _ = at.project(student)
    return attention_map_cross_entropy(*student.token_mixer.feature_maps(q, k), teacher_q, teacher_k)


ATTENTION_MAPS = "attention_map_cross_entropy"
BLOCK_LOSSES: dict[str, BlockLoss] = {
    **{name: _after_projection(ALIGNMENT_LOSSES[name]) for name in ("mse", "normalized_mse")},
    "head_output_mse_1000": _per_head_output,
    ATTENTION_MAPS: _attention_maps,
}


class AttentionAlignment(Stage):
    """Walks the frozen teacher and compares every linearized block's attention with its counterpart on the way.

    There is no backward pass through depth: a block's loss depends on its own parameters alone. With
    ``release_activations`` each block's gradients are computed as soon as the teacher has passed it, and its
    activations are dropped before the next block runs; the stage's memory then does not grow with depth.

    Paper: arXiv 2603.16063, Stage 1.

    Differs: see ``normalized_mse``.
    """

    def __init__(
        self,
        student: LinearizedModel,
        teacher: Backbone,
        loss: str = "normalized_mse",
        release_activations: bool = True,
    ):
        """Builds the stage; which of the linearized attentions' parameters train is decided by their ``requires_grad``.

        Everything else is frozen here: it gets no gradient, and an optimizer would only let it decay.

        Args:
            student: The linearized model.
            teacher: Its softmax counterpart.
            loss: Name of a block loss.
            release_activations: Off under ZeRO-3, which frees a module's weights after its forward pass and could not
                compute its gradients inside the stage's.

        Raises:
            ValueError: An unknown loss, one that the mechanism cannot have, or a student without linearized blocks.
        """
        super().__init__(student, teacher)
        if loss not in BLOCK_LOSSES:
            raise ValueError(f"unknown Stage 1 loss {loss!r}: known are {', '.join(BLOCK_LOSSES)}")
        shells = linearized_blocks(student)
        if not shells:
            raise ValueError("Stage 1 has nothing to align: every block keeps its softmax attention")
        without = [shell.token_mixer for shell in shells.values() if not hasattr(shell.token_mixer, "feature_maps")]
        if loss == ATTENTION_MAPS and without:
            raise ValueError(
                f"loss {ATTENTION_MAPS}: {type(without[0]).__name__} has no feature maps to compare; use normalized_mse"
            )
        aligned = {parameter for shell in shells.values() for parameter in shell.parameters()}
        for parameter in set(student.parameters()) - aligned:
            parameter.requires_grad_(False)
        self.block_loss = BLOCK_LOSSES[loss]
        self._calibrated = tuple(f"block{index:02d}" for index in shells) if loss in CALIBRATED_LOSSES else ()
        self.release_activations = release_activations
        self._checkpoints = False

    @property
    def calibrated_targets(self) -> tuple[str, ...]:
        return self._calibrated

    def checkpoint_activations(self) -> None:
        """Where activations are released block by block, no more than one block's are held, and nothing changes."""
        self._checkpoints = not self.release_activations

    def compile_blocks(self) -> None:
        """The student's attention alone: what hooks interrupt, the teacher, cannot be compiled."""
        self._compiled.append(CompiledModules(linearized_blocks(self.student).values()))

    def targets(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        found: list[tuple[str, Tensor]] = []

        def keep(index: int, attention: nn.Module, x: Tensor, positions: Mapping[str, Any], output: Tensor) -> None:
            found.append((f"block{index:02d}", output))

        with torch.no_grad(), _watch_attention(self.teacher, linearized_blocks(self.student), keep):
            self.teacher(self.images_for(self.teacher, batch))
        return iter(found)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` (mean over linearized blocks) and ``block00_loss``, ...; in eval mode the features too."""
        images, teacher_images = self.images_for_both(batch)
        shells, layout = linearized_blocks(self.student), self.student.token_layout(images)
        positions = self.student.positions(images)
        losses: dict[int, Tensor] = {}
        gradients: dict[nn.Parameter, Tensor] = {}
        with_gradients = torch.is_grad_enabled()
        release = self.release_activations and with_gradients

        def compare(
            index: int, attention: nn.Module, x: Tensor, its_positions: Mapping[str, Any], output: Tensor
        ) -> None:
            with torch.set_grad_enabled(with_gradients):
                variance = self.variance_of(f"block{index:02d}")
                x = x.to(images.dtype)
                at = Comparison(x, layout, positions[index], attention, its_positions, output, variance)
                loss = self._loss_of(shells[index], at) / len(shells)
                if release:
                    gradients.update(_gradients(loss, shells[index]))
                    loss = loss.detach()
            losses[index] = loss

        with torch.no_grad(), _watch_attention(self.teacher, shells, compare):
            teacher_features = self.teacher(teacher_images)

        loss = torch.stack(list(losses.values())).sum()
        if release:
            loss = _ReleasedGradients.apply(loss, list(gradients.values()), *gradients)
        named = {f"block{index:02d}_loss": value.detach() * len(shells) for index, value in losses.items()}
        if not self.training:
            named |= {"features": self.student(images), "teacher_features": teacher_features}
        return {"loss": loss, **named}

    def _loss_of(self, shell: AttentionShell, at: Comparison) -> Tensor:
        if self._checkpoints and torch.is_grad_enabled():
            return checkpoint(self.block_loss, shell, at, use_reentrant=False)
        return self.block_loss(shell, at)


def _gradients(loss: Tensor, shell: AttentionShell) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The gradients of a block's trainable parameters; its graph is gone afterwards."""
    parameters = [p for p in shell.parameters() if p.requires_grad]
    # Not every loss sees every parameter: the output projection comes after the per-head outputs.
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return ((p, g) for p, g in zip(parameters, found, strict=True) if g is not None)


class _ReleasedGradients(torch.autograd.Function):
    """A loss whose gradients are known already: backward hands them out, scaled by what arrives."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple:
        return None, None, *(gradient * grad_output.to(gradient.dtype) for gradient in ctx.gradients)


@contextmanager
def _watch_attention(
    teacher: Backbone,
    blocks: Mapping[int, Any],
    compare: Callable[[int, nn.Module, Tensor, Mapping[str, Any], Tensor], None],
) -> Iterator[None]:
    """Calls ``compare(block, attention, input, positions, output)`` as the teacher passes each of ``blocks``."""

    def hook(index: int) -> Callable:
        def call(attention: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> None:
            # Masks are arguments too, and no teacher is given one.
            positions = {name: value for name, value in named.items() if name not in ("attn_mask", "is_causal")}
            compare(index, attention, inputs[0], positions, output)

        return call

    handles = [teacher.blocks[index].attn.register_forward_hook(hook(index), with_kwargs=True) for index in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
