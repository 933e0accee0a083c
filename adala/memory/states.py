"""What DeepSpeed holds of weights, gradients and optimizer on each GPU, by ZeRO stage and precision.

Read off the code of DeepSpeed 0.19.8, whose files lie in ``deepspeed/runtime``; other versions may differ. P is the
number of trained parameters, R the number of ranks, w the bytes of a weight (2 in bfloat16, 4 in float32 and under
autocast, which leaves weights as they are). AdamW is PyTorch's own.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from adala.ds_config import DeepSpeedConfig
from adala.stages import Stage

# `zero/config.py:113`, `:245`: elements of a bucket of gradients, and of weights that ZeRO-3 may hold gathered.
REDUCE_BUCKET, MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000
# `torch_autocast.py:15`: what under autocast is communicated in its dtype; other parameters in float32.
LOW_PRECISION_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MASTER_BYTES, MOMENTS_BYTES = 4, 8


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of a stage.

    Attributes:
        trained: Of the student and the head, those with a gradient.
        trained_low: Of ``trained``, those that autocast's communication rounds.
        frozen: Of student and head, the others.
        buffers: Of their buffers.
        teacher: Of the teacher's parameters and buffers.
    """

    trained: int
    trained_low: int
    frozen: int
    buffers: int
    teacher: int


@dataclass(frozen=True)
class ModelStates:
    """Bytes on each GPU that do not depend on the micro-batch.

    Attributes:
        teacher: The frozen teacher, whole on each GPU, of which the engine knows nothing.
        student: Weights of student and head, trained or not; under ZeRO-3 the GPU's share of them.
        gathered: Under ZeRO-3, weights that are whole for the time of a step.
        masters: Float32 copies of the trained weights, that the optimizer updates.
        gradients: That are there while activations are, too.
        moments: AdamW's two.
        buckets: Of gradients on their way, there while activations are.
        update: What comes when activations are gone: gradients flattened and reduced, then the optimizer's own.
    """

    teacher: int
    student: int
    gathered: int
    masters: int
    gradients: int
    moments: int
    buckets: int
    update: int

    @property
    def lasting(self) -> int:
        """Bytes that are there all the time."""
        return self.teacher + self.student + self.gathered + self.masters + self.gradients + self.moments


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU sends in one optimizer step, by rings: (R - 1) / R of what is gathered or scattered.

    Attributes:
        gradients: An all-reduce is counted as a scatter and a gather.
        weights: The all-gather of updated or partitioned weights.
    """

    gradients: int
    weights: int


def count_parameters(stage: Stage) -> ParameterCounts:
    """Counts the elements of a stage's parameters, on any device."""
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    low = {
        parameter
        for module in stage.modules()
        if type(module) in LOW_PRECISION_MODULES
        for parameter in module.parameters(recurse=False)
    }
    return ParameterCounts(
        trained=sum(parameter.numel() for parameter in trained),
        trained_low=sum(parameter.numel() for parameter in trained if parameter in low),
        frozen=sum(parameter.numel() for parameter in stage.parameters() if not parameter.requires_grad),
        buffers=sum(buffer.numel() for buffer in stage.buffers()),
        teacher=sum(t.numel() for t in (*stage.teacher.parameters(), *stage.teacher.buffers())),
    )


