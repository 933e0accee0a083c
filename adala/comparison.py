"""Models compared under one protocol, on the same data: the trainer's final table, and the evaluation command.

Features are computed once a model, kept in a store, and read by every measure that wants them. What is fitted on them
is fitted on rank 0 alone, so that it is the same on any number of ranks.

Shapes: B batch, N tokens, D embed dim, h x w patch grid, K classes.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from adala.build import build_evaluation_loader
from adala.contenders import Contender
from adala.data import ShardIndex
from adala.distributed import device, from_rank_0, gather_objects
from adala.evaluation import (
    BlockReport,
    Candidate,
    DenseFeatures,
    DenseHead,
    DenseSettings,
    Features,
    FeatureStore,
    Field,
    LbfgsSettings,
    SgdSettings,
    colour_table_confusion,
    dense_confusion,
    evaluate_all,
    evaluate_apart,
    fit_dense_probe,
    knn_top1,
    majority_confusion,
    mean_iou,
    measure_block_errors,
    precision,
    probe,
)
from adala.evaluation.feature_store import StoredRows
from adala.evaluation.speed import measure_speed
from adala.evaluation.token_rows import FrozenHead, InPrecision, RowCollector
from adala.heads import Pooling
from adala.plan import DataPlan, EvaluationPlan, index_digest
from adala.protocol import Protocol
from adala.tasks import describe_task

Measures = dict[str, float | None]
HELD_OUT, TRAIN = "held-out", "train"


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        measures: By contender, and by baseline without a model.
        notes: By the same names, what was left out and why.
        heads: Frozen heads that were fitted on patch features, by contender, on every rank.
        blocks: Errors by block.
        details: What is no single number.
        samples: How many there were, by split; the same for all models.
        unusable: Held-out samples that could not be read, and are left out of all rows alike.
    """

    measures: dict[str, Measures]
    notes: dict[str, list[str]] = field(default_factory=dict)
    heads: dict[str, FrozenHead] = field(default_factory=dict)
    blocks: BlockReport | None = None
    details: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    unusable: int = 0


