"""Which micro-batch, ZeRO stage and checkpointing of activations fit into a GPU, for each stage of a recipe."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from adala.build import outline_stage
from adala.config import Recipe, StageConfig
from adala.ds_config import DeepSpeedConfig, load_ds_config
from adala.memory.states import (
    ModelStates,
    ParameterCounts,
    Traffic,
    checkpoint_bytes,
    count_parameters,
    model_states,
    step_traffic,
)
from adala.memory.tracing import PassMemory, trace_stage
from adala.plan import StagePlan, outline_run

GIB = 2**30
# Assumed, not measured: the CUDA context with its libraries' and NCCL's buffers, and what the allocator holds in pieces
# that nothing fits into.
CONTEXT_BYTES, FRAGMENTATION = GIB, 0.1


@dataclass(frozen=True)
class Demand:
    """What a stage needs of each GPU in one setting.

    Attributes:
        counts: Its parameters.
        config: ZeRO and precision.
        checkpointing: Of activations.
        gpus: How many.
        images: Images of a GPU in a global batch.
        passes: What depends on the micro-batch.
        capacity: Bytes of a GPU.
        keeps_average: Of the weights over steps.
    """

    counts: ParameterCounts
    config: DeepSpeedConfig
    checkpointing: bool
    gpus: int
    images: int
    passes: PassMemory
    capacity: int
    keeps_average: bool = False

    @cached_property
    def states(self) -> ModelStates:
        """What does not depend on the micro-batch."""
        return model_states(self.counts, self.config, self.gpus, True, self.keeps_average)

    def total(self, micro_batch: int) -> int:
        """Bytes that a micro-batch needs, with the reserve."""
        working = max(self.states.buckets + self.passes.peak.at(micro_batch), self.states.update)
        return math.ceil((self.states.lasting + working) * (1 + FRAGMENTATION)) + CONTEXT_BYTES

    def fits(self, micro_batch: int) -> bool:
        return self.total(micro_batch) <= self.capacity

    @cached_property
    def largest(self) -> int | None:
        """The largest micro-batch that fits and divides a GPU's share of the global batch; None where one does not."""
        return max(filter(self.fits, divisors(self.images)), default=None)

    @property
    def traffic(self) -> Traffic:
        """Sent by each GPU in a step, with the largest micro-batch that fits, or with single images."""
        return step_traffic(self.counts, self.config, self.gpus, self.images // (self.largest or 1))


@dataclass(frozen=True)
class BatchChange:
    """What a stage needs changed for a global batch that divides into GPUs.

    Attributes:
        gpus: How many.
        global_batch_size: The next multiple of them.
        lr: With the square root of the factor of the batch, as is common for AdamW.
        head_lr: The same of the head; None where there is none.
    """

    gpus: int
    global_batch_size: int
    lr: float
    head_lr: float | None


@dataclass(frozen=True)
class StageReport:
    """What a stage needs.

    Attributes:
        plan: Of the stage.
        gpus: How many.
        counts: Its parameters.
        images: Images of a GPU in a global batch.
        demands: By setting: ZeRO stages in order, without checkpointing first.
        chosen: The micro-batch that the recipe asks for; None where it does not divide the GPU's images.
        checkpoint_bytes: Of a checkpoint by name of the DeepSpeed configuration.
        changes: Of the batch where the recipe's does not divide into GPUs, for several numbers of GPUs.
        from_step: The first of the steps that it is about: from there on they have another image size.
    """

    plan: StagePlan
    gpus: int
    counts: ParameterCounts
    images: int
    demands: tuple[Demand, ...]
    chosen: int | None
    checkpoint_bytes: dict[str, int]
    changes: tuple[BatchChange, ...]
    from_step: int = 0

    @property
    def steps(self) -> str:
        """Stage and steps in words."""
        return f"Stage {self.plan.number}" + (f" from step {self.from_step} on" if self.from_step else "")

    @property
    def as_it_stands(self) -> Demand:
        """The recipe's own setting."""
        asked = self.plan.model.precision.name, self.plan.config.activation_checkpointing
        return next(demand for demand in self.demands if (demand.config.name, demand.checkpointing) == asked)

    @property
    def stands(self) -> bool:
        """Whether the recipe runs as it stands."""
        return not self.changes and self.chosen is not None and self.as_it_stands.fits(self.chosen)

    @property
    def best(self) -> Demand | None:
        """What to choose: no recomputation where one image fits without, then the recipe's own ZeRO stage, then the
        lowest, whose gradients and weights travel least; None where nothing fits."""
        own = self.plan.model.precision.name
        fitting = [demand for demand in self.demands if demand.largest is not None]
        return min(fitting, key=lambda d: (d.checkpointing, d.config.name != own, d.config.zero_stage), default=None)


def plan_memory(recipe: Recipe, gpus: int, gpu_gib: float) -> tuple[StageReport, ...]:
    """What each stage of a recipe needs of each of ``gpus`` GPUs of ``gpu_gib`` GiB, at each of its image sizes.

    Raises:
        ValueError: Anything about the recipe that can be told without weights and data.
    """
    return tuple(
        dataclasses.replace(StagePlanner(plan.at(step)).report(gpus, gpu_gib), from_step=step)
        for plan in outline_run(recipe)
        for step in (0, *(change.from_step for change in plan.size_changes))
    )


class StagePlanner:
    """One stage in all its settings; what has been traced is kept for further numbers of GPUs."""

    def __init__(self, plan: StagePlan):
        self.plan = plan
        self._passes: dict[tuple[bool, bool], PassMemory] = {}

    @cached_property
    def counts(self) -> ParameterCounts:
        return count_parameters(outline_stage(self.plan))

    def report(self, gpus: int, gpu_gib: float) -> StageReport:
        """What the stage needs, see :func:`plan_memory`."""
        config = self.plan.config
        global_batch = next_multiple(config.global_batch_size, gpus)
        images, settings = global_batch // gpus, list(self._settings())
        chosen = config.micro_batch_size or images
        return StageReport(
            plan=self.plan,
            gpus=gpus,
            counts=self.counts,
            images=images,
            demands=tuple(
                self.demand(setting, checkpointing, gpus, images, gpu_gib)
                for setting in settings
                for checkpointing in (False, True)
            ),
            chosen=chosen if images % chosen == 0 else None,
            checkpoint_bytes={s.name: checkpoint_bytes(self.counts, s, config.ema > 0) for s in settings},
            changes=tuple(batch_changes(config, gpus)),
        )

    def demand(self, setting: DeepSpeedConfig, checkpointing: bool, gpus: int, images: int, gpu_gib: float) -> Demand:
        """What the stage needs in one setting, with ``images`` of a global batch on each GPU."""
        passes = self.passes(setting, checkpointing)
        capacity, keeps_average = int(gpu_gib * GIB), self.plan.config.ema > 0
        return Demand(self.counts, setting, checkpointing, gpus, images, passes, capacity, keeps_average)

    def passes(self, setting: DeepSpeedConfig, checkpointing: bool) -> PassMemory:
        """The traced passes of a setting; ZeRO stages below 3 have the same."""
        key = (checkpointing, setting.zero_stage == 3)
        if self.plan.kind.name != "attention_alignment":
            key = (checkpointing, False)
        elif setting.zero_stage < 3:
            # Stage 1 drops a block's activations before the next one's come, where it can: there is no more to drop.
            key = (False, False)
        if key not in self._passes:
            loss = next((traced.loss for traced in self._passes.values()), None)
            self._passes[key] = trace_stage(self._plan_in(setting, key[0]), loss=loss)
        return self._passes[key]

    def _settings(self) -> Iterator[DeepSpeedConfig]:
        """Those in which the stage can be built; its own must be."""
        for setting in settings_of(self.plan.model.precision):
            try:
                outline_stage(self._plan_in(setting, False))
            except ValueError:
                if setting is self.plan.model.precision:
                    raise
                continue
            yield setting

    def _plan_in(self, setting: DeepSpeedConfig, checkpointing: bool) -> StagePlan:
        # Compiled blocks hold no more; ZeRO-3 refuses them, which the recipe's own setting may not.
        config = dataclasses.replace(self.plan.config, activation_checkpointing=checkpointing, compile=False)
        model = dataclasses.replace(self.plan.model, precision=setting)
        return dataclasses.replace(self.plan, config=config, model=model)


def settings_of(own: DeepSpeedConfig) -> Iterator[DeepSpeedConfig]:
    """The recipe's DeepSpeed configuration, and the project's of its precision and other ZeRO stages, in order."""
    suffix = {"float32": "", "bfloat16": "_bf16"}.get(own.precision, "_autocast")
    for zero_stage in range(4):
        if zero_stage == own.zero_stage:
            yield own
            continue
        try:
            yield load_ds_config(f"zero{zero_stage}{suffix}")
        except ValueError:
            # bfloat16 and autocast have none without ZeRO.
            continue


def batch_changes(config: StageConfig, gpus: int) -> Iterator[BatchChange]:
    """The batches and rates for ``gpus`` GPUs, and for fewer that are common, where the global batch does not divide.

    Paper: arXiv 2205.10287 (square-root scaling of the rate of Adam), a heuristic.
    """
    for number in sorted({gpus, *(common for common in (64, 512) if common <= gpus)}):
        batch = next_multiple(config.global_batch_size, number)
        if batch != config.global_batch_size:
            factor = math.sqrt(batch / config.global_batch_size)
            head_lr = getattr(config, "head_lr", None)
            yield BatchChange(number, batch, config.lr * factor, head_lr * factor if head_lr else None)


def next_multiple(value: int, of: int) -> int:
    """The smallest multiple of ``of`` that is ``value`` or more."""
    return -(-value // of) * of


def divisors(value: int) -> list[int]:
    return [number for number in range(1, value + 1) if value % number == 0]
