"""The training loop. It knows no stage by name: an engine gives named losses, this minimises ``loss``."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
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
    device,
    gather_objects,
    peak_memory_mib,
    rank,
    say,
    world_size,
)
from adala.engine import Engine
from adala.evaluation import Evaluator
from adala.optim import rate_factor
from adala.preemption import Preempted, reason_to_end
from adala.progress import MetricWriter

# Steps after which a GPU's answer is there without waiting for it.
ASKED_LATER = 8


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
    _unread: list[torch.Tensor] = field(default_factory=list, init=False)
    _names: tuple[str, ...] = field(default=(), init=False)
    _reading_since: float = field(default_factory=time.perf_counter, init=False)
    _asked_to_end: deque[torch.Tensor] = field(default_factory=partial(deque, maxlen=ASKED_LATER + 1), init=False)

    def fit(self) -> dict[str, float]:
        """Trains from the newest whole checkpoint, or from the start, to the last step.

        Returns:
            The last evaluation's metrics; empty without an evaluation loader.

        Raises:
            ValueError: Loss, weights or metrics are not finite, too many steps were skipped in a row, or the data or
                the disk are at fault; every rank raises.
            Preempted: A rank was asked to end; all have saved.
        """
        loader = self.build_loader(self._resume())
        began = self.step
        if any_rank(reason_to_end() is not None):
            raise Preempted(f"at step {self.step} of {self.config.steps}, nothing new to save")
        batches = iter(loader)
        if self.step == 0:
            self.evaluate()
        self._reading_since = time.perf_counter()
        while self.step < self.config.steps:
            self.train_step(batches)
            last = self.step == self.config.steps
            ends = not last and self._is_asked_to_end()
            evaluates, saves = self._due(self.config.evaluate_every), self._due(self.config.save_every) or ends
            logs = last or self._due(self.config.log_every)
            if logs or evaluates or saves:
                metrics = self.read_steps(loader)
            if logs:
                self.writer.write("train", self.step, {**metrics, "peak_memory_mib": peak_memory_mib()})
                self._report_bad_samples(loader)
            if last:
                break
            if evaluates:
                self.evaluate()
            if saves:
                self._save(loader)
            if ends:
                raise Preempted(f"at step {self.step} of {self.config.steps}, saved after {self.step - began} steps")
            if evaluates or saves:
                self._reading_since = time.perf_counter()
        # Before the last checkpoint: one whose metrics are not finite is not to be started from.
        metrics = self.evaluate()
        self._save(loader)
        return metrics

    def train_step(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimizer step over a global batch.

        What it measured stays on the device, so that nothing waits for a GPU, until :meth:`read_steps` is called,
        which is before anything is logged or saved. A step whose loss is not finite has a gradient that is not, and
        leaves the weights alone.
        """
        engine = self.engine
        engine.train()
        engine.module.begin_step(self.step)
        torch.manual_seed(self.seed + 1_000_003 * (self.step * world_size() + rank()))
        engine.set_rate(self._rate_factor(self.step))
        total: dict[str, torch.Tensor] = {}
        for _ in range(engine.gradient_accumulation_steps):
            losses = engine(_on_device(next(batches)))
            engine.backward(losses["loss"])
            total = {name: total.get(name, 0) + value.detach().float() for name, value in losses.items()}
            engine.step()
        means = torch.stack(list(total.values())) / engine.gradient_accumulation_steps
        outcome = torch.stack(engine.outcome()).to(means)
        asked = means.new_full((1,), float(reason_to_end() is not None))
        # One reduction for metrics and flags.
        reduced = all_reduce_sum(torch.cat([means, outcome, asked]))
        self._unread.append(reduced[:-1] / world_size())
        self._asked_to_end.append(reduced[-1])
        self._names = (*total, "skipped", "gradient_norm")
        self.step += 1

    def _is_asked_to_end(self) -> bool:
        """Whether a rank was asked to end, :data:`ASKED_LATER` steps ago on a GPU, which is not waited for; the same on
        all ranks."""
        late = ASKED_LATER if device().type == "cuda" else 0
        return len(self._asked_to_end) > late and bool(self._asked_to_end.popleft() > 0)

    @property
    def has_unread_steps(self) -> bool:
        return bool(self._unread)

    def _rate_factor(self, step: int) -> float:
        config = self.config
        return rate_factor(step, config.steps, config.warmup_steps, config.schedule, config.min_lr / config.lr)

    def read_steps(self, loader: TrainLoader) -> dict[str, float]:
        """Looks at all steps since it was last called; every rank sees the same.

        Returns:
            The metrics of the last one, averaged over ranks and micro-batches, and images/s over all of them.

        Raises:
            ValueError: One is not finite, too many steps were skipped, or nothing of the targets is known.
        """
        rows, first = torch.stack(self._unread).tolist(), self.step - len(self._unread)
        for step, row in enumerate(rows, first + 1):
            metrics = dict(zip(self._names, row, strict=True))
            was_skipped, norm = metrics.pop("skipped") > 0, metrics.pop("gradient_norm")
            self._refuse_non_finite(metrics, step)
            self._watch_skips(was_skipped, step)
            metrics |= {"skipped_steps": self.skipped_in_a_row} if was_skipped else {"gradient_norm": norm}
            self._watch_labels(metrics, loader, step)
        elapsed = time.perf_counter() - self._reading_since
        rate = len(rows) * self.config.global_batch_size / elapsed
        self._unread, self._reading_since = [], time.perf_counter()
        return {**metrics, "lr": self._rate_factor(self.step - 1) * self.config.lr, "images_per_s": rate}

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
            outputs = self.engine(_on_device(batch))
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

    def _watch_labels(self, metrics: Mapping[str, float], loader: TrainLoader, step: int) -> None:
        """Stops a run that has learnt from nothing for an epoch, or for all of its steps where these are fewer."""
        if metrics.get("labelled", 1.0) > 0:
            self.unlabelled_in_a_row = 0
            return
        self.unlabelled_in_a_row += 1
        say(f"step {step}: nothing of its targets is known, all is ignored")
        if self.unlabelled_in_a_row >= min(loader.steps_per_epoch, self.config.steps):
            raise SharedError(
                f"step {step}: of the targets of {self.unlabelled_in_a_row} steps, an epoch, nothing was known, "
                "all was ignored: look at how the targets are read (stage3.task), and at the data"
            )

    def _watch_skips(self, was_skipped: bool, step: int) -> None:
        """Stops a run whose weights are left alone again and again, because the gradient is not finite."""
        if not was_skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        say(f"step {step}: skipped, its gradient is not finite")
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise SharedError(
                f"step {step}: the gradients of {self.skipped_in_a_row} steps in a row were not finite, and "
                "the weights were left alone: lower the learning rate, or use a ds_config without bf16"
            )


def _on_device(batch: dict[str, Any]) -> dict[str, Any]:
    """Images on their way to this rank's device, once: teacher and student both want them."""
    return {**batch, "image": batch["image"].to(device(), non_blocking=True)}


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
