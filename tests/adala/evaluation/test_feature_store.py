"""Features on disk: found again as they were, in one order whoever computed them, and whole or not there."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from adala.data.order import evaluation_range
from adala.distributed import rank, world_size
from adala.evaluation import DenseFeatures, DenseSettings, FeatureStore, Field, RowWriter, fit_dense_probe
from adala.evaluation import feature_store as module
from adala.evaluation.feature_store import ENTRY, KEY_NAMES, PLACES, ROWS

KEY = {name: name for name in KEY_NAMES} | {"image_size": (16, 16)}
FIELDS = {
    "patches": Field((2, 3, 4)),
    "pooled": Field((5,), torch.bfloat16),
    "mask": Field((3, 3), torch.uint8),
}


class Counted:
    """A function that tells how often it was called."""

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def rows_of(positions: list[int]) -> dict[str, torch.Tensor]:
    """What a model would give of these samples, each by itself."""
    of_each = [torch.Generator().manual_seed(position) for position in positions]
    return {
        "patches": torch.stack([torch.randn(2, 3, 4, generator=generator) for generator in of_each]),
        "pooled": torch.stack([torch.randn(5, generator=generator) * 1e6 for generator in of_each]),
        "mask": torch.stack([torch.randint(3, (3, 3), generator=generator) for generator in of_each]),
    }


def sample_id(position: int) -> str:
    return f"x-00000.tar/{position:04}"


def fill_with(count: int, bad: tuple[int, ...] = (), backwards: bool = False) -> Callable[[RowWriter], None]:
    """Writes this rank's part of ``count`` samples in batches of two, perhaps the last one first."""

    def fill(writer: RowWriter) -> None:
        mine = [position for position in evaluation_range(count, rank(), world_size()) if position not in bad]
        batches = [mine[begin : begin + 2] for begin in range(0, len(mine), 2)]
        for batch in batches[::-1] if backwards else batches:
            writer.add([sample_id(position) for position in batch], **rows_of(batch))

    return fill


def assert_rows(found: dict, positions: list[int]) -> None:
    expected = rows_of(positions)
    assert set(found) == set(FIELDS)
    for name, field in FIELDS.items():
        assert len(found[name]) == len(positions)
        assert found[name][:].dtype == field.dtype and found[name][:].equal(expected[name].to(field.dtype)), name


def stored(store: FeatureStore, key: dict, fields: dict, capacity: int, fill: Callable[[RowWriter], None]) -> dict:
    """What is found, or else written and then found."""
    found = store.find(key, fields)
    if found is None:
        with store.writing(key, fields, capacity) as writer:
            fill(writer)
        found = store.find(key, fields)
    return found


def folders(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir() if each.is_dir())


@pytest.mark.parametrize("name", [*KEY_NAMES, "more"])
def test_another_key_is_another_entry(tmp_path: Path, name: str) -> None:
    store, fill = FeatureStore(tmp_path / "new" / "cache"), Counted(fill_with(3))
    for _ in range(2):
        stored(store, KEY, FIELDS, 3, fill)
    assert fill.calls == 1
    stored(store, {**KEY, name: "another"}, FIELDS, 3, fill)
    stored(store, dict(reversed(KEY.items())), FIELDS, 3, fill)
    assert fill.calls == 2


def test_another_format_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Counted(fill_with(3))
    stored(FeatureStore(tmp_path), KEY, FIELDS, 3, fill)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    stored(FeatureStore(tmp_path), KEY, FIELDS, 3, fill)
    assert fill.calls == 2


def test_a_key_must_say_what_features_change_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks weights, kind"):
        key = {name: KEY[name] for name in KEY if name not in ("weights", "kind")}
        FeatureStore(tmp_path).find(key, FIELDS)


def test_dense_rows_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    """Batches of several data workers come out of order, and a sample that cannot be decoded is not there."""
    store, fill = FeatureStore(tmp_path), Counted(fill_with(9, bad=(3,), backwards=True))
    for _ in range(2):
        found = stored(store, KEY, FIELDS, 9, fill)
        assert_rows(found, [0, 1, 2, 4, 5, 6, 7, 8])
    assert fill.calls == 1
    assert found["mask"][torch.tensor([5, 0])].equal(rows_of([6, 0])["mask"].to(torch.uint8))
    assert found["patches"][[2]].equal(rows_of([2])["patches"].half())
    # float16 where bfloat16 was is another field.
    stored(store, KEY, {**FIELDS, "pooled": Field((5,), torch.float32)}, 9, fill)
    assert fill.calls == 2


