"""A recipe resolved once: what each stage is made of, with everything that can be refused without building it.

A plan is frozen, holds values and no tensors, and is made on rank 0 and told to all: no rank reads an index, a target
or a digest of its own. Nothing of a run is touched before its plan stands.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adala.attention import resolve_mechanism
from adala.backbones import NamedModel, build_backbone, check_image_size, load_teacher, read_checkpoint, resolve_name
from adala.budget import SOFTMAX, Budget, HybridMacs, budget_of, count_blocks
from adala.config import DataConfig, Recipe, StageConfig, val_key
from adala.conversion import (
    ADALA,
    QKV_PATTERNS,
    STAGE_NAMES,
    Conversion,
    ConversionStep,
    StageName,
    with_unpacked,
)
from adala.data import Mixture, ShardIndex, View
from adala.data.embedded import TEACHER_PATH
from adala.data.remote import RemoteOptions
from adala.distributed import from_rank_0, world_size
from adala.ds_config import DeepSpeedConfig, load_ds_config
from adala.export import StudentDescription
from adala.files import file_digest, value_digest
from adala.hybrids import count_hybrid_macs
from adala.rules import EMBEDDED_FOLDER, with_text_keys
from adala.runs import RunFolder
from adala.sources import EMBEDDED, Sources
from adala.tasks import Task, describe_task, read_task

RANDOM = "random"
# Keys of a stage that may change while it is under way, and after it: they decide when something is said or saved, how
# a batch is cut, and where files lie, not what is trained. ``steps`` may grow while it is under way.
MAY_CHANGE = (
    "log_every",
    "save_every",
    "save_every_minutes",
    "keep_last",
    "keep_every",
    "evaluate_every",
    "max_skipped_steps",
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
)
# Keys that recipes have had only since there were runs: at their default they are no condition, so that what was made
# before stays what it is.
LATER = ("global_weight", "intermediate_weight", "intermediate_blocks", "ema", "image_sizes")
# What stands for these among the conditions is the digest of what they name.
BY_DIGEST = ("start_from", "train_data")


@dataclass(frozen=True)
class StageKind:
    """What tells the stages apart before anything is built.

    Attributes:
        name: As conversions name it.
        title: For people.
        is_supervised: Whether it trains for the recipe's task.
    """

    name: StageName
    title: str
    is_supervised: bool = False


STAGES: dict[int, StageKind] = {
    1: StageKind("attention_alignment", "attention alignment"),
    2: StageKind("feature_alignment", "feature alignment"),
    3: StageKind("finetuning", "fine-tuning", is_supervised=True),
}
assert {number: kind.name for number, kind in STAGES.items()} == STAGE_NAMES


@dataclass(frozen=True)
class TeacherPlan:
    """The frozen teacher.

    Attributes:
        name: timm model name.
        model_args: Further arguments of timm's constructor.
        image_size: Height and width in pixels.
        checkpoint: Its weights, or None.
        pretrained: Whether timm fetches the weights.
        seed: Of its weights where it has none.
        digest: What identifies its weights.
    """

    name: str
    model_args: dict[str, Any]
    image_size: tuple[int, int]
    checkpoint: Path | None
    pretrained: bool
    seed: int
    digest: str


@dataclass(frozen=True)
class DataPlan:
    """How samples become batches.

    Attributes:
        view: What the model sees of images.
        num_workers: Loader processes of a rank.
        shuffle_buffer: Samples in each worker's buffer.
        max_bad_fraction: Part of a worker's samples that may be bad. No condition of a result: it decides whether a run
            comes to its end, not to which.
        evaluation_batch_size: Samples of a forward pass without gradients.
    """

    view: View
    num_workers: int
    shuffle_buffer: int
    max_bad_fraction: float
    evaluation_batch_size: int


def _at_size(data: DataPlan, image_size: Sequence[int]) -> DataPlan:
    return dataclasses.replace(data, view=dataclasses.replace(data.view, image_size=tuple(image_size)))


@dataclass(frozen=True)
class ModelPlan:
    """Which teacher becomes which student, in which precision.

    Attributes:
        teacher: The frozen teacher.
        student: What is exported, but for a head.
        precision: ZeRO and precision.
        seed: Of initialisation, order and augmentation.
    """

    teacher: TeacherPlan
    student: StudentDescription
    precision: DeepSpeedConfig
    seed: int


@dataclass(frozen=True)
class SizeChange:
    """Another image size from a step of a stage on.

    Attributes:
        from_step: The first step that has it, counted from 0.
        image_size: Height and width in pixels.
        asked: The recipe's micro-batch for it, or None.
        micro_batch_size: Samples per rank and forward pass.
        gradient_accumulation_steps: Forward passes per optimizer step.
    """

    from_step: int
    image_size: tuple[int, int]
    asked: int | None
    micro_batch_size: int
    gradient_accumulation_steps: int


@dataclass(frozen=True)
class SearchPlan:
    """How blocks are chosen that keep softmax attention, once all of them have been aligned.

    Attributes:
        budget: What the recipe allows.
        count: How many blocks that is.
        macs: Of the hybrids at the budget's image size, or at that of the images.
        data: How images become batches.
        training: What they are the first of.
        images: How many.
        conditions: Everything that decides the order of the blocks but that student, by recipe key.
    """

    budget: Budget
    count: int
    macs: HybridMacs
    data: DataPlan
    training: ShardIndex
    images: int
    conditions: dict[str, Any]


@dataclass(frozen=True)
class StagePlan:
    """One stage as it will run.

    Attributes:
        number: 1, 2 or 3.
        kind: What tells it apart.
        config: The recipe's configuration under the conversion's step.
        step: What the conversion says.
        trainable: Patterns of the student's parameters that train.
        frozen: Patterns of those among them that do not.
        model: Of all stages alike.
        data: Of all stages alike, but for an image size of its own.
        training: Its samples.
        held_out_sets: What it is evaluated on while it trains, by name, the first ``monitor_samples`` of each.
        monitor_samples: See ``held_out_sets``.
        micro_batch_size: Samples per rank and forward pass.
        gradient_accumulation_steps: Forward passes per optimizer step.
        size_changes: In the order of their steps; what stands above is of the steps before the first.
        task: What it is supervised by, or None.
        probe_l2: Penalty of the probe that a head may start from.
        conditions: Everything that decides the result but the student that it starts from, by recipe key.
        search: Which decides what blocks of its student keep softmax attention; None where the recipe lists them, and
            for Stage 1, which aligns all of them.
    """

    number: int
    kind: StageKind
    config: StageConfig
    step: ConversionStep
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    model: ModelPlan
    data: DataPlan
    training: ShardIndex
    held_out_sets: dict[str, ShardIndex]
    monitor_samples: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    size_changes: tuple[SizeChange, ...]
    task: Task | None
    probe_l2: float
    conditions: dict[str, Any]
    search: SearchPlan | None

    def at(self, step: int) -> "StagePlan":
        """The plan with the image size and the micro-batch that ``step`` trains on."""
        change = next((each for each in reversed(self.size_changes) if each.from_step <= step), None)
        if change is None:
            return self
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, micro_batch_size=change.asked),
            data=_at_size(self.data, change.image_size),
            micro_batch_size=change.micro_batch_size,
            gradient_accumulation_steps=change.gradient_accumulation_steps,
        )

    @property
    def held_out(self) -> ShardIndex:
        """The first set."""
        return next(iter(self.held_out_sets.values()))

    def keeping(self, blocks: Sequence[int]) -> "StagePlan":
        """The stage of a student whose ``blocks`` keep softmax attention."""
        others = {block: name for block, name in self.model.student.block_mechanisms.items() if block not in blocks}
        student = dataclasses.replace(
            self.model.student,
            keep=list(blocks),
            block_mechanisms=others,
            block_mechanism_options={
                name: options
                for name, options in self.model.student.block_mechanism_options.items()
                if name in others.values()
            },
        )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, student=student))


@dataclass(frozen=True)
class EvaluationPlan:
    """How the models of a run are scored.

    Attributes:
        held_out_sets: Samples that every model is scored on, by the name of their set.
        task: What their targets are; None where they have none.
        probe_train: Samples that probes are fitted on, the first ``probe_samples`` of them; None without targets, or
            where the task knows no probe.
        probe_samples: See ``probe_train``.
        probe_l2: Penalty of the probes.
        conditions: What decides the scores of a given model.
    """

    held_out_sets: dict[str, ShardIndex]
    task: Task | None
    probe_train: ShardIndex | None
    probe_samples: int
    probe_l2: float
    conditions: dict[str, Any]

    @property
    def held_out(self) -> ShardIndex:
        """The first set."""
        return next(iter(self.held_out_sets.values()))


@dataclass(frozen=True)
class RunPlan:
    """A whole run.

    Attributes:
        run: Where its files lie.
        recipe: With what the conversion states written into it.
        model: See :class:`StagePlan`.
        data: See :class:`StagePlan`.
        stages: Those that were asked for, in order.
        left_out: Numbers of those that the conversion does not have.
        evaluation: How its models are scored.
        notes: What the recipe's reader should know about how it was understood.
    """

    run: RunFolder
    recipe: Recipe
    model: ModelPlan
    data: DataPlan
    stages: tuple[StagePlan, ...]
    left_out: tuple[int, ...]
    evaluation: EvaluationPlan
    notes: tuple[str, ...]


def resolve_run(recipe: Recipe, stages: Sequence[int]) -> RunPlan:
    """The plan of ``stages`` under ``recipe``; every rank calls it and gets rank 0's.

    Raises:
        ValueError: Anything about recipe, teacher or data that can be told before a model is built.
    """
    return from_rank_0(lambda: _resolve(recipe, stages))


def conversion_of(recipe: Recipe) -> Conversion:
    """ViT-AdaLA's conversion, or the mechanism's own.

    Raises:
        ValueError: An unknown mechanism, or one without a conversion of its own.
    """
    mixer = resolve_mechanism(recipe.mechanism)
    for name in recipe.block_mechanisms.values():
        resolve_mechanism(name)
    if recipe.conversion == "adala":
        return ADALA
    native = getattr(mixer, "native_conversion", None)
    if native is None:
        raise ValueError(f"mechanism {recipe.mechanism} has no conversion of its own: use --conversion adala")
    return native


def run_folder(recipe: Recipe) -> RunFolder:
    return RunFolder(Path(recipe.runs_dir).expanduser() / recipe.run_name)


def _resolve(recipe: Recipe, stages: Sequence[int]) -> RunPlan:
    conversion = conversion_of(recipe)
    has_step = {number: conversion.step(STAGES[number].name) is not None for number in stages}
    if len(stages) == 1 and not has_step[stages[0]]:
        raise ValueError(
            f"{recipe.mechanism}'s {conversion.name} conversion has no stage {stages[0]}: leave it out"
        )  # fmt: skip
    recipe, notes = under_conversion(recipe, conversion)
    model, data = _resolve_model(recipe)
    embedded = Path(recipe.runs_dir).expanduser() / EMBEDDED_FOLDER
    read = Sources(embedded, recipe.data.classes, remote_options(recipe.data))
    steps = {number: conversion.step(STAGES[number].name) for number in stages if has_step[number]}
    search = _resolve_search(recipe, tuple(steps), conversion, model, data, read)
    plans = tuple(_resolve_stage(recipe, number, step, model, data, read, search) for number, step in steps.items())
    evaluation, unscored = _resolve_evaluation(recipe, read)
    notes = notes if unscored is None else (*notes, f"models are compared by their features alone: {unscored}")
    left_out = tuple(number for number in stages if not has_step[number])
    if model.teacher.checkpoint is None and not model.teacher.pretrained:
        notes = (
            *notes,
            "the teacher is a RANDOM network, as teacher.checkpoint says: nothing it teaches means anything",
        )
    if search is not None and search.budget.blocks is None:
        notes = (*notes, f"keep is {recipe.keep}: that pays for softmax attention in {search.count} blocks")
    return RunPlan(run_folder(recipe), recipe, model, data, plans, left_out, evaluation, notes)


def remote_options(data: DataConfig) -> RemoteOptions:
    """How long remote shards are waited for, and where they are kept: no condition of any result."""
    folder = None if data.cache_dir is None else str(Path(data.cache_dir).expanduser().absolute())
    return RemoteOptions(
        remote_attempts=data.remote_attempts,
        stall_timeout_s=data.stall_timeout_s,
        total_timeout_s=data.total_timeout_s,
        min_mib_per_s=data.min_mib_per_s,
        cache_dir=folder,
        cache_gib=data.cache_gib,
    )


def under_conversion(recipe: Recipe, conversion: Conversion) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with what the conversion states in place of its own values, and a note on each."""
    notes = []
    for step in conversion.steps:
        number = next(number for number, kind in STAGES.items() if kind.name == step.stage)
        stated = {}
        for key in ("loss", "lr", "weight_decay"):
            name, value = f"stage{number}.{key}", getattr(step, key)
            own = getattr(recipe.stage(number), key, None)
            if value is None or value == own:
                continue
            if name in recipe.over_conversion:
                notes.append(f"{name} is {own}, as asked for, in place of the native conversion's {value}")
            else:
                notes.append(f"{name} is {value} by {recipe.mechanism}'s native conversion, in place of {own}")
                stated[key] = value
        if stated:
            recipe = recipe.with_stage(number, **stated)
    return recipe, tuple(notes)


