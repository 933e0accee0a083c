"""What one forward and backward pass of a stage keeps alive, counted on tensors without memory.

Shapes: B batch, H heads, N tokens, d head dim.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from adala.activations import SavedActivations
from adala.build import outline_stage
from adala.plan import StagePlan
from adala.stages import Finetuning, Stage
from adala.tasks import Task

# Micro-batches that are traced. What is held for the backward pass is linear from two images on: of one image, some
# transposed tensors are views and not copies. The peak is the largest of several phases, each linear, and so lies
# below the straight line between two micro-batches: what is read off that line between them is never too little.
TRACED = (2, 64)
# Assumed: bytes that a loss holds whose targets are not known, for each byte of the prediction in float32.
UNKNOWN_LOSS_COPIES = 4


@dataclass(frozen=True)
class Line:
    """Bytes as a function of the micro-batch.

    Attributes:
        fixed: Bytes of no image.
        per_image: Bytes of each.
    """

    fixed: float
    per_image: float

    @classmethod
    def through(cls, counts: Mapping[int, float]) -> "Line":
        """The line through the bytes of two micro-batches."""
        (few, at_few), (many, at_many) = counts.items()
        slope = (at_many - at_few) / (many - few)
        return cls(at_few - slope * few, slope)

    def at(self, images: int) -> float:
        """Bytes of a micro-batch."""
        return self.fixed + self.per_image * images

    def __add__(self, other: "Line") -> "Line":
        return Line(self.fixed + other.fixed, self.per_image + other.per_image)


@dataclass(frozen=True)
class LossMemory:
    """What a task's loss and metrics hold.

    Attributes:
        saved: For the backward pass.
        working: The most that is alive at once beside it.
    """

    saved: Line
    working: Line


@dataclass(frozen=True)
class PassMemory:
    """What a stage's forward and backward pass holds beside weights, optimizer and gradients.

    Attributes:
        saved: What autograd holds when the forward pass ends, or the most before, where blocks let go of it on the way.
        peak: The most that is alive at once in both passes, ``saved`` among it.
        teacher: The most that is alive in the teacher's forward pass alone; no addition to ``peak``, but one of the
            phases that it is the largest of.
        loss: The part of a task's loss, or None where there is no task.
    """

    saved: Line
    peak: Line
    teacher: Line
    loss: LossMemory | None = None


class LiveTensors(TorchDispatchMode):
    """Counts the memory of the tensors that are made while the context lasts, until they are let go of.

    A storage counts once, however many views of it there are. Works on tensors of any device, ``meta`` included.

    Attributes:
        bytes: Alive now.
        peak_bytes: The most that was alive at once.
    """

    def __init__(self, existing: Iterator[Tensor] | list[Tensor] = ()):
        """Counts nothing yet; ``existing`` tensors (weights) do not count, though operations return views of them."""
        super().__init__()
        self.bytes = self.peak_bytes = 0
        # Kept, so that no new storage gets the address of one of them.
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known = {storage._cdata for storage in self._existing}

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and _has_no_values(args[0]):
            # Somebody branches on a value. Mask2Former asks whether all is finite: yes.
            return True
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class FusedAttention(torch.autograd.Function):
    """Softmax attention as GPUs' fused kernels hold it: no N x N weights, but the logarithm of each row's sum.

    PyTorch has no such kernel on ``meta`` and would count the weights of every head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # In the order of the queries: what is computed of rotated ones has to be copied before the output projection.
        output = torch.empty_like(q)
        row_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        # The kernels that take a mask take one of numbers.
        added = None if mask is None else mask.to(q.dtype)
        ctx.save_for_backward(q, k, v, output, row_sums, added)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
    return FusedAttention.apply(query, key, value, attn_mask)


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What autocast computes in float32 on CUDA, and in the dtype of its input on the CPU."""

    def computed(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *arguments, **options)

    return computed


@contextmanager
def _as_on_gpus() -> Iterator[None]:
    """Has softmax attention, and under autocast norms and softmax, hold what they do on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _fused_attention))
        for name in ("layer_norm", "group_norm", "softmax"):
            stack.enter_context(patch.object(F, name, _in_float32(getattr(F, name))))
        yield


class _StandIn:
    """A task whose loss is the sum of the prediction, since a real one looks at values, which there are none of.

    Attributes:
        prediction: Shapes and dtypes of the last one, as tensors on ``meta``.
    """

    def __init__(self) -> None:
        self.prediction: Any = None

    def target(self, batch: Mapping[str, Any], device: torch.device) -> None:
        return None

    def loss(self, prediction: Any, target: None, training: bool) -> Tensor:
        self.prediction = tree_map_only(
            Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), prediction
        )
        return torch.stack([leaf.sum().float() for leaf in tree_leaves(prediction)]).sum()

    def batch_metrics(self, prediction: Any, target: None) -> dict[str, Tensor]:
        return {}


