"""Shards as others write them: names, order, links, labels, and the indexes of other programs."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset import TarWriter

from adala.data.index import build_index, load_index, write_index
from adala.data.index import main as index_main
from adala.data.pack import write_shards
from adala.data.samples import decode, read_shard
from adala.tasks import Classification

read_class = Classification(num_classes=1000).reader


def write_tar(path: Path, files: list[tuple[str, bytes]], links: dict[str, str] | None = None, mode: str = "w") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode, encoding="utf-8") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def read(path: Path) -> dict[str, dict[str, bytes]]:
    """The samples of an indexed shard: fields by key."""
    (shard,) = load_index([str(path)]).shards
    return {raw.key: raw.fields for raw in read_shard(shard, range(shard.samples))}


@pytest.mark.parametrize(
    ("names", "samples"),
    [
        (["img.v1.png", "img.v1.cls", "img.v2.png", "img.v2.cls"], {"img.v1": "cls png", "img.v2": "cls png"}),
        (["2021.03.04.png", "2021.03.05.png"], {"2021.03.04": "png", "2021.03.05": "png"}),
        (["0001.depth.png", "0001.png", "0001.seg.png"], {"0001": "depth.png png seg.png"}),
        (["set.1/0001.png", "set.1/0001.cls"], {"set.1/0001": "cls png"}),
        (["./a.PNG", "./a.CLS"], {"./a": "cls png"}),
        (["._a.png", "a.png", ".DS_Store", "__MACOSX/._a.png", "a/.hidden/b.png", "__index__", "README"], {"a": "png"}),
        (["bär.png", "bär.cls"], {"bär": "cls png"}),
        (["../../x/a.png", "../../x/a.cls", "/etc/a.png", ".hidden/a.png"], {"../../x/a": "cls png", "/etc/a": "png"}),
    ],
    ids=["dots", "dates", "compound", "dotted_folder", "upper_case", "left_behind", "umlaut", "leads_up"],
)
def test_which_files_are_one_sample(tmp_path, png, names, samples):
    path = write_tar(tmp_path / "x.tar", [(name, png(n)) for n, name in enumerate(names)])
    build_index(tmp_path)
    assert {key: " ".join(sorted(fields)) for key, fields in read(path).items()} == samples


def test_many_names_with_dots_are_not_held_back(tmp_path, png):
    """More than fit one group; their files stay together wherever it ends."""
    names = [f"2021.{number:03d}.{extension}" for number in range(99) for extension in ("cls", "png")]
    path = write_tar(tmp_path / "x.tar", [(name, png(0)) for name in names])
    build_index(tmp_path)
    samples = read(path)
    assert len(samples) == 99 and all(fields.keys() == {"cls", "png"} for fields in samples.values())


@pytest.mark.parametrize("order", ["images_first", "segmentation_first"])
def test_files_of_a_sample_that_lie_apart_are_refused(tmp_path, png, order):
    kinds = {"images_first": ("png", "cls"), "segmentation_first": ("seg.png", "png")}[order]
    write_tar(tmp_path / "x.tar", [(f"{key:04d}.{kind}", png(key)) for kind in kinds for key in range(40)])
    with pytest.raises(ValueError, match=r"x.tar holds the files of the sample '0000' apart.*tar --sort=name"):
        build_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("names", [["a.png", "a.png"], ["a.png", "a.PNG"], ["a.png", "b.png", "a.png"]])
def test_a_file_that_is_there_twice_is_refused(tmp_path, png, names):
    write_tar(tmp_path / "x.tar", [(name, png(0)) for name in names])
    with pytest.raises(ValueError, match=r"x.tar holds the file.* '?a.*twice"):
        build_index(tmp_path)


def test_apart_files_are_found_while_reading_too(tmp_path, png):
    """Whatever an index from elsewhere says."""
    path = write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("b.png", png(0)), ("a.cls", b"1")])
    (tmp_path / "index.json").write_text(
        json.dumps({"shards": [{"name": "x.tar", "samples": 3, "bytes": path.stat().st_size}]})
    )
    with pytest.raises(ValueError, match="the sample 'a' apart"):
        read(path)


def test_links_are_refused_by_name_and_left_alone_where_they_are_no_data(tmp_path, png):
    path = write_tar(tmp_path / "x.tar", [("a.png", png(0))], links={"folder": "elsewhere"})
    build_index(tmp_path)
    assert list(read(path)) == ["a"]
    write_tar(path, [("a.png", png(0))], links={"b.png": "a.png"})
    with pytest.raises(ValueError, match=r"holds the link 'b.png' in place of a file.*--hard-dereference"):
        build_index(tmp_path)


def test_archives_joined_with_cat_are_refused(tmp_path, png):
    first, second = (write_tar(tmp_path / f"{key}.tar", [(f"{key}.png", png(0))]) for key in "ab")
    first.write_bytes(first.read_bytes() + second.read_bytes())
    second.unlink()
    with pytest.raises(ValueError, match=r"a.tar goes on behind its end"):
        build_index(tmp_path)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "X.TAR"])
def test_compressed_shards_and_shouted_names(tmp_path, png, name):
    path = write_tar(tmp_path / name, [("a.png", png(3))], mode="w:gz" if "gz" in name else "w")
    build_index(tmp_path)
    assert read(path) == {"a": {"png": png(3)}}


def test_names_that_are_not_utf_8_can_be_told(tmp_path, png):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("aé.png", "aè.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(0))
            tar.addfile(member, io.BytesIO(png(0)))
    build_index(tmp_path)
    assert list(read(path)) == [r"a\xe9", r"a\xe8"]


def test_a_list_of_classes_beside_the_shards_names_text_labels(tmp_path, png):
    files = [
        file for n, name in enumerate(["bee", "ape"]) for file in ((f"{n}.cls", name.encode()), (f"{n}.png", png(n)))
    ]
    path = write_tar(tmp_path / "shards/x.tar", files)
    build_index(path.parent)
    (tmp_path / "mine.txt").write_text("bee\nape\n")

    def labels(classes: str | None = None) -> list[int | None]:
        (shard,) = load_index([str(path)], classes).shards
        return [decode(raw, read_class).target for raw in read_shard(shard, range(2))]

    (path.parent / "classes.json").write_text('["ape", "bee"]')
    assert labels() == [1, 0]
    assert labels(str(tmp_path / "mine.txt")) == [0, 1]
    with pytest.raises(ValueError, match=r"cannot read the names of classes in nowhere.txt"):
        labels("nowhere.txt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [("a.npy", b"1"), ("b.npy", b"1"), ("c.png", None)],
            r"2 of 3 samples have no image .*/a has the files npy",
        ),
        (
            [("a.png", b"1"), ("b.jpg", b"1"), ("c.png", None)],
            r"2 of 3 images .* cannot be decoded .*/a.png: these",
        ),
        ([("README", b"1")], "hold no samples"),
    ],
    ids=["no_images", "broken", "nothing"],
)
def test_a_set_that_is_mostly_unusable_is_refused_with_an_example(tmp_path, png, capsys, files, message):
    write_tar(tmp_path / "x.tar", [(name, png(0) if content is None else content) for name, content in files])
    with pytest.raises(ValueError, match=message):
        build_index(tmp_path)
    assert index_main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


MOSAIC = {"shards": [{"format": "mds", "raw_data": {"basename": "shard.00000.mds"}, "samples": 7}], "version": 2}


def wids(path: Path, **changes) -> dict:
    entry = {"url": path.name, "nsamples": 2, "filesize": path.stat().st_size, **changes}
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [entry]}


@pytest.fixture
def two_samples(tmp_path, png) -> Path:
    return write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("b.png", png(1))])


@pytest.mark.parametrize("changes", [{}, {"filesize": None}, {"url": "./x.tar"}, {"md5sum": "0"}], ids=str)
def test_webdatasets_own_index_is_read(two_samples, changes):
    index = two_samples.parent / "index.json"
    index.write_text(json.dumps(wids(two_samples, **changes)))
    (shard,) = load_index([str(two_samples)]).shards
    assert (shard.samples, shard.bytes) == (2, two_samples.stat().st_size)


@pytest.mark.parametrize(
    "content", [json.dumps(MOSAIC), "{", "[]", '{"shards": []} x'], ids=["mosaic", "cut", "list", "more"]
)
def test_a_foreign_index_is_never_overwritten(two_samples, content):
    folder = two_samples.parent
    (folder / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json is not a shard index.*python -m adala.data.index"):
        load_index([str(two_samples)])
    assert build_index(folder).name == "adala-index.json"
    assert [shard.samples for shard in load_index([f"{folder}/*.tar"]).shards] == [2]
    write_shards([{"png": b"1"}], folder, "val", 1)
    assert [shard.name for shard in load_index([str(folder)]).shards] == ["val-00000.tar", "x.tar"]
    assert (folder / "index.json").read_text() == content


def test_a_split_that_is_added_leaves_those_of_a_foreign_index_listed(two_samples, png):
    folder = two_samples.parent
    (folder / "index.json").write_text(json.dumps(wids(two_samples)))
    write_shards([{"png": png(0)}], folder, "val", 1)
    assert {shard.name: shard.samples for shard in load_index([str(folder)]).shards} == {"val-00000.tar": 1, "x.tar": 2}


def test_ours_goes_before_webdatasets(two_samples, png):
    folder = two_samples.parent
    (folder / "index.json").write_text(json.dumps(wids(two_samples)))
    write_tar(two_samples, [("a.png", png(0))])
    assert build_index(folder).name == "adala-index.json"
    assert load_index([str(folder)]).num_samples == 1


def test_the_index_is_written_over_our_own(two_samples):
    assert [build_index(two_samples.parent).name for _ in range(2)] == ["index.json"] * 2
    assert write_index(two_samples.parent, []).name == "index.json"


def test_tools_read_what_we_write_and_we_read_what_they_write(tmp_path, png):
    """GNU tar and WebDataset's own writer, among whose files nothing is lost."""
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{number}.png").write_bytes(png(number))
        (tmp_path / f"in/{number}.cls").write_text(str(number))
    (tmp_path / "gnu").mkdir()
    subprocess.run(["tar", "cf", tmp_path / "gnu/x.tar", "--sort=name", "-C", tmp_path / "in", "."], check=True)
    (tmp_path / "wds").mkdir()
    with TarWriter(str(tmp_path / "wds/x.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"k/{number}", "png": np.full((4, 4, 3), number / 3), "cls": number})
    for name in ("gnu", "wds"):
        build_index(tmp_path / name)
        (shard,) = load_index([str(tmp_path / name)]).shards
        assert [decode(raw, read_class).target for raw in read_shard(shard, range(3))] == [0, 1, 2]


def test_names_that_are_not_ascii_under_a_c_locale(tmp_path, png):
    folder = tmp_path / "größe"
    write_tar(folder / "bär.tar", [("ä.png", png(0)), ("ö.png", png(0)), ("ü.npy", b"")])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = (
        "from adala.data.index import main, load_index; from adala.data.samples import read_shard; import sys\n"
        "assert main(sys.argv[1:]) == 0\n"
        "(shard,) = load_index(sys.argv[1:]).shards\n"
        "print([ascii(raw.key) for raw in read_shard(shard, range(3))])"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert r"\xe4" in done.stdout and r"\xfc" in done.stdout


def test_a_pointer_in_place_of_a_shard_is_told_as_one(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"x.tar is a Git LFS pointer .* `git lfs pull`"):
        build_index(tmp_path)


def test_shards_in_a_folder_that_cannot_be_written_are_linked_into_another(tmp_path, two_samples, monkeypatch):
    def read_only(*_):
        raise PermissionError("Permission denied")

    with monkeypatch.context() as changed:
        changed.setattr("adala.data.index.write_json", read_only)
        with pytest.raises(ValueError, match=r"cannot write .*index.json \(Permission denied\): .*`ln -s`"):
            build_index(two_samples.parent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x.tar").symlink_to(two_samples)
    build_index(tmp_path / "mine")
    assert load_index([str(tmp_path / "mine")]).num_samples == 2
