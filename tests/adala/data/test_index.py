import functools
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading

import pytest

from adala.data.index import build_index, load_index


def test_counts_and_sizes_come_from_the_index(shard_folder):
    folder = shard_folder(3, 5)
    index = load_index([f"{folder}/train-*.tar"])
    assert [(shard.name, shard.samples) for shard in index.shards] == [("train-00000.tar", 3), ("train-00001.tar", 5)]
    assert [shard.bytes for shard in index.shards] == [path.stat().st_size for path in sorted(folder.glob("*.tar"))]
    assert index.num_samples == 8


def test_braces_globs_and_paths_name_the_same_shards(shard_folder):
    folder = shard_folder(1, 1, 1)
    expected = load_index([f"{folder}/train-*.tar"])
    assert len(expected.shards) == 3
    assert load_index([f"{folder}/train-{{00000..00002}}.tar"]) == expected
    assert load_index([f"file://{folder}/train-*.tar"]) == expected
    assert load_index([f"{folder}/train-0000{number}.tar" for number in range(3)]) == expected


def test_sources_are_concatenated_in_their_order(shard_folder):
    one, two = shard_folder(2, name="one"), shard_folder(3, name="two")
    assert [shard.samples for shard in load_index([f"{two}/train-*.tar", f"{one}/train-*.tar"]).shards] == [3, 2]


