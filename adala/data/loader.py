"""Batches for training and evaluation, read by worker processes in an order that is ours (see ``order``)."""

import atexit
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from adala.data.index import ShardIndex
from adala.data.mixture import Mixture
from adala.data.order import (
    StreamPhase,
    StreamState,
    WorkerRange,
    advance,
    evaluation_batches,
    evaluation_range,
    open_phase,
    permuted_shards,
    shards_in_order,
    usable_samples,
    worker_range,
)
from adala.data.positions import Intervals
from adala.data.preparation import Preparation
from adala.data.samples import (
    MIN_BAD_SAMPLES,
    BadSamples,
    DecodeError,
    RawSample,
    Sample,
    decode,
    fill_slots,
    read_mixture,
    read_positions,
    reorder,
)
from adala.data.transfer import Lent, lending
from adala.data.transforms import seeded
from adala.watchdog import write_stacks_when_asked

Batch = dict[str, Any]
# Travels from a worker to the loader with a batch, and is taken out there.
BAD_FIELD = "bad_samples"
# By which schedulers and terminals end a job.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def collate(ids: list[str], tensors: list[dict[str, torch.Tensor]], epoch: int) -> Batch:
    """The tensors of samples, stacked by name, with ``id`` and ``epoch``.

    Raises:
        ValueError: They do not have the same shapes.
    """
    for sample_id, of_sample in zip(ids, tensors, strict=True):
        for name, tensor in of_sample.items():
            if tensor.shape != tensors[0][name].shape:
                raise ValueError(
                    f"the samples {ids[0]} and {sample_id} cannot be one batch: their {name} have the shapes "
                    f"{tuple(tensors[0][name].shape)} and {tuple(tensor.shape)}; use a batch size of 1"
                )
    return {**{name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}, "id": ids, "epoch": epoch}


def at_once(samples: Iterable[RawSample], count: int) -> Iterator[RawSample]:
    """The samples, of which so many are read before the first of them is decoded.

    A processor's caches hold the code of reading, of decoding or of augmenting, so that each is done to a whole batch.
    """
    iterator = iter(samples)
    while some := list(islice(iterator, count)):
        yield from some


def start_worker(worker: int) -> None:
    """Sets up a data worker: one thread, stacks for a watchdog that asks, and deaf to the signals that end a job.

    Schedulers and terminals signal the whole process group; the trainer still wants batches until it has reached a
    step after which it can save.
    """
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    write_stacks_when_asked()
    torch.set_num_threads(1)


