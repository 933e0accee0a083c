"""Conversions that are killed, stopped, repeated, side by side or out of space: whole in the end, or not there."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adala.data.convert import conversion
from adala.data.convert.command import main
from adala.data.index import listed_shards, load_index
from adala.data.loader import TrainLoader
from adala.data.preparation import prepare_images
from adala.data.transforms import build_eval_transform

# So many images in a shard that one takes about a tenth of a second, of ten.
IMAGES, PER_SHARD, CLASSES = 160, 16, 4
OPTIONS = ("--samples-per-shard", str(PER_SHARD), "--max-size", "300", "--seed", "3")
# On a busy machine.
PATIENCE_S = 60


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Folders of classes, with a few damaged images among the others."""
    folder = tmp_path_factory.mktemp("source") / "photos"
    noise = np.random.default_rng(0).integers(0, 256, (4, 400, 500, 3), dtype=np.uint8)
    for number in range(IMAGES):
        path = folder / f"class {number % CLASSES}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise[number % 4]).save(path)
    (folder / "class 1/17.jpg").write_bytes(b"damaged")
    (folder / "class 2/90.jpg").write_bytes((folder / "class 2/90.jpg").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted conversion by one process writes."""
    shards = tmp_path_factory.mktemp("whole") / "shards"
    assert main(["imagefolder", str(photos), str(shards), *OPTIONS, "--workers", "1"]) == 0
    return contents(shards)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def started(*arguments: str) -> int:
    """The command in a process forked from this one, which leads a group of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(main([str(argument) for argument in arguments]))
    return child


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def unfinished(shards: Path) -> list[Path]:
    return sorted(shards.glob(".converting/train/*/*.tar"))


def kill_alone(process: int) -> None:
    """Kills a command but none of its processes, which are to end by themselves."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_bytes_are_the_same_whatever_the_number_of_processes(photos, whole, tmp_path, capsys):
    assert main(["imagefolder", str(photos), str(tmp_path / "shards"), *OPTIONS, "--workers", "3"]) == 0
    assert contents(tmp_path / "shards") == whole
    assert "train: 158 images in 10 shards, 4 classes, 158 images encoded anew" in capsys.readouterr().out
    assert sorted(whole) == sorted(
        ["classes.json", "index.json", "train.conversion.json", *(f"train-{n:05d}.tar" for n in range(10))]
    )


def test_a_killed_command_is_taken_up_by_the_same_one(photos, whole, tmp_path, capsys):
    """As people run it, with kill -9 at its one process that was not asked to end."""
    shards = tmp_path / "shards"
    command = ["imagefolder", photos, shards, *OPTIONS, "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "adala.data.convert", *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: len(unfinished(shards)) >= 2)
    process.kill()
    process.wait()
    there = {path.name: path.read_bytes() for path in unfinished(shards)}
    assert 2 <= len(there) < 10 and all(whole[name] == content for name, content in there.items())
    assert not list(shards.glob("*")) or [path.name for path in shards.glob("*")] == [".converting"]
    written = {path.name: path.stat().st_mtime_ns for path in unfinished(shards)}
    wait_until(lambda: is_empty(process.pid))
    assert main([str(argument) for argument in command]) == 0
    assert "shards are there, going on" in capsys.readouterr().out
    assert contents(shards) == whole
    assert all((shards / name).stat().st_mtime_ns == when for name, when in written.items()), "whole ones are kept"
    epoch = epoch_of(shards)
    assert len(epoch) == 156 and len(set(epoch)) == 156


def epoch_of(shards: Path) -> list[str]:
    """The ids that two data workers give in an epoch of batches of four."""
    preparation = prepare_images(build_eval_transform((16, 16), (0.5,) * 3, (0.5,) * 3))
    index = load_index([f"{shards}/train-*.tar"])
    loader = TrainLoader(index, preparation, global_batch_size=4, micro_batch_size=4, seed=0, num_workers=2)
    batches = iter(loader)
    ids = [name for _ in range(loader.steps_per_epoch) for name in next(batches)["id"]]
    batches.close()
    return ids


@pytest.mark.faults
def test_twenty_kills_at_random_moments(photos, whole, tmp_path):
    draw, killed = random.Random(0), 0
    for trial in range(4):
        shards = tmp_path / f"shards{trial}"
        command = ("imagefolder", photos, shards, *OPTIONS)
        for _ in range(5):
            process = started(*command, "--workers", draw.choice("123"))
            time.sleep(draw.uniform(0.05, 0.5))
            if os.waitpid(process, os.WNOHANG) == (0, 0):
                kill_alone(process)
                killed += 1
            if (shards / "index.json").exists():
                assert load_index([str(shards)]).num_samples == 158
            wait_until(lambda group=process: is_empty(group))
        assert main([str(argument) for argument in (*command, "--workers", "1")]) == 0
        assert contents(shards) == whole
    assert killed >= 10


@pytest.fixture
def small(tmp_path) -> Path:
    """Thirty images without labels."""
    folder = tmp_path / "small"
    folder.mkdir()
    for number in range(30):
        Image.new("RGB", (8, 8), (number, 2 * number, 200)).save(folder / f"{number}.png")
    return folder


def command_of(source: Path, shards: Path, *options: str) -> list[str]:
    return ["images", str(source), str(shards), "--samples-per-shard", "3", "--workers", "1", *options]


@pytest.mark.parametrize("moment", range(13))
def test_a_crash_while_a_split_takes_the_place_of_another(small, tmp_path, monkeypatch, moment):
    """Thirteen files get their names: an index without the split, ten shards, the record, and the index."""
    shards, fresh = tmp_path / "shards", tmp_path / "fresh"
    assert main(command_of(small, shards)) == main(command_of(small, shards, "--split", "val")) == 0
    expected = command_of(small, fresh, "--seed", "1")
    assert main(expected) == main(command_of(small, fresh, "--split", "val")) == 0
    rename, moved = os.replace, []

    def crash_at_the_moment(path: Path, target: Path) -> Path:
        if Path(target).parent == shards:
            if len(moved) == moment:
                raise KeyboardInterrupt
            moved.append(target)
        rename(path, target)
        return target

    monkeypatch.setattr(Path, "replace", crash_at_the_moment)
    monkeypatch.setattr(Path, "rename", crash_at_the_moment)
    assert main(command_of(small, shards, "--seed", "1", "--overwrite")) == 130
    monkeypatch.undo()
    listed = listed_shards(f"{shards}/")
    found = sum(shard.samples for shard in listed)
    assert found == (60 if moment == 0 else 30), "a split that is not whole is not listed"
    assert load_index([f"{shards}/val-*.tar"]).num_samples == 30
    assert main(command_of(small, shards, "--seed", "1")) == 0
    assert contents(shards) == contents(fresh)


def test_a_finished_split_is_left_alone(small, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert main(command_of(small, shards)) == 0
    times = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    for options in ((), ("--overwrite",), ("--workers", "2")):
        assert main(command_of(small, shards, *options)) == 0
        assert "train: 30 images in 10 shards, no labels: all of it was there" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == times
    (shards / "train-00004.tar").unlink()
    assert main(command_of(small, shards)) == 0
    assert load_index([str(shards)]).num_samples == 30


def touched(source: Path) -> tuple[str, ...]:
    os.utime(source / "7.png", ns=(1, 1))
    return ()


def removed(source: Path) -> tuple[str, ...]:
    (source / "7.png").unlink()
    return ()


def added(source: Path) -> tuple[str, ...]:
    shutil.copy(source / "7.png", source / "7b.png")
    return ()


def renamed(source: Path) -> tuple[str, ...]:
    (source / "7.png").rename(source / "77.png")
    return ()


CHANGES = {
    "touched": (touched, "of 30 files, and there are 30 now, or some have changed"),
    "removed": (removed, "of 30 files, and there are 29 now"),
    "added": (added, "of 30 files, and there are 31 now"),
    "renamed": (renamed, "of 30 files, and there are 30 now, or some have changed"),
    "seed": (lambda source: ("--seed", "1"), "seed was 0, and is 1 now"),
    "samples": (lambda source: ("--samples-per-shard", "4"), "samples_per_shard was 3, and is 4 now"),
    "mib": (lambda source: ("--shard-mib", "1"), "shard_mib was None, and is 1.0 now"),
    "size": (lambda source: ("--max-size", "6"), "max_size was None, and is 6 now"),
}


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "finished"])
@pytest.mark.parametrize("change", CHANGES)
def test_another_source_or_other_options_are_refused(small, tmp_path, monkeypatch, capsys, change, stopped):
    shards = tmp_path / "shards"
    if stopped:
        monkeypatch.setattr(conversion, "_publish", interrupt)
    assert main(command_of(small, shards)) == (130 if stopped else 0)
    monkeypatch.undo()
    before = contents(shards)
    make, message = CHANGES[change]
    options = make(small)
    capsys.readouterr()
    assert main(command_of(small, shards, *options)) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "--overwrite" in said
    assert contents(shards) == before
    assert main(command_of(small, shards, *options, "--overwrite")) == 0
    assert main(command_of(small, tmp_path / "fresh", *options)) == 0
    assert contents(shards) == contents(tmp_path / "fresh")


def interrupt(*arguments) -> None:
    raise KeyboardInterrupt


def test_shards_of_another_hand_are_not_replaced_unasked(small, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "train-00000.tar").write_bytes(b"mine")
    (shards / "training-00000.tar").write_bytes(b"mine as well")
    assert main(command_of(small, shards)) == 1
    assert "holds shards of the split train already, as train-00000.tar" in capsys.readouterr().err
    assert main(command_of(small, shards, "--split", "val")) == 0
    assert main(command_of(small, shards, "--overwrite")) == 0
    assert (shards / "training-00000.tar").read_bytes() == b"mine as well"
    assert load_index([f"{shards}/train-*.tar"]).num_samples == 30


def test_a_source_that_changes_meanwhile_is_noticed(small, tmp_path, monkeypatch, capsys):
    write_shard = conversion.write_shard

    def change_after_the_first(task):
        record = write_shard(task)
        for path in small.iterdir():
            path.write_bytes(path.read_bytes() + b"more")
        return record

    monkeypatch.setattr(conversion, "write_shard", change_after_the_first)
    assert main(command_of(small, tmp_path / "shards")) == 1
    said = capsys.readouterr().err
    assert "has changed since the files were listed: leave the source alone" in said and said.count("\n") == 1


def test_two_commands_in_one_folder_are_noticed(photos, small, tmp_path, capsys):
    shards = tmp_path / "shards"
    process = started("imagefolder", photos, shards, *OPTIONS, "--workers", "2")
    wait_until(lambda: len(unfinished(shards)) >= 1)
    assert main(command_of(small, shards, "--split", "val")) == 1
    assert f"another command is writing into {shards}" in capsys.readouterr().err
    kill_alone(process)
    # The lock is that of the process that was killed, not of those that it started.
    assert main(command_of(small, shards, "--split", "val")) == 0
    wait_until(lambda: is_empty(process))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_sentence_and_the_command_goes_on_later(photos, whole, tmp_path, capsys, workers):
    """A limit on the size of files in place of a full disk: writes fail in the middle of a shard."""
    shards = tmp_path / "shards"
    largest = max(len(content) for name, content in whole.items() if name.endswith(".tar"))
    command = ["imagefolder", str(photos), str(shards), *OPTIONS, "--workers", workers]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert f"error: there is no room left for {shards} (File too large): make room, and give the same" in said
    assert said.count("\n") == 1 and not list(shards.glob(".converting/train/*/.*"))
    assert main(command) == 0
    assert contents(shards) == whole


def kill_own_process(task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_sentence(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conversion, "write_shard", kill_own_process)
    assert main(["imagefolder", str(photos), str(tmp_path / "shards"), *OPTIONS, "--workers", "2"]) == 1
    said = capsys.readouterr().err
    assert "most often because memory is full: give the same command again with fewer --workers" in said
    assert said.count("\n") == 1


def test_too_many_bad_files_stop_the_command_until_they_are_allowed(small, tmp_path, capsys):
    for number in range(11):
        (small / f"{number}.png").write_bytes(b"damaged")
    shards = tmp_path / "shards"
    assert main(command_of(small, shards)) == 1
    said = capsys.readouterr().err
    assert "error: 11 of 30 samples are bad, where 10 may be, the last " in said and said.count("\n") == 1
    assert not list(shards.glob("*.tar")) and not list(shards.glob("*.json"))
    assert main(command_of(small, shards, "--max-bad-fraction", "0.4")) == 0
    assert "left out 11 files (11 x it cannot be decoded)" in capsys.readouterr().err
    assert load_index([str(shards)]).num_samples == 19


def test_files_that_are_gone_or_forbidden(small, tmp_path, monkeypatch, capsys):
    """As root reads everything, the refusal is a made one."""
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "3.png" and path.parent == small:
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert main(command_of(small, tmp_path / "shards")) == 0
    assert "3.png: it cannot be read: Permission denied" in capsys.readouterr().err
    assert load_index([f"{tmp_path}/shards"]).num_samples == 29


def test_what_is_left_out_is_listed_whole_in_the_record(small, tmp_path, capsys):
    for number in range(25):
        (small / f"note {number}.txt").write_text("")
    assert main(command_of(small, tmp_path / "shards")) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 22 and said[-1].endswith(
        "and 5 more, all of them in " + str(tmp_path / "shards/train.conversion.json")
    )
    record = json.loads((tmp_path / "shards/train.conversion.json").read_text())
    assert len(record["left_out"]) == 25 and len(record["shards"]) == 10