def outline_run(recipe: Recipe) -> tuple[StagePlan, ...]:
    """The plans of the stages that the conversion has, as far as neither weights nor data are needed for them.

    They are enough to build everything on the meta device: their data sets are empty, nothing is known of the weights,
    and batches are divided into single images.

    Raises:
        ValueError: Anything about the recipe that can be told so.
    """
    conversion = conversion_of(recipe)
    recipe, _ = under_conversion(recipe, conversion)
    model, data = _resolve_model(recipe, with_weights=False)
    steps = {number: conversion.step(kind.name) for number, kind in STAGES.items()}
    nothing = (ShardIndex(()), {"": ShardIndex(())})
    search = None if budget_of(recipe.keep) is None else _search_plan(recipe, model, data, ShardIndex(()))
    return tuple(
        _stage_plan(recipe, number, step, model, data, nothing, None, search)
        for number, step in steps.items()
        if step is not None
    )


def _resolve_model(recipe: Recipe, with_weights: bool = True) -> tuple[ModelPlan, DataPlan]:
    """The models and how they see data; ``with_weights`` has the teacher's looked for and read."""
    config, size = recipe.teacher, recipe.data.image_size
    named = resolve_name(config.name, config.model_args)
    # Without memory for its weights: only what it was trained with and what it takes are read off it.
    with torch.device("meta"):
        outline = build_backbone(named.architecture, size, named.model_args)
    mean = recipe.data.mean or named.mean or outline.default_cfg["mean"]
    std = recipe.data.std or named.std or outline.default_cfg["std"]
    checkpoint = _teacher_checkpoint(recipe, named) if with_weights else None
    if checkpoint is not None:
        read_checkpoint(outline, checkpoint)
    elif with_weights and config.pretrained and config.checkpoint is None:
        # Now, and not when a stage has begun: weights may be out of reach, or not fit.
        load_teacher(config.name, size, pretrained=True, model_args=config.model_args)
    teacher = TeacherPlan(
        # A repository's name stays: its files may lie elsewhere on another node.
        config.name if named.repository else named.architecture,
        dict(config.model_args) if named.repository else named.model_args,
        tuple(size),
        checkpoint,
        pretrained=config.pretrained and config.checkpoint is None and checkpoint is None,
        seed=recipe.seed,
        digest=_teacher_digest(recipe, named) if with_weights else "unknown",
    )
    data = DataPlan(
        View(tuple(size), tuple(mean), tuple(std), tuple(outline.patch_embed.patch_size)),
        recipe.data.num_workers,
        recipe.data.shuffle_buffer,
        recipe.data.max_bad_fraction,
        recipe.evaluation.batch_size,
    )
    student = StudentDescription(
        backbone=named.architecture,
        model_args=named.model_args,
        image_size=list(size),
        mechanism=recipe.mechanism,
        mechanism_options=dict(recipe.mechanism_options),
        # Of blocks that are to be chosen, none is until all have been aligned.
        keep=[] if budget_of(recipe.keep) else list(recipe.keep),
        mean=list(mean),
        std=list(std),
        block_mechanisms=dict(recipe.block_mechanisms),
        block_mechanism_options=dict(recipe.block_mechanism_options),
    )
    return ModelPlan(teacher, student, load_ds_config(recipe.ds_config), recipe.seed), data


