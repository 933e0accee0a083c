"""Which blocks of an aligned student get softmax attention back: greedily, by what that does to the final features.

A hybrid is a mapping from block numbers to what these blocks have in place of the student's own attention; all other
blocks are the student's. Whatever may be there has been aligned before (softmax need not be), so that every hybrid is
measured as it is, without training: Stage 1 aligns each block by itself, on the teacher's input.

Shapes: B batch, N tokens, D embed dim, L blocks.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adala.budget import SOFTMAX, HybridMacs
from adala.distributed import gather_objects, rank, world_size
from adala.evaluation import raising_together
from adala.families import Backbone
from adala.macs import count_macs
from adala.preemption import end_if_asked
from adala.similarity import comparison_metrics, comparison_sums
from adala.students import LinearizedModel, linearized_blocks, softmax_attention

# What hybrids are compared by, as far as DIGITS go: the order of sums on other machines does not reach them.
ERROR, DIGITS = "relative_error", 6

Hybrid = Mapping[int, str]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Option:
    """What the attention of a block may become."""

    block: int
    mechanism: str = SOFTMAX


@dataclass(frozen=True)
class Step:
    """One choice among the hybrids that differ from the one before by a block.

    Attributes:
        block: The block that is chosen.
        mechanism: What it gets.
        metrics: Of the hybrid with it, see :func:`adala.similarity.comparison_metrics`.
        candidates: What was to choose from, in order: ``block``, ``mechanism``, and the metrics of that hybrid.
    """

    block: int
    mechanism: str
    metrics: Metrics
    candidates: list[dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """The blocks of a student in the order in which they are chosen.

    Attributes:
        images: How many images hybrids were measured on.
        image_size: Height and width of these images in pixels.
        before: Metrics of the student itself.
        steps: See :class:`Step`.
    """

    images: int
    image_size: list[int]
    before: Metrics
    steps: list[Step] = field(default_factory=list)

    def hybrid(self, count: int) -> dict[int, str]:
        """The hybrid of the first ``count`` choices."""
        return {step.block: step.mechanism for step in self.steps[:count]}

    @property
    def blocks(self) -> list[int]:
        """All blocks that were chosen, by number."""
        return sorted(step.block for step in self.steps)

    def __str__(self) -> str:
        reached = [("none", self.before), *((f"{step.block}", step.metrics) for step in self.steps)]
        said = ", ".join(f"{block} {metrics[ERROR]:.4f}" for block, metrics in reached)
        return f"{ERROR} on {self.images} images, by block added: {said}"


def choose_greedily(
    options: Sequence[Option],
    count: int,
    measure: Callable[[Hybrid, Sequence[Option]], Sequence[Metrics]],
    chosen: Sequence[Step] = (),
) -> Iterator[Step]:
    """Adds, ``count`` times in all, the option to the hybrid whose error is then the smallest.

    Args:
        options: What blocks may become, of which the first wins where errors are equal.
        count: How many blocks.
        measure: Metrics of a hybrid with each of some options, in order.
        chosen: Steps that were made before, which count.
    """
    hybrid = {step.block: step.mechanism for step in chosen}
    for _ in range(count - len(hybrid)):
        left = [option for option in options if option.block not in hybrid]
        found = measure(hybrid, left)
        best = min(range(len(left)), key=lambda place: found[place][ERROR])
        candidates = [
            {"block": option.block, "mechanism": option.mechanism, **metrics}
            for option, metrics in zip(left, found, strict=True)
        ]
        yield Step(left[best].block, left[best].mechanism, found[best], candidates)
        hybrid[left[best].block] = left[best].mechanism


class HybridMeter:
    """Measures the hybrids of one student on the same images, on all ranks.

    Batches are dealt to ranks in turn and their sums added in the order of the batches: however many ranks there are,
    the same numbers are added in the same order. What is held of a rank's images for good, on the CPU, is the images
    and the teacher's features of them, computed once; on the device it is one batch with its stream before each block,
    L x (B, N, D).
    """

    def __init__(
        self,
        student: LinearizedModel,
        teacher: Backbone,
        batches: Iterable[Tensor],
        alternatives: Mapping[str, LinearizedModel] | None = None,
    ):
        """Runs the teacher; every rank calls it.

        Args:
            student: All its blocks linearized and aligned. While hybrids are measured its attention is exchanged; it is
                left as it is, in eval mode.
            teacher: On the same device.
            batches: Images (B, 3, height, width), normalised: all of them, on every rank.
            alternatives: What else than softmax a block's attention may become, by name: other students of the teacher,
                aligned as well. None is nothing else.

        Raises:
            ValueError: A student whose blocks are not all linearized, no images, or what reading them raised on one
                rank; every rank raises.
        """
        kept = sorted(set(range(len(student.blocks))) - set(linearized_blocks(student)))
        if kept:
            raise ValueError(
                f"block {kept[0]} of the student has softmax attention already: a search begins with a student all of "
                "whose blocks are linearized"
            )
        self._student, self._teacher = student.eval(), teacher.eval()
        self._attentions = _attentions(teacher, alternatives or {})
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self.images, self.image_size = 0, [0, 0]
        with raising_together():
            self._hold(batches)

    @torch.no_grad()
    def _hold(self, batches: Iterable[Tensor]) -> None:
        for number, images in enumerate(batches):
            self.images, self.image_size = self.images + len(images), list(images.shape[-2:])
            if number % world_size() == rank():
                end_if_asked("while a search held its images")
                self._held[number] = (images.cpu(), self._teacher(self._on_device(images)).cpu())
        if not self.images:
            raise ValueError("there is no image to measure hybrids on: name training shards, or give images")

    def _on_device(self, values: Tensor) -> Tensor:
        weight = self._student.patch_embed.proj.weight
        return values.to(weight.device, weight.dtype)

    @property
    def options(self) -> list[Option]:
        """All that blocks may become, by block and then softmax first."""
        return [Option(block, name) for block in range(len(self._student.blocks)) for name in self._attentions]

    def measure_one(self, hybrid: Hybrid) -> Metrics:
        """Metrics of a hybrid; every rank calls it."""
        (metrics,) = self._over_batches(hybrid, lambda images, theirs: self._sums(self._student(images), theirs)[None])
        return metrics

    def measure(self, hybrid: Hybrid, options: Sequence[Option]) -> list[Metrics]:
        """Metrics of a hybrid with each of ``options`` added, in order; every rank calls it.

        What lies below the block that an option changes is the hybrid's own for all of them, and computed once.
        """

        def of_batch(images: Tensor, theirs: Tensor) -> Tensor:
            streams = self._streams(images)
            return torch.stack([self._with(option, streams[option.block], images, theirs) for option in options])

        return self._over_batches(hybrid, of_batch)

    def _over_batches(self, hybrid: Hybrid, sums_of: Callable[[Tensor, Tensor], Tensor]) -> list[Metrics]:
        """From the sums (hybrids, 8) of single batches to the metrics of each hybrid on all of them."""
        found: dict[int, Tensor] = {}
        with raising_together(), torch.no_grad(), self._exchanged(hybrid):
            for number, held in self._held.items():
                end_if_asked("while hybrids were measured")
                found[number] = sums_of(*map(self._on_device, held)).cpu()
        by_number = {number: sums for of_rank in gather_objects(found) for number, sums in of_rank.items()}
        total = torch.stack([by_number[number] for number in sorted(by_number)]).sum(0)
        return [self._rounded(row) for row in total]

    def _rounded(self, sums: Tensor) -> Metrics:
        metrics = comparison_metrics(sums, self._teacher.has_class_token)
        return {name: float(f"{float(value):.{DIGITS}g}") for name, value in metrics.items()}

    def _sums(self, features: Tensor, theirs: Tensor) -> Tensor:
        return comparison_sums(features, theirs, self._teacher.num_prefix_tokens)

    def _streams(self, images: Tensor) -> list[Tensor]:
        """What comes into each block, (B, N, D)."""
        streams: list[Tensor] = []

        def see(block: nn.Module, arguments: tuple[Any, ...]) -> None:
            streams.append(arguments[0])

        with ExitStack() as handles:
            for block in self._student.blocks:
                handles.callback(block.register_forward_pre_hook(see).remove)
            self._student(images)
        return streams

    def _with(self, option: Option, stream: Tensor, images: Tensor, theirs: Tensor) -> Tensor:
        with self._exchanged({option.block: option.mechanism}), _entered_at(self._student, option.block, stream):
            return self._sums(self._student(images), theirs)

    @contextmanager
    def _exchanged(self, hybrid: Hybrid) -> Iterator[None]:
        """A context in which blocks of the student have the attention of ``hybrid``."""
        blocks = self._student.blocks
        own = {number: blocks[number].attn for number in hybrid}
        try:
            for number, name in hybrid.items():
                blocks[number].attn = self._attentions[name][number]
            yield
        finally:
            for number, attention in own.items():
                blocks[number].attn = attention


@contextmanager
def _entered_at(model: nn.Module, number: int, stream: Tensor) -> Iterator[None]:
    """A context in which ``model(images)`` takes ``stream`` (B, N, D) for what comes into a block, and passes by the
    blocks before it.

    What surrounds the blocks, and what a block is told beside the stream, stays the model's own, whatever its family.
    """
    passed = list(model.blocks)[:number]
    for block in passed:
        block.forward = lambda x, *arguments, **named: x
    handle = model.blocks[number].register_forward_pre_hook(lambda block, arguments: (stream, *arguments[1:]))
    try:
        yield
    finally:
        handle.remove()
        for block in passed:
            del block.forward


def _attentions(teacher: Backbone, alternatives: Mapping[str, LinearizedModel]) -> dict[str, list[nn.Module]]:
    """What each block's attention may become, by mechanism."""
    softmax = [softmax_attention(teacher, number).eval() for number in range(len(teacher.blocks))]
    others = {name: [block.attn.eval() for block in model.blocks] for name, model in alternatives.items()}
    return {SOFTMAX: softmax, **others}


def count_hybrid_macs(
    student: LinearizedModel,
    teacher: Backbone,
    image_size: Sequence[int],
    alternatives: Mapping[str, LinearizedModel] | None = None,
) -> HybridMacs:
    """Multiply-accumulates of a teacher, its student and all hybrids at an image size.

    Args:
        student: All its blocks linearized.
        teacher: Its softmax counterpart.
        image_size: Height and width in pixels.
        alternatives: See :class:`HybridMeter`.
    """
    teacher, student = (copy.deepcopy(model).to("meta").eval() for model in (teacher, student))
    of_student, added = count_macs(student, image_size), {}
    for name, attentions in _attentions(teacher, alternatives or {}).items():
        added[name] = []
        for block, other in zip(student.blocks, attentions, strict=True):
            own, block.attn = block.attn, copy.deepcopy(other).to("meta")
            added[name].append(count_macs(student, image_size) - of_student)
            block.attn = own
    return HybridMacs(tuple(image_size), count_macs(teacher, image_size), of_student, added)
