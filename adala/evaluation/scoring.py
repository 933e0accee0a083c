"""One protocol for teacher and students: cosine to the teacher, and a score by a linear probe or the own head."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from timm.models.vision_transformer import VisionTransformer

from adala.data import EvaluationLoader
from adala.evaluation.evaluator import Candidate, evaluate_all
from adala.evaluation.features import FeatureCollector, Features, collect_features
from adala.evaluation.linear_probe import linear_probe_top1
from adala.heads import Pooling

# What a linear probe sees: the class token beside the mean of the patches.
PROBE_POOLING: Pooling = "cls_patch"


@dataclass(frozen=True)
class Score:
    """One model's scores on the held-out split.

    Attributes:
        value: In percent: by a linear probe on frozen features, or by the model's own head. None without labels, or
            where all are the same.
        metrics: Against the teacher, and the head's; see :func:`adala.evaluation.evaluate_all`.
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

    def scores(self, candidates: Mapping[str, Candidate]) -> dict[str, Score]:
        """Of models by name, each in one pass over the data; every rank calls it.

        A candidate with a head is scored by that, another by a linear probe on its frozen features.
        """
        probed = {name: one.model for name, one in candidates.items() if one.head is None and self.probe_train}
        collectors = {name: FeatureCollector(model, PROBE_POOLING) for name, model in probed.items()}
        seen = {name: replace(candidates[name], collectors=[collector]) for name, collector in collectors.items()}
        metrics = evaluate_all({**candidates, **seen}, self.teacher, self.held_out)
        fitted_on = collect_features(probed, self.probe_train, PROBE_POOLING) if probed else {}
        scores = {name: Score(self._own(one, metrics[name]), metrics[name]) for name, one in candidates.items()}
        for name, collector in collectors.items():
            scores[name] = Score(self._probed(fitted_on[name], collector.gathered()), metrics[name])
        return scores

    def _own(self, candidate: Candidate, metrics: dict[str, float]) -> float | None:
        return None if candidate.head is None else metrics[candidate.task.score]

    def _probed(self, fitted_on: Features, scored_on: Features) -> float | None:
        # Of one class alone every model knows everything.
        if min(len(fitted_on.labels.unique()), len(scored_on.labels.unique())) < 2:
            return None
        return linear_probe_top1(fitted_on, scored_on, l2=self.probe_l2)

    def score(self, candidate: Candidate) -> Score:
        """:meth:`scores` of one model."""
        return self.scores({"": candidate})[""]
