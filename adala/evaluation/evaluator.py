"""Metrics over a data set, for the trainer, the final table, the evaluation command and the bench alike.

Shapes: B batch, N tokens, D embed dim.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from adala.data import View
from adala.distributed import Interrupted, all_reduce_sum, device, gather_objects, raise_together
from adala.families import Backbone
from adala.preemption import end_if_asked
from adala.similarity import comparison_metrics, comparison_sums
from adala.students import token_layout
from adala.tasks import Prediction, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Batch = Mapping[str, Any]
Outputs = Mapping[str, Tensor]


class Collector(Protocol):
    """What else wants to see the outputs that an :class:`Evaluator` sees."""

    def update(self, outputs: Outputs, batch: Batch) -> None: ...


class Evaluator:
    """Sums up outputs batch by batch (:meth:`update`), over ranks (:meth:`reduce`), and divides once (:meth:`compute`).

    Every sample counts once, however it was batched. Outputs are those of a :class:`adala.stages.Stage` in eval mode:
    scalars, which are averaged over images; ``features`` beside ``teacher_features``, which are compared;
    ``decision`` beside ``target``, which go to the task's metrics.
    """

    def __init__(self, model: Backbone, task: Task | None = None, collectors: Sequence[Collector] = ()):
        """Starts from nothing.

        Args:
            model: Whose features are compared; its prefix tokens are told apart.
            task: Whose metrics are computed where there are decisions.
            collectors: Get all outputs too.
        """
        self._num_prefix_tokens = model.num_prefix_tokens
        self._has_class_token = model.has_class_token
        self._metrics = {name: metric.to(device()) for name, metric in task.build_metrics().items()} if task else {}
        self._collectors = collectors
        self._scalars: dict[str, Tensor] = {}
        self._comparison = torch.zeros(8, dtype=torch.float64, device=device())
        self._images = 0

    @torch.no_grad()
    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Takes a batch's outputs."""
        images = len(batch["id"])
        self._images += images
        for name, value in outputs.items():
            if value.ndim == 0:
                self._scalars[name] = self._scalars.get(name, 0) + images * value.double()
        if "teacher_features" in outputs:
            features, teacher_features = outputs["features"], outputs["teacher_features"]
            self._comparison += comparison_sums(features, teacher_features, self._num_prefix_tokens)
        if "decision" in outputs:
            for metric in self._metrics.values():
                metric.update(outputs["decision"], outputs["target"])
        for collector in self._collectors:
            collector.update(outputs, batch)

    def reduce(self) -> None:
        """Adds up all ranks' sums, once; every rank calls it, also one that had no batch."""
        count = torch.tensor(float(self._images), dtype=torch.float64, device=device())
        names = sorted(set().union(*gather_objects(list(self._scalars))))
        scalars = [self._scalars.get(name, torch.zeros_like(count)) for name in names]
        total = all_reduce_sum(torch.stack([count, *self._comparison, *scalars]))
        self._images, self._comparison = int(total[0]), total[1:9]
        self._scalars = dict(zip(names, total[9:], strict=True))
        self._shape_empty_states()

    def _shape_empty_states(self) -> None:
        """Gives a rank that saw no sample states of the other ranks' shapes: torchmetrics would send those of others,
        at which the collective crashes."""
        states = {
            (name, state): (values[0].dtype, values[0].shape[1:])
            for name, metric in self._metrics.items()
            for state, values in metric.metric_state.items()
            if isinstance(values, list) and values
        }
        for of_rank in gather_objects(states):
            for (name, state), (dtype, shape) in of_rank.items():
                if (name, state) not in states:
                    setattr(self._metrics[name], state, [torch.empty((0, *shape), dtype=dtype, device=device())])

    def compute(self) -> dict[str, float]:
        """The metrics, after :meth:`reduce`; the task's reduce themselves."""
        metrics = {name: float(total) / self._images for name, total in self._scalars.items()}
        metrics |= compute_metrics(self._metrics)
        if self._comparison[1] > 0:
            compared = comparison_metrics(self._comparison, self._has_class_token)
            metrics |= {name: float(value) for name, value in compared.items()}
        return metrics

    def total(self) -> dict[str, float]:
        """:meth:`reduce`, then :meth:`compute`."""
        self.reduce()
        return self.compute()


