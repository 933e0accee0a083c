import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch
from launch import PATIENCE_S
from PIL import Image

import adala.data.loader
from adala.data.index import ShardIndex, build_index, load_index
from adala.data.loader import EvaluationLoader, TrainLoader, start_worker
from adala.data.order import StreamState
from adala.data.pack import write_shards
from adala.data.preparation import View, prepare_images
from adala.data.samples import BadDataError
from adala.tasks import Classification

NORMALISATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
VIEW = View((8, 8), *NORMALISATION, (4, 4))
IMAGES, HELD_OUT = (prepare_images(VIEW.image_transform(augmentation)) for augmentation in ("shift", None))
LABELLED = Classification(num_classes=1000).prepare(VIEW, "shift")
# 67 samples: 64 in global batches of 16, over ranges that begin and end inside shards.
SIZES = (13, 7, 21, 10, 16)
GLOBAL_BATCH_SIZE = 16
STEPS = 4
TOPOLOGIES = [(1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4)]


@pytest.fixture
def index(shard_folder):
    return load_index([f"{shard_folder(*SIZES)}/train-*.tar"])


@pytest.fixture
def train_loader(index):
    defaults = {
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "micro_batch_size": 4,
        "seed": 5,
        "shuffle_buffer": 6,
    }
    return functools.partial(TrainLoader, index, LABELLED, **defaults)


# Four workers are more than some machines have cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def take(loader: TrainLoader, steps: int) -> list[dict]:
    """The micro-batches of a number of optimizer steps, without those that workers have read ahead."""
    return list(islice(loader, steps * loader.gradient_accumulation_steps))


def ids(batches) -> list[str]:
    return [sample_id for batch in batches for sample_id in batch["id"]]


def batch_ids(batches) -> list[tuple[str, ...]]:
    return [tuple(batch["id"]) for batch in batches]


@pytest.fixture
def epoch_sets(train_loader):
    """The sample sets of epochs 0 and 1, from one rank and no workers."""
    batches = take(train_loader(), 2 * STEPS)
    return [set(ids(batch for batch in batches if batch["epoch"] == epoch)) for epoch in range(2)]


@pytest.mark.parametrize("world_size, num_workers", TOPOLOGIES)
def test_an_epoch_is_the_same_set_on_all_topologies_and_the_same_sequence_each_time(
    train_loader, epoch_sets, world_size, num_workers
):
    ranks = []
    for rank in range(world_size):
        loader = train_loader(rank=rank, world_size=world_size, num_workers=num_workers)
        batches = take(loader, 2 * STEPS)
        ranks.append(batches)
        assert loader.state == StreamState(2)
        # Two epochs of 64 / world_size samples: neither divides by four workers' micro-batches on two ranks.
        again = take(train_loader(rank=rank, world_size=world_size, num_workers=num_workers), STEPS + 1)
        assert batch_ids(again) == batch_ids(batches)[: len(again)]
    for epoch in range(2):
        seen = [sample_id for batches in ranks for sample_id in ids(b for b in batches if b["epoch"] == epoch)]
        assert len(seen) == 64
        assert set(seen) == epoch_sets[epoch] and len(epoch_sets[epoch]) == 64
    assert epoch_sets[0] != epoch_sets[1]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_epochs_whose_batches_do_not_divide_by_the_workers(train_loader, index, num_workers):
    """Four micro-batches of 16 an epoch, and five of 12: the next epoch begins with another worker than the last."""
    for micro_batch_size in (16, 12):
        loader = train_loader(
            global_batch_size=micro_batch_size, micro_batch_size=micro_batch_size, num_workers=num_workers
        )
        per_epoch = index.num_samples // micro_batch_size
        batches = take(loader, 3 * per_epoch)
        assert [batch["epoch"] for batch in batches] == [epoch for epoch in range(3) for _ in range(per_epoch)]
        for epoch in range(3):
            seen = ids(batch for batch in batches if batch["epoch"] == epoch)
            assert len(seen) == len(set(seen)) == per_epoch * micro_batch_size


