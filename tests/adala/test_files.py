"""Files that are whole or absent, also after the machine loses power; digests of known contents."""

import hashlib
import json
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adala.checkpoint import Checkpoints
from adala.data.index import Shard, write_index
from adala.files import file_checksum, file_digest, read_json, remove_tree, value_digest, write_json, write_whole
from adala.slices import WEIGHTS, Slice


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Of each fsync, in order: the inode, and for a folder the names in it then."""
    calls = []
    fsync = os.fsync

    def noting_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append((os.fstat(descriptor).st_ino, sorted(os.listdir(path)) if path.is_dir() else None))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    return calls


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch, synced) -> list[int]:
    """How many files had been synced when a file or folder took its final name, in order."""
    calls = []
    for module, name in ((os, "replace"), (os, "rename")):
        rename = getattr(module, name)

        def noting_rename(source, target, *arguments, rename=rename, **options) -> None:
            calls.append(len(synced))
            rename(source, target, *arguments, **options)

        monkeypatch.setattr(module, name, noting_rename)
    return calls


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path: Path, synced, replaced) -> None:
    write_whole(tmp_path / "note.txt", "first\n")
    (before,) = replaced
    assert inode(tmp_path / "note.txt") in [number for number, _ in synced[:before]]
    assert (inode(tmp_path), ["note.txt"]) in synced[before:]
    assert (tmp_path / "note.txt").read_text() == "first\n"


def test_an_index_is_on_the_disk_before_it_has_its_name(tmp_path: Path, synced, replaced) -> None:
    path = write_index(tmp_path, [Shard(str(tmp_path / "train-0.tar"), 3, 2048)])
    assert inode(path) in [number for number, _ in synced[: replaced[-1]]]


def test_a_checkpoint_is_on_the_disk_before_it_is_marked_complete(tmp_path: Path, synced, replaced) -> None:
    part = Slice("weight", 0, {WEIGHTS: torch.zeros(250)})
    engine = SimpleNamespace(zero_stage=1, has_finite_weights=lambda: True, slices=lambda: [part])
    checkpoints = Checkpoints(tmp_path, engine)
    checkpoints.begin(3, {"note": 1})
    checkpoints.finish()
    saved = tmp_path / "step-00000003"
    order = [number for number, _ in synced]
    marker = order.index(inode(saved / "COMPLETE"))
    for name in ("rank-00000.safetensors", "trainer.json"):
        assert inode(saved / name) in order[:marker], name
    assert (inode(tmp_path), ["step-00000003"]) in synced[replaced[-1] :]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1} and json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_what_is_no_json_is_told_and_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "nothing.json") is None
    for content in (b"{", b"\xff\xfe\xff"):
        (tmp_path / "broken.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.json is damaged"):
            read_json(tmp_path / "broken.json")


def test_digests_are_those_of_the_whole_file(tmp_path: Path) -> None:
    """Of more than one block of reading."""
    content = bytes(range(256)) * 2**15
    (tmp_path / "large").write_bytes(content)
    assert file_digest(tmp_path / "large") == "sha256:" + hashlib.sha256(content).hexdigest()
    assert file_checksum(tmp_path / "large") == zlib.crc32(content)


def test_a_values_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert value_digest({"a": 1, "b": [2]}) == value_digest({"b": [2], "a": 1}) != value_digest({"a": 1, "b": [3]})
    expected = "sha256:" + hashlib.sha256(b'{"a": 1, "b": [2]}').hexdigest()
    assert value_digest({"b": [2], "a": 1}) == expected


def test_a_tree_is_removed_with_all_it_holds(tmp_path: Path) -> None:
    (tmp_path / "tree" / "branch").mkdir(parents=True)
    (tmp_path / "tree" / "branch" / "leaf").touch()
    for _ in range(2):
        remove_tree(tmp_path / "tree")
        assert not (tmp_path / "tree").exists()