def _teacher_checkpoint(recipe: Recipe, named: NamedModel) -> Path | None:
    config = recipe.teacher
    if config.checkpoint is None and config.pretrained and named.folder is not None:
        return named.weights()
    if config.checkpoint in (None, RANDOM):
        return None
    path = TEACHER_PATH if config.checkpoint == EMBEDDED else Path(config.checkpoint).expanduser()
    if not path.exists():
        raise ValueError(f"teacher.checkpoint {path} does not exist")
    return path


def _teacher_digest(recipe: Recipe, named: NamedModel) -> str:
    path = _teacher_checkpoint(recipe, named)
    if path is not None:
        return file_digest(path)
    if recipe.teacher.checkpoint == RANDOM:
        return f"random weights of seed {recipe.seed}"
    if not recipe.teacher.pretrained:
        raise ValueError(
            "the teacher has no weights: name a file in teacher.checkpoint, or set teacher.pretrained true to fetch "
            f"them (teacher.checkpoint {RANDOM} makes a random network on purpose)"
        )
    path = named.weights()
    return f"timm's pretrained weights of {named.architecture}" if path is None else file_digest(path)


def _resolve_stage(
    recipe: Recipe,
    number: int,
    step: ConversionStep,
    model: ModelPlan,
    data: DataPlan,
    read: Sources,
    search: SearchPlan | None,
) -> StagePlan:
    kind, config = STAGES[number], recipe.stage(number)
    sources = recipe.data.train if config.train_data is None else config.train_data
    sources_key = "data.train" if config.train_data is None else f"stage{number}.train_data"
    task = read_stage_task(recipe) if kind.is_supervised else None
    training, held_out_sets = read.index(sources), _read_held_out(recipe, read)
    if training.num_samples < config.global_batch_size:
        raise ValueError(
            f"{sources_key} holds {training.num_samples} samples, fewer than one global batch of "
            f"{config.global_batch_size}: lower stage{number}.global_batch_size, or name more shards"
        )
    name, held_out = next(iter(held_out_sets.items()))
    if held_out.num_samples < world_size():
        raise ValueError(f"{val_key(name)} holds {held_out.num_samples} samples, fewer than the {world_size()} ranks")
    if task is not None:
        read.check_targets(task, sources, sources_key)
        for name, shards in recipe.data.val_sets.items():
            read.check_targets(task, shards, val_key(name))
        if (different := read.missing_targets(task, sources, *recipe.data.val_sets.values())) is not None:
            raise ValueError(f"{sources_key} and data.val do not have the same labels: {different}")
    return _stage_plan(recipe, number, step, model, data, (training, held_out_sets), world_size(), search)


