"""Several sources in proportions: exact in every stretch, each sample as often as the next, and resumable."""

import functools
import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from adala.data.index import Shard, ShardIndex, build_index, load_index, mix
from adala.data.loader import EvaluationLoader, TrainLoader
from adala.data.mixture import MOST_PARTS, Mixture, whole_parts
from adala.data.order import StreamState
from adala.data.positions import Intervals
from adala.data.preparation import View, prepare_images

VIEW = View((8, 8), (0.5,) * 3, (0.5,) * 3, (4, 4))
IMAGES, HELD_OUT = (prepare_images(VIEW.image_transform(augmentation)) for augmentation in ("shift", None))
GLOBAL_BATCH_SIZE = 8
# Two sources whose shards and keys have the same names, and one that is gone through more than twice an epoch.
SIZES, WEIGHTS = ((13, 7, 0, 21), (11, 6), (3, 2)), (2, 0.5, 1.5)
SAMPLES = sum(map(sum, SIZES))
STEPS = SAMPLES // GLOBAL_BATCH_SIZE

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def mixed(shard_folder) -> ShardIndex:
    folders = [shard_folder(*sizes, name=f"source-{number}") for number, sizes in enumerate(SIZES)]
    return mix([load_index([str(folder)]) for folder in folders], WEIGHTS)


@pytest.fixture
def train_loader(mixed):
    defaults = {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": 2, "seed": 5, "shuffle_buffer": 6}
    return functools.partial(TrainLoader, mixed, IMAGES, **defaults)


def take(loader: TrainLoader, steps: int) -> list[dict]:
    return list(islice(loader, steps * loader.gradient_accumulation_steps))


def ids(batches) -> list[str]:
    return [sample_id for batch in batches for sample_id in batch["id"]]


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((3, 1), (3, 1)),
        ((6, 2), (3, 1)),
        ((0.3, 0.1), (3, 1)),
        ((1e-3, 2), (1, 2000)),
        ((7,), (1,)),
        ((1e-300, 1e300), (1, MOST_PARTS - 4)),
    ],
)
def test_weights_are_whole_numbers_in_the_very_proportions(weights, parts) -> None:
    assert whole_parts(weights) == parts


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 7), (0.123456789012345, 5.0, 1e-9), (1e300,) * 3 + (1e299,)])
def test_weights_of_many_digits_are_rounded(weights) -> None:
    parts = whole_parts(weights)
    assert sum(parts) <= MOST_PARTS and min(parts) >= 1
    exact = np.array(weights) / np.max(weights) / np.sum(np.array(weights) / np.max(weights))
    assert np.allclose(np.array(parts) / sum(parts), exact, atol=2e-9)


@pytest.mark.parametrize("case", range(40))
def test_every_stretch_has_the_sources_in_their_proportions(case: int) -> None:
    generator = random.Random(case)
    parts = tuple(generator.choice([1, 2, 5, 30, 10**6, 123_456_789]) for _ in range(generator.randint(1, 6)))
    mixture = Mixture((1,) * len(parts), parts)
    begin = generator.choice([0, 1, 10**6, 10**14])
    positions = np.arange(begin, begin + 3000)
    sources, numbers = mixture.locate(positions)
    counts = mixture.counts(np.append(positions, positions[-1] + 1))
    for source, part in enumerate(parts):
        # One after the other, each once: what stands at a position is the next of its source.
        assert (np.diff(counts[source]) == (sources == source)).all()
        assert (numbers[sources == source] == counts[source][:-1][sources == source]).all()
        exact = [(begin + n) * part / sum(parts) for n in range(3001)] if begin < 10**7 else None
        if exact is not None:
            assert np.abs(counts[source] - exact).max() < 2
        else:
            stretch = counts[source] - counts[source][0]
            assert np.abs(stretch - np.arange(3001) * (part / sum(parts))).max() < 4
    assert (counts.sum(0) == np.append(positions, positions[-1] + 1)).all()


def test_the_sequence_is_the_same_in_every_version() -> None:
    sources, numbers = Mixture((9, 9, 9), (4, 2, 1)).locate(np.arange(14))
    assert sources.tolist() == [0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 2, 0, 1, 0]
    assert numbers.tolist() == [0, 0, 1, 0, 2, 1, 3, 4, 2, 5, 1, 6, 3, 7]


