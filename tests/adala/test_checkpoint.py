"""Checkpoints that are refused before they are written, and damage that is found."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from adala.checkpoint import complete_checkpoints, find_damage, newest_checkpoint, save_checkpoint


class WritingEngine(SimpleNamespace):
    """An engine whose state is one file of a kilobyte."""

    zero_stage, finite, needs = 1, True, 1000

    def has_finite_weights(self) -> bool:
        return self.finite

    def checkpoint_bytes(self) -> int:
        return self.needs

    def save(self, folder: Path) -> None:
        (folder / "deepspeed").mkdir()
        (folder / "deepspeed" / "state.pt").write_bytes(bytes(1000))


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (WritingEngine(finite=False), "the weights are not finite, and are not saved"),
        (WritingEngine(needs=2**60), "a checkpoint needs 1,099,511,627,776 MiB, and .* left: make room"),
    ],
    ids=["not_finite", "no_room"],
)
def test_what_should_not_be_saved_leaves_nothing(tmp_path: Path, engine: WritingEngine, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        save_checkpoint(tmp_path / "checkpoints", engine, 3, {})
    assert not list(tmp_path.rglob("*.pt")) and complete_checkpoints(tmp_path / "checkpoints") == []


def fail_to_read(path: Path) -> int:
    raise OSError(5, "Input/output error")


def test_the_newest_whole_checkpoint_is_found_and_the_oldest_removed(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "partial-step-00000009").mkdir()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, WritingEngine(), step, {"note": step})
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
    (two / "deepspeed" / "state.pt").unlink()
    assert newest_checkpoint(tmp_path) is None
    (two / "COMPLETE").write_text("")
    assert "COMPLETE cannot be read" in find_damage(two)
