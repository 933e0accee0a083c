"""The training loop. It knows no stage by name: an engine gives named losses, this minimises ``loss``."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from adala.checkpoint import Checkpoints, load_checkpoint, newest_checkpoint
from adala.config import StageConfig, val_key
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
from adala.nonfinite import Fault
from adala.optim import average_decay, rate_factor
from adala.preemption import Preempted, reason_to_end
from adala.progress import MetricWriter

# Steps after which a GPU's answer is there without waiting for it.
ASKED_LATER = 8


@dataclass(frozen=True)
class OnItsWay:
    """Numbers that a device was asked for.

    Attributes:
        values: Where they arrive, on the host.
        arrived: Says when; None where they are there.
    """

    values: torch.Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def send(cls, values: torch.Tensor) -> "OnItsWay":
        """Asks for them, and does not wait. Asked for only when they are read, they would come behind all that the
        device was given since."""
        if not values.is_cuda:
            return cls(values)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(host, arrived)

    def read(self) -> list[float]:
        """The numbers, as soon as they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


@dataclass(frozen=True)
class _Answer:
    """What the ranks of a step said together.

    Attributes:
        end: One was asked to end.
        save: It is time for a checkpoint.
        written: All have written their part of the last one.
    """

    end: bool = False
    save: bool = False
    written: bool = False