def test_numbers_of_intervals_are_those_of_their_positions() -> None:
    mixture = Mixture((10, 20, 5), (5, 3, 1))
    chosen = np.array(sorted(random.Random(0).sample(range(500), 200)))
    sources, numbers = mixture.locate(chosen)
    for source, intervals in enumerate(mixture.numbers(Intervals.of(chosen))):
        assert list(intervals) == numbers[sources == source].tolist()


def test_over_epochs_every_sample_of_a_source_comes_as_often_as_the_next(train_loader, mixed) -> None:
    """Nothing is dropped and nothing begins anew with an epoch."""
    assert [source.num_shards for source in mixed.sources] == [4, 2, 2]
    loader = train_loader()
    assert (loader.steps_per_epoch, loader.dropped_samples) == (STEPS, 0)
    batches = take(loader, 5 * STEPS)
    seen = Counter(ids(batches))
    assert seen.total() == 5 * STEPS * GLOBAL_BATCH_SIZE
    for number, sizes in enumerate(SIZES):
        counts = [count for sample_id, count in seen.items() if sample_id.startswith(f"{number}:train-")]
        expected = seen.total() * WEIGHTS[number] / sum(WEIGHTS)
        assert abs(sum(counts) - expected) < 2 and len(counts) == sum(sizes)
        assert max(counts) - min(counts) <= 1
    by_epoch = [
        Counter(sample_id[0] for batch in batches if batch["epoch"] == e for sample_id in batch["id"]) for e in range(5)
    ]
    assert all(abs(epoch["0"] - STEPS * GLOBAL_BATCH_SIZE / 2) < 2 for epoch in by_epoch)


def test_every_worker_gets_the_sources_in_their_proportions(train_loader) -> None:
    for rank in range(2):
        batches = take(train_loader(rank=rank, world_size=2, num_workers=2, shuffle_buffer=0), STEPS)
        for worker in range(2):
            of_worker = Counter(sample_id[0] for sample_id in ids(batches[worker::2]))
            assert abs(of_worker["0"] - of_worker.total() / 2) < 2 and abs(of_worker["1"] - of_worker.total() / 8) < 2


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 3)])
@pytest.mark.parametrize("consumed", [1, 6, 4 * STEPS - 1, 4 * STEPS, 4 * STEPS + 3])
def test_a_mixture_goes_on_exactly(train_loader, world_size: int, num_workers: int, consumed: int) -> None:
    rank = world_size - 1
    consumed //= world_size
    build = functools.partial(train_loader, rank=rank, world_size=world_size, num_workers=num_workers)
    whole = list(islice(build(), consumed + 9))
    first = build()
    begun = list(islice(first, consumed))
    rest = list(islice(build(state=StreamState.from_dict(json.loads(json.dumps(first.state.to_dict())))), 9))
    assert [batch["id"] for batch in begun + rest] == [batch["id"] for batch in whole]
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(rest, whole[consumed:], strict=True))


