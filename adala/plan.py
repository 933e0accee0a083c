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
from adala.backbones import NamedModel, build_backbone, load_teacher, read_checkpoint, resolve_name
from adala.config import Recipe, StageConfig
from adala.conversion import (
    ADALA,
    QKV_PATTERNS,
    STAGE_NAMES,
    Conversion,
    ConversionStep,
    StageName,
    with_unpacked,
)
from adala.data import ShardIndex, View
from adala.data.embedded import TEACHER_PATH
from adala.distributed import from_rank_0, world_size
from adala.ds_config import DeepSpeedConfig, load_ds_config
from adala.export import StudentDescription
from adala.files import file_digest, value_digest
from adala.rules import EMBEDDED_FOLDER
from adala.runs import RunFolder
from adala.sources import EMBEDDED, Sources
from adala.tasks import Task, describe_task, read_task

RANDOM = "random"
# Keys of a stage that may change while it is under way, and after it: they decide when something is said or saved, how
# a batch is cut, and where files lie, not what is trained. ``steps`` may grow while it is under way.
MAY_CHANGE = (
    "log_every",
    "save_every",
    "evaluate_every",
    "max_skipped_steps",
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
)
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
        evaluation_batch_size: Samples of a forward pass without gradients.
    """

    view: View
    num_workers: int
    shuffle_buffer: int
    evaluation_batch_size: int


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
        held_out: What it is evaluated on while it trains, the first ``monitor_samples`` of it.
        monitor_samples: See ``held_out``.
        micro_batch_size: Samples per rank and forward pass.
        gradient_accumulation_steps: Forward passes per optimizer step.
        task: What it is supervised by, or None.
        probe_l2: Penalty of the probe that a head may start from.
        conditions: Everything that decides the result but the student that it starts from, by recipe key.
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
    held_out: ShardIndex
    monitor_samples: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    task: Task | None
    probe_l2: float
    conditions: dict[str, Any]


@dataclass(frozen=True)
class EvaluationPlan:
    """How the models of a run are scored.

    Attributes:
        held_out: Samples that every model is scored on.
        task: What their targets are; None where they have none.
        probe_train: Samples that probes are fitted on, the first ``probe_samples`` of them; None without targets, or
            where the task knows no probe.
        probe_samples: See ``probe_train``.
        probe_l2: Penalty of the probes.
        conditions: What decides the scores of a given model.
    """

    held_out: ShardIndex
    task: Task | None
    probe_train: ShardIndex | None
    probe_samples: int
    probe_l2: float
    conditions: dict[str, Any]


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
    recipe, notes = _under_conversion(recipe, conversion)
    model, data = _resolve_model(recipe)
    read = Sources(Path(recipe.runs_dir).expanduser() / EMBEDDED_FOLDER, recipe.data.classes)
    steps = {number: conversion.step(STAGES[number].name) for number in stages if has_step[number]}
    plans = tuple(_resolve_stage(recipe, number, step, model, data, read) for number, step in steps.items())
    evaluation, unscored = _resolve_evaluation(recipe, read)
    notes = notes if unscored is None else (*notes, f"models are compared by their features alone: {unscored}")
    left_out = tuple(number for number in stages if not has_step[number])
    if model.teacher.checkpoint is None and not model.teacher.pretrained:
        notes = (
            *notes,
            "the teacher is a RANDOM network, as teacher.checkpoint says: nothing it teaches means anything",
        )
    return RunPlan(run_folder(recipe), recipe, model, data, plans, left_out, evaluation, notes)


def _under_conversion(recipe: Recipe, conversion: Conversion) -> tuple[Recipe, tuple[str, ...]]:
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
    recipe, _ = _under_conversion(recipe, conversion)
    model, data = _resolve_model(recipe, with_weights=False)
    steps = {number: conversion.step(kind.name) for number, kind in STAGES.items()}
    nothing = ShardIndex(())
    return tuple(
        _stage_plan(recipe, number, step, model, data, (nothing, nothing), (1, recipe.stage(number).global_batch_size))
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
        recipe.evaluation.batch_size,
    )
    student = StudentDescription(
        backbone=named.architecture,
        model_args=named.model_args,
        image_size=list(size),
        mechanism=recipe.mechanism,
        mechanism_options=dict(recipe.mechanism_options),
        keep=list(recipe.keep),
        mean=list(mean),
        std=list(std),
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
) -> StagePlan:
    kind, config = STAGES[number], recipe.stage(number)
    sources = recipe.data.train if config.train_data is None else config.train_data
    sources_key = "data.train" if config.train_data is None else f"stage{number}.train_data"
    task = read_stage_task(recipe) if kind.is_supervised else None
    training, held_out = read.index(sources), read.index(recipe.data.val)
    if training.num_samples < config.global_batch_size:
        raise ValueError(
            f"{sources_key} holds {training.num_samples} samples, fewer than one global batch of "
            f"{config.global_batch_size}: lower stage{number}.global_batch_size, or name more shards"
        )
    if held_out.num_samples < world_size():
        raise ValueError(f"data.val holds {held_out.num_samples} samples, fewer than the {world_size()} ranks")
    if task is not None:
        read.check_targets(task, sources, sources_key)
        read.check_targets(task, recipe.data.val, "data.val")
        if (different := read.missing_targets(task, sources, recipe.data.val)) is not None:
            raise ValueError(f"{sources_key} and data.val do not have the same labels: {different}")
    divided = divide_batch(number, config, world_size())
    return _stage_plan(recipe, number, step, model, data, (training, held_out), divided)


def _stage_plan(
    recipe: Recipe,
    number: int,
    step: ConversionStep,
    model: ModelPlan,
    data: DataPlan,
    data_sets: tuple[ShardIndex, ShardIndex],
    divided: tuple[int, int],
) -> StagePlan:
    """The plan of a stage whose training and held-out samples, micro-batch and accumulation are known."""
    kind, config, (training, held_out) = STAGES[number], recipe.stage(number), data_sets
    micro, accumulation = divided
    size = data.view.image_size if config.image_size is None else tuple(config.image_size)
    own_data = dataclasses.replace(data, view=dataclasses.replace(data.view, image_size=size))
    trainable = QKV_PATTERNS if getattr(config, "trainable", "all") == "qkv" else step.trainable
    return StagePlan(
        number=number,
        kind=kind,
        config=config,
        step=step,
        trainable=with_unpacked(trainable),
        frozen=tuple(getattr(config, "freeze", ())),
        model=model,
        data=own_data,
        training=training,
        held_out=held_out,
        monitor_samples=recipe.evaluation.monitor_samples,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        task=read_stage_task(recipe) if kind.is_supervised else None,
        probe_l2=recipe.evaluation.probe_l2,
        conditions=_stage_conditions(recipe, number, step, model, data, training),
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


def divide_batch(number: int, config: StageConfig, ranks: int) -> tuple[int, int]:
    """Micro-batch and accumulation steps of stage ``number`` on ``ranks`` ranks.

    Raises:
        ValueError: The global batch does not divide into ranks and micro-batches.
    """
    micro = config.micro_batch_size or config.global_batch_size // ranks
    share = micro * ranks
    if micro < 1 or config.global_batch_size % share:
        raise ValueError(
            f"stage{number}.global_batch_size {config.global_batch_size} does not divide into {ranks} ranks x "
            f"micro-batches of {max(micro, 1)}: choose a multiple of {max(share, ranks)}, "
            f"or another stage{number}.micro_batch_size"
        )
    return micro, config.global_batch_size // share


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
    own = {f"stage{number}.{key}": value for key, value in config.items() if key not in MAY_CHANGE + BY_DIGEST}
    if labelled:
        # With every option written out: what a recipe leaves to its default decides the result, too.
        own[f"stage{number}.task"] = describe_task(read_stage_task(recipe))
    if config.get("head_init") == "probe":
        own["evaluation.probe_l2"] = recipe.evaluation.probe_l2
    return {
        "seed": recipe.seed,
        "mechanism": recipe.mechanism,
        "mechanism_options": dict(recipe.mechanism_options),
        "keep": list(recipe.keep),
        "conversion": recipe.conversion,
        "conversion step": value_digest(dataclasses.asdict(step)),
        "teacher.name": model.teacher.name,
        "teacher.model_args": model.teacher.model_args,
        "teacher.checkpoint (its weights)": model.teacher.digest,
        "data.image_size": list(data.view.image_size),
        "data.mean": list(data.view.mean),
        "data.std": list(data.view.std),
        "data.shuffle_buffer": data.shuffle_buffer,
        f"stage{number}.train_data or data.train (its shards)": index_digest(training, labelled),
        "ds_config (its precision)": model.precision.precision,
        **own,
    }


def index_digest(index: ShardIndex, labelled: bool) -> str:
    """What identifies a data set wherever it lies: names, samples and bytes of shards, and names of classes."""
    classes = [shard.classes for shard in index.shards if shard.classes is not None][:1] if labelled else []
    return value_digest([[shard.name, shard.samples, shard.bytes] for shard in index.shards] + classes)


def _resolve_evaluation(recipe: Recipe, read: Sources) -> tuple[EvaluationPlan, str | None]:
    """How the run's models are scored, and why they have no scores, if they have none."""
    config, task = recipe.evaluation, read_stage_task(recipe)
    probe_sources = config.probe_train or recipe.data.train
    try:
        missing = read.missing_targets(task, recipe.data.val, *([probe_sources] if task.probe else []))
    except ValueError as error:
        # Stage 3 would not start; Stages 1 and 2 have no use for targets.
        missing = str(error)
    held_out = read.index(recipe.data.val)
    probe_train = read.index(probe_sources) if task.probe and missing is None else None
    conditions = {
        "data.val": index_digest(held_out, missing is None),
        "stage3.task": describe_task(task) if missing is None else None,
        "evaluation.probe_train": index_digest(probe_train, True) if probe_train else None,
        "evaluation.probe_samples": config.probe_samples,
        "evaluation.probe_l2": config.probe_l2,
    }
    return EvaluationPlan(
        held_out, task if missing is None else None, probe_train, config.probe_samples, config.probe_l2, conditions
    ), missing