def written_by_a_rank(folder: Path) -> list[torch.Tensor]:
    found = stored(FeatureStore(folder), KEY, FIELDS, 9, fill_with(9, bad=(5,), backwards=True))
    return [found[name][:] for name in FIELDS]


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_write_what_one_writes(tmp_path: Path, ranks: int) -> None:
    expected = [values.to(FIELDS[name].dtype) for name, values in rows_of([0, 1, 2, 3, 4, 6, 7, 8]).items()]
    for found in on_ranks(ranks, written_by_a_rank, tmp_path):
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    assert_rows(stored(FeatureStore(tmp_path), KEY, FIELDS, 9, None), [0, 1, 2, 3, 4, 6, 7, 8])


def of_one_folder_a_rank(folder: Path) -> str:
    module.VISIBLE_WITHIN_S = 0.3
    try:
        stored(FeatureStore(folder / str(rank())), KEY, FIELDS, 4, fill_with(4))
    except ValueError as error:
        return str(error)
    return ""


def test_a_folder_that_ranks_do_not_share_is_refused_by_all(tmp_path: Path) -> None:
    for said in on_ranks(2, of_one_folder_a_rank, tmp_path):
        assert "rank 1 on" in said and "a file system that all machines share" in said
    assert folders(tmp_path / "0") == []


def fails_on_rank_1(folder: Path) -> str:
    def fill(writer: RowWriter) -> None:
        fill_with(4)(writer)
        if rank() == 1:
            raise ValueError("rank 1 has a bad shard")

    try:
        stored(FeatureStore(folder), KEY, FIELDS, 4, fill)
    except ValueError as error:
        return str(error)
    return ""


def test_what_one_rank_raises_all_raise_and_nothing_stays(tmp_path: Path) -> None:
    assert on_ranks(2, fails_on_rank_1, tmp_path) == ["rank 1 has a bad shard"] * 2
    assert folders(tmp_path) == []


def test_two_models_are_written_in_one_pass(tmp_path: Path) -> None:
    store, keys = FeatureStore(tmp_path), [{**KEY, "weights": name} for name in ("teacher", "student")]
    with store.writing(keys[0], FIELDS, 4) as first, store.writing(keys[1], FIELDS, 4) as second:
        fill_with(4)(first), fill_with(4, bad=(2,))(second)
    assert_rows(store.find(keys[0], FIELDS), [0, 1, 2, 3])
    assert_rows(store.find(keys[1], FIELDS), [0, 1, 3])
    assert store.find({**KEY, "weights": "another"}, FIELDS) is None


def is_killed_as_it_writes(folder: Path) -> None:
    def fill(writer: RowWriter) -> None:
        fill_with(4)(writer)
        os._exit(9)

    stored(FeatureStore(folder), KEY, FIELDS, 4, fill)


def test_what_a_killed_command_left_is_not_read_and_is_removed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=is_killed_as_it_writes, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    (left,) = folders(tmp_path)
    assert left.endswith(".partial") and (tmp_path / left / ROWS).stat().st_size > 0
    store, fill = FeatureStore(tmp_path), Counted(fill_with(4))
    assert_rows(stored(store, KEY, FIELDS, 4, fill), [0, 1, 2, 3])
    assert fill.calls == 1
    (entry,) = folders(tmp_path)
    assert entry != left and not entry.endswith(".partial")