def test_batches_are_shuffled_by_seed_and_epoch(train_loader):
    orders = {
        tuple(ids(take(train_loader(seed=seed, state=StreamState(epoch)), 1))) for seed in (1, 2) for epoch in (0, 1)
    }
    assert len(orders) == 4
    unshuffled = ids(take(train_loader(shuffle_buffer=0), STEPS))
    assert unshuffled != ids(take(train_loader(), STEPS))


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (1, 3), (2, 2)])
@pytest.mark.parametrize("consumed", [1, 5, 8, 9, 21])
def test_a_resumed_loader_continues_exactly(train_loader, world_size, num_workers, consumed):
    rank = world_size - 1
    build = functools.partial(train_loader, rank=rank, world_size=world_size, num_workers=num_workers)
    whole = list(islice(build(), consumed + 12))
    first = build()
    begun = list(islice(first, consumed))
    assert batch_ids(begun) == batch_ids(whole[:consumed])
    state = StreamState.from_dict(json.loads(json.dumps(first.state.to_dict())))
    second = build(state=state)
    assert second.state == state
    rest = list(islice(second, 12))
    assert batch_ids(rest) == batch_ids(whole[consumed:])
    for resumed, uninterrupted in zip(rest, whole[consumed:], strict=True):
        assert torch.equal(resumed["image"], uninterrupted["image"])
        assert (resumed["epoch"], resumed["label"].tolist()) == (
            uninterrupted["epoch"],
            uninterrupted["label"].tolist(),
        )


def test_iterating_again_continues_after_what_was_handed_out(train_loader):
    whole = batch_ids(take(train_loader(num_workers=2), STEPS))
    loader = train_loader(num_workers=2)
    parts = [batch_ids(islice(loader, count)) for count in (3, 4, 5)]
    assert sum(parts, []) == whole[:12]


@pytest.mark.parametrize("before, after", [((2, 2), (1, 0)), ((1, 0), (2, 3)), ((1, 2), (1, 4)), ((2, 0), (4, 0))])
def test_other_ranks_and_workers_read_the_rest_of_the_epoch(train_loader, epoch_sets, before, after):
    def read(topology, steps, state):
        world_size, num_workers = topology
        seen = []
        for rank in range(world_size):
            loader = train_loader(rank=rank, world_size=world_size, num_workers=num_workers, state=state)
            seen += ids(take(loader, steps))
        return seen, loader.state

    first, state = read(before, 1, StreamState())
    assert state.samples == 16
    second, state = read(after, 1, state)
    # And once more back, so that two closed phases are replayed.
    third, state = read(before, 2, state)
    assert len(first + second + third) == 64
    assert set(first + second + third) == epoch_sets[0]
    assert state == StreamState(1)


def test_another_micro_batch_size_continues_too(train_loader, epoch_sets):
    first = train_loader()
    seen = ids(take(first, 1))
    second = train_loader(micro_batch_size=8, state=first.state)
    assert second.gradient_accumulation_steps == 2
    seen += ids(take(second, 3))
    assert len(seen) == 64 and set(seen) == epoch_sets[0]


def test_a_change_within_a_step_is_refused(train_loader):
    loader = train_loader()
    list(islice(loader, 1))
    with pytest.raises(ValueError, match="within a global batch of 16"):
        train_loader(world_size=2, state=loader.state)


def test_the_state_counts_what_was_handed_out_rather_than_read_ahead(train_loader):
    loader = train_loader(num_workers=2)
    assert loader.state == StreamState()
    stream = iter(loader)
    for count in range(1, 4):
        next(stream)
        assert [phase.micro_batches for phase in loader.state.phases] == [count]


def test_augmentation_does_not_depend_on_ranks_and_workers(train_loader):
    def pictures(**topology):
        images = {}
        for rank in range(topology.get("world_size", 1)):
            for batch in take(train_loader(rank=rank, **topology), STEPS):
                images |= dict(zip(batch["id"], batch["image"], strict=True))
        return images

    alone = pictures()
    assert len({image.numpy().tobytes() for image in alone.values()}) == 64
    for other in (pictures(num_workers=2), pictures(world_size=2, num_workers=1)):
        assert other.keys() == alone.keys()
        assert all(torch.equal(other[sample_id], alone[sample_id]) for sample_id in alone)
    second_epoch = {}
    for batch in take(train_loader(state=StreamState(1)), STEPS):
        second_epoch |= dict(zip(batch["id"], batch["image"], strict=True))
    common = alone.keys() & second_epoch.keys()
    assert sum(torch.equal(alone[sample_id], second_epoch[sample_id]) for sample_id in common) < len(common) // 2


