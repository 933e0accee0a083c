"""One protocol for teacher and students: cosine to the teacher, and a score by a linear probe or the own head."""

from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adala.data import EvaluationLoader
from adala.evaluation.evaluator import evaluate
from adala.evaluation.features import FeatureCollector, collect_features
from adala.evaluation.linear_probe import linear_probe_top1
from adala.heads import Pooling
from adala.tasks import Task

# What a linear probe sees: the class token beside the mean of the patches.
PROBE_POOLING: Pooling = "cls_patch"


@dataclass(frozen=True)
class Score:
    """One model's scores on the held-out split.

    Attributes:
        value: In percent: by a linear probe on frozen features, or by the model's own head. None without labels, or
            where all are the same.
        metrics: Against the teacher, and the head's; see :func:`adala.evaluation.evaluate`.
    """

    value: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Scorer:
    """Scores models on the same held-out samples against the same teacher.

    Attributes:
        teacher: What every model is compared with.
        held_out: This rank's part of the held-out samples.
        probe_train: This rank's part of the samples that a linear probe is fitted on; None without labels.
        probe_l2: Penalty of the probe.
    """

    teacher: VisionTransformer
    held_out: EvaluationLoader
    probe_train: EvaluationLoader | None
    probe_l2: float

    def frozen(self, model: VisionTransformer) -> Score:
        """By a linear probe on frozen features, in one pass over the held-out samples; every rank calls it."""
        if self.probe_train is None:
            return Score(None, evaluate(model, self.teacher, self.held_out))
        collector = FeatureCollector(model, PROBE_POOLING)
        metrics = evaluate(model, self.teacher, self.held_out, collectors=[collector])
        fitted_on, scored_on = collect_features(model, self.probe_train, PROBE_POOLING), collector.gathered()
        # Of one class alone every model knows everything.
        if min(len(fitted_on.labels.unique()), len(scored_on.labels.unique())) < 2:
            return Score(None, metrics)
        return Score(linear_probe_top1(fitted_on, scored_on, l2=self.probe_l2), metrics)

    def tuned(self, model: VisionTransformer, head: nn.Module, task: Task) -> Score:
        """By the model's own head; every rank calls it."""
        metrics = evaluate(model, self.teacher, self.held_out, head, task)
        return Score(metrics[task.score], metrics)