def test_what_another_command_is_writing_is_left_alone(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(KEY, FIELDS, 4) as slow:
        with store.writing({**KEY, "data": "others"}, FIELDS, 4) as fast:
            fill_with(4)(fast)
        (tmp_path / ".empty.partial").mkdir()
        with store.writing({**KEY, "data": "more"}, FIELDS, 4) as third:
            fill_with(4)(third)
        assert not (tmp_path / ".empty.partial").exists() and len(folders(tmp_path)) == 3
        fill_with(4)(slow)
    assert_rows(store.find(KEY, FIELDS), [0, 1, 2, 3])


def test_of_two_commands_that_compute_the_same_the_first_counts(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writing(KEY, FIELDS, 4) as slow:
        with store.writing(KEY, FIELDS, 4) as fast:
            fill_with(4)(fast)
        (entry,) = [name for name in folders(tmp_path) if not name.endswith(".partial")]
        written = (tmp_path / entry / ROWS).stat().st_ino
        fill_with(4)(slow)
    assert folders(tmp_path) == [entry] and (tmp_path / entry / ROWS).stat().st_ino == written


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize("name", [ROWS, PLACES, ENTRY])
@pytest.mark.parametrize("damage", [flip, shorten, os.unlink], ids=["a bit flipped", "truncated", "removed"])
def test_what_is_damaged_is_computed_again(tmp_path: Path, name: str, damage, caplog) -> None:
    store, fill = FeatureStore(tmp_path), Counted(fill_with(4))
    for expected_calls in (1, 2):
        assert_rows(stored(store, KEY, FIELDS, 4, fill), [0, 1, 2, 3])
        assert fill.calls == expected_calls
        if expected_calls == 1:
            (entry,) = folders(tmp_path)
            damage(tmp_path / entry / name)
    assert [record.message.count("are damaged") for record in caplog.records] == [1]
    stored(store, KEY, FIELDS, 4, fill)
    assert fill.calls == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patches": torch.full((1, 2, 3, 4), 7e4)}, r"beyond what torch.float16 holds: store them as bfloat16"),
        ({"patches": torch.full((1, 2, 3, 4), torch.nan)}, "patches are not finite"),
        ({"pooled": torch.zeros(1, 4)}, r"pooled of an image has the shape \(4,\), announced was \(5,\)"),
        ({"more": torch.zeros(1, 4)}, "announced were"),
    ],
    ids=["too large", "not finite", "shape", "field"],
)
def test_rows_that_cannot_be_stored_are_refused(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stored(FeatureStore(tmp_path), KEY, FIELDS, 4, lambda writer: writer.add(["a"], **rows_of([0]) | values))
    assert folders(tmp_path) == []


def test_neither_too_many_rows_nor_none(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with pytest.raises(ValueError, match="more images than the 3 that were announced"):
        stored(store, KEY, FIELDS, 3, fill_with(4))
    with pytest.raises(ValueError, match="no image could be read"):
        stored(store, KEY, FIELDS, 3, lambda writer: None)
    with pytest.raises(ValueError, match=r"features take .* MiB left"):
        stored(store, KEY, FIELDS, 2**45, fill_with(4))


def test_the_store_says_how_large_it_is(tmp_path: Path) -> None:
    store, wide = FeatureStore(tmp_path / "cache"), {"values": Field((2048,), torch.float32)}
    assert store.summary() == f"no features lie in {tmp_path / 'cache'}"
    with store.writing(KEY, wide, 1024) as writer:
        writer.add([sample_id(position) for position in range(1024)], values=torch.zeros(1024, 2048))
    assert store.summary().startswith(f"1 sets of features take 8 MiB in {tmp_path / 'cache'}")


def test_an_entry_says_what_it_is_of(tmp_path: Path) -> None:
    stored(FeatureStore(tmp_path), KEY, FIELDS, 3, fill_with(3))
    (folder,) = folders(tmp_path)
    assert json.loads((tmp_path / folder / ENTRY).read_text())["entry"]["key"]["image_size"] == [16, 16]


def test_a_probe_reads_rows_out_of_the_file(tmp_path: Path) -> None:
    found = stored(FeatureStore(tmp_path), KEY, FIELDS, 8, fill_with(8))
    settings = DenseSettings(num_classes=3, rates=(0.1,), epochs=2, batch_size=3)
    head = fit_dense_probe(DenseFeatures(found["patches"], found["pooled"]), found["mask"], settings)
    copied = {name: stored[:] for name, stored in found.items()}
    expected = fit_dense_probe(DenseFeatures(copied["patches"], copied["pooled"]), copied["mask"], settings)
    assert head.weight.equal(expected.weight)
