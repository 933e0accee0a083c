"""Features of models on a run's data, and the targets beside them, as rows on disk that measures read.

Shapes: n samples, D embed dim, h x w patch grid, K classes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adala.contenders import Contender
from adala.data import ShardIndex
from adala.data.addresses import is_remote, local_path
from adala.distributed import SharedError, from_rank_0, say, world_size
from adala.evaluation import DenseFeatures, Features, FeatureStore, Field
from adala.evaluation.dense_probe import READ_AT_ONCE
from adala.evaluation.feature_store import StoredRows
from adala.evaluation.token_rows import RowCollector
from adala.files import value_digest
from adala.heads import Pooling
from adala.plan import DataPlan, EvaluationPlan, index_digest
from adala.tasks import Task, describe_task

HELD_OUT, TRAIN = "held-out", "training"


def held_out_split(name: str) -> str:
    """The split of a held-out set, by its name in the recipe; a single one has none."""
    return f"{HELD_OUT} {name}" if name else HELD_OUT


class FeatureRows:
    """Features of contenders on the held-out and on the training samples, computed once each and kept in a store."""

    def __init__(
        self,
        contenders: Mapping[str, Contender],
        data: DataPlan,
        evaluation: EvaluationPlan,
        store: FeatureStore,
        train_samples: int | None,
        autocast: torch.dtype | None,
        held_out_samples: int | None = None,
    ):
        """Identifies the data; every rank does.

        Args:
            contenders: By name.
            data: How samples become batches.
            evaluation: The samples, and their task, which knows a probe.
            store: Where features are kept.
            train_samples: So many of the training samples, the first ones; None is all.
            autocast: What models compute in.
            held_out_samples: So many of each held-out set, the first ones; None is all.
        """
        self._contenders, self._data, self._store, self._autocast = contenders, data, store, autocast
        self._task, self._is_dense = evaluation.task, evaluation.task.probe == "dense"
        held_out = {held_out_split(name): (index, held_out_samples) for name, index in evaluation.held_out_sets.items()}
        self._splits = {TRAIN: (evaluation.probe_train, train_samples), **held_out}
        self._digests = from_rank_0(self._identify_data)
        self._rows: dict[tuple[str | None, str], dict[str, StoredRows]] = {}

    def samples(self, split: str) -> tuple[ShardIndex, int | None]:
        """A split's shards, and how many of their samples count; None is all."""
        return self._splits[split]

    def collectors(self, split: str, stack: ExitStack) -> dict[str | None, RowCollector]:
        """Writers of what is not stored yet, which end with ``stack``: by contender, and under None of targets. Every
        rank calls it."""
        collectors, under_way = {}, []
        for name in (*self._contenders, None):
            key, fields = self._key(name, split), self._fields(name)
            stored = self._store.find(key, fields)
            if stored is not None:
                self._rows[name, split] = stored
            elif key not in under_way:  # two heads on one backbone have the same features
                under_way.append(key)
                writer = stack.enter_context(self._store.writing(key, fields, self._capacity(split)))
                model = None if name is None else self._contenders[name].model
                collectors[name] = RowCollector(writer, model, self._task, fields)
        if computed := [name for name in collectors if name is not None]:
            say(f"computing features of {', '.join(computed)} on {self._capacity(split)} {split} samples")
        return collectors

    def open(self, split: str) -> int:
        """Opens a split's rows on every rank, so that what is fitted on one finds them; says how many there are.

        Raises:
            SharedError: Somebody has removed them meanwhile.
        """
        for name in (*self._contenders, None):
            if (name, split) not in self._rows:
                stored = self._store.find(self._key(name, split), self._fields(name))
                if stored is None:
                    raise SharedError(f"features were removed from {self._store.folder} while models are compared")
                self._rows[name, split] = stored
        return len(self._rows[None, split]["target"])

    def pooled(self, name: str, split: str, pooling: Pooling) -> Features:
        """One vector an image, with its labels."""
        stored, labels = self._rows[name, split], self.labels(split)
        # Without a class token the mean patch stands for it.
        parts = [part for part in {"cls_patch": ["cls", "patch"]}.get(pooling, [pooling]) if part in stored]
        values = torch.cat([stored[part][:] for part in parts or ["patch"]], 1)
        return Features(values, labels.float() if self._task.probe == "multilabel" else labels)

    def labels(self, split: str) -> Tensor:
        """(n,) or (n, K)."""
        return self._rows[None, split]["target"][:]

    def dense(self, name: str, split: str) -> tuple[DenseFeatures, StoredRows]:
        """Features of all patches, with the masks."""
        stored = self._rows[name, split]
        pooled = stored["cls" if "cls" in stored else "patch"]
        return DenseFeatures(stored["patches"], pooled), self._rows[None, split]["target"]

    def masks(self, split: str) -> Iterator[Tensor]:
        """Batches (B, H, W) of masks."""
        masks = self._rows[None, split]["target"]
        return (masks[rows] for rows in torch.arange(len(masks)).split(READ_AT_ONCE))

    def _identify_data(self) -> dict[str, str]:
        return {split: _data_digest(index) for split, (index, _) in self._splits.items()}

    def _capacity(self, split: str) -> int:
        """Samples there are, if all can be read."""
        index, limit = self._splits[split]
        return index.num_samples if limit is None else len(index.first(limit))

    def _key(self, name: str | None, split: str) -> dict[str, Any]:
        index, _ = self._splits[split]
        view, target = self._data.view, _target_of(self._task)
        identity = {"weights": "none", "model": target} if name is None else self._contenders[name].identity
        names = [shard.label for shard in index.shards]
        # Samples of shards of one label have equal ids, whose order is the one in which they are read.
        is_ordered = len(set(names)) == len(names)
        return {
            **identity,
            "data": self._digests[split],
            "samples": self._capacity(split),
            # Which samples can be used depends on the target, and with it which features there are.
            "target": target,
            "image_size": list(view.image_size),
            "normalisation": [list(view.mean), list(view.std)],
            "precision": str(self._autocast or torch.float32),
            "kind": "targets" if name is None else "dense" if self._is_dense else "pooled",
            "order": None if is_ordered else [world_size(), self._data.num_workers, self._data.evaluation_batch_size],
        }

    def _fields(self, name: str | None) -> dict[str, Field]:
        view = self._data.view
        if name is None:
            return {"target": self._target_field()}
        model = self._contenders[name].model
        width, of_image = model.embed_dim, ["cls", "patch"] if model.has_class_token else ["patch"]
        if not self._is_dense:
            return {part: Field((width,), torch.float32) for part in of_image}
        sizes = zip(view.image_size, model.patch_embed.patch_size, strict=True)
        grid = tuple(size // patch for size, patch in sizes)
        return {of_image[0]: Field((width,), torch.float32), "patches": Field((*grid, width))}

    def _target_field(self) -> Field:
        if self._is_dense:
            # Masks are most of the bytes but features.
            is_small = max(self._task.num_classes - 1, self._task.mask_format.ignore_index) < 256
            return Field(self._data.view.image_size, torch.uint8 if is_small else torch.int32)
        return Field((self._task.num_classes,) if self._task.probe == "multilabel" else (), torch.int64)


def _data_digest(index: ShardIndex) -> str:
    """Of a data set as it lies there. A shard whose labels were mended may have the same name and size as before."""
    changed = [
        None if is_remote(shard.url) else Path(local_path(shard.url)).stat().st_mtime_ns for shard in index.shards
    ]
    return value_digest([index_digest(index, labelled=True), changed])


def _target_of(task: Task) -> dict[str, Any]:
    """What decides the targets of samples, and which samples have one."""
    return {key: value for key, value in describe_task(task).items() if key not in task.fields_of_head}
