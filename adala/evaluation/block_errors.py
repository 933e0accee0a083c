"""Where a student departs from its teacher, block by block.

Shapes: B batch, N tokens, D embed dim, L blocks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adala.distributed import SharedError, all_reduce_sum, device, gather_objects
from adala.evaluation.evaluator import raising_together
from adala.families import Backbone
from adala.similarity import comparison_metrics, comparison_sums


@dataclass(frozen=True)
class BlockErrors:
    """One student against its teacher, in the metrics of :func:`adala.similarity.comparison_metrics`.

    Attributes:
        attention: Where error arises: each block's attention by itself, after the output projection, on the *teacher's*
            input to it, which is what Stage 1 minimises.
        stream: How error accumulates: the residual stream after each block, of the student run as a whole.
        features: What is left: the final norm's output.
    """

    attention: list[dict[str, float]]
    stream: list[dict[str, float]]
    features: dict[str, float]


@dataclass(frozen=True)
class BlockReport:
    """Students against one teacher on the same images.

    Attributes:
        images: How many.
        outliers: How unevenly the teacher's stream after each block is spread over channels: ``max_over_rms`` of all
            its values, the ``channel`` of largest rms, and ``channel_over_median``, its rms over the median channel's.
        students: By name.
    """

    images: int
    outliers: list[dict[str, float]]
    students: dict[str, BlockErrors]


@torch.no_grad()
def measure_block_errors(
    teacher: Backbone,
    students: Mapping[str, Backbone],
    batches: Iterable[Mapping[str, Any]],
) -> BlockReport:
    """Compares students with their teacher on all ranks' batches; every rank calls it and gets the same.

    What all blocks of two models give is held for a batch at a time.

    Args:
        teacher: In eval mode, as the students are, with as many blocks.
        students: By name.
        batches: This rank's; each with ``image`` (B, 3, height, width), normalised.

    Raises:
        ValueError: No rank has an image, or reading them raised on one; every rank raises.
    """
    depth, in_float64 = len(teacher.blocks), {"dtype": torch.float64, "device": device()}
    sums = {name: torch.zeros(2 * depth + 1, 8, **in_float64) for name in students}
    squares, largest = torch.zeros(depth, teacher.embed_dim, **in_float64), torch.zeros(depth, **in_float64)
    counts = torch.zeros(2, **in_float64)
    with raising_together():
        for batch in batches:
            images = batch["image"].to(device())
            calls, theirs = _trace(teacher, images)
            streams = torch.stack(theirs[depth:-1]).double()
            counts += counts.new_tensor([len(images), streams[0, ..., 0].numel()])
            squares += streams.square().sum((1, 2))
            largest = largest.maximum(streams.abs().amax((1, 2, 3)))
            for name, student in students.items():
                own_calls, ours = _trace(student, images)
                # The teacher's input, but the student's arguments: the layout of the tokens is among them.
                inputs = zip(student.blocks, calls, own_calls, strict=True)
                alone = [block.attn(x, **arguments) for block, (x, _), (_, arguments) in inputs]
                pairs = zip([*alone, *ours[depth:]], theirs, strict=True)
                sums[name] += torch.stack([comparison_sums(a, b, teacher.num_prefix_tokens) for a, b in pairs])
    images, tokens = (int(count) for count in all_reduce_sum(counts))
    if not images:
        raise SharedError("there is no image to compare models on: name held-out shards in data.val")
    rms = (all_reduce_sum(squares) / tokens).sqrt().cpu()
    largest = torch.stack(gather_objects(largest.cpu())).amax(0)
    outliers = [_outliers(*block) for block in zip(rms, largest, strict=True)]
    return BlockReport(images, outliers, {name: _errors(all_reduce_sum(of), teacher) for name, of in sums.items()})


def _trace(model: Backbone, images: Tensor) -> tuple[list[tuple[Tensor, dict[str, Any]]], list[Tensor]]:
    """The input (B, N, D) and named arguments of each block's attention; then, each (B, N, D), the outputs of all
    attentions, the residual stream after each block, and the features."""
    calls, outputs, streams = [], [], []

    def see_attention(attention: nn.Module, positional: tuple, named: dict[str, Any], output: Tensor) -> None:
        calls.append((positional[0], named))
        outputs.append(output)

    handles = [block.attn.register_forward_hook(see_attention, with_kwargs=True) for block in model.blocks]
    handles += [block.register_forward_hook(lambda _, __, output: streams.append(output)) for block in model.blocks]
    try:
        features = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls, [*outputs, *streams, features]


def _outliers(rms: Tensor, largest: Tensor) -> dict[str, float]:
    """From the rms of each channel (D,) and the largest absolute value."""
    tiny = torch.finfo(rms.dtype).tiny
    overall, median = rms.square().mean().sqrt().clamp_min(tiny), rms.median().clamp_min(tiny)
    return {
        "max_over_rms": float(largest / overall),
        "channel": int(rms.argmax()),
        "channel_over_median": float(rms.max() / median),
    }


def _errors(sums: Tensor, teacher: Backbone) -> BlockErrors:
    """From sums (2 L + 1, 8) of the attentions, the streams and the features."""
    found = [comparison_metrics(row, teacher.has_class_token) for row in sums]
    metrics = [{name: float(value) for name, value in of_place.items()} for of_place in found]
    depth = len(teacher.blocks)
    return BlockErrors(metrics[:depth], metrics[depth:-1], metrics[-1])
