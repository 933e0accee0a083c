import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import adala.data
from adala.data.embedded import load_split
from adala.data.index import load_index
from adala.data.order import shards_in_order
from adala.data.pack import write_embedded, write_shards
from adala.data.samples import decode, read_positions
from adala.tasks import Classification

read_class = Classification(num_classes=1000).reader


def samples_of(folder, split):
    index = load_index([f"{folder}/{split}-*.tar"])
    sequence = shards_in_order([shard.samples for shard in index.shards])
    return [decode(raw, read_class) for raw in read_positions(index, sequence, range(index.num_samples))]


@pytest.fixture
def numbered(png):
    return lambda count: ({"png": png(number), "cls": number} for number in range(count))


@pytest.mark.parametrize("name", ["new", "a:b/100% {x,y} [z]/größe"])
def test_shards_have_the_asked_size_and_an_index(tmp_path, numbered, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_shards(numbered(7), name, "train", 3)
    assert [shard.samples for shard in load_index([f"{name}/train-*.tar"]).shards] == [3, 3, 1]
    assert [sample.target for sample in samples_of(name, "train")] == list(range(7))


def test_the_same_samples_give_the_same_bytes(tmp_path, numbered):
    for name in ("a", "b"):
        write_shards(numbered(3), tmp_path / name, "train", 3)
    assert (tmp_path / "a/train-00000.tar").read_bytes() == (tmp_path / "b/train-00000.tar").read_bytes()


def test_images_may_be_pil_and_keys_given(tmp_path):
    image = Image.fromarray(np.full((5, 4, 3), 90, dtype=np.uint8))
    write_shards([{"__key__": "mine", "png": image, "cls": 2}], tmp_path, "train", 3)
    (sample,) = samples_of(tmp_path, "train")
    assert sample.id == "train-00000.tar/mine" and np.array_equal(np.asarray(sample.image), np.asarray(image))


def test_a_split_is_replaced_and_the_others_stay(tmp_path, numbered):
    write_shards(numbered(5), tmp_path, "val", 2)
    write_shards(numbered(2), tmp_path, "val-hard", 2)
    write_shards(numbered(9), tmp_path, "train", 3)
    write_shards(numbered(4), tmp_path, "train", 3)
    assert [path.name for path in sorted(tmp_path.glob("train-*"))] == ["train-00000.tar", "train-00001.tar"]
    write_shards(numbered(3), tmp_path, "val", 2)
    counts = {split: len(samples_of(tmp_path, split)) for split in ("train", "val", "val-hard")}
    # The pattern of "val" takes in the two of "val-hard".
    assert counts == {"train": 4, "val": 3 + 2, "val-hard": 2}


def test_a_split_that_fails_half_way_leaves_the_old_one(tmp_path, numbered):
    write_shards(numbered(4), tmp_path, "train", 2)
    before = sorted(path.name for path in tmp_path.iterdir())

    def failing():
        yield from numbered(3)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        write_shards(failing(), tmp_path, "train", 2)
    with pytest.raises(ValueError, match="no samples to write"):
        write_shards([], tmp_path, "train", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert len(samples_of(tmp_path, "train")) == 4


def test_a_crash_while_shards_are_replaced_leaves_the_split_out_of_the_index(tmp_path, numbered, monkeypatch):
    write_shards(numbered(4), tmp_path, "train", 2)
    write_shards(numbered(4), tmp_path, "val", 2)
    rename = Path.rename

    def fail_on_the_second(path, target):
        if path.name.endswith("00001.tar"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_shards(numbered(4), tmp_path, "train", 2)
    with pytest.raises(ValueError, match="matches 'train-"):
        load_index([f"{tmp_path}/train-*.tar"])
    assert len(samples_of(tmp_path, "val")) == 4


def test_the_embedded_slice_is_written_once(tmp_path):
    write_embedded(tmp_path)
    shards = sorted(tmp_path.glob("*.tar"))
    assert [path.name for path in shards] == [
        *(f"train-{shard:05d}.tar" for shard in range(8)),
        *(f"val-{shard:05d}.tar" for shard in range(2)),
    ]
    samples = samples_of(tmp_path, "val")
    images, labels = load_split("val")
    assert [sample.target for sample in samples] == labels.tolist()
    assert all(np.array_equal(np.asarray(s.image)[..., 1], image) for s, image in zip(samples, images, strict=True))
    written = [path.stat().st_mtime_ns for path in shards]
    write_embedded(tmp_path)
    assert [path.stat().st_mtime_ns for path in shards] == written
    with tarfile.open(shards[0]) as tar:
        assert len(tar.getnames()) == 2 * 2000
    # A damaged copy is written anew, and only the split it is in.
    shards[-1].unlink()
    write_embedded(tmp_path)
    assert len(load_index([f"{tmp_path}/val-*.tar"]).shards) == 2
    assert [path.stat().st_mtime_ns for path in shards[:8]] == written[:8]


def test_the_public_names_are_there():
    assert all(getattr(adala.data, name).__module__.startswith("adala.data.") for name in adala.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        adala.data.missing  # noqa: B018
