"""Models compared under one protocol, on the same data: the trainer's final table, and the evaluation command.

Features are computed once a model, kept in a store, and read by every measure that wants them. What is fitted on them
is fitted on rank 0 alone, so that it is the same on any number of ranks.

Shapes: B batch, N tokens, D embed dim, h x w patch grid, K classes.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adala.build import build_evaluation_loader
from adala.config import val_key
from adala.contenders import Contender
from adala.data import Preparation, ShardIndex
from adala.distributed import SharedError, device, from_rank_0, gather_objects
from adala.evaluation import (
    BlockReport,
    Candidate,
    DenseHead,
    DenseSettings,
    Features,
    FeatureStore,
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
from adala.evaluation.evaluator import compute_metrics
from adala.evaluation.linear_probe import top_k
from adala.evaluation.speed import measure_speed
from adala.evaluation.token_rows import FrozenHead, InPrecision, RowCollector
from adala.families import Backbone
from adala.feature_rows import TRAIN, FeatureRows, held_out_split
from adala.plan import DataPlan, EvaluationPlan
from adala.protocol import Protocol
from adala.tasks import Task

Measures = dict[str, float | None]
# Rows of segmentation that have no model.
BASELINES = MAJORITY, COLOUR_TABLE = "majority class", "colour table"


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        measures: By contender, and by baseline without a model. Where held-out sets have names, what is measured on
            one has its name before it; see :func:`of_held_out`.
        notes: By the same names, what was left out of a row and why.
        left_out: Measures that were asked for and that no model has, and why.
        heads: What makes decisions of features, by contender, on every rank: its own head, or else a frozen one that
            was fitted on patch features.
        blocks: Errors by block.
        details: What is no single number, as JSON: errors by block, IoU by class, rates that were chosen.
        samples: How many could be read, by split (``training``, ``held-out``, ``held-out photos``); the same for all
            models.
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
        probes_tuned: bool = True,
    ):
        """Prepares; every rank does.

        Args:
            contenders: By name, the teacher first.
            data: How samples become batches.
            evaluation: The samples and their task.
            protocol: What is measured.
            store: Where features are kept.
            probes_tuned: Whether a model whose own head is scored is probed, too.
        """
        self.contenders, self.data, self.protocol = contenders, data, protocol
        self.task, self.sets = evaluation.task, evaluation.held_out_sets
        self.teacher = next(iter(contenders.values())).model
        self.autocast, self.limit = autocast_of(protocol), protocol.held_out_samples
        self.wants = set(protocol.measures)
        kind = self.task.probe if self.task and evaluation.probe_train else None
        self.is_dense = kind == "dense" and "segmentation" in self.wants
        self.is_pooled = kind in ("linear", "multilabel") and bool(self.wants & {"probe", "knn"})
        section = protocol.segmentation if self.is_dense else protocol.probe
        self.result = Comparison({name: {} for name in contenders}, {name: [] for name in contenders})
        self.result.left_out |= _not_for(self.task, kind, self.wants)
        self.heads = self._fitting_heads() if "head" in self.wants and self.task else {}
        self.probed = {name: one for name, one in contenders.items() if probes_tuned or name not in self.heads}
        self.rows = None
        if self.is_dense or self.is_pooled:
            samples = (section.train_samples, self.autocast, protocol.held_out_samples)
            self.rows = FeatureRows(self.probed, data, evaluation, store, *samples)

    def compare(self) -> Comparison:
        """Every measure that the protocol asks for and data and models allow; every rank calls it and gets the same.

        Raises:
            ValueError: Data or features that cannot be used; every rank raises.
        """
        for of_set in self.sets:
            self._pass_held_out(of_set)
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

    def _pass_held_out(self, of_set: str) -> None:
        split = held_out_split(of_set)
        apart = self.task.prepare_scoring(self.data.view) if self.heads else None
        with ExitStack() as stack:
            collectors = self.rows.collectors(split, stack) if self.rows else {}
            candidates = self._candidates(collectors, {} if apart else self.heads)
            if candidates:
                loader = build_evaluation_loader(self.data, self.sets[of_set], self.limit, self.task)
                seen = Seen(loader)
                teacher = self.teacher if "features" in self.wants else None
                found = evaluate_all(candidates, teacher, seen, self.autocast)
                self._note(of_set, found, heads={} if apart else self.heads)
                self.result.samples[split] = sum(gather_objects(seen.samples))
                if not self.result.samples[split]:
                    raise SharedError(f"no held-out sample can be used: name other shards in {val_key(of_set)}")
        if self.rows:
            self.result.samples[split] = self.rows.open(split)
        if apart is not None:
            self._score_apart(of_set, self.heads, apart, "head")
        if split in self.result.samples:
            index = self.sets[of_set]
            asked = index.num_samples if self.limit is None else len(index.first(self.limit))
            self.result.unusable += asked - self.result.samples[split]

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

    def _add(self, name: str, of_set: str, measures: Measures) -> None:
        """Takes over what was measured of a model on a held-out set."""
        self.result.measures[name] |= {of_held_out(of_set, key): value for key, value in measures.items()}

    def _note(self, of_set: str, found: Mapping[str, Measures], heads: Mapping[str, nn.Module]) -> None:
        """Takes over what was measured of features, and of heads."""
        of_task = set(self.task.build_metrics()) if heads else set()
        for name, metrics in found.items():
            for key, value in metrics.items():
                if key not in of_task:
                    self._add(name, of_set, {key: value})
                elif name in heads:
                    self._add(name, of_set, {f"head_{key}": value})
            note = "its features have another shape than the teacher's, and are not compared with them"
            if "features" in self.wants and "feature_cosine" not in metrics and note not in self.result.notes[name]:
                self.result.notes[name].append(note)

    def _score_apart(self, of_set: str, heads: Mapping[str, nn.Module], preparation: Preparation, kind: str) -> None:
        """Scores heads on samples as the task finally wants them scored, which is another view."""
        loader = build_evaluation_loader(self.data, self.sets[of_set], self.limit, self.task, preparation)
        candidates = {name: Candidate(self.contenders[name].model, head, self.task) for name, head in heads.items()}
        for name, metrics in evaluate_apart(candidates, loader, self.data.view, self.autocast).items():
            self._add(name, of_set, {f"{kind}_{key}": value for key, value in metrics.items()})

    @torch.no_grad()
    def _pass_train(self) -> None:
        with ExitStack() as stack:
            collectors = self.rows.collectors(TRAIN, stack)
            if collectors:
                with raising_together():
                    for batch in build_evaluation_loader(self.data, *self.rows.samples(TRAIN), self.task):
                        images = batch["image"].to(device())
                        for name, collector in collectors.items():
                            with precision(self.autocast):
                                features = None if name is None else self.contenders[name].model(images)
                            collector.update({"features": features}, batch)
        self.result.samples[TRAIN] = self.rows.open(TRAIN)

    def _fit_pooled(self) -> None:
        scored = [of_set for of_set in self.sets if self._labels_differ(of_set)]
        for of_set in (of_set for of_set in self.sets if of_set not in scored):
            all_labels = f"all labels of {val_key(of_set)}, or of the training samples," if of_set else "all labels"
            for notes in self.result.notes.values():
                notes.append(f"{all_labels} are the same: models are compared by their features alone")
        for name in self.probed if scored else ():
            if "knn" in self.wants and self.task.probe == "linear":
                for of_set, found in from_rank_0(partial(self._knn, name, scored)).items():
                    self._add(name, of_set, {f"knn{k}_top1": value for k, value in found.items()})
            if "probe" in self.wants:
                by_set, chosen = from_rank_0(partial(self._probe, name, scored))
                for of_set, measures in by_set.items():
                    self._add(name, of_set, measures)
                self._note_rate(name, "probe", *chosen)

    def _labels_differ(self, of_set: str) -> bool:
        """Of one class alone every model knows everything."""
        labels = [self.rows.labels(split) for split in (TRAIN, held_out_split(of_set))]
        return self.task.probe != "linear" or min(len(found.unique()) for found in labels) >= 2

    def _note_rate(self, name: str, kind: str, rate: float | None, scores: Mapping[float, float | None]) -> None:
        if rate is not None:
            by_rate = {f"{each:g}": score for each, score in scores.items()}
            chosen = {"rate": rate, "scores_on_training_samples_held_back": by_rate}
            self.result.details.setdefault("chosen_rates", {}).setdefault(name, {})[kind] = chosen

    def _knn(self, name: str, sets: Sequence[str]) -> dict[str, dict[int, float]]:
        knn = self.protocol.knn
        train, *held_out = (self.rows.pooled(name, split, knn.pooling) for split in (TRAIN, *map(held_out_split, sets)))
        return {
            of_set: knn_top1(train, one, knn.k, knn.temperature) for of_set, one in zip(sets, held_out, strict=True)
        }

    def _probe(
        self, name: str, sets: Sequence[str]
    ) -> tuple[dict[str, Measures], tuple[float | None, dict[float, float | None]]]:
        """Scores by held-out set; the rate that was chosen, and what each scored. It is fitted once, for all sets."""
        pooling = self.protocol.probe.pooling
        train, *held_out = (self.rows.pooled(name, split, pooling) for split in (TRAIN, *map(held_out_split, sets)))
        together = Features(torch.cat([one.values for one in held_out]), torch.cat([one.labels for one in held_out]))
        found = probe(train, together, _probe_settings(self.protocol))
        by_set = found.logits.split([len(one.labels) for one in held_out])
        scores = {
            of_set: self._score_probe(logits, one.labels, train.labels)
            for of_set, logits, one in zip(sets, by_set, held_out, strict=True)
        }
        return scores, (found.rate, found.scores)

    def _score_probe(self, logits: Tensor, labels: Tensor, train_labels: Tensor) -> Measures:
        if self.task.probe == "linear":
            top5 = {"probe_top5": top_k(logits, labels, 5)} if train_labels.max() >= 5 else {}
            return {"probe_top1": top_k(logits, labels, 1), **top5}
        metrics = self.task.build_metrics()
        for metric in metrics.values():
            # The other ranks wait for this one.
            metric.distributed_available_fn = lambda: False
            metric.update(self.task.decision(logits, self.data.view.image_size), labels)
        return {f"probe_{key}": value for key, value in compute_metrics(metrics).items()}

    def _fit_dense(self) -> None:
        """Frozen linear heads, and the two baselines that a segmentation has to beat."""
        for name in self.probed:
            head = from_rank_0(partial(self._fit_dense_head, name))
            self._note_rate(name, "segmentation", head.rate, head.scores)
            self.result.heads[name] = FrozenHead(head, self.contenders[name].model.has_class_token).to(device()).eval()
        self.result.measures |= {name: {} for name in BASELINES}
        self.result.notes |= {name: [] for name in BASELINES}
        for of_set in self.sets:
            self._score_dense(of_set)

    def _score_dense(self, of_set: str) -> None:
        preparation = self.task.prepare_scoring(self.data.view)
        if preparation is None:
            for name in self.probed:
                self._note_iou(name, of_set, *from_rank_0(partial(self._dense_iou, name, of_set)))
        else:
            self._score_apart(of_set, self.result.heads, preparation, "probe")
        for name, found in from_rank_0(partial(self._baselines, of_set, preparation)).items():
            self._note_iou(name, of_set, *found)

    def _note_iou(self, name: str, of_set: str, mean: float, by_class: Tensor) -> None:
        self._add(name, of_set, {"probe_miou": mean})
        self.result.details.setdefault(of_held_out(of_set, "iou_by_class"), {})[name] = by_class.tolist()

    def _fit_dense_head(self, name: str) -> DenseHead:
        settings = self.protocol.segmentation
        return fit_dense_probe(
            *self.rows.dense(name, TRAIN),
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

    def _dense_iou(self, name: str, of_set: str) -> tuple[float, Tensor]:
        head, ignore_index = self.result.heads[name].head, self.task.mask_format.ignore_index
        return mean_iou(dense_confusion(head, *self.rows.dense(name, held_out_split(of_set)), ignore_index))

    def _baselines(self, of_set: str, preparation: Preparation | None) -> dict[str, tuple[float, Tensor]]:
        """IoU of the most frequent class, and of a table from colours to classes, on the pixels that heads are scored
        on."""
        classes, ignore_index = self.task.num_classes, self.task.mask_format.ignore_index
        bins, split = self.protocol.segmentation.colour_bins, held_out_split(of_set)
        train, held_out = self._pictures(TRAIN), partial(self._pictures, split, preparation)
        table = colour_table_confusion(train, held_out(), classes, bins, ignore_index)
        masks = self.rows.masks(split) if preparation is None else (masks for _, masks in held_out())
        majority = majority_confusion(self.rows.masks(TRAIN), masks, classes, ignore_index)
        return {MAJORITY: mean_iou(majority), COLOUR_TABLE: mean_iou(table)}

    def _pictures(self, split: str, preparation: Preparation | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images (B, 3, H, W) uint8 and masks (B, H, W), on this rank alone."""
        index, limit = self.rows.samples(split)
        view = self.data.view
        mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))
        for batch in build_evaluation_loader(self.data, index, limit, self.task, preparation, alone=True):
            images, masks = batch["image"] * std + mean, batch["mask"]
            # An image that is seen as a whole has another size than its mask.
            images = F.interpolate(images, masks.shape[-2:], mode="nearest-exact")
            yield (images * 255).round().clamp(0, 255).to(torch.uint8), masks

    def _first(self) -> ShardIndex:
        """The held-out set that counts where one is enough."""
        return next(iter(self.sets.values()))

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
        loader = build_evaluation_loader(self.data, self._first(), self.protocol.blocks.images)
        self.result.blocks = measure_block_errors(self.teacher, students, loader)
        self.result.details["blocks"] = dataclasses.asdict(self.result.blocks)

    def _time(self) -> None:
        for name, measures in from_rank_0(self._speed).items():
            self.result.measures[name] |= measures

    @torch.no_grad()
    def _speed(self) -> dict[str, Measures]:
        speed = self.protocol.speed
        batch = next(iter(build_evaluation_loader(self.data, self._first(), speed.batch_size, alone=True)), None)
        if batch is None:
            key = val_key(next(iter(self.sets)))
            raise ValueError(f"there is no held-out sample to time models on: name more shards in {key}")
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


def of_held_out(of_set: str, measure: str) -> str:
    """What is measured on a held-out set, by the set's name in the recipe: ``photos/probe_top1``."""
    return f"{of_set}/{measure}" if of_set else measure


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


def _layout(model: Backbone) -> tuple[Any, ...]:
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
