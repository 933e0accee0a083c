"""The training loop. It knows no stage by name: an engine gives named losses, this minimises ``loss``."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adala.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from adala.config import StageConfig
from adala.data import EvaluationLoader, StreamState, TrainLoader
from adala.distributed import (
    SharedError,
    all_reduce_sum,
    any_rank,
    gather_objects,
    peak_memory_mib,
    rank,
    say,
    world_size,
)
from adala.engine import Engine
from adala.evaluation import Evaluator
from adala.optim import rate_factor
from adala.progress import MetricWriter


@dataclass
class Trainer:
    """One stage's loop: step, log, evaluate, save, resume.

    Attributes:
        engine: What is trained.
        config: Lengths and rates.
        build_loader: Called with the state of the stream to continue from.
        evaluation_loader: Held-out data, or None.
        build_evaluator: Gives a fresh evaluator of the held-out data.
        writer: Where metrics go.
        checkpoint_folder: Where checkpoints go.
        seed: Of whatever the model draws while it trains; every step is seeded anew, so that a resumed run draws the
            same.
    """

    engine: Engine
    config: StageConfig
    build_loader: Callable[[StreamState], TrainLoader]
    evaluation_loader: EvaluationLoader | None
    build_evaluator: Callable[[], Evaluator]
    writer: MetricWriter
    checkpoint_folder: Path
    seed: int = 0
    step: int = 0
    skipped_in_a_row: int = 0
    unlabelled_in_a_row: int = 0
    reported_bad_samples: dict[str, int] = field(default_factory=dict)

    def fit(self) -> dict[str, float]:
        """Trains from the newest whole checkpoint, or from the start, to the last step.

        Returns:
            The last evaluation's metrics; empty without an evaluation loader.

        Raises:
            ValueError: Loss, weights or metrics are not finite, too many steps were skipped in a row, or the data or
                the disk are at fault; every rank raises.
        """
        loader = self.build_loader(self._resume())
        batches = iter(loader)
        if self.step == 0:
            self.evaluate()
        while self.step < self.config.steps:
            metrics = self.train_step(batches)
            self.step += 1
            last = self.step == self.config.steps
            self._watch_labels(metrics, loader)
            if self.step % self.config.log_every == 0 or last:
                self.writer.write("train", self.step, {**metrics, "peak_memory_mib": peak_memory_mib()})
                self._report_bad_samples(loader)
            if last:
                break
            if self._due(self.config.evaluate_every):
                self.evaluate()
            if self._due(self.config.save_every):
                self._save(loader)
        # Before the last checkpoint: one whose metrics are not finite is not to be started from.
        metrics = self.evaluate()
        self._save(loader)
        return metrics

    def train_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step over a global batch; returns its metrics averaged over ranks and micro-batches."""
        started = time.perf_counter()
        config, engine = self.config, self.engine
        engine.train()
        engine.module.begin_step(self.step)
        torch.manual_seed(self.seed + 1_000_003 * (self.step * world_size() + rank()))
        factor = rate_factor(self.step, config.steps, config.warmup_steps, config.schedule, config.min_lr / config.lr)
        engine.set_rate(factor)
        total: dict[str, torch.Tensor] = {}
        for micro_step in range(engine.gradient_accumulation_steps):
            losses = engine(next(batches))
            engine.backward(losses["loss"])
            total = {name: total.get(name, 0) + value.detach().float() for name, value in losses.items()}
            if micro_step + 1 == engine.gradient_accumulation_steps:
                # Before the weights change: a checkpoint of a model that is all NaN helps nobody.
                metrics = _mean_over_ranks(total, engine.gradient_accumulation_steps)
                self._refuse_non_finite(metrics, self.step + 1)
            engine.step()
        if self._was_skipped():
            metrics["skipped_steps"] = self.skipped_in_a_row
        else:
            metrics["gradient_norm"] = engine.gradient_norm()
        return {
            **metrics,
            "lr": factor * config.lr,
            "images_per_s": config.global_batch_size / (time.perf_counter() - started),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics over the held-out data, each sample counted once; every rank calls it and gets the same.

        Raises:
            ValueError: One is not finite.
        """
        if self.evaluation_loader is None:
            return {}
        self.engine.eval()
        evaluator = self.build_evaluator()
        for batch, is_new in _equally_many(self.evaluation_loader):
            outputs = self.engine(batch)
            if is_new:
                evaluator.update(outputs, batch)
        metrics = evaluator.total()
        self._refuse_non_finite(metrics, self.step)
        self.writer.write("val", self.step, metrics)
        return metrics

    def _resume(self) -> StreamState:
        """Restores the newest whole checkpoint, if there is one; returns where its stream of samples stood."""
        path = newest_checkpoint(self.checkpoint_folder)
        if path is None:
            return StreamState()
        state = load_checkpoint(path, self.engine)
        self.step = state["step"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.unlabelled_in_a_row = state["unlabelled_in_a_row"]
        say(f"resuming from {path} at step {self.step} of {self.config.steps}")
        return StreamState.from_dict(state["stream"])

    def _save(self, loader: TrainLoader) -> None:
        in_a_row = {"skipped_in_a_row": self.skipped_in_a_row, "unlabelled_in_a_row": self.unlabelled_in_a_row}
        state = {"stream": loader.state.to_dict(), **in_a_row}
        save_checkpoint(self.checkpoint_folder, self.engine, self.step, state)

    def _report_bad_samples(self, loader: TrainLoader) -> None:
        """Says which shards had samples that could not be used, whenever this rank has met new ones."""
        if loader.bad_samples != self.reported_bad_samples:
            self.reported_bad_samples = dict(loader.bad_samples)
            counts = ", ".join(f"{count} in {shard}" for shard, count in sorted(loader.bad_samples.items()))
            print(f"rank {rank()}: bad samples skipped so far: {counts}", flush=True)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _refuse_non_finite(self, metrics: Mapping[str, float], step: int) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise SharedError(
                f"step {step}: {', '.join(bad)} not finite; the last checkpoint is intact: "
                "lower the learning rate, lengthen the warm-up, or look at the data"
            )

    def _watch_labels(self, metrics: Mapping[str, float], loader: TrainLoader) -> None:
        """Stops a run that has learnt from nothing for an epoch, or for all of its steps where these are fewer."""
        if metrics.get("labelled", 1.0) > 0:
            self.unlabelled_in_a_row = 0
            return
        self.unlabelled_in_a_row += 1
        say(f"step {self.step}: nothing of its targets is known, all is ignored")
        if self.unlabelled_in_a_row >= min(loader.steps_per_epoch, self.config.steps):
            raise SharedError(
                f"step {self.step}: of the targets of {self.unlabelled_in_a_row} steps, an epoch, nothing was known, "
                "all was ignored: look at how the targets are read (stage3.task), and at the data"
            )

    def _was_skipped(self) -> bool:
        """Whether the weights were left alone because the gradient was not finite; too often stops the run."""
        if not any_rank(not self.engine.was_step_applied()):
            self.skipped_in_a_row = 0
            return False
        self.skipped_in_a_row += 1
        say(f"step {self.step + 1}: skipped, its gradient is not finite")
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise SharedError(
                f"step {self.step + 1}: the gradients of {self.skipped_in_a_row} steps in a row were not finite, and "
                "the weights were left alone: lower the learning rate, or use a ds_config without bf16"
            )
        return True


def _mean_over_ranks(total: dict[str, torch.Tensor], micro_steps: int) -> dict[str, float]:
    """Sums of ``micro_steps`` values on each rank, as means over ranks and micro-steps."""
    values = all_reduce_sum(torch.stack(list(total.values()))) / (micro_steps * world_size())
    return dict(zip(total, values.tolist(), strict=True))


def _equally_many(loader: EvaluationLoader) -> Iterator[tuple[dict[str, Any], bool]]:
    """This rank's batches, then its last one again and again until all ranks are through; whether it is a new one.

    Under ZeRO-3 a forward pass is a collective: a rank with fewer batches than another must keep calling.

    Raises:
        ValueError: A rank found no usable sample; every rank raises.
    """
    batches = iter(loader)
    last = next(batches, None)
    if any_rank(last is None):
        raise SharedError("a rank found no usable held-out sample: name other shards in data.val")
    yield last, True
    for _ in range(max(gather_objects(len(loader))) - 1):
        batch = next(batches, None)
        last = last if batch is None else batch
        yield last, batch is not None
