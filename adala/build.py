"""From a plan to the things that a stage is made of: teacher, student, stage module, engine, loaders."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from adala.attention import insert_lora
from adala.backbones import build_backbone, check_image_size, load_teacher
from adala.conversion import LoraSpec
from adala.data import (
    EvaluationLoader,
    Mixture,
    Preparation,
    ShardIndex,
    StreamState,
    TrainLoader,
    View,
    prepare_images,
)
from adala.distributed import device, from_rank_0, rank, say, world_size
from adala.evaluation import Features, collect_features, fit_probe
from adala.export import WEIGHTS, has_student, load_student, read_description
from adala.families import Backbone
from adala.files import file_digest, value_digest
from adala.optim import build_optimizer, freeze_except, freeze_matching
from adala.plan import DataPlan, ModelPlan, RunPlan, StagePlan, TeacherPlan
from adala.runs import RunFolder
from adala.stages import AttentionAlignment, FeatureAlignment, Finetuning, Stage
from adala.students import LinearizedModel, restore_softmax
from adala.tasks import Task

if TYPE_CHECKING:
    from adala.engine import Engine

# Images on which the variance of a stage's targets is measured.
CALIBRATION_SAMPLES = 128
# What must be the same of two students for one to go on from the other.
MADE_OF = (
    "backbone",
    "model_args",
    "mechanism",
    "mechanism_options",
    "keep",
    "block_mechanisms",
    "block_mechanism_options",
)


def build_teacher(plan: TeacherPlan) -> Backbone:
    """The frozen teacher in float32 on this rank's device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.seed)
        teacher = load_teacher(plan.name, plan.image_size, plan.checkpoint, plan.pretrained, plan.model_args)
    return teacher.to(device())


def unaligned_student(model: ModelPlan, teacher: Backbone) -> LinearizedModel:
    """The linearized teacher, in training mode."""
    return model.student.linearize(teacher, model.seed)


@dataclass(frozen=True)
class Start:
    """The student that a stage begins with.

    Attributes:
        folder: Where it lies; None is the linearized teacher.
        digest: What identifies it.
        origin: In words.
        keep: Blocks of it that keep softmax attention.
        restored: Those among them that get it back only now: in the folder they are linearized.
    """

    folder: Path | None
    digest: str
    origin: str
    keep: tuple[int, ...] = ()
    restored: tuple[int, ...] = ()

    def restoring(self, blocks: Sequence[int]) -> "Start":
        """The same student with the teacher's softmax attention in ``blocks``."""
        numbers = ", ".join(map(str, blocks))
        return replace(
            self,
            digest=value_digest([self.digest, *blocks]),
            origin=f"{self.origin}, with the teacher's softmax attention in the blocks {numbers}, which a search chose",
            keep=tuple(blocks),
            restored=tuple(blocks),
        )


def find_start(run: RunFolder, plan: StagePlan) -> Start:
    """Where the stage starts from, as it lies on the disk now; rank 0 calls it.

    Where a search decides which blocks keep softmax attention, the student may be one of which none does yet.

    Raises:
        ValueError: ``start_from`` names a folder without a student, or one of another teacher, model or mechanism; or
            there is to be a search, and no student that could be searched.
    """
    number, start_from = plan.number, plan.config.start_from
    if start_from == "linearized":
        return Start(None, "linearized", f"the linearized teacher, as stage{number}.start_from says")
    if start_from == "auto":
        earlier = [n for n in range(number - 1, 0, -1) if run.stage(n).record() and has_student(run.stage(n).path)]
        if not earlier and plan.search is not None:
            raise ValueError(
                f"keep is auto:{plan.search.budget.text}, which is chosen after Stage 1, and the run {run.path} has no "
                "finished stage 1: run --stage 1 first, or --stage all"
            )
        if not earlier:
            missing = f" (no stage {number - 1} in this run)" if number > 1 else ""
            return Start(None, "linearized", f"the linearized teacher{missing}")
        _check_same_model(run, earlier[0], plan)
        folder = run.stage(earlier[0]).path
    else:
        folder = Path(start_from).expanduser()
    found = read_description(folder)
    expected = plan.model.student
    if plan.search is not None:
        # The student of a later stage of this run is a hybrid that was chosen before.
        if found.keep and not (start_from == "auto" and earlier[0] > 1):
            raise ValueError(
                f"the student in {folder} has softmax attention in block {found.keep[0]} already, and keep is "
                f"auto:{plan.search.budget.text}: list the blocks in keep, or start from a student that has none"
            )
        expected = plan.keeping(found.keep).model.student
    for key in MADE_OF:
        ours = getattr(expected, key)
        if getattr(found, key) != ours:
            raise ValueError(
                f"the student in {folder} has {key} {getattr(found, key)!r}, this recipe {ours!r}: "
                f"choose another --run_name, or --stage{number}.start_from linearized"
            )
    return Start(folder, file_digest(folder / WEIGHTS), f"the student in {folder}", tuple(found.keep))


