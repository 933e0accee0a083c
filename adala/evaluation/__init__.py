"""How models are scored: metrics over a data set or block by block, probes and neighbours on frozen features, speed."""

from adala.evaluation.block_errors import BlockErrors, BlockReport, measure_block_errors
from adala.evaluation.dense_probe import (
    DenseFeatures,
    DenseHead,
    DenseSettings,
    colour_table_confusion,
    confusion_matrix,
    dense_confusion,
    fit_dense_probe,
    majority_confusion,
    mean_iou,
)
from adala.evaluation.evaluator import (
    Candidate,
    Collector,
    Evaluator,
    evaluate_all,
    evaluate_apart,
    precision,
    raising_together,
)
from adala.evaluation.feature_store import FeatureStore, Field, RowWriter, StoredRows
from adala.evaluation.features import FeatureCollector, Features, collect_features
from adala.evaluation.knn import knn_top1
from adala.evaluation.linear_probe import (
    LbfgsSettings,
    ProbeResult,
    SgdSettings,
    fit_probe,
    probe,
)
from adala.evaluation.speed import Speed, measure_speed

__all__ = [
    "BlockErrors",
    "BlockReport",
    "Candidate",
    "Collector",
    "DenseFeatures",
    "DenseHead",
    "DenseSettings",
    "Evaluator",
    "FeatureCollector",
    "FeatureStore",
    "Features",
    "Field",
    "LbfgsSettings",
    "ProbeResult",
    "RowWriter",
    "SgdSettings",
    "Speed",
    "StoredRows",
    "collect_features",
    "colour_table_confusion",
    "confusion_matrix",
    "dense_confusion",
    "evaluate_all",
    "evaluate_apart",
    "fit_dense_probe",
    "fit_probe",
    "knn_top1",
    "majority_confusion",
    "mean_iou",
    "measure_block_errors",
    "measure_speed",
    "precision",
    "probe",
    "raising_together",
]
