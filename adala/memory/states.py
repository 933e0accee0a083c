"""What DeepSpeed holds of weights, gradients and optimizer on each GPU, by ZeRO stage and precision.

Read off the code of DeepSpeed 0.19.8, whose files lie in ``deepspeed/runtime``; other versions may differ. P is the
number of trained parameters, R the number of ranks, w the bytes of a weight (2 in bfloat16, 4 in float32 and under
autocast, which leaves weights as they are). AdamW is PyTorch's own.
"""

from dataclasses import dataclass, replace

from adala.ds_config import DeepSpeedConfig
from adala.stages import Stage

# `zero/config.py:245`: elements of weights that ZeRO-3 may hold gathered.
MAX_LIVE_PARAMETERS = 1_000_000_000
MASTER_BYTES, MOMENTS_BYTES = 4, 8
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of a stage.

    Attributes:
        trained: Of the student and the head, those with a gradient.
        frozen: Of student and head, the others.
        buffers: Of their buffers.
        teacher: Of the teacher's parameters and buffers.
    """

    trained: int
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
        average: Of these, over steps, where one is kept.
        gradients: That are there while activations are, too.
        moments: AdamW's two.
        buckets: Of gradients on their way, there while activations are.
        update: What comes when activations are gone: gradients flattened and reduced, then the optimizer's own.
    """

    teacher: int
    student: int
    gathered: int
    masters: int
    average: int
    gradients: int
    moments: int
    buckets: int
    update: int

    @property
    def lasting(self) -> int:
        """Bytes that are there all the time."""
        trained = self.masters + self.average + self.gradients + self.moments
        return self.teacher + self.student + self.gathered + trained


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
    return ParameterCounts(
        trained=sum(parameter.numel() for parameter in trained),
        frozen=sum(parameter.numel() for parameter in stage.parameters() if not parameter.requires_grad),
        buffers=sum(buffer.numel() for buffer in stage.buffers()),
        teacher=sum(t.numel() for t in (*stage.teacher.parameters(), *stage.teacher.buffers())),
    )


