"""A run's folder: results replaced whole, orders that outlive a process, one command at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adala.files import file_checksum, file_digest, read_json, remove_tree, write_json
from adala.runs import RunFolder, StageRecord


def stage_with(folder, text: str, finished: bool = True) -> None:
    folder.start_attempt({"seed": 0})
    (folder.path / "student.safetensors").write_text(text)
    if finished:
        folder.finish(StageRecord({"seed": 0}, text))


def student(run: RunFolder) -> str:
    return (run.stage(2).path / "student.safetensors").read_text()


def test_a_replacement_takes_the_place_of_what_it_replaces(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    stage_with(run.stage(2), "old")
    stage_with(run.replacement(2), "new")
    run.install(2)
    assert student(run) == "new" and run.stage(2).record().student == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["stage2"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_process_that_dies_while_it_replaces_leaves_one_whole_result(tmp_path: Path, moment: str) -> None:
    run = RunFolder(tmp_path)
    stage_with(run.stage(2), "old")
    stage_with(run.replacement(2), "new")
    if moment != "before":
        run.stage(2).path.rename(tmp_path / "stage2.old")
    if moment == "after":
        run.replacement(2).path.rename(run.stage(2).path)
    run.complete_installations()
    assert student(run) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["stage2"]


def test_a_record_of_another_version_is_a_sentence(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    stage_with(run.stage(2), "old")
    write_json(run.stage(2).path / "finished.json", {"loss": 1.0})
    with pytest.raises(ValueError, match=r"finished.json is not of this version .*: move .*stage2 away"):
        run.stage(2).record()


def test_an_unfinished_replacement_stays_beside(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    stage_with(run.stage(2), "old")
    stage_with(run.replacement(2), "new", finished=False)
    run.complete_installations()
    assert student(run) == "old" and run.replacement(2).attempt() == {"seed": 0}


def test_an_order_to_overwrite_outlives_the_process_that_was_given_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    order, is_old = run.overwrite_order([1, 2])
    assert not is_old
    assert run.overwrite_order([1, 2]) == (order, True)
    other, is_old = run.overwrite_order([2])
    assert other.id != order.id and not is_old
    run.close_order()
    assert run.overwrite_order([2])[0].id != other.id


HOLD = """
import sys
from adala.runs import RunFolder
from pathlib import Path
with RunFolder(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_commands_do_not_train_one_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f'is being trained by another command .*"pid": {other.pid}'), run.held():
            pass
        other.kill()
    with run.held():
        assert not list(run.path.glob(".seen-*"))


def raise_no_space(descriptor: int) -> None:
    raise OSError("no space left on device")


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    assert read_json(path) is None
    write_json(path, {"a": 1})
    before = file_digest(path), file_checksum(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1} and (file_digest(path), file_checksum(path)) == before
    assert [each.name for each in tmp_path.iterdir()] == ["value.json"]
    # Cut off where a full disk or a kill would: before the new contents are on the disk.
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(os, "fsync", raise_no_space)
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"value.json is damaged"):
        read_json(path)
    remove_tree(tmp_path / "absent")


def test_a_run_that_is_asked_to_end_again_and_again_without_getting_further_is_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.note_end()
    run.note_end()
    (run.stage(1).checkpoints / "step-00000002").mkdir(parents=True)
    write_json(run.stage(1).checkpoints / "step-00000002" / "COMPLETE", {})
    run.note_end()
    run.note_end()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"asked to end 3 times in a row and got no further .* give its jobs more"):
            run.note_end()
        # What was said is forgotten: whoever starts it again has read it.
        run.note_end()
        run.note_end()
    run.forget_ends()
    assert not (tmp_path / "interrupted.json").exists()
    run.note_end()
    run.note_end()