def _check_same_model(run: RunFolder, earlier: int, plan: StagePlan) -> None:
    before = run.stage(earlier).record().conditions
    for key, now in plan.conditions.items():
        if key == "keep" and plan.search is not None and earlier == 1:
            now = []
        if key.startswith(("teacher.", "mechanism", "keep", "block_mechanism")) and before.get(key) != now:
            raise ValueError(
                f"stage {earlier} of {run.path} was made with {key} {before.get(key)!r}, this recipe has {now!r}: run "
                f"it again (--stage {earlier} --overwrite), choose another --run_name, or "
                f"--stage{plan.number}.start_from linearized"
            )


def load_start(start: Start, model: ModelPlan, teacher: Backbone) -> LinearizedModel:
    """The student that a stage starts from, on this rank's device, everything trainable."""
    if start.folder is None:
        return unaligned_student(model, teacher)
    student = load_student(start.folder).to(device()).train().requires_grad_(True)
    restore_softmax(student, teacher, start.restored)
    return student


def prepare_student(plan: StagePlan, student: LinearizedModel) -> None:
    """Inserts the stage's adapters, and freezes everything that it does not train."""
    if plan.step.lora is not None:
        _insert_adapters(student, plan.step.lora, plan.model.seed)
    freeze_except(student, plan.trainable)
    freeze_matching(student, plan.frozen)


def build_stage(plan: StagePlan, student: LinearizedModel, teacher: Backbone) -> Stage:
    """The stage module around a prepared student."""
    # The teacher computes in the student's precision, so that a student equal to it is equal to the bit.
    stage = STAGE_BUILDERS[plan.kind.name](plan, student, teacher.to(plan.model.precision.dtype))
    stage.normalise = plan.data.view.normalise
    if plan.config.activation_checkpointing:
        stage.checkpoint_activations()
    if plan.config.compile:
        # ZeRO-3 fetches weights in hooks on every module inside a block.
        if plan.model.precision.zero_stage == 3:
            raise ValueError(
                f"stage{plan.number}.compile is true: torch.compile cannot see through the hooks of ZeRO-3 "
                f"(ds_config {plan.model.precision.name}): leave it out, or use ZeRO 0, 1 or 2"
            )
        stage.compile_blocks()
    return stage


def _build_attention_alignment(plan: StagePlan, student: LinearizedModel, teacher: Backbone) -> AttentionAlignment:
    # ZeRO-3 frees weights after each module's forward pass, so gradients cannot be taken inside the stage's.
    release = plan.model.precision.zero_stage < 3
    if not release and plan.config.loss == "attention_map_cross_entropy":
        raise ValueError(
            f"ds_config {plan.model.precision.name}: ZeRO-3 gathers weights for a module's forward pass only, and the "
            "loss attention_map_cross_entropy takes a mixer's feature maps by themselves: use ZeRO 0, 1 or 2"
        )
    return AttentionAlignment(student, teacher, plan.config.loss, release_activations=release)


def _build_feature_alignment(plan: StagePlan, student: LinearizedModel, teacher: Backbone) -> FeatureAlignment:
    config = plan.config
    try:
        return FeatureAlignment(
            student,
            teacher,
            config.loss,
            global_weight=config.global_weight,
            intermediate_weight=config.intermediate_weight,
            intermediate_blocks=config.intermediate_blocks,
        )
    except ValueError as error:
        raise ValueError(f"stage{plan.number}.{error}") from error


def _build_finetuning(
    plan: StagePlan, student: LinearizedModel, teacher: Backbone
) -> Finetuning:  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.model.seed)
        head = plan.task.build_head(student)
    _starts_as_probe(plan)
    head = head.to(student.patch_embed.proj.weight.device)
    return Finetuning(student, teacher, plan.task, head, plan.config.freeze_backbone)