def trace_stage(plan: StagePlan, micro_batches: tuple[int, int] = TRACED, loss: LossMemory | None = None) -> PassMemory:
    """Runs the plan's stage forward and backward without memory, at two micro-batches.

    Without autocast its tensors are on ``meta``. Autocast knows no such device: then they are fake tensors that say
    they are on the CPU, on which the real autocast works, with what CUDA's does differently put right.

    Args:
        plan: Of the stage; whether activations are checkpointed is what it says.
        micro_batches: Two different ones.
        loss: What the task's loss holds, where it has been traced before: it does not depend on checkpointing.

    Raises:
        ValueError: Whatever a builder refuses.
    """
    stage = outline_stage(plan).train()
    stage.target_variance = dict.fromkeys(stage.calibrated_targets, 1.0)
    stage.normalise = _normalise
    task = None
    if isinstance(stage, Finetuning):
        task, stage.task = stage.task, _StandIn()
    autocast_dtype = plan.model.precision.autocast_dtype
    stage.to(plan.model.precision.dtype)
    passes: dict[int, tuple[int, int, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) if autocast_dtype else nullcontext(), _as_on_gpus():
        if autocast_dtype:
            _pretend_cpu(stage)
            _pretend_cpu(stage.teacher)
        for images in micro_batches:
            passes[images] = _trace_pass(stage, plan, images, _autocast(autocast_dtype))
    saved, peak, teacher = (
        Line.through({images: counted[part] for images, counted in passes.items()}) for part in range(3)
    )
    if task is None:
        return PassMemory(saved, peak, teacher)
    loss = loss or trace_loss(task, stage.task.prediction, plan.data.view.image_size)
    # The loss is computed when all that backbone and head hold is held; what their backward pass needs beside that
    # comes when the loss's is done with.
    working = Line(
        max(peak.fixed - saved.fixed, loss.working.fixed), max(peak.per_image - saved.per_image, loss.working.per_image)
    )
    return PassMemory(saved + loss.saved, saved + loss.saved + working, teacher, loss)


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager:
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


def _pretend_cpu(module: nn.Module) -> None:
    """Makes fake tensors that say that they are on the CPU of a module's tensors on ``meta``, in place."""
    module.to_empty(device="cpu")


def _trace_pass(stage: Stage, plan: StagePlan, images: int, autocast: AbstractContextManager) -> tuple[int, int, int]:
    """Bytes saved for the backward pass, the most alive in both, and in the teacher's forward pass alone."""
    weights = [*stage.parameters(), *stage.buffers(), *stage.teacher.parameters(), *stage.teacher.buffers()]
    # As ZeRO 2 and 3 do: what gradients take is counted with the optimizer's states.
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in stage.parameters() if p.requires_grad]
    with LiveTensors(weights) as live:
        with SavedActivations(weights) as saved, autocast:
            batch = _uint8_batch(stage, plan, images)
            loss = stage(batch)["loss"]
        held = saved.peak_bytes
        loss.backward()
        del loss, batch
    for hook in hooks:
        hook.remove()
    with LiveTensors(weights) as forward, torch.no_grad(), autocast:
        stage.teacher(stage.images_for(stage.teacher, _uint8_batch(stage, plan, images)))
    return held, live.peak_bytes, forward.peak_bytes


def _uint8_batch(stage: Stage, plan: StagePlan, images: int) -> dict[str, Tensor]:
    """A batch as it comes to the device."""
    device = next(stage.parameters()).device
    return {"image": torch.empty(images, 3, *plan.data.view.image_size, dtype=torch.uint8, device=device)}


def _normalise(images: Tensor) -> Tensor:
    """Holds what torchvision's normalising holds, which looks at values and so cannot be run without them."""
    return images.float().sub(0.5)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def trace_loss(task: Task, prediction: Any, image_size: tuple[int, int]) -> LossMemory:
    """What a task's loss and its metrics of a batch hold, computed on the CPU on predictions of zeros.

    Args:
        task: Whose loss it is.
        prediction: Tensors (B, ...) whose shapes and dtypes are those of a prediction, in the form that the task knows.
        image_size: Height and width in pixels.
    """
    example = task.example_target(image_size)
    if example is None:
        guessed = Line(0, UNKNOWN_LOSS_COPIES * sum(4 * leaf[0].numel() for leaf in tree_leaves(prediction)))
        return LossMemory(guessed, guessed)
    held, live = {}, {}
    for images in (1, 2):
        zeros = tree_map_only(
            Tensor, lambda t, n=images: torch.zeros(n, *t.shape[1:], dtype=t.dtype, requires_grad=True), prediction
        )
        target = torch.stack([example] * images)
        existing = [*tree_leaves(zeros), target]
        with LiveTensors(existing) as tensors:
            with SavedActivations() as saved:
                loss = task.loss(zeros, target, True)
            held[images] = saved.bytes
            task.batch_metrics(zeros, target)
            loss.backward()
            del loss
        live[images] = tensors.peak_bytes - held[images]
    return LossMemory(Line.through(held), Line.through(live))