@dataclass
class Trainer:
    """One stage's loop: step, log, evaluate, save, resume.

    Attributes:
        engine: What is trained.
        config: Lengths and rates.
        build_loader: Called with the state of the stream to continue from and the step that comes next, whose image
            size its batches have.
        evaluation_loaders: Held-out data, by the name of their set; a single one without a name has an empty one.
        build_evaluator: Gives a fresh evaluator of the held-out data.
        writer: Where metrics go.
        checkpoints: Where they go, and which are kept.
        seed: Of whatever the model draws while it trains; every step is seeded anew, so that a resumed run draws the
            same.
        beat: Called whenever training goes on, see :mod:`adala.watchdog`.
    """

    engine: Engine
    config: StageConfig
    build_loader: Callable[[StreamState, int], TrainLoader]
    evaluation_loaders: Mapping[str, EvaluationLoader]
    build_evaluator: Callable[[], Evaluator]
    writer: MetricWriter
    checkpoints: Checkpoints
    seed: int = 0
    beat: Callable[[], None] = lambda: None
    step: int = 0
    skipped_in_a_row: int = 0
    skipped_in_all: int = 0
    unlabelled_in_a_row: int = 0
    reported_bad_samples: dict[str, int] = field(default_factory=dict)
    _unread: list[torch.Tensor] = field(default_factory=list, init=False)
    _names: tuple[str, ...] = field(default=(), init=False)
    _reading_since: float = field(default_factory=time.perf_counter, init=False)
    _questions: deque[OnItsWay] = field(default_factory=partial(deque, maxlen=ASKED_LATER + 1), init=False)
    owes_evaluation: bool = field(default=False, init=False)
    _saved_at: float = field(default_factory=time.monotonic, init=False)
    _saved_step: int = field(default=0, init=False)

    def fit(self) -> dict[str, float]:
        """Trains from the newest whole checkpoint, or from the start, to the last step.

        Returns:
            The last evaluation's metrics; empty without evaluation loaders.

        Raises:
            ValueError: Weights or metrics are not finite, too many steps in a row were skipped since gradient or loss
                was not, or the data or the disk are at fault; every rank raises.
            Preempted: A rank was asked to end; all have saved.
        """
        loader = self._open_stream(self._resume())
        began = self.step
        if any_rank(reason_to_end() is not None):
            raise Preempted(f"at step {self.step} of {self.config.steps}, nothing new to save")
        batches = iter(loader)
        self._saved_at, self._saved_step = time.monotonic(), self.step
        if self.step == 0 or (self.owes_evaluation and self.step < self.config.steps):
            self._evaluate_or_save(loader)
        self._reading_since = time.perf_counter()
        while self.step < self.config.steps:
            if self.step > began and self._changes_size():
                batches.close()
                self.reported_bad_samples = {}
                loader = self._open_stream(loader.state)
                batches = iter(loader)
            self.train_step(batches)
            last = self.step == self.config.steps
            answer = self._ask()
            ends = not last and answer.end
            evaluates = self._due(self.config.evaluate_every)
            saves = self._due(self.config.save_every) or answer.save or ends
            logs = last or self._due(self.config.log_every)
            if logs or evaluates or saves:
                metrics = self.read_steps(loader)
            if logs:
                self.writer.write("train", self.step, {**metrics, "peak_memory_mib": peak_memory_mib()})
                self._report_bad_samples(loader)
            if last:
                break
            if answer.written:
                self._finish_saving()
            # Before the evaluation, during which it is written; one that is cut short is made up for.
            self.owes_evaluation = evaluates
            if saves:
                self._save(loader)
            if ends:
                self._finish_saving()
                raise Preempted(f"at step {self.step} of {self.config.steps}, saved after {self.step - began} steps")
            if evaluates:
                self._evaluate_or_save(loader)
            if evaluates or saves:
                self._reading_since = time.perf_counter()
        # Before the last checkpoint: one whose metrics are not finite is not to be started from.
        metrics = self._evaluate_or_save(loader)
        self._save(loader)
        self._finish_saving()
        return metrics

    def _open_stream(self, state: StreamState) -> TrainLoader:
        """Batches of the size that the next step trains on, from where ``state`` stands."""
        loader = self.build_loader(state, self.step)
        if self.config.image_sizes:
            self.engine.set_accumulation(loader.micro_batch_size, loader.gradient_accumulation_steps)
        return loader

    def _changes_size(self) -> bool:
        return any(change["from_step"] == self.step for change in self.config.image_sizes)

    def train_step(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimizer step over a global batch.

        What it measured stays on the device, so that nothing waits for a GPU, until :meth:`read_steps` is called,
        which is before anything is logged or saved. A step whose loss is not finite has a gradient that is not, and
        leaves the weights alone; the numbers say where that begins, of each rank.
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
        if self.config.ema:
            engine.update_average(average_decay(self.step, self.config.ema))
        means = torch.stack(list(total.values())) / engine.gradient_accumulation_steps
        *outcome, first_fault = engine.outcome()
        outcome, faults = torch.stack(outcome).to(means), means.new_zeros(world_size())
        faults[rank()] = first_fault
        questions = means.new_tensor(
            [reason_to_end() is not None, self._is_time_to_save(), self.checkpoints.is_writing]
        )
        # One reduction for metrics and flags.
        reduced = all_reduce_sum(torch.cat([means, outcome, faults, questions]))
        self._names = (*total, "skipped", "gradient_norm")
        reduced[: len(self._names)] /= world_size()
        self._unread.append(reduced[: -len(questions)])
        self._questions.append(OnItsWay.send(reduced[-len(questions) :]))
        self.step += 1
        self.beat()

    def _is_time_to_save(self) -> bool:
        """By rank 0's clock, which is the one that counts."""
        minutes = self.config.save_every_minutes
        return rank() == 0 and minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def _ask(self) -> "_Answer":
        """What ranks wanted :data:`ASKED_LATER` steps ago on a GPU, which is not waited for; the same on all ranks."""
        late = ASKED_LATER if device().type == "cuda" else 0
        if len(self._questions) <= late:
            return _Answer()
        end, save, writing = self._questions.popleft().read()
        # What was said before the last checkpoint was begun is not said of it.
        is_since = self.step - late > self._saved_step
        return _Answer(end > 0, save > 0 and is_since, not writing and is_since)

    @property
    def has_unread_steps(self) -> bool:
        return bool(self._unread)

    def _rate_factor(self, step: int) -> float:
        config = self.config
        return rate_factor(step, config.steps, config.warmup_steps, config.schedule, config.min_lr / config.lr)

    def read_steps(self, loader: TrainLoader) -> dict[str, float]:
        """Looks at all steps since it was last called; every rank sees the same.

        Returns:
            The metrics of the last one, averaged over ranks and micro-batches, and images/s over all of them; without
            those that are not finite where it was skipped.

        Raises:
            ValueError: One is not finite, too many steps were skipped, or nothing of the targets is known.
        """
        rows, first = torch.stack(self._unread).tolist(), self.step - len(self._unread)
        for step, row in enumerate(rows, first + 1):
            metrics = dict(zip(self._names, row, strict=False))
            was_skipped, norm = metrics.pop("skipped") > 0, metrics.pop("gradient_norm")
            fault = self.engine.watch.fault([round(number) for number in row[len(self._names) :]])
            if was_skipped:
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self._refuse_non_finite(metrics, step, fault)
            self._watch_skips(was_skipped, step, fault)
            metrics |= {"skipped_steps": self.skipped_in_a_row} if was_skipped else {"gradient_norm": norm}
            self._watch_labels(metrics, loader, step)
        elapsed = time.perf_counter() - self._reading_since
        rate = len(rows) * self.config.global_batch_size / elapsed
        self._unread, self._reading_since = [], time.perf_counter()
        return {**metrics, "lr": self._rate_factor(self.step - 1) * self.config.lr, "images_per_s": rate}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics over the held-out data, each sample counted once; every rank calls it and gets the same.

        Those of a named set have its name before them: ``photos/loss``. They are of the average of the weights where
        one is kept.

        Raises:
            ValueError: One is not finite.
            Preempted: A rank was asked to end meanwhile.
        """
        self.engine.eval()
        with self.engine.averaged():
            return self._evaluate_sets()

    def _evaluate_sets(self) -> dict[str, float]:
        metrics, last = {}, None
        for name, loader in self.evaluation_loaders.items():
            evaluator = self.build_evaluator()
            for batch, is_new in _equally_many(loader, last, val_key(name)):
                self.beat()
                if any_rank(reason_to_end() is not None):
                    raise Preempted(f"at step {self.step} of {self.config.steps}, while it was evaluated")
                outputs, last = self.engine(_on_device(batch)), batch
                if is_new:
                    evaluator.update(outputs, batch)
            found = evaluator.total()
            named = {f"{name}/{key}" if name else key: value for key, value in found.items()}
            self._refuse_non_finite(named, self.step)
            self.writer.write(f"val/{name}" if name else "val", self.step, found)
            metrics |= named
        return metrics

    def _resume(self) -> StreamState:
        """Restores the newest whole checkpoint, if there is one; returns where its stream of samples stood."""
        path = newest_checkpoint(self.checkpoints.folder)
        if path is None:
            return StreamState()
        state = load_checkpoint(path, self.engine)
        self.step = state["step"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.skipped_in_all = state["skipped_in_all"]
        self.unlabelled_in_a_row = state["unlabelled_in_a_row"]
        self.owes_evaluation = state["owes_evaluation"]
        say(f"resuming from {path} at step {self.step} of {self.config.steps}")
        return StreamState.from_dict(state["stream"])

    def _save(self, loader: TrainLoader) -> None:
        """Begins a checkpoint, which is written while training goes on."""
        self._finish_saving()
        in_a_row = {"skipped_in_a_row": self.skipped_in_a_row, "unlabelled_in_a_row": self.unlabelled_in_a_row}
        counts = {**in_a_row, "skipped_in_all": self.skipped_in_all}
        state = {"stream": loader.state.to_dict(), "owes_evaluation": self.owes_evaluation, **counts}
        self.checkpoints.begin(self.step, state)
        self._saved_at, self._saved_step = time.monotonic(), self.step

    def _finish_saving(self) -> None:
        """Completes a checkpoint that was begun, and says what it cost."""
        cost = self.checkpoints.finish()
        if cost:
            self.writer.write("checkpoint", self._saved_step, cost)

    def _evaluate_or_save(self, loader: TrainLoader) -> dict[str, float]:
        """Evaluates; where a rank is asked to end meanwhile, what is not saved yet is, and the evaluation owed."""
        try:
            return self.evaluate()
        except Preempted:
            if self.step > self._saved_step:
                self.owes_evaluation = True
                self._save(loader)
            self._finish_saving()
            raise

    def _report_bad_samples(self, loader: TrainLoader) -> None:
        """Says which shards had samples that could not be used, whenever this rank has met new ones."""
        if loader.bad_samples != self.reported_bad_samples:
            self.reported_bad_samples = dict(loader.bad_samples)
            counts = ", ".join(f"{count} in {shard}" for shard, count in sorted(loader.bad_samples.items()))
            print(f"rank {rank()}: bad samples skipped so far: {counts}", flush=True)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _refuse_non_finite(self, metrics: Mapping[str, float], step: int, fault: Fault | None = None) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            where = "" if fault is None or fault.place is None else f"; {fault}"
            raise SharedError(
                f"step {step}: {', '.join(bad)} not finite{where}; the last checkpoint is intact: "
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

    def _watch_skips(self, was_skipped: bool, step: int, fault: Fault) -> None:
        """Records a step that left the weights alone, because the gradient, or the loss, is not finite, with where that
        begins; stops a run in which it happens again and again."""
        if not was_skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.skipped_in_all += 1
        counts = {"in_a_row": self.skipped_in_a_row, "in_all": self.skipped_in_all}
        self.writer.note("skipped", step, {**fault.to_row(), **counts})
        say(f"step {step}: skipped, its gradient is not finite: {fault} ({self.skipped_in_all} skipped so far)")
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise SharedError(
                f"step {step}: the gradients of {self.skipped_in_a_row} steps in a row were not finite, and "
                f"the weights were left alone; in this step {fault}: lower the learning rate, look at the data, or use "
                "a ds_config without bf16"
            )


def _on_device(batch: dict[str, Any]) -> dict[str, Any]:
    """Images on their way to this rank's device, once: teacher and student both want them."""
    return {**batch, "image": batch["image"].to(device(), non_blocking=True)}


def _equally_many(
    loader: EvaluationLoader, spare: dict[str, Any] | None, key: str
) -> Iterator[tuple[dict[str, Any], bool]]:
    """This rank's batches, then its last one again and again until all ranks are through; whether it is a new one.

    Under ZeRO-3 a forward pass is a collective: a rank with fewer batches than another must keep calling.

    Args:
        loader: Of this rank.
        spare: What a rank repeats that has no batch at all; None where each must have one.
        key: Of the recipe, for messages.

    Raises:
        ValueError: A rank without a ``spare``, or all ranks, found no usable sample; every rank raises.
    """
    batches = iter(loader)
    first = next(batches, None)
    counts = gather_objects((first is not None, len(loader)))
    found = [is_found for is_found, _ in counts]
    if not (all(found) if spare is None else any(found)):
        raise SharedError(f"a rank found no usable held-out sample: name other shards in {key}")
    last = spare if first is None else first
    yield last, first is not None
    for _ in range(max(length for _, length in counts) - 1):
        batch = next(batches, None)
        last = last if batch is None else batch
        yield last, batch is not None
