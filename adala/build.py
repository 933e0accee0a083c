"""From a recipe to the things that a stage is made of: plan, teacher, student, stage module, engine, loaders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adala.attention import insert_lora, resolve_mechanism
from adala.backbones import check_image_size, load_teacher
from adala.config import Recipe, StageConfig
from adala.conversion import ADALA, QKV_PATTERNS, STAGE_NAMES, Conversion, ConversionStep, LoraSpec
from adala.data import (
    EvaluationLoader,
    ShardIndex,
    StreamState,
    TrainLoader,
    build_eval_transform,
    build_train_transform,
    load_index,
    write_embedded,
)
from adala.data.embedded import TEACHER_PATH
from adala.distributed import broadcast_object, device, raise_together, rank, world_size
from adala.engine import Engine, compute_dtype, load_ds_config, zero_stage
from adala.evaluation.features import Features, collect_features
from adala.evaluation.linear_probe import fit_probe
from adala.export import (
    StudentDescription,
    build_head,
    has_student,
    load_student,
    read_description,
)
from adala.heads import ClassificationHead
from adala.optim import build_optimizer, freeze_except, freeze_matching
from adala.progress import say
from adala.runs import RunFolder
from adala.stages import AttentionAlignment, FeatureAlignment, Finetuning, Stage
from adala.students import linearize

EMBEDDED = "embedded"
# What a linear probe sees: the class token beside the mean of the patches.
FEATURE_POOLING = "cls_patch"


@dataclass(frozen=True)
class StagePlan:
    """A stage as it will run: the recipe's configuration under the conversion's step.

    Attributes:
        step: What the conversion says.
        config: The recipe's stage, with the step's loss and rates where it states any.
        sources: Training shards.
        micro_batch_size: Samples per rank and forward pass.
        gradient_accumulation_steps: Forward passes per optimizer step.
    """

    step: ConversionStep
    config: StageConfig
    sources: list[str]
    micro_batch_size: int
    gradient_accumulation_steps: int


def plan_stage(recipe: Recipe, number: int) -> StagePlan:
    """Joins recipe and conversion, and divides the global batch.

    Raises:
        ValueError: The conversion has no such stage, or the global batch does not divide over ranks and micro-batches.
    """
    conversion = conversion_of(recipe)
    step = conversion.step(STAGE_NAMES[number])
    if step is None:
        raise ValueError(f"{recipe.mechanism}'s {conversion.name} conversion has no stage {number}: leave it out")
    stated = {key: getattr(step, key) for key in ("loss", "lr", "weight_decay") if getattr(step, key) is not None}
    config = replace(recipe.stage(number), **stated)
    micro = config.micro_batch_size or config.global_batch_size // world_size()
    share = micro * world_size()
    if micro < 1 or config.global_batch_size % share:
        raise ValueError(
            f"stage{number}.global_batch_size {config.global_batch_size} does not divide into {world_size()} ranks x "
            f"micro-batches of {max(micro, 1)}: choose a multiple of {max(share, world_size())}, "
            f"or another stage{number}.micro_batch_size"
        )
    sources = recipe.data.train if config.train_data is None else config.train_data
    return StagePlan(step, config, sources, micro, config.global_batch_size // share)


def resume_conditions(recipe: Recipe, number: int, plan: StagePlan) -> dict[str, Any]:
    """What a checkpoint of this stage can only be continued under, by recipe key, as JSON gives it back."""
    conditions = {
        "seed": recipe.seed,
        "mechanism": recipe.mechanism,
        "mechanism_options": recipe.mechanism_options,
        "keep": recipe.keep,
        "conversion": recipe.conversion,
        "teacher.name": recipe.teacher.name,
        "teacher.model_args": recipe.teacher.model_args,
        "data.image_size": recipe.data.image_size,
        f"stage{number}.global_batch_size": plan.config.global_batch_size,
        f"stage{number}.train_data (or data.train)": plan.sources,
    }
    return json.loads(json.dumps(conditions))


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
    return RunFolder(Path(recipe.runs_dir) / recipe.run_name)


def build_teacher(recipe: Recipe) -> VisionTransformer:
    """The frozen teacher in float32 on this rank's device."""
    config = recipe.teacher
    checkpoint = TEACHER_PATH if config.checkpoint == EMBEDDED else config.checkpoint
    if len(recipe.data.image_size) != 2:
        raise ValueError(f"data.image_size must be [height, width] in pixels, not {recipe.data.image_size}")
    teacher = load_teacher(config.name, recipe.data.image_size, checkpoint, config.pretrained, config.model_args)
    return teacher.to(device())


