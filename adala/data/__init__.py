"""Shards to samples to batches: the order of the stream, its split over ranks and workers, and its state.

Names are imported on first use, so that ``python -m adala.data.index`` runs as the one copy of its module.
"""

import importlib
from typing import Any

_HOMES = {
    "EvaluationLoader": "loader",
    "Mixture": "mixture",
    "Preparation": "preparation",
    "Shard": "index",
    "ShardIndex": "index",
    "StreamPhase": "order",
    "StreamState": "order",
    "TrainLoader": "loader",
    "View": "preparation",
    "build_eval_transform": "transforms",
    "build_index": "index",
    "build_train_transform": "transforms",
    "load_index": "index",
    "mix": "index",
    "prepare_images": "preparation",
    "write_embedded": "pack",
    "write_shards": "pack",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