def model_states(counts: ParameterCounts, config: DeepSpeedConfig, ranks: int, accumulates: bool) -> ModelStates:
    """What DeepSpeed holds on each GPU; padding, a few elements a group or parameter, is left out.

    Args:
        counts: Of the stage.
        config: ZeRO and precision.
        ranks: GPUs.
        accumulates: Whether gradients of several micro-batches are added up for a step.
    """
    width, zero, share = _width(config), config.zero_stage, _share(counts.trained, ranks)
    student = counts.trained + counts.frozen
    # The optimizer is PyTorch's over the weights themselves; gradients are reduced after the backward pass
    # (`engine.py:3092`). bfloat16 without ZeRO is refused by load_ds_config.
    unpartitioned = ModelStates(
        teacher=counts.teacher * width,
        student=(student + counts.buffers) * width,
        gathered=0,
        masters=0,
        gradients=counts.trained * width,
        moments=MOMENTS_BYTES * counts.trained,
        buckets=_buckets(counts, config),
        update=_update(counts, config, ranks),
    )
    if zero == 0:
        return unpartitioned
    partitioned = replace(unpartitioned, masters=MASTER_BYTES * share, moments=MOMENTS_BYTES * share)
    if zero == 1:
        # `zero/stage_1_and_2.py:560`: a float32 clone of the rank's share of the weights, also of float32 weights.
        # Gradients have the weights' dtype: the accumulation's dtype is the model's (`engine.py:1806`), unless
        # data_types.grad_accum_dtype says otherwise, which load_ds_config does not take; so the optimizer is
        # DeepSpeedZeroOptimizer, and BF16_Optimizer with its float32 gradients never (`engine.py:2305`). They stay
        # whole on the parameters until the step (`zero/stage_1_and_2.py:2282`).
        return partitioned
    if zero == 2:
        # The share of each micro-batch's (`:2183`), beside that of those before (`:1036`).
        return replace(partitioned, gradients=share * width * (2 if accumulates else 1))
    # ZeRO-3 partitions all parameters, frozen ones too, and keeps a gathered weight that is used again within
    # max_reuse_distance, by default 1e9 elements (`zero/partitioned_param_coordinator.py:653`): all of a ViT's.
    # Float32 weights were to be their own masters, but a device is compared with the name of one
    # (`zero/stage3.py:1162`, `:333`), so they are cloned like others. The share of gradients stays (`:791`).
    live = int(config.values["zero_optimization"].get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
    return replace(
        partitioned,
        student=(_share(student, ranks) + counts.buffers) * width,
        gathered=min(student, live) * width,
        gradients=share * width,
    )


def _width(config: DeepSpeedConfig) -> int:
    """Bytes of a weight."""
    return config.dtype.itemsize


def _share(elements: int, ranks: int) -> int:
    return -(-elements // ranks)


def _communicated(counts: ParameterCounts, config: DeepSpeedConfig) -> list[torch.dtype]:
    """The dtypes that gradients are communicated in, each with a bucket of its own."""
    if config.autocast_dtype is None:
        return [config.dtype]
    kinds = {config.autocast_dtype: counts.trained_low, torch.float32: counts.trained - counts.trained_low}
    return [dtype for dtype, elements in kinds.items() if elements]


def _buckets(counts: ParameterCounts, config: DeepSpeedConfig) -> int:
    """Bytes of the buckets, which are made at their full size however small the model is."""
    zero = config.values.get("zero_optimization", {})
    if config.zero_stage == 0 or not zero.get("contiguous_gradients", True):
        return 0
    elements = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    dtypes = _communicated(counts, config)
    if config.zero_stage == 3:
        # Made with the engine, never let go of, each in its dtype (`zero/stage3.py:782`).
        return elements * sum(dtype.itemsize for dtype in dtypes)
    # Made as a backward pass begins, in the dtype of the weights whatever they are for (`zero/stage_1_and_2.py:3266`,
    # `:1254`); twice where the reduction overlaps with it.
    return elements * _width(config) * len(dtypes) * (2 if zero.get("overlap_comm") else 1)


def _update(counts: ParameterCounts, config: DeepSpeedConfig, ranks: int) -> int:
    """Bytes that come after the backward pass, beside what lasts: of the reduction, then of the update."""
    zero = config.values.get("zero_optimization", {})
    width, share = _width(config), _share(counts.trained, ranks)
    # PyTorch's AdamW of several tensors at once makes the square roots of all second moments.
    if config.zero_stage == 0:
        flat = counts.trained * width if ranks > 1 else 0
        return max(flat, 4 * counts.trained)
    # A bucket is flattened, and cast where its communication has another dtype (`zero/stage_1_and_2.py:2367`, `:2377`);
    # ZeRO-1 copies its share of the gradients out (`:2183`).
    elements = min(counts.trained, int(zero.get("reduce_bucket_size", REDUCE_BUCKET)))
    reduction = elements * (width + (config.autocast_dtype.itemsize if config.autocast_dtype else 0))
    reduction += _buckets(counts, config) + (share * width if config.zero_stage == 1 else 0)
    # The share's gradient in float32 (`:3118`), and the square roots. ZeRO-3's buckets are there all the time.
    update = share * (4 + 4) + (_buckets(counts, config) if config.zero_stage == 3 else 0)
    return max(reduction, update)


def checkpoint_bytes(counts: ParameterCounts, config: DeepSpeedConfig) -> int:
    """About how many bytes all ranks together write, see :meth:`adala.engine.Engine.checkpoint_bytes`."""
    of_optimizer = MOMENTS_BYTES + (MASTER_BYTES if config.zero_stage else 0)
    return (counts.trained + counts.frozen) * _width(config) + of_optimizer * counts.trained


def step_traffic(counts: ParameterCounts, config: DeepSpeedConfig, ranks: int, accumulation: int) -> Traffic:
    """What each GPU sends in one optimizer step.

    Args:
        counts: Of the stage.
        config: ZeRO and precision.
        ranks: GPUs.
        accumulation: Micro-batches of a step.
    """
    width, zero = _width(config), config.zero_stage
    low = config.autocast_dtype.itemsize if config.autocast_dtype and zero else width
    gradients = (counts.trained_low * low + (counts.trained - counts.trained_low) * width) * (ranks - 1) // ranks
    weights = counts.trained * width * (ranks - 1) // ranks
    if zero == 3:
        # Scattered every micro-batch; all weights gathered for its forward pass, and, where they were let go of, once
        # more for the backward pass, which is the most that can come.
        whole = (counts.trained + counts.frozen) * width * (ranks - 1) // ranks
        return Traffic(gradients * accumulation, 2 * whole * accumulation)
    # All-reduced, under ZeRO-1 and 2 as well (`zero/stage_1_and_2.py:1516`), at the step or, under ZeRO-2, every
    # micro-batch (`engine.py:3084`). Without ZeRO every rank updates all weights.
    return Traffic(2 * gradients * (accumulation if zero == 2 else 1), weights if zero else 0)