def model_states(
    counts: ParameterCounts, config: DeepSpeedConfig, ranks: int, accumulates: bool, keeps_average: bool = False
) -> ModelStates:
    """What DeepSpeed holds on each GPU; padding, a few elements a group or parameter, is left out.

    Args:
        counts: Of the stage.
        config: ZeRO and precision.
        ranks: GPUs.
        accumulates: Whether gradients of several micro-batches are added up for a step.
        keeps_average: Whether the engine averages the weights over steps, in float32, as the optimizer has them cut.
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
        average=MASTER_BYTES * counts.trained if keeps_average else 0,
        gradients=counts.trained * width,
        moments=MOMENTS_BYTES * counts.trained,
        buckets=_buckets(counts, config),
        update=_update(counts, config, ranks),
    )
    if zero == 0:
        return unpartitioned
    partitioned = replace(
        unpartitioned,
        masters=MASTER_BYTES * share,
        average=MASTER_BYTES * share if keeps_average else 0,
        moments=MOMENTS_BYTES * share,
    )
    # `zero/stage_1_and_2.py:560`: masters are a float32 clone of the rank's share, also of float32 weights.
    added_up = _added_up(config)
    if zero == 1:
        # Gradients stay whole on the parameters until the step (`zero/stage_1_and_2.py:2282`). Where they are added up
        # in float32, the optimizer is BF16_Optimizer (`engine.py:2305`), which holds them whole in float32 all the
        # time (`bf16_optimizer.py:180`), beside each micro-batch's own.
        return replace(partitioned, gradients=counts.trained * (width + (added_up if added_up != width else 0)))
    if zero == 2:
        # The share in float32, into which each micro-batch's are added (`zero/stage_1_and_2.py:1268`); or, where they
        # are added up in the weights' dtype, that of each micro-batch (`:2183`) beside that before (`:1036`).
        twice = 2 if accumulates and added_up == width else 1
        return replace(partitioned, gradients=share * added_up * twice)
    # ZeRO-3 partitions all parameters, frozen ones too, and keeps a gathered weight that is used again within
    # max_reuse_distance, by default 1e9 elements (`zero/partitioned_param_coordinator.py:653`): all of a ViT's.
    # Float32 weights were to be their own masters, but a device is compared with the name of one
    # (`zero/stage3.py:1162`, `:333`), so they are cloned like others. The share of gradients stays (`:791`).
    live = int(config.values["zero_optimization"].get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
    return replace(
        partitioned,
        student=(_share(student, ranks) + counts.buffers) * width,
        gathered=min(student, live) * width,
        gradients=share * added_up,
    )


def _width(config: DeepSpeedConfig) -> int:
    """Bytes of a weight."""
    return config.dtype.itemsize


def _share(elements: int, ranks: int) -> int:
    return -(-elements // ranks)


def _added_up(config: DeepSpeedConfig) -> int:
    """Bytes of an element of the sum of gradients over micro-batches."""
    dtypes = config.completed(0).get("data_types", {})
    return GRADIENT_BYTES[dtypes["grad_accum_dtype"]] if dtypes else _width(config)


def _communicated(config: DeepSpeedConfig) -> int:
    """Bytes of an element of a gradient on its way; what autocast is told to round is left out."""
    dtype = config.completed(0).get("communication_data_type")
    return GRADIENT_BYTES[dtype] if dtype and config.zero_stage else _width(config)


def _bucket(counts: ParameterCounts, config: DeepSpeedConfig) -> int:
    """Elements of a bucket."""
    return int(config.completed(counts.trained)["zero_optimization"]["reduce_bucket_size"])


def _has_buckets(config: DeepSpeedConfig) -> bool:
    """Whether gradients are collected in buckets as they come: not by BF16_Optimizer, which reduces at the step."""
    zero = config.values.get("zero_optimization", {})
    is_bf16_optimizer = config.zero_stage == 1 and _added_up(config) != _width(config)
    return config.zero_stage > 0 and zero.get("contiguous_gradients", True) and not is_bf16_optimizer


def _buckets(counts: ParameterCounts, config: DeepSpeedConfig) -> int:
    """Bytes of the buckets, which are made at their full size."""
    if not _has_buckets(config):
        return 0
    if config.zero_stage == 3:
        # Made with the engine, never let go of, in the dtype of the communication (`zero/stage3.py:782`).
        return _bucket(counts, config) * _communicated(config)
    # Made as a backward pass begins, in the dtype of the weights whatever they are for (`zero/stage_1_and_2.py:3266`,
    # `:1254`); twice where the reduction overlaps with it.
    return (
        _bucket(counts, config) * _width(config) * (2 if config.values["zero_optimization"].get("overlap_comm") else 1)
    )


def _update(counts: ParameterCounts, config: DeepSpeedConfig, ranks: int) -> int:
    """Bytes that come after the backward pass, beside what lasts: of the reduction, then of the update."""
    width, share = _width(config), _share(counts.trained, ranks)
    # PyTorch's AdamW of several tensors at once makes the square roots of all second moments.
    if config.zero_stage == 0:
        flat = counts.trained * width if ranks > 1 else 0
        return max(flat, 4 * counts.trained)
    if config.zero_stage == 1 and not _has_buckets(config):
        # All of a group are flattened to be reduced, 5e8 elements at a time (`engine.py:3827`).
        return max(counts.trained * _added_up(config), share * 4)
    # A bucket is flattened, and cast where its communication has another dtype (`zero/stage_1_and_2.py:2367`, `:2377`);
    # ZeRO-1 copies its share of the gradients out (`:2183`).
    elements = min(counts.trained, _bucket(counts, config))
    communicated = _communicated(config)
    reduction = elements * (width + (communicated if communicated != width else 0))
    reduction += _buckets(counts, config) + (share * width if config.zero_stage == 1 else 0)
    # The share's gradient in float32 (`:3118`), and the square roots. ZeRO-3's buckets are there all the time.
    update = share * (4 + 4) + (_buckets(counts, config) if config.zero_stage == 3 else 0)
    return max(reduction, update)


def checkpoint_bytes(counts: ParameterCounts, config: DeepSpeedConfig, keeps_average: bool = False) -> int:
    """About how many bytes all ranks together write, see :meth:`adala.engine.Engine.slices`."""
    average = MASTER_BYTES if keeps_average else 0
    return counts.frozen * _width(config) + (MOMENTS_BYTES + MASTER_BYTES + average) * counts.trained


def step_traffic(counts: ParameterCounts, config: DeepSpeedConfig, ranks: int, accumulation: int) -> Traffic:
    """What each GPU sends in one optimizer step.

    Args:
        counts: Of the stage.
        config: ZeRO and precision.
        ranks: GPUs.
        accumulation: Micro-batches of a step.
    """
    width, zero = _width(config), config.zero_stage
    gradients = counts.trained * _communicated(config) * (ranks - 1) // ranks
    weights = counts.trained * width * (ranks - 1) // ranks
    if zero == 3:
        # Scattered every micro-batch; all weights gathered for its forward pass, and, where they were let go of, once
        # more for the backward pass, which is the most that can come.
        whole = (counts.trained + counts.frozen) * width * (ranks - 1) // ranks
        return Traffic(gradients * accumulation, 2 * whole * accumulation)
    # All-reduced, under ZeRO-1 and 2 as well (`zero/stage_1_and_2.py:1516`), at the step or, under ZeRO-2, every
    # micro-batch (`engine.py:3084`). Without ZeRO every rank updates all weights.
    return Traffic(2 * gradients * (accumulation if zero == 2 else 1), weights if zero else 0)
