"""Stage 1: each block's linear attention learns its frozen softmax counterpart's output, on the latter's input.

Shapes: B batch, H heads, N tokens, d head dim, D embed dim.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adala.attention import AttentionShell, TokenLayout
from adala.losses import attention_map_cross_entropy, mse, normalized_mse
from adala.stages.base import Stage
from adala.students import linearized_blocks

# (student's attention, teacher's attention, their common input (B, N, D), its layout, teacher's output (B, N, D)) -> scalar
BlockLoss = Callable[[AttentionShell, nn.Module, Tensor, TokenLayout, Tensor], Tensor]


def _after_projection(loss: Callable[[Tensor, Tensor], Tensor]) -> BlockLoss:
    def block_loss(
        student: AttentionShell, teacher: nn.Module, x: Tensor, layout: TokenLayout, target: Tensor
    ) -> Tensor:
        return loss(student(x, layout), target)

    return block_loss


def _per_head_output(
    student: AttentionShell, teacher: nn.Module, x: Tensor, layout: TokenLayout, target: Tensor
) -> Tensor:
    """1000 x MSE of the mixed values before the output projection (LoLCATS, arXiv 2410.10254, attention transfer)."""
    with torch.no_grad():
        expected = nn.functional.scaled_dot_product_attention(*_project(teacher, x.to(teacher.qkv.weight.dtype)))
    return 1000 * mse(student.mix(*student.project(x), layout), expected)


def _attention_maps(
    student: AttentionShell, teacher: nn.Module, x: Tensor, layout: TokenLayout, target: Tensor
) -> Tensor:
    """Cross-entropy of the attention maps (Hedgehog, arXiv 2402.04347); one layer's N x N maps at a time."""
    if not hasattr(student.token_mixer, "feature_maps"):
        raise ValueError(
            f"loss attention_map_cross_entropy: {type(student.token_mixer).__name__} has no feature maps to compare; "
            "use normalized_mse"
        )
    with torch.no_grad():
        teacher_q, teacher_k, _ = _project(teacher, x.to(teacher.qkv.weight.dtype))
    q, k, _ = student.project(x)
    return attention_map_cross_entropy(*student.token_mixer.feature_maps(q, k), teacher_q, teacher_k)


BLOCK_LOSSES: dict[str, BlockLoss] = {
    "mse": _after_projection(mse),
    "normalized_mse": _after_projection(normalized_mse),
    "head_output_mse_1000": _per_head_output,
    "attention_map_cross_entropy": _attention_maps,
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
        student: VisionTransformer,
        teacher: VisionTransformer,
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
            ValueError: An unknown loss, or a student without linearized blocks.
        """
        super().__init__(student, teacher)
        if loss not in BLOCK_LOSSES:
            raise ValueError(f"unknown Stage 1 loss {loss!r}: known are {', '.join(BLOCK_LOSSES)}")
        shells = linearized_blocks(student)
        if not shells:
            raise ValueError("Stage 1 has nothing to align: every block keeps its softmax attention")
        aligned = {parameter for shell in shells.values() for parameter in shell.parameters()}
        for parameter in set(student.parameters()) - aligned:
            parameter.requires_grad_(False)
        self.block_loss = BLOCK_LOSSES[loss]
        self.release_activations = release_activations

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` (mean over linearized blocks) and ``block00_loss``, ...; in eval mode the features' cosine too."""
        images, teacher_images = self.images_for(self.student, batch), self.images_for(self.teacher, batch)
        shells = linearized_blocks(self.student)
        losses: dict[int, Tensor] = {}
        gradients: dict[nn.Parameter, Tensor] = {}
        with_gradients = torch.is_grad_enabled()
        release = self.release_activations and with_gradients

        def compare(index: int, attention: nn.Module, x: Tensor, output: Tensor) -> None:
            with torch.set_grad_enabled(with_gradients):
                loss = self.block_loss(shells[index], attention, x.to(images.dtype), layout, output) / len(shells)
                if release:
                    parameters = [p for p in shells[index].parameters() if p.requires_grad]
                    # Not every loss sees every parameter: the output projection comes after the per-head outputs.
                    found = torch.autograd.grad(loss, parameters, allow_unused=True)
                    gradients.update((p, g) for p, g in zip(parameters, found, strict=True) if g is not None)
                    loss = loss.detach()
            losses[index] = loss

        layout = self.student.token_layout(images)
        with torch.no_grad(), _watch_attention(self.teacher, shells, compare):
            teacher_features = self.teacher(teacher_images)

        loss = torch.stack(list(losses.values())).sum()
        if release:
            loss = _ReleasedGradients.apply(loss, list(gradients.values()), *gradients)
        named = {f"block{index:02d}_loss": value.detach() * len(shells) for index, value in losses.items()}
        if not self.training:
            named |= self.feature_metrics(self.student(images), teacher_features)
        return {"loss": loss, **named}


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
    teacher: VisionTransformer, blocks: Mapping[int, Any], compare: Callable[[int, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls ``compare(block, attention, input, output)`` as the teacher passes each of ``blocks``."""

    def hook(index: int) -> Callable:
        return lambda attention, inputs, output: compare(index, attention, inputs[0], output)

    handles = [teacher.blocks[index].attn.register_forward_hook(hook(index)) for index in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _project(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, d) of timm's softmax attention."""
    return AttentionShell.project(attention, x)
