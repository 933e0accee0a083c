"""How models are scored: metrics over a data set against the teacher, and probes on frozen features."""

from adala.evaluation.evaluator import Collector, Evaluator, evaluate
from adala.evaluation.features import FeatureCollector, Features, collect_features
from adala.evaluation.linear_probe import fit_probe, linear_probe_top1
from adala.evaluation.scoring import Score, Scorer

__all__ = [
    "Collector",
    "Evaluator",
    "FeatureCollector",
    "Features",
    "Score",
    "Scorer",
    "collect_features",
    "evaluate",
    "fit_probe",
    "linear_probe_top1",
]