def _resolve_search(
    recipe: Recipe, stages: Sequence[int], conversion: Conversion, model: ModelPlan, data: DataPlan, read: Sources
) -> SearchPlan | None:
    """The search that ``stages`` need; None where the recipe lists blocks, or there are no stages."""
    if budget_of(recipe.keep) is None or not stages:
        return None
    if conversion.step(STAGES[1].name) is None:
        raise ValueError(
            f"keep is {recipe.keep}, which is chosen after Stage 1, and {recipe.mechanism}'s {conversion.name} "
            "conversion has none: list the blocks"
        )
    if 2 in stages and recipe.stage2.start_from == "linearized":
        raise ValueError(
            f"keep is {recipe.keep}, which is chosen after Stage 1, and stage2.start_from is linearized: list the "
            "blocks, or start from auto or from the folder of a student that Stage 1 has aligned"
        )
    if 3 in stages and recipe.stage3.start_from != "auto":
        raise ValueError(
            f"keep is {recipe.keep}, and stage3.start_from is {recipe.stage3.start_from}, not auto: list the blocks "
            "that this student keeps"
        )
    sources = recipe.data.train if recipe.stage1.train_data is None else recipe.stage1.train_data
    return _search_plan(recipe, model, data, read.index(sources))


def _search_plan(recipe: Recipe, model: ModelPlan, data: DataPlan, training: ShardIndex) -> SearchPlan:
    budget, size, student = budget_of(recipe.keep), _search_size(recipe), model.student
    if student.mechanism == SOFTMAX:
        raise ValueError(f"keep is {recipe.keep}, and mechanism is {SOFTMAX}: all blocks have softmax")
    # Where the budget has no size of its own, what is told of costs is of the images that are measured.
    macs = outline_macs(model, "search.image_size", size)
    if budget.image_size is not None:
        macs = outline_macs(model, "keep", budget.image_size)
    view = dataclasses.replace(data.view, image_size=size)
    conditions = {
        "mechanism": student.mechanism,
        "mechanism_options": student.mechanism_options,
        **_block_conditions(recipe),
        "teacher.name": model.teacher.name,
        "teacher.model_args": model.teacher.model_args,
        "teacher.checkpoint (its weights)": model.teacher.digest,
        "data.image_size": list(data.view.image_size),
        "data.mean": list(view.mean),
        "data.std": list(view.std),
        "stage1.train_data or data.train (its shards)": index_digest(training, False),
        "search.images": recipe.search.images,
        "search.image_size": list(size),
    }
    return SearchPlan(
        budget=budget,
        count=count_blocks(budget, macs),
        macs=macs,
        data=dataclasses.replace(data, view=view),
        training=training,
        images=recipe.search.images,
        conditions=conditions,
    )


