import functools
import http.server
import json
import socket
import subprocess
import sys
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


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr("adala.data.addresses.HTTP_TIMEOUT_S", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(ValueError, match=r"cannot read the shard index http://.*timed out"):
            load_index([f"http://127.0.0.1:{deaf.getsockname()[1]}/x/train-*.tar"])


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


def test_a_broken_http_stream_is_opened_again_and_given_up_after_three_times(shard_folder, serve):
    from adala.data.samples import read_shard

    class Breaking(Quiet):
        requests = 0
        breaks = 1

        def copyfile(self, source, outputfile):
            type(self).requests += 1
            if type(self).requests <= self.breaks and self.path.endswith(".tar"):
                outputfile.write(source.read(5000))
                self.close_connection = True
            else:
                super().copyfile(source, outputfile)

    folder = shard_folder(8)
    shard = load_index([f"{serve(folder, Breaking)}/train-00000.tar"]).shards[0]
    Breaking.requests, Breaking.breaks = 0, 1
    assert [raw.key for raw in read_shard(shard, range(8))] == [f"{key:04d}" for key in range(8)]
    assert Breaking.requests == 2
    Breaking.requests, Breaking.breaks = 0, 100
    with pytest.raises(ValueError, match=r"train-00000.tar gave \d samples where its index lists 8"):
        list(read_shard(shard, range(8)))
    assert Breaking.requests == 3
