import io
import logging

import numpy as np
import pytest
from PIL import Image

from adala.data.index import Shard, load_index
from adala.data.samples import BadDataError, BadSamples, DecodeError, RawSample, decode, fill_slots, read_shard, reorder
from adala.tasks import Classification

read_class = Classification(num_classes=1000).reader

SHARD = Shard("/shards/train-00000.tar", 100, 1)


def image_bytes(mode: str, format: str, size: tuple[int, int] = (6, 4), color=0) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, format=format)
    return stream.getvalue()


def raw(key: str, good: bool = True) -> RawSample:
    return RawSample(SHARD, key, {"png": image_bytes("RGB", "PNG") if good else b"broken"})


def test_wanted_ordinals_come_in_sequence_and_no_more_is_read(shard_folder, monkeypatch):
    shard = load_index([f"{shard_folder(20)}/train-*.tar"]).shards[0]
    opened = []
    monkeypatch.setattr("adala.data.samples.open_stream", lambda url, *_: opened.append(open(url, "rb")) or opened[-1])
    samples = read_shard(shard, [3, 4, 9])
    assert [next(samples).key for _ in range(3)] == ["0003", "0004", "0009"]
    assert list(samples) == []
    assert [stream.closed for stream in opened] == [True]


def test_a_shard_shorter_than_its_index_is_named_with_the_command(shard_folder):
    folder = shard_folder(5)
    shard = load_index([f"{folder}/train-*.tar"]).shards[0]
    longer = Shard(shard.url, 9, shard.bytes)
    with pytest.raises(ValueError, match=rf"train-00000.tar .*lists 9.*python -m adala.data.index {folder}`"):
        list(read_shard(longer, range(9)))


def test_a_shard_longer_than_its_index_is_named_before_its_last_sample_is_given(shard_folder):
    """Whoever has the last sample asks for no more."""
    folder = shard_folder(9)
    shard = load_index([f"{folder}/train-*.tar"]).shards[0]
    samples = read_shard(Shard(shard.url, 5, shard.bytes), range(5))
    assert [next(samples).key for _ in range(4)] == ["0000", "0001", "0002", "0003"]
    with pytest.raises(
        ValueError, match=r"train-00000.tar holds more than the 5 samples that its index lists: write the"
    ):
        next(samples)


def test_a_truncated_shard_is_named(shard_folder):
    shard = load_index([f"{shard_folder(9)}/train-*.tar"]).shards[0]
    with open(shard.url, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"train-00000.tar gave \d samples where its index lists 9"):
        list(read_shard(shard, range(9)))
    with pytest.raises(OSError, match=r"cannot read the shard .*missing.tar"):
        list(read_shard(Shard("/nowhere/missing.tar", 1, 1), [0]))


@pytest.mark.parametrize("field, format", [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_all_kinds_become_rgb(field, format, mode):
    sample = decode(RawSample(SHARD, "k", {field: image_bytes(mode, format), "cls": b"12"}), read_class)
    assert (sample.image.mode, sample.image.size, sample.target) == ("RGB", (6, 4), 12)
    assert sample.id == "train-00000.tar/k"


def test_the_segmentation_map_is_not_taken_for_the_image():
    both = {"seg.png": image_bytes("L", "PNG", color=3), "jpg": image_bytes("RGB", "JPEG", color=(200, 200, 200))}
    assert np.asarray(decode(RawSample(SHARD, "k", both)).image).min() > 190
    with pytest.raises(DecodeError, match=r"no image: it has the files seg\.png"):
        decode(RawSample(SHARD, "k", {"seg.png": both["seg.png"]}))


def test_a_truncated_image_and_a_strange_label_are_decode_errors():
    whole = image_bytes("RGB", "PNG", (64, 64))
    with pytest.raises(DecodeError, match="png cannot be decoded"):
        decode(RawSample(SHARD, "k", {"png": whole[: len(whole) // 2]}))
    with pytest.raises(DecodeError, match=r"its .cls is no label: .cat. is a name: list the names"):
        decode(RawSample(SHARD, "k", {"png": whole, "cls": b"cat"}), read_class)


def test_a_label_is_read_where_it_is_asked_for_and_missed_there_alone():
    labelled = RawSample(SHARD, "k", {**raw("k").fields, "cls": b"3"})
    assert decode(raw("k")).target is None
    assert decode(labelled).target is None
    assert decode(labelled, read_class).target == 3
    with pytest.raises(DecodeError, match="it has no label"):
        decode(raw("k"), read_class)


def test_reordering_reads_no_further_than_needed():
    read = []
    samples = (read.append(number) or raw(f"{number}") for number in range(6))
    emitted = reorder(samples, range(6), [1, 0, 3])
    assert next(emitted).key == "1" and read == [0, 1]
    assert next(emitted).key == "0" and read == [0, 1]
    assert next(emitted).key == "3" and read == [0, 1, 2, 3]


def keys(samples) -> list[str]:
    return [sample.id.rpartition("/")[2] for sample in samples]


def test_the_next_good_sample_fills_a_bad_slot(caplog):
    slots = [raw("a", good=False), raw("b"), raw("c", good=False), raw("d", good=False), raw("e")]
    bad = BadSamples(1000, 0.01)
    with caplog.at_level(logging.WARNING):
        assert keys(fill_slots(slots, lambda: slots, bad)) == list("bbeee")
    assert bad.take() == {"train-00000.tar": 3} and bad.take() == {}
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"skipping the sample train-00000.tar/{key}" for key in "acd"
    ]


def test_the_last_slots_are_filled_from_the_beginning_and_count_once():
    slots = [raw("a", good=False), raw("b"), raw("c"), raw("d", good=False)]
    bad = BadSamples(1000, 0.01)
    assert keys(fill_slots(slots, lambda: slots, bad)) == list("bbcb")
    assert bad.take() == {"train-00000.tar": 2}


def test_too_many_bad_samples_stop_the_run():
    slots = [raw(f"{number}", good=number >= 12) for number in range(13)]
    with pytest.raises(BadDataError, match=r"more than 10 .*train-00000.tar \(train-00000.tar/10: .*repair the shards"):
        list(fill_slots(slots, lambda: slots, BadSamples(100, 0.01)))
    assert len(keys(fill_slots(slots, lambda: slots, BadSamples(100, 0.12)))) == 13
    assert BadSamples(5000, 0.01).limit == 50
    assert BadSamples(20, 0.01, at_least=2).limit == 2
    assert BadSamples(20, 0).limit == 0


def test_a_range_without_a_good_sample_stops_the_run():
    slots = [raw("a", good=False)]
    with pytest.raises(BadDataError, match="every sample"):
        list(fill_slots(slots, lambda: slots, BadSamples(1, 0.01)))