def outline_macs(model: ModelPlan, key: str, image_size: Sequence[int]) -> HybridMacs:
    """Multiply-accumulates of the teacher, its linearized student and its hybrids, counted on the meta device.

    Args:
        model: Teacher and student.
        key: What names the image size, for messages.
        image_size: Height and width in pixels.

    Raises:
        ValueError: The patch size does not divide the image size.
    """
    student = model.student
    with torch.device("meta"):
        teacher = build_backbone(model.teacher.name, model.teacher.image_size, model.teacher.model_args)
        linearized = dataclasses.replace(student, keep=[]).linearize(teacher)
    try:
        check_image_size(teacher, image_size)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return count_hybrid_macs(linearized, teacher, image_size)


def _read_held_out(recipe: Recipe, read: Sources) -> dict[str, ShardIndex]:
    """The held-out sets by name, in the recipe's order.

    Raises:
        ValueError: One that cannot be read, or a named one without samples.
    """
    sets = {}
    for name, shards in recipe.data.val_sets.items():
        try:
            sets[name] = read.index(shards)
        except ValueError as error:
            if not name:
                raise
            raise ValueError(f"{val_key(name)}: {error}") from error
        if name and not sets[name].num_samples:
            raise ValueError(f"{val_key(name)} holds no samples: name other shards, or leave the set out")
    return sets