def test_the_index_counts_samples_rather_than_files(tmp_path, shard_folder):
    folder = shard_folder(4)
    entries = json.loads((folder / "index.json").read_text())["shards"]
    assert entries == [{"name": "train-00000.tar", "samples": 4, "bytes": (folder / "train-00000.tar").stat().st_size}]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_folder_without_index_is_refused_with_the_command_that_helps(shard_folder):
    folder = shard_folder(2)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match=f"python -m adala.data.index {folder}"):
        load_index([f"{folder}/train-00000.tar"])
    command = [sys.executable, "-W", "error", "-m", "adala.data.index", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    assert load_index([f"{folder}/train-00000.tar"]).num_samples == 2


def test_an_index_that_is_none_is_refused(shard_folder):
    folder = shard_folder(2)
    (folder / "index.json").write_text('{"files": []}')
    with pytest.raises(ValueError, match="is not a shard index"):
        load_index([f"{folder}/train-*.tar"])


def test_a_shard_outside_the_index_is_refused(shard_folder):
    folder = shard_folder(2)
    with pytest.raises(ValueError, match=r"no shard .* is called 'train-00001.tar'"):
        load_index([f"{folder}/train-{{00000..00001}}.tar"])


def test_a_shard_missing_on_disk_is_refused(shard_folder):
    folder = shard_folder(2, 2)
    (folder / "train-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00001.tar, but there is no such file"):
        load_index([f"{folder}/train-*.tar"])


def test_a_shard_of_another_size_is_refused(shard_folder):
    folder = shard_folder(2)
    with open(folder / "train-00000.tar", "ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match=r"train-00000.tar has \d+ bytes, but the index says \d+"):
        load_index([f"{folder}/train-*.tar"])


def test_a_glob_without_matches_is_refused(shard_folder):
    with pytest.raises(ValueError, match=r"matches 'val-\*.tar'.*lists train-00000.tar"):
        load_index([f"{shard_folder(2)}/val-*.tar"])


def test_no_sources_and_repeated_shards_are_refused(shard_folder):
    with pytest.raises(ValueError, match="no shards were named"):
        load_index([])
    folder = shard_folder(2)
    with pytest.raises(ValueError, match="named twice"):
        load_index([f"{folder}/train-*.tar", f"{folder}/train-00000.tar"])


def test_a_folder_without_shards_and_a_damaged_shard_are_not_indexed(tmp_path, shard_folder):
    with pytest.raises(ValueError, match=r"holds no \*.tar"):
        build_index(tmp_path)
    folder = shard_folder(6)
    with open(folder / "train-00000.tar", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(ValueError, match=r"train-00000.tar is damaged"):
        build_index(folder)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    """Serves a folder over HTTP on this machine, and returns its address."""
    servers = []

    def start(folder, handler=Quiet) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_shards_over_http_are_indexed_and_read(shard_folder, serve):
    from adala.data.order import shards_in_order
    from adala.data.samples import read_positions

    folder = shard_folder(3, 4)
    index = load_index([f"{serve(folder)}/train-*.tar"])
    assert [shard.samples for shard in index.shards] == [3, 4]
    raws = list(read_positions(index, shards_in_order([3, 4]), range(1, 6)))
    assert [raw.id for raw in raws] == [
        f"train-0000{shard}.tar/{key:04d}" for shard, key in [(0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    ]


@pytest.mark.parametrize("key", ["samples", "bytes"])
@pytest.mark.parametrize("value", ["-1", "1e30", "1" + "0" * 30, "8.0", "NaN", "Infinity", '"8"', "true", "null", "[]"])
def test_a_count_that_cannot_be_is_refused_in_one_sentence(shard_folder, key, value):
    index = shard_folder(8) / "index.json"
    index.write_text(re.sub(rf'"{key}": \d+', f'"{key}": {value}', index.read_text()))
    with pytest.raises(
        ValueError, match=rf'index\.json is not a shard index .*"{key}" of .train-00000\.tar. is '
    ) as caught:
        load_index([str(index.parent)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../train-00000.tar", "/etc/passwd", "x/y.tar", "..", ".", "", "http://host/x.tar", "a\0.tar", "a\n.tar", 3, None],
    ids=repr,
)
def test_what_an_index_lists_lies_beside_it(shard_folder, name):
    index = shard_folder(8) / "index.json"
    listed = json.loads(index.read_text())
    listed["shards"][0]["name"] = name
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"index\.json is not a shard index .* is not the name of a file beside it"):
        load_index([str(index.parent)])


def test_counts_that_no_shard_of_that_size_has_are_refused(shard_folder):
    index = shard_folder(8) / "index.json"
    text = index.read_text()
    for samples, message in [(10**6, "cannot hold 1000000 samples in"), (0, "bytes, and no samples")]:
        index.write_text(text.replace('"samples": 8', f'"samples": {samples}'))
        with pytest.raises(ValueError, match=message):
            load_index([str(index.parent)])


def test_counts_that_no_data_set_has_are_refused_together(tmp_path, monkeypatch, shard_folder):
    monkeypatch.setattr("adala.data.index.MAX_TOTAL_SAMPLES", 15)
    with pytest.raises(ValueError, match="the indexes list 16 samples together, more than 15"):
        load_index([str(shard_folder(8, 8))])


def test_a_shard_that_is_listed_twice_is_refused(shard_folder):
    index = shard_folder(8) / "index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"shards": listed["shards"] * 2}))
    with pytest.raises(ValueError, match=r"it lists .*train-00000\.tar twice"):
        load_index([str(index.parent)])


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 10**5 + b"]" * 10**5,
        b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        b'{"shards": []}'.ljust(2**24 + 1),
        b"\xff\xfe{\0}\0",
        b"9" * 10**4,
        b"",
    ],
    ids=["lists", "objects", "large", "utf-16", "digits", "empty"],
)
def test_what_is_no_index_is_refused_in_one_sentence(shard_folder, content):
    folder = shard_folder(8)
    (folder / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json is not a shard index .*: write it with `python -m") as caught:
        load_index([str(folder)])
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    # Nor does it stop ours from being written beside it.
    assert build_index(folder).name == "adala-index.json"
    assert load_index([str(folder)]).num_samples == 8


def test_an_index_with_a_byte_order_mark_is_read(shard_folder):
    index = shard_folder(8) / "index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert load_index([str(index.parent)]).num_samples == 8


@pytest.mark.parametrize("source", ["{}", "{}/*.tar", "{}/train-*.tar"])
def test_a_shard_that_the_index_does_not_know_is_not_left_out_without_a_word(shard_folder, source):
    folder = shard_folder(8, 8)
    index = folder / "index.json"
    index.write_text(json.dumps({"shards": json.loads(index.read_text())["shards"][:1]}))
    with pytest.raises(ValueError, match=r"train-00001\.tar is not in the index beside it: write the index anew"):
        load_index([source.format(folder)])
    assert load_index([f"{folder}/train-00000.tar"]).num_samples == 8


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ValueError, match=r"x\.tar is no file: leave only shards under such names"):
        build_index(tmp_path)


def test_an_archive_without_a_sample_among_shards_is_refused(shard_folder):
    folder = shard_folder(8)
    with tarfile.open(folder / "notes.tar", "w") as tar:
        member = tarfile.TarInfo("README")
        member.size = 20_000
        tar.addfile(member, io.BytesIO(b"x" * 20_000))
    with pytest.raises(ValueError, match=r"notes\.tar holds no samples: leave only shards in the folder"):
        build_index(folder)