def worker_place() -> tuple[int, int]:
    """This process' number among the data workers and how many there are; (0, 1) in the training process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


@dataclass(frozen=True)
class TrainStream(IterableDataset):
    """What one data worker reads: its micro-batches of the epoch under way, then of all epochs to come.

    One stream for all epochs, so that workers start once and read ahead over the end of an epoch.
    """

    index: ShardIndex
    preparation: Preparation
    state: StreamState
    rank: int
    usable: int
    seed: int
    max_bad_fraction: float

    def __iter__(self) -> Iterator[Batch]:
        process, num_streams = worker_place()
        state = self.state
        # torch asks process 0 first and then in turn. The stream may begin within an epoch and an epoch's number of
        # micro-batches need not divide by the workers, so the process that gives number 0 changes with the epoch.
        first_process = -state.phases[-1].micro_batches % num_streams
        while True:
            phase = state.phases[-1]
            worker = (process - first_process) % num_streams
            part = worker_range(self.usable, state, self.rank, worker, self.seed)
            yield from self._micro_batches(part, phase.micro_batch_size, state.epoch)
            left = self.usable - sum(past.samples for past in state.phases[:-1])
            micro_batches = left // (phase.world_size * phase.micro_batch_size)
            first_process = (first_process + micro_batches) % num_streams
            fresh = StreamPhase(phase.world_size, phase.num_workers, phase.micro_batch_size, 0, phase.shuffle_buffer)
            state = StreamState(state.epoch + 1, (fresh,))

    def _micro_batches(self, part: WorkerRange, micro_batch_size: int, epoch: int) -> Iterator[Batch]:
        bad = BadSamples(len(part.positions), self.max_bad_fraction)
        samples = fill_slots(
            at_once(self._raw_samples(part, part.consumed, epoch), micro_batch_size),
            lambda: self._raw_samples(part, 0, epoch),
            bad,
            self.preparation.reader,
        )
        batch: list[Sample] = []
        for sample in samples:
            batch.append(sample)
            if len(batch) == micro_batch_size:
                tensors = [
                    seeded(partial(self.preparation.transform, each.image, each.target), self.seed, each.epoch, each.id)
                    for each in batch
                ]
                yield {**collate([each.id for each in batch], tensors, epoch), BAD_FIELD: bad.take()}
                batch = []
        assert not batch, "a worker's range holds whole micro-batches"

    def _raw_samples(self, part: WorkerRange, skipped: int, epoch: int) -> Iterator[RawSample]:
        """The samples of a range in order of emission, from number ``skipped`` on; those before are not kept."""
        arriving = part.buffer.left_after(skipped)
        samples = self._samples_at(part.positions.take(arriving), epoch)
        return reorder(samples, arriving, part.buffer.emission(skipped))

    def _samples_at(self, positions: Intervals, epoch: int) -> Iterator[RawSample]:
        if self.index.sources:
            # One sequence for all epochs, which begins where the epochs before have stopped.
            endless = positions.shifted(epoch * self.usable)
            return read_mixture(self.index, Mixture.of(self.index), endless, self.seed)
        sequence = permuted_shards([shard.samples for shard in self.index.shards], self.seed, epoch)
        return read_positions(self.index, sequence, positions)


class TrainLoader:
    """Micro-batches of one rank, epoch after epoch, that can stop anywhere and go on there.

    The sequence is a pure function of (seed, epoch, ranks, workers), an epoch's set of samples of seed and epoch alone.
    """

    def __init__(
        self,
        index: ShardIndex,
        preparation: Preparation,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_buffer: int = 1000,
        pin_memory: bool = False,
        state: StreamState = StreamState(),  # noqa: B008 (immutable)
        max_bad_fraction: float = 0.01,
    ):
        """Plans the stream; workers start when it is iterated.

        Args:
            index: The shards.
            preparation: From a sample's files to the tensors of a batch.
            global_batch_size: Samples of one optimizer step, on all ranks together.
            micro_batch_size: Samples of one forward pass on one rank.
            seed: Of the order and the augmentation.
            rank: Of this process.
            world_size: Number of ranks.
            num_workers: Data workers of this rank; 0 reads in this process.
            shuffle_buffer: Samples among which each worker shuffles, undecoded; 0 and 1 do not shuffle.
            pin_memory: Whether batches lie in pinned memory.
            state: Where to begin, from another loader's :attr:`state` over the same index, seed and global batch.
            max_bad_fraction: See :class:`adala.data.samples.BadSamples`.

        Raises:
            ValueError: Fewer samples than one global batch, a global batch that does not divide into micro-batches, or
                a state that this loader cannot continue.
        """
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"a global batch of {global_batch_size} does not divide into micro-batches of {micro_batch_size} on "
                f"{world_size} ranks: choose a multiple of {micro_batch_size * world_size}"
            )
        if index.num_samples < global_batch_size:
            raise ValueError(
                f"the shards hold {index.num_samples} samples, fewer than one global batch of {global_batch_size}: "
                "add shards or lower global_batch_size"
            )
        self.index = index
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation_steps = global_batch_size // (micro_batch_size * world_size)
        self.bad_samples: dict[str, int] = {}
        self._preparation = preparation
        self._seed = seed
        self._rank = rank
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._max_bad_fraction = max_bad_fraction
        self._usable = usable_samples(index.num_samples, global_batch_size)
        self._phase = StreamPhase(world_size, num_workers, micro_batch_size, 0, shuffle_buffer)
        self._state = self._opened(state)

    def _opened(self, state: StreamState) -> StreamState:
        return open_phase(state, self._phase, self._usable, self.global_batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self._usable // self.global_batch_size

    @property
    def dropped_samples(self) -> int:
        """Samples of an epoch that do not fill a global batch; other ones in each epoch, and none of a mixture."""
        return 0 if self.index.sources else self.index.num_samples - self._usable

    @property
    def state(self) -> StreamState:
        """What was handed out so far, however far the workers have read ahead."""
        return replace(self._state, phases=tuple(phase for phase in self._state.phases if phase.micro_batches))

    def __iter__(self) -> Iterator[Batch]:
        """Yields micro-batches without end, from where :attr:`state` stands.

        Each is a dict: ``image`` (B, 3, H, W), float32 or uint8, what else the preparation makes of a sample, ``id`` a
        list of ``<shard file name>/<key>``, ``epoch`` an int.

        Raises:
            ValueError: A shard holds fewer samples than its index says, or too many are bad.
        """
        stream = TrainStream(
            index=self.index,
            preparation=self._preparation,
            state=self._state,
            rank=self._rank,
            usable=self._usable,
            seed=self._seed,
            max_bad_fraction=self._max_bad_fraction,
        )
        for batch in iterate(stream, self._num_workers, self._pin_memory):
            assert batch["epoch"] == self._state.epoch, "workers and loader count the same micro-batches"
            self.bad_samples = dict(Counter(self.bad_samples) + Counter(batch.pop(BAD_FIELD)))
            advanced = advance(self._state, self._usable)
            self._state = advanced if advanced.phases else self._opened(advanced)
            yield batch


def iterate(stream: IterableDataset, num_workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """The batches of a stream through torch's loader, whose workers end when this generator does."""
    if num_workers == 0:
        yield from _loader_of(stream, 0, pin_memory)
        return
    with lending(stream, num_workers) as lent:
        with ending_signals_held_back():
            batches = iter(_loader_of(lent, num_workers, pin_memory))
        # Workers ignore SIGTERM, by which multiprocessing ends those that are left when the interpreter exits before it
        # waits for them: a trainer that failed would wait for ever. Handlers registered last run first. The reference
        # also keeps the garbage collector from closing the workers' queues before they were told to stop.
        stop = partial(stop_workers, batches)
        atexit.register(stop)
        try:
            for batch in batches:
                yield batch.taken() if isinstance(batch, Lent) else batch  # in pinned memory, it is taken already
        finally:
            atexit.unregister(stop)
            stop()