def _stage_plan(
    recipe: Recipe,
    number: int,
    step: ConversionStep,
    model: ModelPlan,
    data: DataPlan,
    data_sets: tuple[ShardIndex, dict[str, ShardIndex]],
    ranks: int | None,
    search: SearchPlan | None,
) -> StagePlan:
    """The plan of a stage whose training and held-out samples are known; on None ranks batches are single images."""
    kind, config, (training, held_out_sets) = STAGES[number], recipe.stage(number), data_sets
    micro, accumulation = divide_batch(number, config, ranks)
    trainable = QKV_PATTERNS if getattr(config, "trainable", "all") == "qkv" else step.trainable
    return StagePlan(
        number=number,
        kind=kind,
        config=config,
        step=step,
        trainable=with_unpacked(trainable),
        frozen=tuple(getattr(config, "freeze", ())),
        model=model,
        data=data if config.image_size is None else _at_size(data, config.image_size),
        training=training,
        held_out_sets=held_out_sets,
        monitor_samples=recipe.evaluation.monitor_samples,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        size_changes=_size_changes(number, config, ranks),
        task=read_stage_task(recipe) if kind.is_supervised else None,
        probe_l2=recipe.evaluation.probe_l2,
        conditions=_stage_conditions(recipe, number, step, model, data, training),
        search=search if number > 1 else None,
    )