STAGE_BUILDERS: dict[str, Callable[[StagePlan, LinearizedModel, Backbone], Stage]] = {
    "attention_alignment": _build_attention_alignment,
    "feature_alignment": _build_feature_alignment,
    "finetuning": _build_finetuning,
}


def measure_on_data(plan: StagePlan, stage: Stage) -> None:
    """What a stage wants to know of its training data before it starts; every rank calls it."""
    if stage.calibrated_targets:
        stage.calibrate(build_evaluation_loader(plan.data, plan.training, CALIBRATION_SAMPLES))
    if _starts_as_probe(plan):
        _fit_head(plan, stage)


def _starts_as_probe(plan: StagePlan) -> bool:
    """Raises ValueError where the head cannot."""
    if plan.task is None or plan.config.head_init != "probe":
        return False
    if plan.task.probe != "linear":
        raise ValueError(f"stage3.head_init is probe, which is for classification: {plan.task.name} has random")
    return True


def _fit_head(plan: StagePlan, stage: Finetuning) -> None:
    """Starts the head as a linear probe on frozen features: gradients of a random head would first distort them.

    Paper: arXiv 2202.10054 (LP-FT).
    """
    task, head, student = plan.task, stage.head, stage.student.eval()
    batches = build_evaluation_loader(plan.data, plan.training, plan.config.head_init_samples, task)
    features = collect_features({"": student}, batches, head.pooling, task)[""]
    normalized = Features(head.norm(features.values.to(device())).cpu(), features.labels)
    # On rank 0 alone: L-BFGS would round differently on machines that differ.
    weight, bias = from_rank_0(lambda: fit_probe(normalized, task.num_classes, plan.probe_l2))
    head.linear.load_state_dict({"weight": weight, "bias": bias})
    student.train()