def compute_metrics(metrics: Mapping[str, "Metric"]) -> dict[str, float]:
    """Values of a task's metrics."""
    with warnings.catch_warnings():
        # Of ranks without a sample and classes without a positive one, which tasks see to themselves.
        warnings.simplefilter("ignore", UserWarning)
        return {name: float(metric.compute()) for name, metric in metrics.items()}


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        model: Gives features (B, N, D); in eval mode.
        head: From features and their layout to the task's predictions, where there is one.
        task: Of ``head``.
        collectors: See :class:`Evaluator`.
    """

    model: Backbone
    head: nn.Module | None = None
    task: Task | None = None
    collectors: Sequence[Collector] = ()

    def outputs(
        self, batch: Batch, images: Tensor, teacher: Backbone | None, teacher_features: Tensor | None
    ) -> Outputs:
        """What an :class:`Evaluator` reads, of a batch whose images are on the device."""
        # Comparing the teacher with itself need not run it twice.
        features = teacher_features if self.model is teacher else self.model(images)
        outputs = {"features": features}
        # Another backbone may have features of another shape.
        if teacher_features is not None and features.shape == teacher_features.shape:
            outputs["teacher_features"] = teacher_features
        if self.head is not None:
            decision = self.task.decision(
                self.head(features, token_layout(self.model, images)), tuple(images.shape[-2:])
            )
            outputs |= {"decision": decision, "target": self.task.target(batch, images.device)}
        return outputs

    def predict(self, images: Tensor) -> Prediction:
        """The head's prediction for images (B, 3, H, W)."""
        return self.head(self.model(images), token_layout(self.model, images))


@contextmanager
def raising_together() -> Iterator[None]:
    """What one rank raises within, all raise at the end: none waits for a rank that is gone, nor takes what that one
    has to say for an answer. Every rank enters it, and there is no collective within.

    Raises:
        ValueError: See above; also for an OSError.
        Interrupted: See above.
    """
    error = None
    try:
        yield
    except (ValueError, OSError, Interrupted) as raised:
        error = raised
    raise_together(error)


def precision(autocast: torch.dtype | None) -> torch.autocast:
    """A context in which models compute in ``autocast``, or as their weights are."""
    return torch.autocast(device().type, autocast, enabled=autocast is not None)


@torch.no_grad()
def evaluate_all(
    candidates: Mapping[str, Candidate],
    teacher: Backbone | None,
    batches: Iterable[Batch],
    autocast: torch.dtype | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of models over every sample that the ranks' ``batches`` hold, by name; the same on every rank.

    The data are read once, and the teacher runs once, for all of them.

    Args:
        candidates: By name.
        teacher: What they are compared with; None compares them with nothing.
        batches: This rank's part of the data.
        autocast: See :func:`precision`.

    Raises:
        ValueError: What reading the data or a collector raised on one rank; every rank raises.
    """
    evaluators = {
        name: Evaluator(one.model, one.task if one.head is not None else None, one.collectors)
        for name, one in candidates.items()
    }
    with raising_together():
        for batch in batches:
            end_if_asked("while models were scored")
            images = batch["image"].to(device())
            with precision(autocast):
                teacher_features = None if teacher is None else teacher(images)
            for name, candidate in candidates.items():
                with precision(autocast):
                    outputs = candidate.outputs(batch, images, teacher, teacher_features)
                evaluators[name].update(outputs, batch)
    return {name: evaluator.total() for name, evaluator in evaluators.items()}


@torch.no_grad()
def evaluate_apart(
    candidates: Mapping[str, Candidate], batches: Iterable[Batch], view: View, autocast: torch.dtype | None = None
) -> dict[str, dict[str, float]]:
    """The task's metrics of models with heads over samples of any size (see :meth:`adala.tasks.Task.predict`), by name.

    Args:
        candidates: By name; with heads.
        batches: This rank's part of the data.
        view: What the models have been trained to see.
        autocast: See :func:`precision`.

    Raises:
        ValueError: What reading the data raised on one rank; every rank raises.
    """
    evaluators = {name: Evaluator(one.model, one.task) for name, one in candidates.items()}
    with raising_together():
        for batch in batches:
            end_if_asked("while models were scored")
            images = batch["image"].to(device())
            for name, candidate in candidates.items():
                target = candidate.task.target(batch, device())
                with precision(autocast):
                    decision = candidate.task.predict(candidate.predict, images, tuple(target.shape[-2:]), view)
                evaluators[name].update({"decision": decision, "target": target}, batch)
    return {name: evaluator.total() for name, evaluator in evaluators.items()}
