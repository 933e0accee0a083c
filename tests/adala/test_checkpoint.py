"""Checkpoints that are refused before they are written, written meanwhile, kept and removed; damage that is found."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adala.checkpoint import Checkpoints, complete_checkpoints, find_damage, load_checkpoint, newest_checkpoint
from adala.slices import WEIGHTS, Slice, SliceReader

VALUES = torch.arange(250.0)


class WritingEngine(SimpleNamespace):
    """An engine whose state is a kilobyte."""

    zero_stage, finite, values, restored = 1, True, VALUES, None

    def has_finite_weights(self) -> bool:
        return self.finite

    def slices(self) -> list[Slice]:
        return [Slice("weight", 0, {WEIGHTS: self.values}, 3)]

    def restore(self, reader: SliceReader) -> None:
        self.restored = reader.read("weight", WEIGHTS)


def save(folder: Path, engine: WritingEngine, step: int, state: dict | None = None, **kept: int) -> Path:
    checkpoints = Checkpoints(folder, engine, **kept)
    checkpoints.begin(step, state or {})
    assert checkpoints.finish()["mib"] == 1000 / 2**20 and checkpoints.finish() == {}
    return folder / f"step-{step:08d}"


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (WritingEngine(finite=False), "the weights are not finite, and are not saved"),
        (
            WritingEngine(values=torch.empty(1).expand(2**58)),
            "a checkpoint needs 1,099,511,627,776 MiB, and .* left: make room",
        ),
    ],
    ids=["not_finite", "no_room"],
)
def test_what_should_not_be_saved_leaves_nothing(tmp_path: Path, engine: WritingEngine, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Checkpoints(tmp_path / "checkpoints", engine).begin(3, {})
    assert not list(tmp_path.rglob("*.safetensors")) and complete_checkpoints(tmp_path / "checkpoints") == []


def fail_to_read(path: Path) -> int:
    raise OSError(5, "Input/output error")


def test_the_newest_whole_checkpoint_is_found_and_the_oldest_removed(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "partial-step-00000009").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, WritingEngine(), step, {"note": step})
    two, three = complete_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert newest_checkpoint(tmp_path) == three and find_damage(three) is None
    (three / "trainer.json").write_text("{")
    assert "trainer.json has" in find_damage(three)
    assert newest_checkpoint(tmp_path) == two
    assert "is damaged" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr("adala.checkpoint.file_checksum", fail_to_read)
        assert find_damage(two) == "[Errno 5] Input/output error"
    part = two / "rank-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert find_damage(two) == "rank-00000.safetensors has changed"
    part.unlink()
    assert find_damage(two) == "rank-00000.safetensors is missing"
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged: restore one, or add --overwrite"):
        newest_checkpoint(tmp_path)
    (two / "COMPLETE").write_text("")
    assert "COMPLETE cannot be read" in find_damage(two)
    (two / "COMPLETE").write_text("[1]")
    assert "COMPLETE cannot be read" in find_damage(two)


def test_where_nothing_was_saved_there_is_nothing_to_find(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, WritingEngine(), step, keep_last=1, keep_every=3)
    assert [path.name[-1] for path in complete_checkpoints(tmp_path)] == ["3", "6", "7"]


def test_they_are_told_apart_by_their_numbers_not_by_their_names(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, WritingEngine(), step)
    assert newest_checkpoint(tmp_path).name == "step-100000000"


def test_what_is_saved_is_what_was_there_when_it_was_begun(tmp_path: Path, monkeypatch) -> None:
    """Training goes on, on the very tensors, while they are written."""
    may_write = threading.Event()
    from adala import checkpoint

    write = checkpoint.write_slices
    monkeypatch.setattr(checkpoint, "write_slices", lambda *parts: (may_write.wait(20), write(*parts)))
    engine = WritingEngine(values=VALUES.clone())
    checkpoints = Checkpoints(tmp_path, engine)
    for step in (1, 2):
        may_write.clear()
        engine.values.fill_(step)
        checkpoints.begin(step, {"note": step})
        assert checkpoints.is_writing
        engine.values.fill_(-1)
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001"][: step - 1]
        may_write.set()
        assert checkpoints.finish()["pause_ms"] > 0 and not checkpoints.is_writing
        assert load_checkpoint(newest_checkpoint(tmp_path), engine)["note"] == step
        assert (engine.restored == step).all()


def test_a_part_that_rank_0_does_not_see_makes_no_checkpoint(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("adala.runs.VISIBLE_WITHIN_S", 0.1)
    checkpoints = Checkpoints(tmp_path, WritingEngine())
    checkpoints.begin(1, {})
    checkpoints._pending.thread.join()
    (tmp_path / "partial-step-00000001" / "rank-00000.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"does not see rank 0's part of a checkpoint, .*: runs_dir must be one"):
        checkpoints.finish()
    assert complete_checkpoints(tmp_path) == []


def test_one_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, WritingEngine(), 1)
    (saved / "trainer.json").write_text('{"step": 1, "world_size": 1, "zero_stage": 1}')
    with pytest.raises(ValueError, match="was written by an earlier version"):
        load_checkpoint(saved, WritingEngine())


def test_other_ranks_are_told_of(tmp_path: Path, capsys) -> None:
    saved = save(tmp_path, WritingEngine(), 1)
    load_checkpoint(saved, WritingEngine())
    assert capsys.readouterr().out == ""
    load_checkpoint(saved, WritingEngine(zero_stage=3))
    assert "written on 1 ranks under ZeRO 1, taken up by 1 ranks under ZeRO 3" in capsys.readouterr().out
