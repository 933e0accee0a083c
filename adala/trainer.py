"""The training loop. It knows no stage by name: an engine gives named losses, this minimises ``loss``."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adala.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from adala.config import StageConfig
from adala.data import EvaluationLoader, StreamState, TrainLoader
from adala.distributed import (
    all_reduce_sum,
    any_rank,
    device,
    gather_objects,
    peak_memory_mib,
    rank,
    world_size,
)
from adala.engine import Engine
from adala.optim import rate_factor
from adala.progress import MetricWriter, say


@dataclass
class Trainer:
    """One stage's loop: step, log, evaluate, save, resume.

    Attributes:
        engine: What is trained.
        config: Lengths and rates.
        build_loader: Called with the state of the stream to continue from.
        evaluation_loader: Held-out data, or None.
        writer: Where metrics go.
        checkpoint_folder: Where checkpoints go.
        conditions: What a checkpoint must agree with to be continued, by recipe key: data, batch, seed, mechanism, ...
        seed: Of whatever the model draws while it trains; every step is seeded anew, so that a resumed run draws the
            same.
    """

    engine: Engine
    config: StageConfig
    build_loader: Callable[[StreamState], TrainLoader]
    evaluation_loader: EvaluationLoader | None
    writer: MetricWriter
    checkpoint_folder: Path
    conditions: Mapping[str, Any]
    seed: int = 0
    step: int = 0
    skipped_in_a_row: int = 0
    reported_bad_samples: dict[str, int] = field(default_factory=dict)

    def fit(self) -> dict[str, float]:
        """Trains from the newest complete checkpoint, or from the start, to the last step.

        Returns:
            The last evaluation's metrics; empty without an evaluation loader.

        Raises:
            ValueError: The loss is not finite, too many steps were skipped in a row, or the data are at fault; every
                rank raises.
        """
        loader = self.build_loader(self._resume())
        batches = iter(loader)
        if self.step == 0:
            self.evaluate()
        metrics: dict[str, float] = {}
        while self.step < self.config.steps:
            metrics = self.train_step(batches)
            self.step += 1
            last = self.step == self.config.steps
            if self.step % self.config.log_every == 0 or last:
                self.writer.write("train", self.step, metrics)
                self._report_bad_samples(loader)
            if self._due(self.config.evaluate_every) and not last:
                self.evaluate()
            if self._due(self.config.save_every) or last:
                self._save(loader)
        return self.evaluate()

    def train_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step over a global batch; returns its metrics averaged over ranks and micro-batches."""
        started = time.perf_counter()
        config, engine = self.config, self.engine
        engine.train()
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
                self._refuse_non_finite(metrics)
            engine.step()
        self._count_skipped()
        return {
            **metrics,
            "lr": factor * config.lr,
            "gradient_norm": engine.gradient_norm(),
            "images_per_s": config.global_batch_size / (time.perf_counter() - started),
            "peak_memory_mib": peak_memory_mib(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics over the held-out data, each sample counted once; every rank calls it and gets the same."""
        if self.evaluation_loader is None:
            return {}
        self.engine.eval()
        total: dict[str, torch.Tensor] = {}
        count = torch.zeros((), device=device())
        for batch, weight in _equal_length(self.evaluation_loader):
            for name, value in self.engine(batch).items():
                total[name] = total.get(name, 0) + weight * value.detach().float()
            count += weight
        sums = all_reduce_sum(torch.stack([*total.values(), count]))
        metrics = dict(zip(total, (sums[:-1] / sums[-1]).tolist(), strict=True))
        self.writer.write("val", self.step, metrics)
        return metrics

    def _resume(self) -> StreamState:
        """Restores the newest complete checkpoint, if there is one; returns where its stream of samples stood."""
        checkpoints = complete_checkpoints(self.checkpoint_folder)
        if not checkpoints:
            return StreamState()
        state = load_checkpoint(checkpoints[-1], self.engine, self.conditions)
        self.step = state["step"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        say(f"resuming from {checkpoints[-1]} at step {self.step} of {self.config.steps}")
        return StreamState.from_dict(state["stream"])

    def _save(self, loader: TrainLoader) -> None:
        state = {"stream": loader.state.to_dict(), "skipped_in_a_row": self.skipped_in_a_row}
        save_checkpoint(self.checkpoint_folder, self.engine, self.step, {**state, "conditions": dict(self.conditions)})

    def _report_bad_samples(self, loader: TrainLoader) -> None:
        """Says which shards had samples that could not be decoded, whenever this rank has met new ones."""
        if loader.bad_samples != self.reported_bad_samples:
            self.reported_bad_samples = dict(loader.bad_samples)
            counts = ", ".join(f"{count} in {shard}" for shard, count in sorted(loader.bad_samples.items()))
            print(f"rank {rank()}: bad samples skipped so far: {counts}", flush=True)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _refuse_non_finite(self, metrics: dict[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"step {self.step + 1}: {', '.join(bad)} not finite; the last checkpoint is intact: "
                "lower the learning rate, lengthen the warm-up, or look at the data"
            )

    def _count_skipped(self) -> None:
        """Stops a run whose optimizer silently skips its steps (DeepSpeed does on overflow)."""
        if any_rank(not self.engine.was_step_applied()):
            self.skipped_in_a_row += 1
            say(f"step {self.step + 1}: the optimizer skipped this step (overflow)")
        else:
            self.skipped_in_a_row = 0
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise ValueError(
                f"step {self.step + 1}: {self.skipped_in_a_row} optimizer steps in a row were skipped for overflow: "
                "lower the learning rate, or use a ds_config without bf16"
            )


def _mean_over_ranks(total: dict[str, torch.Tensor], micro_steps: int) -> dict[str, float]:
    """Sums of ``micro_steps`` values on each rank, as means over ranks and micro-steps."""
    values = all_reduce_sum(torch.stack(list(total.values()))) / (micro_steps * world_size())
    return dict(zip(total, values.tolist(), strict=True))


def _equal_length(loader: EvaluationLoader) -> Iterator[tuple[dict[str, Any], int]]:
    """This rank's batches with their sizes as weights, then its last one with weight 0 until all ranks are through.

    Under ZeRO-3 a forward pass is a collective: a rank with fewer batches than another must keep calling.
    """
    longest = max(gather_objects(len(loader)))
    batch = None
    for batch in loader:
        yield batch, len(batch["id"])
    for _ in range(longest - len(loader)):
        yield batch, 0