def read_stage_task(recipe: Recipe) -> Task:
    """What Stage 3 trains for, and what models are scored by.

    Raises:
        ValueError: An unknown task, or options that it cannot have.
    """
    try:
        return read_task(recipe.stage3.task)
    except ValueError as error:
        raise ValueError(f"stage3.task: {error}") from error


def divide_batch(
    number: int, config: StageConfig, ranks: int | None, micro_batch_size: int | None = None, key: str = ""
) -> tuple[int, int]:
    """Micro-batch and accumulation steps of stage ``number`` on ``ranks`` ranks.

    Args:
        number: Of the stage.
        config: Its batch.
        ranks: How many; None divides the batch into single images.
        micro_batch_size: Asked for in place of the stage's.
        key: Of the recipe below the stage, which asks for it.

    Raises:
        ValueError: The global batch does not divide into ranks and micro-batches.
    """
    if ranks is None:
        return 1, config.global_batch_size
    micro = micro_batch_size or config.micro_batch_size or config.global_batch_size // ranks
    share = micro * ranks
    if micro < 1 or config.global_batch_size % share:
        raise ValueError(
            f"stage{number}.global_batch_size {config.global_batch_size} does not divide into {ranks} ranks x "
            f"micro-batches of {max(micro, 1)}: choose a multiple of {max(share, ranks)}, "
            f"or another stage{number}.{key}micro_batch_size"
        )
    return micro, config.global_batch_size // share


def _size_changes(number: int, config: StageConfig, ranks: int | None) -> tuple[SizeChange, ...]:
    changes = []
    for index, change in enumerate(config.image_sizes):
        asked = change.get("micro_batch_size") or config.micro_batch_size
        divided = divide_batch(number, config, ranks, asked, f"image_sizes[{index}].")
        changes.append(SizeChange(change["from_step"], tuple(change["image_size"]), asked, *divided))
    return tuple(changes)


