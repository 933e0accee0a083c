"""One protocol for teacher and students: cosine to the teacher, and a score by a probe or the own head."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import VisionTransformer

from adala.data import EvaluationLoader, View
from adala.distributed import from_rank_0
from adala.evaluation.evaluator import Candidate, evaluate_all, evaluate_apart
from adala.evaluation.features import FeatureCollector, Features, collect_features
from adala.evaluation.linear_probe import linear_probe_top1
from adala.heads import Pooling
from adala.tasks import Task

# What a linear probe sees: the class token beside the mean of the patches.
PROBE_POOLING: Pooling = "cls_patch"


@dataclass(frozen=True)
class Score:
    """One model's scores on the held-out split.

    Attributes:
        value: By the task's metric, of a probe on frozen features or of the model's own head. None without targets,
            where all are the same, or where the task knows no probe.
        metrics: Against the teacher, and the head's; see :func:`adala.evaluation.evaluate_all`.
    """

    value: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Scorer:
    """Scores models on the same held-out samples against the same teacher.

    Attributes:
        teacher: What every model is compared with.
        task: What the samples' targets are; None without.
        held_out: This rank's part of the held-out samples.
        probe_train: This rank's part of the samples that a probe is fitted on; None where there is none.
        probe_l2: Penalty of the linear probe.
        apart: This rank's part of the held-out samples as heads are finally scored, where that is not as in
            ``held_out``; see :meth:`adala.tasks.Task.prepare_scoring`.
        view: What the models have been trained to see.
        autocast: What models compute in, see :func:`adala.evaluation.precision`.
    """

    teacher: VisionTransformer
    task: Task | None
    held_out: EvaluationLoader
    probe_train: EvaluationLoader | None
    probe_l2: float = 1e-3
    apart: EvaluationLoader | None = None
    view: View | None = None
    autocast: torch.dtype | None = None

    def scores(self, candidates: Mapping[str, Candidate]) -> dict[str, Score]:
        """Of models by name, all in one pass over the data; every rank calls it.

        A candidate with a head is scored by that, another by a probe on its frozen features.
        """
        probed = {name: one.model for name, one in candidates.items() if one.head is None and self.probe_train}
        collectors = {name: FeatureCollector(model, PROBE_POOLING, self.task) for name, model in probed.items()}
        seen = {name: replace(candidates[name], collectors=[collector]) for name, collector in collectors.items()}
        metrics = evaluate_all({**candidates, **seen}, self.teacher, self.held_out, self.autocast)
        headed = {name: one for name, one in candidates.items() if one.head is not None}
        if self.apart is not None and headed:
            for name, found in evaluate_apart(headed, self.apart, self.view, self.autocast).items():
                metrics[name] |= found
        values = {name: metrics[name][one.task.score] for name, one in headed.items()}
        if probed:
            fitted_on = collect_features(probed, self.probe_train, PROBE_POOLING, self.task, self.autocast)
            values |= {name: self._probed(fitted_on[name], collectors[name].gathered()) for name in probed}
        return {name: Score(values.get(name), metrics[name]) for name in candidates}

    def _probed(self, fitted_on: Features, scored_on: Features) -> float | None:
        # Of one class alone every model knows everything.
        if min(len(fitted_on.labels.unique()), len(scored_on.labels.unique())) < 2:
            return None
        # Once: on every rank it would cost as much each time, and round differently on machines that differ.
        return from_rank_0(lambda: linear_probe_top1(fitted_on, scored_on, l2=self.probe_l2))

    def score(self, candidate: Candidate) -> Score:
        """:meth:`scores` of one model."""
        return self.scores({"": candidate})[""]