def _insert_adapters(student: LinearizedModel, lora: LoraSpec, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for block in student.blocks:
            insert_lora(block.attn, lora.rank, lora.alpha, lora.targets)


def build_engine(plan: StagePlan, stage: nn.Module) -> "Engine":
    # Imported here: DeepSpeed takes seconds to import, and what is built on the meta device alone does not need it.
    from adala.engine import Engine

    config = plan.config
    head_lr = getattr(config, "head_lr", None)
    return Engine(
        stage,
        lambda module: build_optimizer(
            module, config.lr, config.weight_decay, config.betas, {"head.": head_lr} if head_lr else None
        ),
        plan.model.precision,
        plan.micro_batch_size,
        plan.gradient_accumulation_steps,
        config.gradient_clipping,
        keeps_average=config.ema > 0,
    )


def build_train_loader(
    plan: StagePlan,
    state: StreamState = StreamState(),  # noqa: B008 (immutable)
    step: int = 0,
) -> TrainLoader:
    """The stage's training batches on this rank, from where ``state`` stands, as ``step`` wants them."""
    plan = plan.at(step)
    data = plan.data
    return TrainLoader(
        plan.training,
        # The stage normalises what comes as uint8.
        preparation_of(plan.task, replace(data.view, trains_on_uint8=True), plan.config.augmentation),
        global_batch_size=plan.config.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        seed=plan.model.seed,
        rank=rank(),
        world_size=world_size(),
        num_workers=data.num_workers,
        shuffle_buffer=data.shuffle_buffer,
        pin_memory=device().type == "cuda",
        state=state,
        max_bad_fraction=data.max_bad_fraction,
    )


def preparation_of(task: Task | None, view: View, augmentation: str | None = None) -> Preparation:
    """What becomes of a sample: with the task's target, or the image alone; as held-out where nothing is augmented."""
    if task is not None:
        return task.prepare(view, augmentation)
    return prepare_images(view.image_transform(augmentation, as_uint8=view.trains_on_uint8))


def build_evaluation_loader(
    data: DataPlan,
    index: ShardIndex,
    limit: int | None = None,
    task: Task | None = None,
    preparation: Preparation | None = None,
    alone: bool = False,
) -> EvaluationLoader:
    """This rank's part of a data set, each sample once over all ranks.

    Args:
        data: How samples become batches.
        index: The data set.
        limit: Takes the first so many samples only.
        task: Whose targets are wanted.
        preparation: Of samples that come one by one, in place of the task's for samples of one size.
        alone: Gives this rank all of it.
    """
    return EvaluationLoader(
        index,
        preparation or preparation_of(task, data.view),
        batch_size=1 if preparation else data.evaluation_batch_size,
        rank=0 if alone else rank(),
        world_size=1 if alone else world_size(),
        num_workers=data.num_workers,
        limit=limit,
        max_bad_fraction=data.max_bad_fraction,
    )


def build_monitor_loader(plan: StagePlan, name: str | None = None) -> EvaluationLoader:
    """What a stage is evaluated on while it trains: a held-out set by name, or the first."""
    held_out = plan.held_out if name is None else plan.held_out_sets[name]
    return build_evaluation_loader(plan.data, held_out, plan.monitor_samples, plan.task)


def outline_stage(plan: StagePlan) -> Stage:
    """The stage module around the linearized teacher on the meta device, without memory for its weights.

    Raises:
        ValueError: Whatever a builder refuses.
    """
    model = plan.model
    with torch.device("meta"):
        teacher = build_backbone(model.teacher.name, model.teacher.image_size, model.teacher.model_args)
        check_image_size(teacher, model.teacher.image_size)
        for size in (plan.data.view.image_size, *(change.image_size for change in plan.size_changes)):
            check_image_size(teacher, size)
        if plan.search is not None:
            # Which blocks will keep softmax is not known yet; any are as large as any.
            plan = plan.keeping(range(plan.search.count))
        student = unaligned_student(plan.model, teacher)
        prepare_student(plan, student)
        return build_stage(plan, student, teacher)


def rehearse(plan: RunPlan) -> None:
    """Builds everything that the plan's stages consist of, without memory or data, so that what fails fails now.

    Raises:
        ValueError: Whatever a builder refuses, or a disk without room for the run's checkpoints and students.
    """
    from adala.engine import check_ds_config

    model = plan.model
    check_ds_config(model.precision)
    needed = 0
    for stage_plan in plan.stages:
        stage = outline_stage(stage_plan)
        for first_step in (0, *(change.from_step for change in stage_plan.size_changes)):
            build_train_loader(stage_plan, step=first_step)
        for name in stage_plan.held_out_sets:
            build_monitor_loader(stage_plan, name)
        needed += _bytes_on_disk(stage_plan, stage)
    _check_disk(plan.run.path, needed)


def _bytes_on_disk(plan: StagePlan, stage: Stage) -> int:
    """About what a stage leaves there: its last checkpoints, and its student in float32."""
    config = plan.config
    weights = 4 * sum(parameter.numel() for parameter in stage.parameters())
    # AdamW's two moments, and an average where one is kept, besides the float32 weights of what trains.
    kept = 12 if config.ema else 8
    checkpoint = weights + kept * sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad)
    # One is being written before the oldest goes.
    newest = min(config.keep_last + 1, config.steps)
    if not config.save_every_minutes:
        newest = min(newest, 1 + (config.steps - 1) // config.save_every if config.save_every else 1)
    for_good = config.steps // config.keep_every if config.keep_every else 0
    return (newest + for_good) * checkpoint + weights


def _check_disk(path: Path, needed: int) -> None:
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 2**20:,.0f} MiB left, and checkpoints and students of this run may need "
            f"{needed / 2**20:,.0f} MiB: make room, or choose another runs_dir"
        )


def say_stream(plan: StagePlan, loader: TrainLoader) -> None:
    """Says how the training samples divide into steps, and of a mixture in which proportions its sources come."""
    index, steps = plan.training, loader.steps_per_epoch
    held = f"{index.num_samples} training samples in {len(index.shards)} shards: {steps} steps an epoch"
    if not index.sources:
        say(f"{held}, {loader.dropped_samples} samples of each epoch dropped at its end")
        return
    mixture = Mixture.of(index)
    read = [share * steps * loader.global_batch_size for share in mixture.shares]
    sources = [
        f"source {number}, {share:.3%} ({size} samples, {count / size:.3g} times an epoch)"
        for number, (share, size, count) in enumerate(zip(mixture.shares, mixture.sizes, read, strict=True))
    ]
    say(f"{held}, none dropped; a mixture of {'; '.join(sources)}")
