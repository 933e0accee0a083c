"""Stages 1 and 2, and their measure, for a notebook or a script of one's own: one process, no recipe, no DeepSpeed.

Shapes: B batch, N tokens, D embed dim, H, W height and width of an image in pixels.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from adala.conversion import ADALA
from adala.distributed import device
from adala.evaluation import measure_speed
from adala.families import Backbone
from adala.hybrids import Choice, HybridMeter, choose_greedily
from adala.optim import build_optimizer, freeze_except, rate_factor
from adala.progress import build_bar
from adala.similarity import comparison_metrics, comparison_sums
from adala.stages import AttentionAlignment, FeatureAlignment, Stage
from adala.students import LinearizedModel

# Images on which variances, and the features before and after, are measured.
MEASURED_IMAGES = 128
# As in a recipe: the largest global gradient norm, and steps in a row that may be skipped before there is an error.
GRADIENT_CLIPPING = 1.0
MAX_SKIPPED_STEPS = 5
STAGES: dict[str, type[AttentionAlignment] | type[FeatureAlignment]] = {
    "attention_alignment": AttentionAlignment,
    "feature_alignment": FeatureAlignment,
}


@dataclass(frozen=True)
class Alignment:
    """What :func:`align` measured.

    Attributes:
        before: Of the features against the teacher's, see :func:`evaluate`, on the measured images.
        after: The same at the end.
        losses: Of every step by stage, ``attention_alignment`` and ``feature_alignment``; a skipped step's is not
            finite.
        measured_images: How many images ``before`` and ``after`` are of.
        seconds: That all of it took.
    """

    before: dict[str, float]
    after: dict[str, float]
    losses: dict[str, tuple[float, ...]]
    measured_images: int
    seconds: float

    def __str__(self) -> str:
        changes = ", ".join(f"{name} {self.before[name]:.4f} -> {self.after[name]:.4f}" for name in self.after)
        steps = " + ".join(str(len(losses)) for losses in self.losses.values())
        return f"{changes} on {self.measured_images} images, after {steps} steps in {self.seconds:.0f} s"


def align(
    student: LinearizedModel,
    teacher: Backbone,
    images: Iterable[Any],
    *,
    steps: Sequence[int] = (312, 900),
    lr: Sequence[float] = (1e-3, 2e-5),
    warmup_steps: Sequence[int] = (20, 50),
    loss: str = "normalized_mse",
    batch_size: int = 32,
    bf16: bool = False,
    held_out: Iterable[Any] | None = None,
    progress: bool = True,
) -> Alignment:
    """Trains a student on its teacher: Stage 1 (each block's attention), then Stage 2 (the final features).

    Losses, parameters, optimizer and schedule are those of the training command's stages; lengths and rates by default
    those of the recipe ``dinov2_small``. What a classifier of the two makes of the features has no part in it.

    Args:
        student: As :func:`adala.linearize` gives it, trained in place; it is in eval mode afterwards.
        teacher: Its softmax counterpart on the same device; left as it was.
        images: Batches (B, 3, H, W), one a step, or single images (3, H, W); normalised, in the order in which they are
            to come. Tensors, tuples and lists whose first is one, or mappings with an ``image``. What can be iterated
            again (a DataLoader, a list) is, as often as the steps need.
        steps: Optimizer steps of the two stages; 0 leaves one out.
        lr: Their peak rates of AdamW.
        warmup_steps: Their steps of linear warm-up, before a cosine to 0.
        loss: ``normalized_mse``, or ``mse`` as in the paper.
        batch_size: How many single images make a batch.
        bf16: Whether to compute under autocast in bfloat16; weights and sums stay in float32.
        held_out: Images to measure on before and after; None takes the first of ``images``, which are trained on, too.
        progress: Whether to show a bar.

    Raises:
        ValueError: Models that do not belong together, images that are none or too few, or gradients that are not
            finite, step after step.

    Paper: arXiv 2603.16063, Stages 1 and 2. Its rates and lengths are in no text at hand: the defaults were measured.
    """
    _check_pair(student, teacher)
    for name, values in (("steps", steps), ("lr", lr), ("warmup_steps", warmup_steps)):
        if len(values) != len(STAGES) or any(value < 0 for value in values):
            raise ValueError(f"{name} is {values!r}: it must be two numbers, of Stage 1 and of Stage 2, none below 0")
    if not any(steps):
        raise ValueError(f"steps is {steps!r}: one of the two stages must have some")
    started, first, stream = time.monotonic(), *_first_and_all(images, batch_size)
    measured = first if held_out is None else _first(held_out, batch_size)
    losses: dict[str, tuple[float, ...]] = {}
    with ExitStack() as context:
        context.enter_context(_left_as_found(teacher))
        context.enter_context(_requires_grad_kept(student))
        for model in (student, teacher):
            context.enter_context(_features_only(model))
        context.enter_context(_autocast(student, bf16))
        bar = context.enter_context(build_bar(progress))
        before = _compare(student, teacher, measured)
        for number, (name, build) in enumerate(STAGES.items()):
            if steps[number]:
                freeze_except(student, ADALA.step(name).trainable)
                stage = build(student, teacher, loss)
                stage.calibrate({"image": batch} for batch in first)
                fit = _Fit(stage, steps[number], lr[number], warmup_steps[number], f"Stage {number + 1}")
                losses[name] = fit.run(stream, bar)
        after = _compare(student, teacher, measured)
    student.eval().zero_grad(set_to_none=True)
    return Alignment(before, after, losses, sum(map(len, measured)), time.monotonic() - started)


def evaluate(
    student: nn.Module,
    teacher: Backbone,
    images: Iterable[Any],
    *,
    batch_size: int = 32,
    bf16: bool = False,
    speed: bool = False,
) -> dict[str, float]:
    """How close a student's features are to its teacher's, over all images that there are.

    Args:
        student: Of the teacher's shape, on the same device; left as it was, as is the teacher.
        teacher: What it is compared with.
        images: As for :func:`align`.
        batch_size: How many single images make a batch.
        bf16: Whether to compute under autocast in bfloat16.
        speed: Whether to time both on the first batch, in turn.

    Returns:
        ``feature_cosine`` (mean over all tokens), ``patch_cosine``, ``cls_cosine`` where there is a class token,
        ``relative_error`` (see :func:`adala.similarity.comparison_metrics`), ``images`` (how many), and with ``speed``
        ``images_per_s`` and ``speed_against_teacher``, the median of the rounds' ratios.

    Raises:
        ValueError: Models that do not belong together, or images that are none.
    """
    _check_pair(student, teacher)
    if speed and _device(student) != device():
        raise ValueError(f"speed is measured on {device()}, but the models are on {_device(student)}: move both there")
    with ExitStack() as context:
        for model in (student, teacher):
            context.enter_context(_left_as_found(model))
            context.enter_context(_features_only(model))
        context.enter_context(_autocast(student, bf16))
        first, batches = _peek(_batches(images, batch_size))
        counted = _Counted(batches)
        metrics = _compare(student, teacher, counted)
        metrics["images"] = counted.images
        if speed:
            timed = measure_speed({"teacher": teacher.eval(), "student": student.eval()}, first)["student"]
            metrics |= {"images_per_s": timed.images_per_s, "speed_against_teacher": timed.against_first}
    return metrics


def choose_softmax_blocks(
    student: LinearizedModel,
    teacher: Backbone,
    images: Iterable[Any],
    count: int,
    *,
    measured_images: int = 256,
    batch_size: int = 16,
    bf16: bool = False,
) -> Choice:
    """Which blocks of a student should have softmax attention, so that its features come closest to its teacher's.

    Greedily: the block whose softmax lowers the error most, then the one that does beside it, and so on. Call it after
    Stage 1 (``align`` with no steps of Stage 2); of a student that has not been aligned it says nothing that holds
    afterwards. Then ``restore_softmax(student, teacher, choice.blocks)`` makes the hybrid, which Stage 2 aligns.

    Args:
        student: All its blocks linearized; left as it was, but in eval mode.
        teacher: Its softmax counterpart on the same device; left as it was.
        images: As for :func:`align`; the first ``measured_images`` are used, all of one size.
        count: How many blocks.
        measured_images: How many images the error is of. They and the teacher's features are held in memory.
        batch_size: How many single images make a batch.
        bf16: Whether to compute under autocast in bfloat16.

    Raises:
        ValueError: Models that do not belong together, a student that has softmax attention already, images that are
            none, or no block that would be left linearized.
    """
    _check_pair(student, teacher)
    if not 1 <= count < len(student.blocks):
        raise ValueError(f"count is {count}: it must be a whole number from 1 to {len(student.blocks) - 1}")
    with ExitStack() as context:
        context.enter_context(_left_as_found(teacher))
        for model in (student, teacher):
            context.enter_context(_features_only(model))
        context.enter_context(_autocast(student, bf16))
        meter = HybridMeter(student, teacher, _take(_batches(images, batch_size), measured_images))
        before = Choice(meter.images, meter.image_size, meter.measure_one({}))
        steps = list(choose_greedily(meter.options, count, meter.measure))
    return dataclasses.replace(before, steps=steps)


class _Fit:
    """One stage's loop."""

    def __init__(self, stage: Stage, steps: int, lr: float, warmup_steps: int, title: str):
        self.stage = stage.train()
        self.steps = steps
        self.warmup_steps = warmup_steps
        self.title = title
        self.optimizer = build_optimizer(stage, lr, weight_decay=0.0, betas=(0.9, 0.999))
        self.lr = lr

    def run(self, batches: Iterator[Tensor], bar: Progress) -> tuple[float, ...]:
        """Trains; returns every step's loss."""
        losses, skipped_in_a_row = [], 0
        task = bar.add_task(self.title, total=self.steps, note="")
        for step in range(self.steps):
            loss, norm = self._step(step, next(batches))
            losses.append(loss)
            skipped_in_a_row = 0 if math.isfinite(norm) else skipped_in_a_row + 1
            if skipped_in_a_row >= MAX_SKIPPED_STEPS:
                raise ValueError(
                    f"{self.title}, step {step + 1}: the gradients of {skipped_in_a_row} steps in a row were not "
                    "finite, and the weights were left alone: lower lr, or look at the images"
                )
            bar.update(task, completed=step + 1, note=f"loss {loss:.4g}")
        return tuple(losses)

    def _step(self, step: int, batch: Tensor) -> tuple[float, float]:
        """Loss and gradient norm; a gradient that is not finite leaves the weights alone."""
        self.stage.begin_step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate_factor(step, self.steps, self.warmup_steps, "cosine")
        loss = self.stage({"image": batch})["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
        norm = float(nn.utils.clip_grad_norm_(trained, GRADIENT_CLIPPING))
        if math.isfinite(norm):
            self.optimizer.step()
        return float(loss.detach()), norm


@torch.no_grad()
def _compare(student: nn.Module, teacher: Backbone, batches: Iterable[Tensor]) -> dict[str, float]:
    """Metrics of the features in eval mode; both models give those of all tokens."""
    student.eval(), teacher.eval()
    weight, total = teacher.patch_embed.proj.weight, 0
    for batch in batches:
        batch = batch.to(weight.device, weight.dtype)
        total = total + comparison_sums(student(batch), teacher(batch), teacher.num_prefix_tokens)
    return {name: float(value) for name, value in comparison_metrics(total, teacher.has_class_token).items()}


def _check_pair(student: nn.Module, teacher: nn.Module) -> None:
    for role, model in (("student", student), ("teacher", teacher)):
        if not hasattr(model, "forward_head") or not hasattr(model, "blocks"):
            raise ValueError(f"the {role} is a {type(model).__name__}: give a timm ViT, or what adala.linearize makes")
    if (student.embed_dim, len(student.blocks)) != (teacher.embed_dim, len(teacher.blocks)):
        raise ValueError(
            f"the student has {len(student.blocks)} blocks of width {student.embed_dim}, the teacher "
            f"{len(teacher.blocks)} of width {teacher.embed_dim}: linearize this teacher"
        )
    if _device(student) != _device(teacher):
        raise ValueError(
            f"the student is on {_device(student)}, the teacher on {_device(teacher)}: move one to the other"
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _first_and_all(images: Iterable[Any], batch_size: int) -> tuple[list[Tensor], Iterator[Tensor]]:
    """The first batches, and endless ones from the beginning."""
    if not isinstance(images, Iterator):
        return _first(images, batch_size), _endless(images, batch_size)
    passing = _batches(images, batch_size)
    first = _take(passing, MEASURED_IMAGES)
    return first, _once(itertools.chain(first, passing))


def _first(images: Iterable[Any], batch_size: int) -> list[Tensor]:
    return _take(_batches(images, batch_size), MEASURED_IMAGES)


def _take(batches: Iterator[Tensor], count: int) -> list[Tensor]:
    """As many batches as hold ``count`` images, or all that there are."""
    taken: list[Tensor] = []
    while sum(map(len, taken)) < count:
        batch = next(batches, None)
        if batch is None:
            break
        taken.append(batch)
    return taken


def _endless(images: Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    while True:
        yield from _batches(images, batch_size)


def _once(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    count = 0
    for batch in batches:
        yield batch
        count += 1
    raise ValueError(
        f"the images ended after {count} batches, before the last step, and cannot be iterated again: give a list or a "
        "DataLoader, or fewer steps"
    )


def _batches(images: Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    """One pass, in batches (B, 3, H, W).

    Raises:
        ValueError: There are none, or something else than normalised images.
    """
    waiting: list[Tensor] = []
    is_empty = True
    for item in images:
        is_empty, tensor = False, _tensor_of(item)
        if tensor.ndim == 4:
            yield tensor
            continue
        if waiting and waiting[0].shape != tensor.shape:
            raise ValueError(
                f"single images of {tuple(waiting[0].shape)} and {tuple(tensor.shape)} cannot be one batch: resize "
                "them, or give batches"
            )
        waiting.append(tensor)
        if len(waiting) == batch_size:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)
    if is_empty:
        raise ValueError("there are no images: what was given is empty, or was iterated to its end before")


def _tensor_of(item: Any) -> Tensor:
    if isinstance(item, Mapping):
        item = item.get("image")
    elif isinstance(item, tuple | list) and item:
        item = item[0]
    if not isinstance(item, Tensor):
        raise ValueError(
            f"images are tensors, not {type(item).__name__}: transform them first, with "
            "timm.data.create_transform(**timm.data.resolve_model_data_config(teacher)), say"
        )
    if item.ndim not in (3, 4) or item.shape[-3] != 3 or not item.is_floating_point():
        raise ValueError(
            f"images are (B, 3, height, width) or (3, height, width), floating and normalised, not {item.dtype} "
            f"{tuple(item.shape)}"
        )
    return item


def _peek(batches: Iterator[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    first = next(batches)
    return first, itertools.chain([first], batches)


class _Counted:
    """Counts images on their way."""

    def __init__(self, batches: Iterator[Tensor]):
        self._batches = batches
        self.images = 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            self.images += len(batch)
            yield batch


@contextmanager
def _features_only(model: nn.Module) -> Iterator[None]:
    """A context in which ``model(images)`` gives the features of all tokens, whatever head it has.

    timm's models are ``forward_head(forward_features(images))``. Stages call the model itself, as hooks want it.
    """
    model.forward_head = lambda features: features
    try:
        yield
    finally:
        model.__dict__.pop("forward_head", None)  # gone already where both models are one


@contextmanager
def _requires_grad_kept(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """A context after which every module's mode, and which parameters train, are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    with _requires_grad_kept(model):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _autocast(model: nn.Module, bf16: bool) -> torch.autocast:
    return torch.autocast(_device(model).type, torch.bfloat16, enabled=bf16)
