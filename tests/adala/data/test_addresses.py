"""Where people say that their shards lie."""

import os
import shutil
from pathlib import Path

import pytest

from adala.data.index import load_index

ALL = ["train-00000.tar", "train-00001.tar", "train-00002.tar"]


@pytest.fixture
def home(tmp_path: Path, shard_folder, monkeypatch) -> Path:
    """A working and home folder in which ``shards`` lie, three of one sample each."""
    shard_folder(1, 1, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def names(*sources: str) -> list[str]:
    return [shard.name for shard in load_index(sources).shards]


@pytest.mark.parametrize(
    "source",
    [
        "shards",
        "shards/",
        "./shards//",
        "shards//train-*.tar",
        "shards/../shards/train-*.tar",
        "~/shards/train-*.tar",
        "~/shards",
        "sh?rds",
        "shards/train-0000[0-9].tar",
        "shards/train-{00000..00002}.tar",
        "shards/{train-00000,train-00001,train-00002}.tar",
        "{shards/train-00000,shards/train-0000[12]}.tar",
        "*/train-*.tar",
        "**/train-*.tar",
        "file:shards",
        "file:{}/shards/train-*.tar",
        "file://{}/shards",
        "file://localhost{}/sh%61rds/train-*.tar",
    ],
)
def test_addresses_of_one_folder(home, source):
    assert names(source.replace("{}", str(home))) == ALL


@pytest.mark.parametrize(
    "folder",
    ["a:b", "100%", "{x}", "{a,b}", "[ab]", "a b", "x?", "*", "größe", "%61", "a{", "s3:", "-x", "%05d", "a//b"],
)
@pytest.mark.parametrize("form", ["{}", "{}/", "{}/train-*.tar", "{}/train-{00000..00002}.tar", "./{}/train-*.tar"])
def test_folders_with_strange_names_are_meant_as_they_are_written(home, folder, form):
    shutil.copytree("shards", folder)
    assert names(form.replace("{}", folder)) == ALL


def test_strange_names_of_shards(home):
    shutil.copy("shards/train-00000.tar", "shards/a[1].tar")
    shutil.copy("shards/train-00001.tar", "shards/{b}:%.tar")
    from adala.data.index import build_index

    build_index("shards")
    assert names("shards/a[1].tar", "shards/{b}:%.tar") == ["a[1].tar", "{b}:%.tar"]


def test_several_folders_by_glob(home):
    for name in ("part-1", "part-2"):
        shutil.copytree("shards", name)
    Path("part-3").mkdir()
    assert names("part-*/train-00001.tar") == ["train-00001.tar"] * 2
    assert names("part-*/train-*.tar") == 2 * ALL
    assert names("part-*") == 2 * ALL
    assert names("part-{1,2}") == 2 * ALL
    assert [shard.url for shard in load_index(["part-{2,1}/train-00000.tar"]).shards] == [
        "part-2/train-00000.tar",
        "part-1/train-00000.tar",
    ]


@pytest.mark.parametrize("again", ["shards/train-00001.tar", "./shards/*1.tar", "{}/shards/train-00001.tar", "link"])
def test_a_shard_named_by_two_addresses_is_named_twice(home, again):
    os.symlink("shards", "link")
    with pytest.raises(ValueError, match="named twice"):
        names("shards", again.replace("{}", str(home)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/train-*.tar", r"cannot read the shard index nowhere/index.json"),
        ("nowhere-*/train-*.tar", r"nowhere-\*/train-\*.tar: there is no such folder"),
        ("shards/val-*.tar", r"no shard in shards/index.json matches 'val-\*.tar'"),
        ("shards/train-{00000..00003}.tar", r"is called 'train-00003.tar'"),
        ("shards/train-00000.tar/", None),
        ("shards/train-00000.tar/x.tar", r"cannot read the shard index shards/train-00000.tar/index.json"),
        ("", r"cannot read the shard index index.json"),
        ("pipe:cat shards/train-00000.tar", r"cannot read the shard index pipe:cat shards/index.json"),
        ("foo://bucket/train.tar", r"foo://bucket/index.json"),
    ],
)
def test_addresses_of_nothing(home, source, message):
    if message is None:
        assert names(source) == ["train-00000.tar"]
        return
    with pytest.raises(ValueError, match=message):
        names(source)
