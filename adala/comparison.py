"""Models compared under one protocol, on the same data: the trainer's final table, and the evaluation command.

Features are computed once a model, kept in a store, and read by every measure that wants them. What is fitted on them
is fitted on rank 0 alone, so that it is the same on any number of ranks.

Shapes: B batch, N tokens, D embed dim, h x w patch grid, K classes.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adala.build import build_evaluation_loader
from adala.contenders import Contender
from adala.data import Preparation, ShardIndex
from adala.data.addresses import is_remote, local_path
from adala.distributed import SharedError, device, from_rank_0, gather_objects, say, world_size
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
    raising_together,
)
from adala.evaluation.dense_probe import READ_AT_ONCE
from adala.evaluation.evaluator import compute_metrics
from adala.evaluation.feature_store import StoredRows
from adala.evaluation.speed import measure_speed
from adala.evaluation.token_rows import FrozenHead, InPrecision, RowCollector
from adala.files import value_digest
from adala.heads import Pooling
from adala.plan import DataPlan, EvaluationPlan, index_digest
from adala.protocol import Protocol
from adala.tasks import Task, describe_task

Measures = dict[str, float | None]
HELD_OUT, TRAIN = "held-out", "training"
# Rows of segmentation that have no model.
BASELINES = MAJORITY, COLOUR_TABLE = "majority class", "colour table"


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        measures: By contender, and by baseline without a model.
        notes: By the same names, what was left out of a row and why.
        left_out: Measures that were asked for and that no model has, and why.
        heads: What makes decisions of features, by contender, on every rank: its own head, or else a frozen one that
            was fitted on patch features.
        blocks: Errors by block.
        details: What is no single number, as JSON: errors by block, IoU by class, rates that were chosen.
        samples: How many could be read, by split; the same for all models.
        unusable: Held-out samples that could not be read, and are left out of all rows alike.
    """

    measures: dict[str, Measures]
    notes: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
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
        self.wants = set(protocol.measures)
        kind = self.task.probe if self.task and self.train else None
        self.is_dense = kind == "dense" and "segmentation" in self.wants
        self.is_pooled = kind in ("linear", "multilabel") and bool(self.wants & {"probe", "knn"})
        section = protocol.segmentation if self.is_dense else protocol.probe
        self.limits = {TRAIN: section.train_samples, HELD_OUT: None}
        self._digests = from_rank_0(self._identify_data) if self.is_dense or self.is_pooled else {}
        self._rows: dict[tuple[str | None, str], dict[str, StoredRows]] = {}
        self.result = Comparison({name: {} for name in contenders}, {name: [] for name in contenders})
        self.result.left_out |= _not_for(self.task, kind, self.wants)
        self.heads = self._fitting_heads() if "head" in self.wants and self.task else {}

    def compare(self) -> Comparison:
        """Every measure that the protocol asks for and data and models allow; every rank calls it and gets the same.

        Raises:
            ValueError: Data or features that cannot be used; every rank raises.
        """
        self._pass_held_out()
        if self.is_pooled or self.is_dense:
            self._pass_train()
        if self.is_pooled:
            self._fit_pooled()
        if self.is_dense:
            self._fit_dense()
        self.result.heads |= self.heads
        if "blocks" in self.wants:
            self._compare_blocks()
        if "speed" in self.wants:
            self._time()
        return self.result

    def _fitting_heads(self) -> dict[str, nn.Module]:
        """Heads for the target that these samples have; of others a note."""
        heads = {}
        for name, one in self.contenders.items():
            if one.head is None:
                continue
            theirs, ours = ((task.name, getattr(task, "num_classes", None)) for task in (one.task, self.task))
            if theirs == ours:
                heads[name] = one.head
            else:
                its, these = (f"for {task} of {classes} classes" for task, classes in (theirs, ours))
                self.result.notes[name].append(f"its head is {its}, and these samples are {these}: it is left out")
        if not heads:
            self.result.left_out["head"] = "no model has one that was fine-tuned for these targets"
        return heads

    def _pass_held_out(self) -> None:
        apart = self.task.prepare_scoring(self.data.view) if self.heads else None
        with ExitStack() as stack:
            collectors = self._collectors(HELD_OUT, stack)
            candidates = self._candidates(collectors, {} if apart else self.heads)
            if candidates:
                loader = build_evaluation_loader(self.data, self.held_out, task=self.task)
                seen = Seen(loader)
                teacher = self.teacher if "features" in self.wants else None
                self._note(evaluate_all(candidates, teacher, seen, self.autocast), heads={} if apart else self.heads)
                self.result.samples[HELD_OUT] = sum(gather_objects(seen.samples))
                if not self.result.samples[HELD_OUT]:
                    raise SharedError("no held-out sample can be used: name other shards in data.val")
        self._open_rows(HELD_OUT)
        if apart is not None:
            self._score_apart(self.heads, apart, "head")
        if HELD_OUT in self.result.samples:
            self.result.unusable = self.held_out.num_samples - self.result.samples[HELD_OUT]

    def _candidates(
        self, collectors: Mapping[str | None, RowCollector], heads: Mapping[str, nn.Module]
    ) -> dict[str, Candidate]:
        """Models of which something is wanted of every held-out sample."""
        candidates, first = {}, next(iter(self.contenders))
        for name, one in self.contenders.items():
            # Targets are gathered beside the first model, the teacher.
            own = [collectors[key] for key in ([name, None] if name == first else [name]) if key in collectors]
            if "features" in self.wants or name in heads or own:
                # By the recipe's task, whatever a student's own says of how it is scored.
                candidates[name] = Candidate(one.model, heads.get(name), self.task, own)
        return candidates

    def _note(self, found: Mapping[str, Measures], heads: Mapping[str, nn.Module]) -> None:
        """Takes over what was measured of features, and of heads."""
        of_task = set(self.task.build_metrics()) if heads else set()
        for name, metrics in found.items():
            for key, value in metrics.items():
                if key not in of_task:
                    self.result.measures[name][key] = value
                elif name in heads:
                    self.result.measures[name][f"head_{key}"] = value
            if "features" in self.wants and "feature_cosine" not in metrics:
                self.result.notes[name].append(
                    "its features have another shape than the teacher's, and are not compared with them"
                )

    def _score_apart(self, heads: Mapping[str, nn.Module], preparation: Preparation, kind: str) -> None:
        """Scores heads on samples as the task finally wants them scored, which is another view."""
        loader = build_evaluation_loader(self.data, self.held_out, task=self.task, preparation=preparation)
        candidates = {name: Candidate(self.contenders[name].model, head, self.task) for name, head in heads.items()}
        for name, metrics in evaluate_apart(candidates, loader, self.data.view, self.autocast).items():
            self.result.measures[name] |= {f"{kind}_{key}": value for key, value in metrics.items()}

    @torch.no_grad()
    def _pass_train(self) -> None:
        with ExitStack() as stack:
            collectors = self._collectors(TRAIN, stack)
            if collectors:
                with raising_together():
                    for batch in build_evaluation_loader(self.data, self.train, self.limits[TRAIN], self.task):
                        images = batch["image"].to(device())
                        for name, collector in collectors.items():
                            with precision(self.autocast):
                                features = None if name is None else self.contenders[name].model(images)
                            collector.update({"features": features}, batch)
        self._open_rows(TRAIN)

    def _collectors(self, split: str, stack: ExitStack) -> dict[str | None, RowCollector]:
        """Of what is not stored yet: by contender, and under None of targets."""
        if not (self.is_pooled or self.is_dense):
            return {}
        collectors, under_way = {}, []
        for name in (*self.contenders, None):
            key, fields = self._key(name, split), self._fields(name)
            stored = self.store.find(key, fields)
            if stored is not None:
                self._rows[name, split] = stored
            elif key not in under_way:  # two heads on one backbone have the same features
                under_way.append(key)
                writer = stack.enter_context(self.store.writing(key, fields, self._capacity(split)))
                model = None if name is None else self.contenders[name].model
                collectors[name] = RowCollector(writer, model, self.task, fields)
        if computed := [name for name in collectors if name is not None]:
            say(f"computing features of {', '.join(computed)} on {self._capacity(split)} {split} samples")
        return collectors

    def _samples(self, split: str) -> tuple[ShardIndex, int | None]:
        return (self.train if split == TRAIN else self.held_out), self.limits[split]

    def _identify_data(self) -> dict[str, str]:
        return {split: _data_digest(self._samples(split)[0]) for split in (TRAIN, HELD_OUT)}

    def _capacity(self, split: str) -> int:
        """Samples there are, if all can be read."""
        index, limit = self._samples(split)
        return index.num_samples if limit is None else min(limit, index.num_samples)

    def _key(self, name: str | None, split: str) -> dict[str, Any]:
        index, _ = self._samples(split)
        view, target = self.data.view, _target_of(self.task)
        identity = {"weights": "none", "model": target} if name is None else self.contenders[name].identity
        names = [shard.name for shard in index.shards]
        # Samples of shards of one name have equal ids, whose order is the one in which they are read.
        is_ordered = len(set(names)) == len(names)
        return {
            **identity,
            "data": self._digests[split],
            "samples": self._capacity(split),
            # Which samples can be used depends on the target, and with it which features there are.
            "target": target,
            "image_size": list(view.image_size),
            "normalisation": [list(view.mean), list(view.std)],
            "precision": str(self.autocast or torch.float32),
            "kind": "targets" if name is None else "dense" if self.is_dense else "pooled",
            "order": None if is_ordered else [world_size(), self.data.num_workers, self.data.evaluation_batch_size],
        }

    def _fields(self, name: str | None) -> dict[str, Field]:
        view = self.data.view
        if name is None:
            return {"target": self._target_field()}
        model = self.contenders[name].model
        width, of_image = model.embed_dim, ["cls", "patch"] if model.has_class_token else ["patch"]
        if not self.is_dense:
            return {part: Field((width,), torch.float32) for part in of_image}
        sizes = zip(view.image_size, model.patch_embed.patch_size, strict=True)
        grid = tuple(size // patch for size, patch in sizes)
        return {of_image[0]: Field((width,), torch.float32), "patches": Field((*grid, width))}

    def _target_field(self) -> Field:
        if self.is_dense:
            # Masks are most of the bytes but features.
            is_small = max(self.task.num_classes - 1, self.task.mask_format.ignore_index) < 256
            return Field(self.data.view.image_size, torch.uint8 if is_small else torch.int32)
        return Field((self.task.num_classes,) if self.task.probe == "multilabel" else (), torch.int64)

    def _open_rows(self, split: str) -> None:
        """On every rank: what is fitted on one finds them open."""
        if not (self.is_pooled or self.is_dense):
            return
        for name in (*self.contenders, None):
            if (name, split) not in self._rows:
                stored = self.store.find(self._key(name, split), self._fields(name))
                if stored is None:
                    raise SharedError(f"features were removed from {self.store.folder} while models are compared")
                self._rows[name, split] = stored
        self.result.samples[split] = len(self._rows[None, split]["target"])

    def _features(self, name: str, split: str, pooling: Pooling) -> Features:
        stored, target = self._rows[name, split], self._rows[None, split]["target"][:]
        # Without a class token the mean patch stands for it.
        parts = [part for part in {"cls_patch": ["cls", "patch"]}.get(pooling, [pooling]) if part in stored]
        values = torch.cat([stored[part][:] for part in parts or ["patch"]], 1)
        return Features(values, target.float() if self.task.probe == "multilabel" else target)

    def _fit_pooled(self) -> None:
        labels = [self._rows[None, split]["target"][:] for split in (TRAIN, HELD_OUT)]
        if self.task.probe == "linear" and min(len(found.unique()) for found in labels) < 2:
            # Of one class alone every model knows everything.
            for notes in self.result.notes.values():
                notes.append("all labels are the same: models are compared by their features alone")
            return
        for name in self.contenders:
            if "knn" in self.wants and self.task.probe == "linear":
                found = from_rank_0(partial(self._knn, name))
                self.result.measures[name] |= {f"knn{k}_top1": value for k, value in found.items()}
            if "probe" in self.wants:
                measures, chosen = from_rank_0(partial(self._probe, name))
                self.result.measures[name] |= measures
                self._note_rate(name, "probe", *chosen)

    def _note_rate(self, name: str, kind: str, rate: float | None, scores: Mapping[float, float | None]) -> None:
        if rate is not None:
            by_rate = {f"{each:g}": score for each, score in scores.items()}
            chosen = {"rate": rate, "scores_on_training_samples_held_back": by_rate}
            self.result.details.setdefault("chosen_rates", {}).setdefault(name, {})[kind] = chosen

    def _knn(self, name: str) -> dict[int, float]:
        knn = self.protocol.knn
        train, held_out = (self._features(name, split, knn.pooling) for split in (TRAIN, HELD_OUT))
        return knn_top1(train, held_out, knn.k, knn.temperature)

    def _probe(self, name: str) -> tuple[Measures, tuple[float | None, dict[float, float | None]]]:
        """Scores; the rate that was chosen, and what each scored."""
        settings = self.protocol.probe
        train, held_out = (self._features(name, split, settings.pooling) for split in (TRAIN, HELD_OUT))
        found = probe(train, held_out, _probe_settings(self.protocol))
        if self.task.probe == "linear":
            top5 = {"probe_top5": found.top5} if train.labels.max() >= 5 else {}
            return {"probe_top1": found.top1, **top5}, (found.rate, found.scores)
        metrics = self.task.build_metrics()
        for metric in metrics.values():
            # The other ranks wait for this one.
            metric.distributed_available_fn = lambda: False
            metric.update(self.task.decision(found.logits, self.data.view.image_size), held_out.labels)
        measures = {f"probe_{key}": value for key, value in compute_metrics(metrics).items()}
        return measures, (found.rate, found.scores)

    def _fit_dense(self) -> None:
        """Frozen linear heads, and the two baselines that a segmentation has to beat."""
        for name in self.contenders:
            head = from_rank_0(partial(self._fit_dense_head, name))
            self._note_rate(name, "segmentation", head.rate, head.scores)
            self.result.heads[name] = FrozenHead(head, self.contenders[name].model.has_class_token).to(device()).eval()
        preparation = self.task.prepare_scoring(self.data.view)
        if preparation is None:
            for name in self.contenders:
                self._note_iou(name, *from_rank_0(partial(self._dense_iou, name)))
        else:
            self._score_apart(self.result.heads, preparation, "probe")
        for name, found in from_rank_0(partial(self._baselines, preparation)).items():
            self.result.measures[name], self.result.notes[name] = {}, []
            self._note_iou(name, *found)

    def _note_iou(self, name: str, mean: float, by_class: Tensor) -> None:
        self.result.measures[name]["probe_miou"] = mean
        self.result.details.setdefault("iou_by_class", {})[name] = by_class.tolist()

    def _dense(self, name: str, split: str) -> tuple[DenseFeatures, StoredRows]:
        stored = self._rows[name, split]
        pooled = stored["cls" if "cls" in stored else "patch"]
        return DenseFeatures(stored["patches"], pooled), self._rows[None, split]["target"]

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

    def _dense_iou(self, name: str) -> tuple[float, Tensor]:
        head, ignore_index = self.result.heads[name].head, self.task.mask_format.ignore_index
        return mean_iou(dense_confusion(head, *self._dense(name, HELD_OUT), ignore_index))

    def _baselines(self, preparation: Preparation | None) -> dict[str, tuple[float, Tensor]]:
        """IoU of the most frequent class, and of a table from colours to classes, on the pixels that heads are scored
        on."""
        classes, ignore_index = self.task.num_classes, self.task.mask_format.ignore_index
        bins = self.protocol.segmentation.colour_bins
        train, held_out = self._pictures(TRAIN), partial(self._pictures, HELD_OUT, preparation)
        table = colour_table_confusion(train, held_out(), classes, bins, ignore_index)
        masks = self._masks(HELD_OUT) if preparation is None else (masks for _, masks in held_out())
        majority = majority_confusion(self._masks(TRAIN), masks, classes, ignore_index)
        return {MAJORITY: mean_iou(majority), COLOUR_TABLE: mean_iou(table)}

    def _masks(self, split: str) -> Iterator[Tensor]:
        masks = self._rows[None, split]["target"]
        return (masks[rows] for rows in torch.arange(len(masks)).split(READ_AT_ONCE))

    def _pictures(self, split: str, preparation: Preparation | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images (B, 3, H, W) uint8 and masks (B, H, W), on this rank alone."""
        index, limit = self._samples(split)
        view = self.data.view
        mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))
        for batch in build_evaluation_loader(self.data, index, limit, self.task, preparation, alone=True):
            images, masks = batch["image"] * std + mean, batch["mask"]
            # An image that is seen as a whole has another size than its mask.
            images = F.interpolate(images, masks.shape[-2:], mode="nearest-exact")
            yield (images * 255).round().clamp(0, 255).to(torch.uint8), masks

    def _compare_blocks(self) -> None:
        students = {}
        for name, one in self.contenders.items():
            if one.model is self.teacher:
                continue
            if _layout(one.model) == _layout(self.teacher):
                students[name] = one.model
            else:
                self.result.notes[name].append("it has other blocks or tokens than the teacher: no errors by block")
        if not students:
            self.result.left_out["blocks"] = "there is no student with the teacher's blocks and tokens"
            return
        loader = build_evaluation_loader(self.data, self.held_out, self.protocol.blocks.images)
        self.result.blocks = measure_block_errors(self.teacher, students, loader)
        self.result.details["blocks"] = dataclasses.asdict(self.result.blocks)

    def _time(self) -> None:
        for name, measures in from_rank_0(self._speed).items():
            self.result.measures[name] |= measures

    @torch.no_grad()
    def _speed(self) -> dict[str, Measures]:
        speed = self.protocol.speed
        batch = next(iter(build_evaluation_loader(self.data, self.held_out, speed.batch_size, alone=True)), None)
        if batch is None:
            raise ValueError("there is no held-out sample to time models on: name more shards in data.val")
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


class Seen:
    """Batches, and how many samples they held."""

    def __init__(self, batches: Iterable[Mapping[str, Any]]):
        self._batches, self.samples = batches, 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._batches:
            self.samples += len(batch["id"])
            yield batch


def _not_for(task: Task | None, kind: str | None, wants: set[str]) -> dict[str, str]:
    """Measures among ``wants`` that models cannot have on samples of the task, and why."""
    if task is None:
        return dict.fromkeys(sorted(wants & {"knn", "probe", "head", "segmentation"}), "the samples have no targets")
    measured = {"linear": {"knn", "probe"}, "multilabel": {"probe"}, "dense": {"segmentation"}, None: set()}[kind]
    missing = (wants & {"knn", "probe", "segmentation"}) - measured
    return dict.fromkeys(sorted(missing), f"the samples are for {task.name}")


def _data_digest(index: ShardIndex) -> str:
    """Of a data set as it lies there. A shard whose labels were mended may have the same name and size as before."""
    changed = [
        None if is_remote(shard.url) else Path(local_path(shard.url)).stat().st_mtime_ns for shard in index.shards
    ]
    return value_digest([index_digest(index, labelled=True), changed])


def _target_of(task: Task) -> dict[str, Any]:
    """What decides the targets of samples, and which samples have one."""
    return {key: value for key, value in describe_task(task).items() if key not in task.fields_of_head}


def _layout(model: VisionTransformer) -> tuple[Any, ...]:
    """What two models must have alike to be compared block by block."""
    return len(model.blocks), model.embed_dim, model.patch_embed.patch_size, model.num_prefix_tokens


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