def unaligned_student(recipe: Recipe, teacher: VisionTransformer) -> VisionTransformer:
    """The linearized teacher, in training mode."""
    return linearize(teacher, recipe.mechanism, recipe.keep, recipe.mechanism_options, recipe.seed)


def starting_student(recipe: Recipe, number: int, teacher: VisionTransformer) -> tuple[VisionTransformer, str]:
    """The student that a stage begins with, and in words where it comes from.

    Raises:
        ValueError: ``start_from`` names a folder without a student, or one of another model or mechanism.
    """
    run, start_from = run_folder(recipe), recipe.stage(number).start_from
    unaligned = unaligned_student(recipe, teacher)
    if start_from == "auto":
        earlier = [n for n in range(number - 1, 0, -1) if run.is_finished(n) and has_student(run.stage(n))]
        if not earlier:
            return unaligned, "the linearized teacher" + (f" (no stage {number - 1} in this run)" if number > 1 else "")
        folder = run.stage(earlier[0])
    elif start_from == "linearized":
        return unaligned, f"the linearized teacher, as stage{number}.start_from says"
    else:
        folder = Path(start_from).expanduser()
    found, wanted = read_description(folder), describe_student(recipe, unaligned, teacher)
    for key in ("backbone", "model_args", "mechanism", "mechanism_options", "keep"):
        if getattr(found, key) != getattr(wanted, key):
            raise ValueError(
                f"the student in {folder} has {key} {getattr(found, key)!r}, this recipe {getattr(wanted, key)!r}: "
                f"choose another --run_name, or --stage{number}.start_from linearized"
            )
    student = load_student(folder).to(device())
    return student.train().requires_grad_(True), f"the student in {folder}"


def describe_student(recipe: Recipe, student: VisionTransformer, teacher: VisionTransformer) -> StudentDescription:
    mean, std = normalisation(recipe, teacher)
    return StudentDescription(
        backbone=recipe.teacher.name,
        model_args=dict(recipe.teacher.model_args),
        image_size=[grid * patch for grid, patch in zip(*_grid_and_patch(student), strict=True)],
        mechanism=recipe.mechanism,
        mechanism_options=dict(recipe.mechanism_options),
        keep=list(recipe.keep),
        mean=mean,
        std=std,
    )


def _grid_and_patch(model: VisionTransformer) -> tuple[tuple[int, int], tuple[int, int]]:
    return model.patch_embed.grid_size, model.patch_embed.patch_size


def normalisation(recipe: Recipe, teacher: VisionTransformer) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the input: the recipe's, else those the teacher was trained with."""
    mean = recipe.data.mean or teacher.default_cfg["mean"]
    std = recipe.data.std or teacher.default_cfg["std"]
    return list(mean), list(std)


