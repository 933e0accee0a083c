"""How models are scored: metrics against the teacher over a data set or block by block, probes on frozen features."""

from adala.evaluation.block_errors import BlockErrors, BlockReport, measure_block_errors
from adala.evaluation.evaluator import Candidate, Collector, Evaluator, evaluate, evaluate_all
from adala.evaluation.features import FeatureCollector, Features, collect_features
from adala.evaluation.knn import knn_top1
from adala.evaluation.linear_probe import (
    LbfgsSettings,
    ProbeResult,
    SgdSettings,
    fit_probe,
    linear_probe_top1,
    probe,
)
from adala.evaluation.scoring import Score, Scorer

__all__ = [
    "BlockErrors",
    "BlockReport",
    "Candidate",
    "Collector",
    "Evaluator",
    "FeatureCollector",
    "Features",
    "LbfgsSettings",
    "ProbeResult",
    "Score",
    "Scorer",
    "SgdSettings",
    "collect_features",
    "evaluate",
    "evaluate_all",
    "fit_probe",
    "knn_top1",
    "linear_probe_top1",
    "measure_block_errors",
    "probe",
]