def test_the_dropped_tail_is_counted_and_changes_with_the_epoch(train_loader, index, epoch_sets):
    loader = train_loader()
    assert (loader.steps_per_epoch, loader.dropped_samples, loader.gradient_accumulation_steps) == (4, 3, 4)
    assert index.num_samples == 67 and len(epoch_sets[0]) == 64
    assert len(epoch_sets[0] | epoch_sets[1]) == 67


def test_a_batch_has_images_labels_and_ids(train_loader):
    batch = next(iter(train_loader(num_workers=1)))
    assert set(batch) == {"image", "label", "id", "epoch"}
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 3, 8, 8), torch.float32)
    assert batch["image"].is_contiguous()
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [int(sample_id.rpartition("/")[2]) % 7 for sample_id in batch["id"]]


def test_the_trainers_random_numbers_are_left_alone(train_loader):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        list(islice(train_loader(num_workers=num_workers), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_shards_without_labels(shard_folder):
    index = load_index([f"{shard_folder(8, labels=False)}/train-*.tar"])
    build = functools.partial(TrainLoader, index, global_batch_size=4, micro_batch_size=4, seed=0)
    assert set(next(iter(build(IMAGES)))) == {"image", "id", "epoch"}
    for num_workers in (0, 1):
        with pytest.raises(BadDataError, match="every sample of one data worker's range is bad"):
            next(iter(build(LABELLED, num_workers=num_workers)))
    with pytest.raises(BadDataError, match=r"more than 1 samples .* it has no label"):
        next(iter(EvaluationLoader(index, LABELLED, batch_size=4)))


def test_labels_that_nobody_asked_for_do_not_decide_what_a_batch_is(tmp_path):
    """One sample without a label among many: every batch is the same with labels left out, and has one with them."""
    samples = [
        {"__key__": f"{n:02d}", "png": Image.new("RGB", (8, 8))} | ({"cls": n} if n != 5 else {}) for n in range(16)
    ]
    write_shards(samples, tmp_path, "train", samples_per_shard=16)
    index = load_index([f"{tmp_path}/train-*.tar"])
    build = functools.partial(TrainLoader, index, global_batch_size=4, micro_batch_size=4, seed=0)
    assert all(set(batch) == {"image", "id", "epoch"} for batch in take(build(IMAGES), 4))
    loader = build(LABELLED)
    assert all(len(batch["label"]) == 4 for batch in take(loader, 4))
    assert loader.bad_samples == {"train-00000.tar": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_filled_and_counted_and_resume_is_still_exact(shard_folder, num_workers):
    bad = (0, 3, 4, 19, 31)
    index = load_index([f"{shard_folder(16, 16, bad=bad)}/train-*.tar"])
    build = functools.partial(
        TrainLoader, index, IMAGES, global_batch_size=8, micro_batch_size=4, seed=0, num_workers=num_workers
    )
    loader = build(shuffle_buffer=5)
    whole = take(loader, 4)
    assert loader.bad_samples == {"train-00000.tar": 3, "train-00001.tar": 2}
    seen = ids(whole)
    assert len(seen) == 32
    assert {int(sample_id.rpartition("/")[2]) for sample_id in seen} == set(range(32)) - set(bad)
    for consumed in range(1, 8):
        loader = build(shuffle_buffer=5)
        list(islice(loader, consumed))
        resumed = build(shuffle_buffer=5, state=loader.state)
        assert batch_ids(islice(resumed, 8 - consumed)) == batch_ids(whole[consumed:])


def test_too_many_bad_samples_stop_the_run(shard_folder):
    index = load_index([f"{shard_folder(32, bad=tuple(range(0, 22, 2)))}/train-*.tar"])
    for num_workers in (0, 1):
        loader = TrainLoader(index, IMAGES, global_batch_size=4, micro_batch_size=4, seed=0, num_workers=num_workers)
        with pytest.raises(BadDataError, match=r"more than 10 samples .*train-00000.tar"):
            take(loader, 8)


def test_impossible_batches_are_refused(train_loader):
    with pytest.raises(ValueError, match="hold 67 samples, fewer than one global batch of 68"):
        train_loader(global_batch_size=68)
    with pytest.raises(ValueError, match="does not divide into micro-batches of 4 on 3 ranks: choose a multiple of 12"):
        train_loader(world_size=3)


def test_a_shard_that_shrank_behind_its_index_is_an_error(shard_folder):
    folder = shard_folder(8, 8)
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace('"samples": 8', '"samples": 12'))
    loader = TrainLoader(
        load_index([f"{folder}/train-*.tar"]), IMAGES, global_batch_size=8, micro_batch_size=8, seed=0, num_workers=1
    )
    with pytest.raises(ValueError, match=r"train-0000\d.tar gave 8 samples where its index lists 12"):
        take(loader, 3)
    build_index(folder)
    assert load_index([f"{folder}/train-*.tar"]).num_samples == 16


def slowly_started(worker: int) -> None:
    time.sleep(2 * worker)
    start_worker(worker)


@pytest.mark.parametrize("slow_start", [False, True])
def test_workers_survive_the_signals_that_end_a_job(train_loader, monkeypatch, slow_start):
    """With a slow start the second worker is signalled before it has come to :func:`start_worker`."""
    if slow_start:
        monkeypatch.setattr(adala.data.loader, "start_worker", slowly_started)
    loader = train_loader(num_workers=2)
    stream = iter(loader)
    seen = [tuple(next(stream)["id"])]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    # More than could have been read ahead.
    seen += batch_ids(islice(stream, 15))
    assert seen == batch_ids(take(train_loader(num_workers=2), STEPS))
    stream.close()
    assert not any(worker.is_alive() for worker in workers)


def test_a_failing_trainer_leaves_no_workers(shard_folder):
    index = load_index([f"{shard_folder(8, labels=False)}/train-*.tar"])
    loader = TrainLoader(index, LABELLED, global_batch_size=4, micro_batch_size=4, seed=0, num_workers=1)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="every sample"):
        next(iter(loader))
    assert multiprocessing.active_children() == [] and time.monotonic() - begin < 5


def test_the_interpreter_exits_with_workers_running_when_the_trainer_fails(shard_folder):
    program = f"""
from adala.data import TrainLoader, View, load_index, prepare_images
images = prepare_images(View((8, 8), (0.5,) * 3, (0.5,) * 3, (4, 4)).image_transform("none"))
index = load_index(["{shard_folder(8)}/train-*.tar"])
batches = iter(TrainLoader(index, images, global_batch_size=4, micro_batch_size=4, seed=0, num_workers=2))
next(batches)
raise RuntimeError("the step failed")
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert finished.returncode == 1
    assert finished.stderr.strip().endswith("RuntimeError: the step failed")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_each_sample_once_on_three_ranks(index, num_workers):
    seen, sizes = [], []
    for rank in range(3):
        loader = EvaluationLoader(index, HELD_OUT, batch_size=5, rank=rank, world_size=3, num_workers=num_workers)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sum(len(batch["id"]) < 5 for batch in batches) <= 1
        assert ids(batches) == ids(loader)
        sizes.append(len(ids(batches)))
        seen += ids(batches)
    assert max(sizes) - min(sizes) <= 1
    assert len(seen) == len(set(seen)) == 67


@pytest.mark.parametrize(("limit", "expected"), [(10, 10), (1000, 67)])
def test_evaluation_of_the_first_samples_only(index, limit, expected):
    whole = ids(EvaluationLoader(index, HELD_OUT, batch_size=5))
    loaders = [
        EvaluationLoader(index, HELD_OUT, batch_size=5, rank=rank, world_size=2, limit=limit) for rank in range(2)
    ]
    assert [sample for loader in loaders for sample in ids(loader)] == whole[:expected]


def test_evaluation_with_fewer_samples_than_ranks(shard_folder):
    index = load_index([f"{shard_folder(2)}/train-*.tar"])
    loaders = [
        EvaluationLoader(index, HELD_OUT, batch_size=2, rank=rank, world_size=3, num_workers=2) for rank in range(3)
    ]
    assert sorted(len(ids(loader)) for loader in loaders) == sorted(map(len, loaders)) == [0, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_leaves_bad_samples_out_and_counts_them(shard_folder, num_workers):
    index = load_index([f"{shard_folder(6, 6, bad=(4, 9, 10, 11))}/train-*.tar"])
    loader = EvaluationLoader(index, HELD_OUT, batch_size=3, num_workers=num_workers)
    with pytest.raises(BadDataError, match=r"more than 1 samples .*train-00001.tar/0009"):
        list(loader)
    index = load_index([f"{shard_folder(6, 6, 8, bad=(6, 7), name='few')}/train-*.tar"])
    loader = EvaluationLoader(index, HELD_OUT, batch_size=2, num_workers=num_workers)
    for _ in range(2):  # counted anew each time
        batches = list(loader)
        assert len(ids(batches)) == 18 and len(batches) == len(loader) - 1
        assert loader.bad_samples == {"train-00001.tar": 2}


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_evaluation_counts_a_last_batch_that_is_wholly_bad(shard_folder, num_workers):
    """With two workers each of them has one."""
    index = load_index([f"{shard_folder(20, bad=(8, 9, 18, 19))}/train-*.tar"])
    loader = EvaluationLoader(index, HELD_OUT, batch_size=2, num_workers=num_workers, max_bad_fraction=0.5)
    for _ in range(2):
        assert len(ids(loader)) == 16
        assert loader.bad_samples == {"train-00000.tar": 4}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_with_no_bad_samples_allowed_one_stops_training_and_evaluation(shard_folder, num_workers):
    index = load_index([f"{shard_folder(32, bad=(5,))}/train-*.tar"])
    options = {"num_workers": num_workers, "max_bad_fraction": 0}
    training = TrainLoader(index, IMAGES, global_batch_size=4, micro_batch_size=4, seed=0, **options)
    for read in (lambda: take(training, 8), lambda: list(EvaluationLoader(index, HELD_OUT, batch_size=4, **options))):
        with pytest.raises(BadDataError, match=r"more than 0 samples .*allow more of them with data\.max_bad_fraction"):
            read()


def cut(content: bytes, place: int) -> bytes:
    return content[:place]


def cut_and_filled(content: bytes, place: int) -> bytes:
    return content[:place].ljust(len(content), b"\0")


def flipped(content: bytes, place: int) -> bytes:
    header = place // 512 * 512 + 5
    return content[:header] + bytes([content[header] ^ 1]) + content[header + 1 :]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("damage", [cut, cut_and_filled, flipped])
def test_a_shard_that_was_damaged_after_it_was_indexed_stops_the_run(shard_folder, damage, training, num_workers):
    """Between a sample's label and its image: what came before is read, and the half of a sample is none.

    The index says the size of the shard as it is now, and so all that could tell is what is read.
    """
    folder = shard_folder(8, 20)
    shard, content = folder / "train-00001.tar", (folder / "train-00001.tar").read_bytes()
    place = content.index(b"0013.png") // 512 * 512
    assert content[place - 1024 :].startswith(b"0013.cls")
    shard.write_bytes(damage(content, place))
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace(f'"bytes": {len(content)}', f'"bytes": {shard.stat().st_size}'))
    if damage is cut:  # to a size that cannot hold so many samples: an index of bytes says more than one from elsewhere
        (first, second) = load_index([str(shard_folder(8, 20, name="whole"))]).shards
        index = ShardIndex((first, replace(second, url=str(shard))))
    else:
        index = load_index([str(folder)])
    if training:
        loader = TrainLoader(
            index, IMAGES, global_batch_size=1, micro_batch_size=1, seed=0, num_workers=num_workers, shuffle_buffer=0
        )
        batches = islice(loader, index.num_samples)
    else:
        loader = EvaluationLoader(index, HELD_OUT, batch_size=1, num_workers=num_workers, max_bad_fraction=0.5)
        batches = iter(loader)
    seen = []
    with pytest.raises(ValueError, match=r"train-00001\.tar gave \d+ samples where its index lists 20") as caught:
        for batch in batches:
            seen += batch["id"]
    assert not any(sample.rpartition("/")[2] > "0012" for sample in seen) and len(set(seen)) == len(seen)
    assert loader.bad_samples == {}
    assert "\n" not in str(caught.value) or num_workers