@pytest.mark.parametrize("worlds", [((1, 0), (2, 2)), ((2, 2), (4, 1), (1, 3))])
def test_other_ranks_and_workers_go_on_with_the_same_samples(train_loader, worlds) -> None:
    """Over two epochs, with a change of the world in the midst of both."""
    alone, pictures, state = take(train_loader(), 2 * STEPS), Counter(), StreamState()
    steps = [STEPS // 2, STEPS, 2 * STEPS - STEPS // 2 - STEPS]
    for number, count in enumerate(steps):
        world_size, num_workers = worlds[number % len(worlds)]
        for rank in range(world_size):
            loader = train_loader(rank=rank, world_size=world_size, num_workers=num_workers, state=state)
            pictures += content(take(loader, count))
        state = loader.state
    assert state == StreamState(2) and pictures == content(alone)


def content(batches) -> Counter:
    return Counter(
        (sample_id, image.numpy().tobytes())
        for batch in batches
        for sample_id, image in zip(batch["id"], batch["image"], strict=True)
    )


def test_a_sample_that_comes_again_within_an_epoch_is_augmented_anew(train_loader) -> None:
    """A small source is gone through several times, which are epochs of its own."""
    seen = content(take(train_loader(), STEPS))
    again = Counter(sample_id for sample_id, _ in seen if sample_id.startswith("2:"))
    assert sum(count for (name, _), count in seen.items() if name.startswith("2:")) > 2 * len(again)
    assert sum(count > 1 for count in again.values()) >= 4


def test_samples_of_two_sources_with_the_same_names_are_not_taken_for_each_other(train_loader) -> None:
    """They have the same names and images, and each its own augmentation."""
    pictures = content(take(train_loader(), STEPS))
    zero, one = ({(name[2:], image) for name, image in pictures if name[0] == number} for number in "01")
    common = {name for name, _ in zero} & {name for name, _ in one}
    assert len(common) >= 6 and len(zero & one) <= len(common) // 2


def test_sources_with_the_same_shards_have_orders_of_their_own(shard_folder) -> None:
    index = mix([load_index([str(shard_folder(*[1] * 8, name=name))]) for name in "ab"], (1, 1))
    loader = TrainLoader(index, IMAGES, global_batch_size=8, micro_batch_size=8, seed=0, shuffle_buffer=0)
    seen = ids(take(loader, 4))
    orders = [[sample_id[2:] for sample_id in seen if sample_id[0] == source] for source in "01"]
    assert len(orders[0]) == len(orders[1]) == 16 and orders[0] != orders[1]
    assert orders[0][:8] != orders[0][8:] and sorted(orders[0][:8]) == sorted(orders[0][8:])


def test_bad_samples_are_counted_by_source(shard_folder) -> None:
    folders = [shard_folder(8, bad=bad, name=name) for name, bad in (("a", (1,)), ("b", (2, 3)))]
    index = mix([load_index([str(folder)]) for folder in folders], (1, 1))
    loader = TrainLoader(index, IMAGES, global_batch_size=4, micro_batch_size=4, seed=0, num_workers=1)
    assert len(ids(take(loader, 4))) == 16
    assert loader.bad_samples == {"0:train-00000.tar": 1, "1:train-00000.tar": 2}


def test_the_first_samples_of_a_mixture_are_of_all_its_sources(mixed) -> None:
    loader = EvaluationLoader(mixed, HELD_OUT, batch_size=5, limit=24)
    assert Counter(sample_id[0] for sample_id in ids(loader)) == {"0": 12, "1": 3, "2": 5}
    assert len(mixed.first(24)) == 20, "the last source has five"
    # A mixture of one gets all that it asks for, and asks for no more than there is.
    everything = [*range(SAMPLES)]
    alone = mix([ShardIndex(tuple(replace(shard, source=None) for shard in mixed.shards))], [0.3])
    assert [list(alone.first(limit)) for limit in (7, 100)] == [everything[:7], everything]
    heavy = replace(mixed, sources=tuple(replace(source, weight=1.5e308) for source in mixed.sources))
    assert list(heavy.first(6)) == [0, 1, 41, 42, 58, 59]


def test_an_evaluation_without_a_limit_sees_every_sample_of_a_mixture_once(mixed) -> None:
    everything = [
        sample_id
        for rank in range(2)
        for sample_id in ids(EvaluationLoader(mixed, HELD_OUT, batch_size=5, rank=rank, world_size=2, num_workers=1))
    ]
    assert len(everything) == len(set(everything)) == SAMPLES


def test_a_source_without_samples_or_a_shard_in_two_is_refused(shard_folder, tmp_path) -> None:
    full, empty = (load_index([str(shard_folder(*sizes, name=name))]) for name, sizes in (("a", (4, 3)), ("b", (1,))))
    empty = ShardIndex(tuple(Shard(shard.url, 0, shard.bytes) for shard in empty.shards))
    with pytest.raises(ValueError, match=r"source 1 of the mixture \(.*b/train-00000.tar\) holds no samples"):
        mix([full, empty], (1, 1))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"the shard .*link/train-00000.tar is in two sources of the mixture"):
        mix([full, load_index([f"{tmp_path}/link"])], (1, 2))
    # And where the shard itself is a link, also within one data set.
    (tmp_path / "c").mkdir()
    (tmp_path / "c/train-00000.tar").symlink_to(tmp_path / "a/train-00001.tar")
    build_index(tmp_path / "c")
    linked = load_index([f"{tmp_path}/c"])
    with pytest.raises(ValueError, match=r"the shard .*c/train-00000.tar is in two sources of the mixture"):
        mix([full, linked], (1, 2))
    with pytest.raises(ValueError, match=r"the shard .*c/train-00000.tar is named twice"):
        load_index([f"{tmp_path}/a", f"{tmp_path}/c"])