def _loader_of(stream: IterableDataset, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        # Python 3.14 starts processes otherwise by default, and each would import all of torch and get a copy of the
        # index.
        multiprocessing_context="fork" if num_workers else None,
        # It would otherwise draw its base seed from the global generator, and move the trainer's random numbers.
        generator=torch.Generator(),
    )


@contextmanager
def ending_signals_held_back() -> Iterator[None]:
    """Processes started within are deaf to these signals from birth, not only once they are set up.

    A signal that comes meanwhile reaches this process at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_workers(batches: Any) -> None:
    """Ends the workers of torch's multi-process iterator ``batches``, by force those that are stuck in a read."""
    batches._shutdown_workers()
    for process in batches._workers:
        if process.is_alive():
            process.kill()


@dataclass(frozen=True)
class EvaluationStream(IterableDataset):
    """What one data worker reads of a rank's evaluation samples."""

    index: ShardIndex
    preparation: Preparation
    positions: Intervals
    batch_size: int
    max_bad_fraction: float

    def __iter__(self) -> Iterator[Batch]:
        worker, num_streams = worker_place()
        sequence = shards_in_order([shard.samples for shard in self.index.shards])
        batches = evaluation_batches(range(len(self.positions)), self.batch_size, num_streams, worker)
        if not batches:
            return
        samples = read_positions(self.index, sequence, self.positions.slice(batches[0].start, batches[-1].stop))
        total = sum(len(batch) for batch in batches)
        # Few of few: scores of what is left should still be scores of the set.
        at_least = min(MIN_BAD_SAMPLES, max(1, total // 10))
        bad = BadSamples(total, self.max_bad_fraction, at_least)
        for batch in batches:
            raws = list(islice(samples, len(batch)))
            decoded = [sample for raw in raws if (sample := self._decode(raw, bad)) is not None]
            if decoded:
                tensors = [self.preparation.transform(sample.image, sample.target) for sample in decoded]
                yield {**collate([sample.id for sample in decoded], tensors, epoch=0), BAD_FIELD: bad.take()}
        if left := bad.take():  # of a last batch without a good sample
            yield {BAD_FIELD: left}

    def _decode(self, raw: RawSample, bad: BadSamples) -> Sample | None:
        try:
            return decode(raw, self.preparation.reader)
        except DecodeError as error:
            bad.add(raw, error)
            return None


class EvaluationLoader:
    """One rank's part of an evaluation set: over all ranks each sample exactly once, without padding.

    A bad sample is left out and counted in ``bad_samples``, by shard; more than a few stop the evaluation.
    """

    def __init__(
        self,
        index: ShardIndex,
        preparation: Preparation,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        limit: int | None = None,
        max_bad_fraction: float = 0.01,
    ):
        """Cuts the set.

        Args:
            index: The shards, read in this order.
            preparation: From a sample's files to the tensors of a batch.
            batch_size: Samples of a batch; a rank's last one in reading order may be smaller.
            rank: Of this process.
            world_size: Number of ranks, whose parts differ by at most one sample.
            num_workers: Data workers of this rank; 0 reads in this process.
            limit: Only the first so many samples of the set, over all ranks together; None is all.
            max_bad_fraction: See :class:`adala.data.samples.BadSamples`; of few samples, a tenth may be bad.
        """
        chosen = Intervals.whole(0, index.num_samples) if limit is None else index.first(limit)
        mine = evaluation_range(len(chosen), rank, world_size)
        positions = chosen.slice(mine.start, mine.stop)
        self._num_batches = -(-len(positions) // batch_size)
        self._num_workers = min(num_workers, self._num_batches)
        self._stream = EvaluationStream(index, preparation, positions, batch_size, max_bad_fraction)
        self.bad_samples: dict[str, int] = {}

    def __len__(self) -> int:
        """Batches of this rank at most; ranks may differ by one, and those of bad samples alone are left out."""
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yields the part once, in dicts as those of :class:`TrainLoader`.

        Raises:
            ValueError: Too many samples are bad, or a shard holds fewer than its index says.
        """
        self.bad_samples = {}
        for batch in iterate(self._stream, self._num_workers):
            self.bad_samples = dict(Counter(self.bad_samples) + Counter(batch.pop(BAD_FIELD)))
            if batch:
                yield batch