def _stage_conditions(
    recipe: Recipe,
    number: int,
    step: ConversionStep,
    model: ModelPlan,
    data: DataPlan,
    training: ShardIndex,
) -> dict[str, Any]:
    """Everything that decides the stage's result but where it starts from, as JSON gives it back."""
    config, labelled = dataclasses.asdict(recipe.stage(number)), STAGES[number].is_supervised
    defaults = dataclasses.asdict(type(recipe.stage(number))())
    own = {
        f"stage{number}.{key}": value
        for key, value in config.items()
        if key not in MAY_CHANGE + BY_DIGEST and not (key in LATER and value == defaults[key])
    }
    if config["image_sizes"]:
        # How batches are cut is no condition.
        sizes = [[change["from_step"], list(change["image_size"])] for change in config["image_sizes"]]
        own[f"stage{number}.image_sizes"] = sizes
    if labelled:
        # With every option written out: what a recipe leaves to its default decides the result, too.
        own[f"stage{number}.task"] = describe_task(read_stage_task(recipe))
    if config.get("head_init") == "probe":
        own["evaluation.probe_l2"] = recipe.evaluation.probe_l2
    sources = f"stage{number}.train_data or data.train"
    weights = {f"{sources} (its weights)": list(Mixture.of(training).parts)} if training.sources else {}
    return {
        "seed": recipe.seed,
        "mechanism": recipe.mechanism,
        "mechanism_options": dict(recipe.mechanism_options),
        **_keep_conditions(recipe, number),
        **_block_conditions(recipe),
        "conversion": recipe.conversion,
        "conversion step": value_digest(dataclasses.asdict(step)),
        "teacher.name": model.teacher.name,
        "teacher.model_args": model.teacher.model_args,
        "teacher.checkpoint (its weights)": model.teacher.digest,
        "data.image_size": list(data.view.image_size),
        "data.mean": list(data.view.mean),
        "data.std": list(data.view.std),
        "data.shuffle_buffer": data.shuffle_buffer,
        **weights,
        f"{sources} (its shards)": index_digest(training, labelled),
        "ds_config (its precision)": model.precision.precision,
        **own,
    }


def _block_conditions(recipe: Recipe) -> dict[str, Any]:
    """What decides which blocks have a mechanism of their own.

    Where any do: results from before recipes had these keys stay what they were.
    """
    blocks = {key: with_text_keys(getattr(recipe, key)) for key in ("block_mechanisms", "block_mechanism_options")}
    return {key: value for key, value in blocks.items() if value}


def _keep_conditions(recipe: Recipe, number: int) -> dict[str, Any]:
    """What decides which blocks keep softmax attention; Stage 1 aligns all of those that a search is to choose from."""
    if budget_of(recipe.keep) is None:
        return {"keep": list(recipe.keep)}
    if number == 1:
        return {"keep": []}
    return {"keep": recipe.keep, "search.images": recipe.search.images, "search.image_size": list(_search_size(recipe))}


def _search_size(recipe: Recipe) -> tuple[int, int]:
    return tuple(recipe.search.image_size or recipe.stage1.image_size or recipe.data.image_size)


def index_digest(index: ShardIndex, labelled: bool) -> str:
    """What identifies a data set wherever it lies: names, samples and bytes of shards, names of classes, and of a
    mixture which shards are one source and how often that comes."""
    classes = [shard.classes for shard in index.shards if shard.classes is not None][:1] if labelled else []
    mixed = [[source.num_shards for source in index.sources], Mixture.of(index).parts] if index.sources else []
    return value_digest([[shard.name, shard.samples, shard.bytes] for shard in index.shards] + classes + mixed)


def _resolve_evaluation(recipe: Recipe, read: Sources) -> tuple[EvaluationPlan, str | None]:
    """How the run's models are scored, and why they have no scores, if they have none."""
    config, task = recipe.evaluation, read_stage_task(recipe)
    probe_sources = config.probe_train or recipe.data.train
    try:
        missing = read.missing_targets(task, *recipe.data.val_sets.values(), *([probe_sources] if task.probe else []))
    except ValueError as error:
        # Stage 3 would not start; Stages 1 and 2 have no use for targets.
        missing = str(error)
    held_out_sets = _read_held_out(recipe, read)
    digests = [[name, index_digest(held_out, missing is None)] for name, held_out in held_out_sets.items()]
    probe_train = read.index(probe_sources) if task.probe and missing is None else None
    conditions = {
        # Of named sets in their order, which says which one counts.
        "data.val": digests if isinstance(recipe.data.val, dict) else digests[0][1],
        "stage3.task": describe_task(task) if missing is None else None,
        "evaluation.probe_train": index_digest(probe_train, True) if probe_train else None,
        "evaluation.probe_samples": config.probe_samples,
        "evaluation.probe_l2": config.probe_l2,
    }
    return EvaluationPlan(
        held_out_sets, task if missing is None else None, probe_train, config.probe_samples, config.probe_l2, conditions
    ), missing