class Comparer:
    """Compares contenders, of which the first is the teacher, on a run's data."""

    def __init__(
        self,
        contenders: Mapping[str, Contender],
        data: DataPlan,
        evaluation: EvaluationPlan,
        protocol: Protocol,
        store: FeatureStore,
    ):
        """Prepares; every rank does.

        Args:
            contenders: By name, the teacher first.
            data: How samples become batches.
            evaluation: The samples and their task.
            protocol: What is measured.
            store: Where features are kept.
        """
        self.contenders, self.data, self.protocol, self.store = contenders, data, protocol, store
        self.task, self.held_out, self.train = evaluation.task, evaluation.held_out, evaluation.probe_train
        self.teacher = next(iter(contenders.values())).model
        self.autocast = autocast_of(protocol)
        kind = self.task.probe if self.task and self.train else None
        wants = set(protocol.measures)
        self.is_dense = kind == "dense" and "segmentation" in wants
        self.is_pooled = kind in ("linear", "multilabel") and bool(wants & {"probe", "knn"})
        section = protocol.segmentation if self.is_dense else protocol.probe
        self.limits = {TRAIN: section.train_samples, HELD_OUT: None}
        self._rows: dict[tuple[str | None, str], dict[str, StoredRows]] = {}
        self.result = Comparison({name: {} for name in contenders}, {name: [] for name in contenders})

    def compare(self) -> Comparison:
        """Every measure that the protocol asks for and data and models allow; every rank calls it and gets the same.

        Raises:
            ValueError: Data or features that cannot be used; every rank raises.
        """
        self._pass_held_out()
        if self.is_pooled or self.is_dense:
            self._pass_train()
            self._open_rows()
        if self.is_pooled:
            self._fit_pooled()
        if self.is_dense:
            self._fit_dense()
        if "blocks" in self.protocol.measures:
            self._compare_blocks()
        if "speed" in self.protocol.measures:
            self._time()
        return self.result

    # Passes over the data.

    def _pass_held_out(self) -> None:
        loader = build_evaluation_loader(self.data, self.held_out, task=self.task)
        wants_heads = "head" in self.protocol.measures and self.task is not None
        first = next(iter(self.contenders))
        with ExitStack() as stack:
            collectors = self._collectors(HELD_OUT, stack)
            candidates = {
                # Targets are gathered beside the first model, the teacher.
                name: Candidate(
                    one.model,
                    one.head if wants_heads else None,
                    one.task,
                    [collectors[key] for key in ([name, None] if name == first else [name]) if key in collectors],
                )
                for name, one in self.contenders.items()
            }
            found = evaluate_all(candidates, self.teacher, loader, self.autocast)
        self.result.unusable = sum(gather_objects(sum(loader.bad_samples.values())))
        headed = {name: one for name, one in candidates.items() if one.head is not None}
        self._score_apart(headed, found)
        for name, metrics in found.items():
            is_headed = name in headed
            for key, value in metrics.items():
                of_features = key.endswith(("cosine", "relative_error"))
                if of_features and "features" in self.protocol.measures:
                    self.result.measures[name][key] = value
                elif is_headed and not of_features:
                    self.result.measures[name][f"head_{key}"] = value

    def _score_apart(self, headed: dict[str, Candidate], found: dict[str, dict[str, float]]) -> None:
        """Scores heads on samples as they are finally scored, where that is another view."""
        preparation = self.task.prepare_scoring(self.data.view) if headed else None
        if preparation is None:
            return
        loader = build_evaluation_loader(self.data, self.held_out, task=self.task, preparation=preparation)
        for name, metrics in evaluate_apart(headed, loader, self.data.view, self.autocast).items():
            found[name] = {key: value for key, value in found[name].items() if key.endswith(("cosine", "error"))}
            found[name] |= metrics

    @torch.no_grad()
    def _pass_train(self) -> None:
        with ExitStack() as stack:
            collectors = self._collectors(TRAIN, stack)
            if not collectors:
                return
            for batch in build_evaluation_loader(self.data, self.train, self.limits[TRAIN], self.task):
                images = batch["image"].to(device())
                for name, collector in collectors.items():
                    with precision(self.autocast):
                        features = None if name is None else self.contenders[name].model(images)
                    collector.update({"features": features}, batch)

    # Features on disk.

    def _collectors(self, split: str, stack: ExitStack) -> dict[str | None, RowCollector]:
        """Of what is not stored yet: by contender, and under None of targets."""
        if not (self.is_pooled or self.is_dense):
            return {}
        index, limit = self._samples(split)
        capacity = min(index.num_samples, index.num_samples if limit is None else limit)
        collectors = {}
        for name in (*self.contenders, None):
            key, fields = self._key(name, split), self._fields(name)
            if self.store.find(key, fields) is None:
                writer = stack.enter_context(self.store.writing(key, fields, capacity))
                model = None if name is None else self.contenders[name].model
                collectors[name] = RowCollector(writer, model, self.task, fields)
        return collectors

    def _samples(self, split: str) -> tuple[ShardIndex, int | None]:
        return (self.train if split == TRAIN else self.held_out), self.limits[split]

    def _key(self, name: str | None, split: str) -> dict[str, Any]:
        index, limit = self._samples(split)
        view = self.data.view
        identity = {"weights": "none", "model": describe_task(self.task)}
        return {
            # Which samples can be used depends on the task, and with it which features there are.
            **(identity if name is None else self.contenders[name].identity),
            "data": index_digest(index, labelled=True),
            "limit": limit,
            "task": identity["model"],
            "image_size": list(view.image_size),
            "normalisation": [list(view.mean), list(view.std)],
            "precision": str(self.autocast or torch.float32),
            "kind": "targets" if name is None else "dense" if self.is_dense else "pooled",
        }

    def _fields(self, name: str | None) -> dict[str, Field]:
        view = self.data.view
        if name is None:
            return {"target": self._target_field()}
        model = self.contenders[name].model
        width = model.embed_dim
        fields = {"cls": Field((width,), torch.float32), "patch": Field((width,), torch.float32)}
        if self.is_dense:
            grid = tuple(
                size // patch for size, patch in zip(view.image_size, model.patch_embed.patch_size, strict=True)
            )
            fields["patches"] = Field((*grid, width))
        return fields

    def _target_field(self) -> Field:
        if self.is_dense:
            # Masks are most of the bytes but features.
            is_small = max(self.task.num_classes - 1, self.task.mask_format.ignore_index) < 256
            return Field(self.data.view.image_size, torch.uint8 if is_small else torch.int32)
        return Field((self.task.num_classes,) if self.task.probe == "multilabel" else (), torch.int64)

    def _open_rows(self) -> None:
        """On every rank: what is fitted on one finds them open."""
        for split in (TRAIN, HELD_OUT):
            for name in (*self.contenders, None):
                self._rows[name, split] = self.store.find(self._key(name, split), self._fields(name))
            self.result.samples[split] = len(self._rows[None, split]["target"])

    def _features(self, name: str, split: str, pooling: Pooling) -> Features:
        stored, target = self._rows[name, split], self._rows[None, split]["target"][:]
        has_class_token = self.contenders[name].model.has_class_token
        parts = {"cls": ["cls"], "patch": ["patch"], "cls_patch": ["cls", "patch"] if has_class_token else ["patch"]}
        values = torch.cat([stored[part][:] for part in parts[pooling]], 1)
        return Features(values, target.float() if self.task.probe == "multilabel" else target)

    # Measures.

    def _fit_pooled(self) -> None:
        labels = [self._rows[None, split]["target"][:] for split in (TRAIN, HELD_OUT)]
        if self.task.probe == "linear" and min(len(found.unique()) for found in labels) < 2:
            # Of one class alone every model knows everything.
            for notes in self.result.notes.values():
                notes.append("all labels are the same: models are compared by their features alone")
            return
        for name in self.contenders:
            if "knn" in self.protocol.measures and self.task.probe == "linear":
                found = from_rank_0(partial(self._knn, name))
                self.result.measures[name] |= {f"knn{k}_top1": value for k, value in found.items()}
            if "probe" in self.protocol.measures:
                self.result.measures[name] |= from_rank_0(partial(self._probe, name))

    def _knn(self, name: str) -> dict[int, float]:
        knn = self.protocol.knn
        train, held_out = (self._features(name, split, knn.pooling) for split in (TRAIN, HELD_OUT))
        return knn_top1(train, held_out, knn.k, knn.temperature)

    def _probe(self, name: str) -> Measures:
        settings = self.protocol.probe
        train, held_out = (self._features(name, split, settings.pooling) for split in (TRAIN, HELD_OUT))
        found = probe(train, held_out, _probe_settings(self.protocol))
        if self.task.probe == "linear":
            return (
                {"probe_top1": found.top1, "probe_top5": found.top5}
                if train.labels.max() >= 5
                else {"probe_top1": found.top1}
            )
        metrics = self.task.build_metrics()
        for metric in metrics.values():
            metric.sync_on_compute = False
            metric.update(self.task.decision(found.logits, self.data.view.image_size), held_out.labels)
        return {f"probe_{key}": float(metric.compute()) for key, metric in metrics.items()}

    def _fit_dense(self) -> None:
        """Frozen linear heads, and the two baselines that a segmentation has to beat."""
        for name in self.contenders:
            head = from_rank_0(partial(self._fit_dense_head, name))
            self.result.heads[name] = FrozenHead(head, self.contenders[name].model.has_class_token).to(device()).eval()
        preparation = self.task.prepare_scoring(self.data.view)
        if preparation is None:
            for name in self.contenders:
                self.result.measures[name]["probe_miou"] = from_rank_0(partial(self._dense_miou, name))
        else:
            loader = build_evaluation_loader(self.data, self.held_out, task=self.task, preparation=preparation)
            candidates = {
                name: Candidate(self.contenders[name].model, head, self.task)
                for name, head in self.result.heads.items()
            }
            for name, metrics in evaluate_apart(candidates, loader, self.data.view, self.autocast).items():
                self.result.measures[name] |= {f"probe_{key}": value for key, value in metrics.items()}
        for name, miou in from_rank_0(self._baselines).items():
            self.result.measures[name], self.result.notes[name] = {"probe_miou": miou}, []

    def _dense(self, name: str, split: str) -> tuple[DenseFeatures, Any]:
        stored = self._rows[name, split]
        return DenseFeatures(stored["patches"], stored["cls"]), self._rows[None, split]["target"]

    def _fit_dense_head(self, name: str) -> DenseHead:
        settings = self.protocol.segmentation
        return fit_dense_probe(
            *self._dense(name, TRAIN),
            DenseSettings(
                num_classes=self.task.num_classes,
                ignore_index=self.task.mask_format.ignore_index,
                rates=settings.rates,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                weight_decay=settings.weight_decay,
                held_fraction=settings.selection_fraction,
                fit_scale=settings.fit_scale,
                seed=settings.seed,
            ),
        ).cpu()

    def _dense_miou(self, name: str) -> float:
        head = self.result.heads[name].head
        return mean_iou(dense_confusion(head, *self._dense(name, HELD_OUT), self.task.mask_format.ignore_index))[0]

    def _baselines(self) -> dict[str, float]:
        """Mean IoU of the most frequent class, and of a table from colours to classes, in what ``crop`` shows."""
        classes, ignore_index = self.task.num_classes, self.task.mask_format.ignore_index
        train, held_out = (partial(self._pictures, split) for split in (TRAIN, HELD_OUT))
        majority = majority_confusion(
            (masks for _, masks in train()), (masks for _, masks in held_out()), classes, ignore_index
        )
        bins = self.protocol.segmentation.colour_bins
        table = colour_table_confusion(train(), held_out(), classes, bins, ignore_index)
        return {"majority class": mean_iou(majority)[0], "colour table": mean_iou(table)[0]}

    def _pictures(self, split: str):
        """All images (B, 3, H, W) uint8 and masks, on this rank alone."""
        index, limit = self._samples(split)
        view = self.data.view
        mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))
        for batch in build_evaluation_loader(self.data, index, limit, self.task, alone=True):
            yield ((batch["image"] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8), batch["mask"]

    def _compare_blocks(self) -> None:
        depth, width = len(self.teacher.blocks), self.teacher.embed_dim
        students = {
            name: one.model
            for name, one in self.contenders.items()
            if one.model is not self.teacher and (len(one.model.blocks), one.model.embed_dim) == (depth, width)
        }
        if students:
            loader = build_evaluation_loader(self.data, self.held_out, self.protocol.blocks.images)
            self.result.blocks = measure_block_errors(self.teacher, students, loader)

    def _time(self) -> None:
        speed = self.protocol.speed
        batch = next(iter(build_evaluation_loader(self.data, self.held_out, speed.batch_size)), None)
        found = from_rank_0(partial(self._speed, batch))
        for name, measures in found.items():
            self.result.measures[name] |= measures

    @torch.no_grad()
    def _speed(self, batch: Mapping[str, Any] | None) -> dict[str, Measures]:
        speed = self.protocol.speed
        if batch is None:
            raise ValueError("rank 0 has no held-out sample to time models on: name more shards in data.val")
        images = batch["image"]
        images = images.repeat(-(-speed.batch_size // len(images)), 1, 1, 1)[: speed.batch_size]
        models = {name: InPrecision(one.model, self.autocast) for name, one in self.contenders.items()}
        found = measure_speed(models, images, speed.rounds, speed.warmup)
        return {
            name: {
                "images_per_s": one.images_per_s,
                "images_per_s_p20": one.images_per_s_p20,
                "images_per_s_p80": one.images_per_s_p80,
                "speed_ratio": one.against_first,
                "peak_memory_mib": one.peak_memory_mib,
            }
            for name, one in found.items()
        }


def autocast_of(protocol: Protocol) -> torch.dtype | None:
    """What models compute in: bf16 by autocast where the protocol says so, or leaves it to an accelerator."""
    is_bf16 = protocol.precision == "bf16" or (protocol.precision == "auto" and device().type == "cuda")
    return torch.bfloat16 if is_bf16 else None


def _probe_settings(protocol: Protocol) -> SgdSettings | LbfgsSettings:
    config = protocol.probe
    if config.solver == "lbfgs":
        return LbfgsSettings(config.l2)
    return SgdSettings(
        rates=config.rates,
        epochs=config.epochs,
        batch_size=config.batch_size,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        held_fraction=config.selection_fraction,
        seed=config.seed,
    )