def build_stage(
    recipe: Recipe, number: int, plan: StagePlan, student: VisionTransformer, teacher: VisionTransformer
) -> Stage:
    """The stage module, with everything frozen that the conversion does not train."""
    ds_config = load_ds_config(recipe.ds_config)
    # The teacher computes in the student's precision, so that a student equal to it is equal to the bit.
    teacher = teacher.to(compute_dtype(ds_config))
    if plan.step.lora is not None:
        _insert_adapters(student, plan.step.lora, recipe.seed)
    patterns = QKV_PATTERNS if number == 2 and plan.config.trainable == "qkv" else plan.step.trainable
    freeze_except(student, patterns)
    if number == 2:
        freeze_matching(student, plan.config.freeze)
    if number == 1:
        # ZeRO-3 frees weights after each module's forward pass, so gradients cannot be taken inside the stage's.
        release = zero_stage(ds_config) < 3
        if not release and plan.config.loss == "attention_map_cross_entropy":
            raise ValueError(
                f"ds_config {recipe.ds_config}: ZeRO-3 gathers weights for a module's forward pass only, and the loss "
                "attention_map_cross_entropy takes a mixer's feature maps by themselves: use ZeRO 0, 1 or 2"
            )
        return AttentionAlignment(student, teacher, plan.config.loss, release_activations=release)
    if number == 2:
        return FeatureAlignment(student, teacher, plan.config.loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = build_head(student, plan.config.num_classes, plan.config.pooling).to(device())
    if plan.config.head_init == "probe":
        fit_head(recipe, plan, student, teacher, head)
    return Finetuning(student, teacher, head, plan.config.label_smoothing, plan.config.freeze_backbone)


def fit_head(
    recipe: Recipe, plan: StagePlan, student: VisionTransformer, teacher: VisionTransformer, head: ClassificationHead
) -> None:
    """Starts the head as a linear probe on frozen features: gradients of a random head would first distort them.

    Paper: arXiv 2202.10054 (LP-FT).
    """
    index = data_index(recipe, plan.sources)
    batches = build_evaluation_loader(recipe, index, teacher, plan.config.head_init_samples, require_label=True)
    features = collect_features(student.eval(), batches, plan.config.pooling)
    normalized = Features(head.norm(features.values.to(device())).cpu(), features.labels)
    # On rank 0 alone: L-BFGS would round differently on machines that differ.
    fitted = fit_probe(normalized, plan.config.num_classes, recipe.evaluation.probe_l2) if rank() == 0 else None
    weight, bias = broadcast_object(fitted)
    head.linear.load_state_dict({"weight": weight, "bias": bias})
    student.train()


def _insert_adapters(student: VisionTransformer, lora: LoraSpec, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in student.blocks:
            insert_lora(block.attn, lora.rank, lora.alpha, lora.targets)


def build_engine(recipe: Recipe, plan: StagePlan, stage: nn.Module) -> Engine:
    config = plan.config
    head_lr = getattr(config, "head_lr", None)
    return Engine(
        stage,
        lambda module: build_optimizer(
            module, config.lr, config.weight_decay, config.betas, {"head.": head_lr} if head_lr else None
        ),
        load_ds_config(recipe.ds_config),
        plan.micro_batch_size,
        plan.gradient_accumulation_steps,
        config.gradient_clipping,
    )


def data_index(recipe: Recipe, sources: Sequence[str]) -> ShardIndex:
    """The shards behind ``sources``; the embedded ones are written below runs_dir when first asked for.

    Raises:
        ValueError: See ``adala.data.load_index``; the same on every rank.
    """
    folder = Path(recipe.runs_dir) / "embedded-fashion-mnist"
    if any(source.startswith(f"{EMBEDDED}:") for source in sources):
        error = None
        if rank() == 0:
            try:
                write_embedded(folder)
            except (ValueError, OSError) as raised:
                error = raised
        raise_together(error)
    return load_index([_embedded_pattern(source, folder) for source in sources])


def _embedded_pattern(source: str, folder: Path) -> str:
    name, _, split = source.partition(":")
    if name != EMBEDDED:
        return source
    if split not in ("train", "val"):
        raise ValueError(f"{source}: the embedded data are embedded:train and embedded:val")
    return str(folder / f"{split}-*.tar")


def build_train_loader(
    recipe: Recipe, number: int, plan: StagePlan, index: ShardIndex, teacher: VisionTransformer, state: StreamState
) -> TrainLoader:
    mean, std = normalisation(recipe, teacher)
    check_image_size(teacher, recipe.data.image_size)
    transform = build_train_transform(tuple(recipe.data.image_size), mean, std, augmentation=plan.config.augmentation)
    loader = TrainLoader(
        index,
        transform,
        global_batch_size=plan.config.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        seed=recipe.seed,
        rank=rank(),
        world_size=world_size(),
        num_workers=recipe.data.num_workers,
        shuffle_buffer=recipe.data.shuffle_buffer,
        require_label=number == 3,
        pin_memory=device().type == "cuda",
        state=state,
    )
    say(
        f"{index.num_samples} training samples in {len(index.shards)} shards: {loader.steps_per_epoch} steps an epoch, "
        f"{loader.dropped_samples} samples of each epoch dropped at its end"
    )
    return loader


def build_evaluation_loader(
    recipe: Recipe,
    index: ShardIndex,
    teacher: VisionTransformer,
    limit: int | None = None,
    require_label: bool = False,
) -> EvaluationLoader:
    """Held-out samples, each once over all ranks; ``limit`` takes the first so many only.

    Raises:
        ValueError: Fewer samples than ranks.
    """
    if index.num_samples < world_size():
        raise ValueError(f"data.val holds {index.num_samples} samples, fewer than the {world_size()} ranks")
    mean, std = normalisation(recipe, teacher)
    return EvaluationLoader(
        index,
        build_eval_transform(tuple(recipe.data.image_size), mean, std),
        batch_size=recipe.evaluation.batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=recipe.data.num_workers,
        require_label=require_label,
        limit=limit,
    )
