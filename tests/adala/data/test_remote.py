"""Remote files as streams; everything that a server can do is tried in tests/faults."""

import importlib.util
import io
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fault_server import PAGE, Exchange, FaultServer, cases, cut_at, first, redirect
from fsspec.implementations.memory import MemoryFileSystem
from served_shards import (
    IMPATIENT,
    INDEX,
    SHARD,
    as_served,
    check_outcome,
    layout_of,
    read_all,
    try_case,
    write_folder,
)

from adala.config import DataConfig
from adala.data.addresses import open_stream, read_text
from adala.data.index import ShardIndex, load_classes, load_index
from adala.data.loader import EvaluationLoader, TrainLoader
from adala.data.over_http import _retry_after
from adala.data.preparation import View, prepare_images
from adala.data.remote import AbsentError, RemoteError, RemoteOptions
from adala.plan import remote_options

QUICK = (
    *("well", "silent-once", "resets-twice", "garbage", "endless-headers", "status-404", "status-503-twice"),
    *("retry-after-past", "retry-after-an-hour", "redirect-loop", "redirect-with-endless-body", "drip"),
    *("cut-between-label-and-image", "cut-mid-sample-without-ranges", "cut-every-20000", "cut-always"),
    *("length-short", "length-none", "chunked-cut-once", "range-shifted", "changed-bytes", "page-of-unknown-size"),
    *("changed-name-of-the-state-alone", "body-endless-of-unknown-size", "noise-once", "packed"),
    *("index-silent", "index-cut-once", "index-not-utf-8", "index-count-too-small", "index-size-too-small"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("served") / "shards", 8, 3)


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:
    return as_served(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list:
    return read_all(str(folder.parent))


@pytest.mark.parametrize("name", QUICK)
def test_reading_ends_in_time_with_all_samples_or_a_sentence(name, files, expected) -> None:
    case = cases(layout_of(files[SHARD]))[name]
    check_outcome(case, try_case(case, files), expected)


def test_the_recipes_defaults_are_the_streams(monkeypatch) -> None:
    assert remote_options(DataConfig()) == RemoteOptions()
    monkeypatch.setenv("HOME", "/home/somebody")
    assert remote_options(DataConfig(cache_dir="~/cache")).cache_dir == "/home/somebody/cache"


def test_only_what_is_missing_is_asked_for_again(files, expected) -> None:
    asked = []

    def noted(exchange: Exchange) -> None:
        asked.append((exchange.headers.get("range"), exchange.headers.get("if-range")))
        exchange.good(upto=exchange.range_start + 30000)

    with FaultServer(files, {SHARD: noted}) as server:
        assert read_all(server.url) == expected
    assert asked == [(None, None), ("bytes=30000-", '"a1"'), ("bytes=60000-", '"a1"')]


@pytest.mark.parametrize(
    "name", ["shifted", "of-the-beginning", "not-said", "garbage", "not-there", "without-validator"]
)
def test_other_ranges_than_were_asked_for_are_not_joined(files, name) -> None:
    case = cases(layout_of(files[SHARD]))[f"range-{name}"]
    with FaultServer(files, {SHARD: case.shard}) as server:
        with open_stream(server.url + SHARD, IMPATIENT) as stream:
            assert stream.read() == files[SHARD]


def test_the_time_between_reads_is_the_readers(files) -> None:
    """A trainer that is slow for longer than any time-out loses nothing, even if the server does not wait for it."""

    def impatient(exchange: Exchange) -> None:
        exchange.good(upto=exchange.range_start + 25000)

    with FaultServer(files, {SHARD: impatient}) as server:
        read = b""
        with open_stream(server.url + SHARD, replace(IMPATIENT, total_timeout_s=0.5)) as stream:
            while block := stream.read(25000):
                read += block
                time.sleep(0.5)
    assert read == files[SHARD]


def test_retries_leave_every_generator_of_random_numbers_alone(files) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with FaultServer(files, {SHARD: first(3, cut_at(9000))}) as server:
        read_all(server.url)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        (" 0 ", 0, 0),
        ("99999999", 120, 120),
        ("-3", None, None),
        ("1.5", None, None),
        ("later", None, None),
        ("", None, None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0),
        ("Fri, 31 Dec 2199 23:59:59 GMT", 120, 120),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None, None),
    ],
)
def test_what_a_server_asks_to_wait(header, low, high) -> None:
    waits = _retry_after(header)
    assert waits is None if low is None else low <= waits <= high


def test_nobody_there(files) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(ValueError, match=r"cannot read the shard index .*given up .* since Connection refused: look"):
        read_all(f"http://127.0.0.1:{port}")
    with pytest.raises(ValueError, match=r"cannot read the shard index http://nobody.invalid/shards/index.json: given"):
        read_all("http://nobody.invalid")
    with pytest.raises(ValueError, match=r"its address is none \(nonnumeric port"):
        read_all("http://localhost:port")


def test_a_connection_that_is_never_accepted_is_given_up() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        start = time.monotonic()
        with pytest.raises(ValueError, match="timed out"):
            read_all(f"http://127.0.0.1:{address[1]}")
        assert time.monotonic() - start < 6
        for each in waiting:
            each.close()


def test_tls_to_a_plain_port(files) -> None:
    with FaultServer(files) as server, pytest.raises(ValueError, match="given up at byte 0 after 4 attempts, since"):
        read_all(server.url.replace("http:", "https:"))


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch) -> Iterator[str]:
    """A certificate for localhost, with its key, and an empty memory of whom this machine trusts."""
    from adala.data.over_http import _trust

    path = tmp_path / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", path, "-out", path]
    # The key comes first in the file, the certificate is appended.
    try:
        subprocess.run([*command[:-1], tmp_path / "cert.pem"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    path.write_bytes(path.read_bytes() + (tmp_path / "cert.pem").read_bytes())
    _trust.cache_clear()
    yield str(path)
    _trust.cache_clear()


def test_a_certificate_that_nobody_trusts_is_refused_at_once(files, certificate) -> None:
    with FaultServer(files, certificate=certificate) as server:
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"certificate is not trusted \(self.signed certificate\).*SSL_CERT_FILE"):
            read_all(server.url, replace(IMPATIENT, first_wait_s=5))
        assert time.monotonic() - start < 6


def test_https_is_read_and_never_left_for_http(files, expected, certificate, monkeypatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    with FaultServer(files) as plain, FaultServer(files, certificate=certificate) as server:
        assert read_all(server.url) == expected
        server.handlers[SHARD] = redirect(plain.url + "/moved.tar")
        with pytest.raises(OSError, match=r"leads from HTTPS to http://localhost:.*not safe"):
            read_all(server.url)
        assert not plain.requests
        plain.handlers[SHARD] = redirect(server.url + "/moved.tar")
        plain.handlers[INDEX] = redirect(server.url + "/moved.json")
        assert read_all(plain.url) == expected


def test_names_that_a_url_must_escape(folder, files, expected) -> None:
    served = {path.replace("train-", "trän ing-"): content for path, content in files.items()}
    served[INDEX] = files[INDEX].decode().replace("train-", "trän ing-").encode()
    served = {path.replace("ä", "%C3%A4").replace(" ", "%20"): content for path, content in served.items()}
    with FaultServer(served) as server:
        index = load_index([f"{server.url}/shards/*.tar"], remote=IMPATIENT)
        assert [shard.name for shard in index.shards] == ["trän ing-00000.tar", "trän ing-00001.tar"]
        with open_stream(index.shards[0].url, IMPATIENT) as stream:
            assert stream.read() == files[SHARD]


def test_classes_from_a_server(files) -> None:
    with FaultServer({"/classes.txt": b"cat\ndog\n"}) as server:
        assert list(load_classes(f"{server.url}/classes.txt", IMPATIENT)) == ["cat", "dog"]
        with pytest.raises(ValueError, match=r"cannot read the names of classes in .*no\.txt .*answers 404"):
            load_classes(f"{server.url}/no.txt", IMPATIENT)


def test_an_index_larger_than_any_is_not_read_to_its_end(files, monkeypatch) -> None:
    monkeypatch.setattr("adala.data.openers.MAX_TEXT_BYTES", 2**20)
    with FaultServer({**files, INDEX: b" " * 2**21}) as server:
        with pytest.raises(ValueError, match="larger than 1 MiB"):
            read_all(server.url)


class FlakyFile(io.BytesIO):
    """A file that hangs or breaks as often as ``moods`` has something left to say."""

    moods: ClassVar[list[str]] = []

    def read(self, count: int | None = -1) -> bytes:
        mood = self.moods.pop() if self.moods else None
        if mood == "hangs":
            time.sleep(2)
        if mood == "breaks":
            raise RuntimeError("the client's own error")
        return super().read(count)


class FlakyFileSystem(MemoryFileSystem):
    """What is in memory, of which one shard is flaky."""

    protocol = "flaky"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path: str, *arguments, **options):
        file = super()._open(path, *arguments, **options)
        return FlakyFile(file.getvalue()) if path.endswith("0.tar") else file


@pytest.fixture
def in_memory(files) -> Iterator[None]:
    """Puts the files where fsspec reads them."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    store = fsspec.filesystem("memory")
    for path, content in files.items():
        store.pipe(path, content)
    yield
    store.rm("/shards", recursive=True)
    FlakyFile.moods = []


def test_shards_by_fsspec(in_memory, expected, files) -> None:
    assert read_all("memory:/") == expected
    with pytest.raises(ValueError, match=r"memory://nowhere/index.json \(there is no such file .*python -m adala.data"):
        load_index(["memory://nowhere/train-*.tar"], remote=IMPATIENT)
    fsspec.filesystem("memory").rm(SHARD)
    with pytest.raises(OSError, match=r"cannot read the shard memory://shards/train-00000.tar: there is no such file"):
        read_all("memory:/")


@pytest.mark.parametrize("mood", ["hangs", "breaks"])
def test_file_systems_that_hang_or_break(in_memory, expected, mood) -> None:
    FlakyFile.moods = [mood]
    assert read_all("flaky:/") == expected
    assert FlakyFile.moods == []
    FlakyFile.moods = 9 * [mood]
    start = time.monotonic()
    says = {"hangs": r"nothing came for 0\.5 s", "breaks": "RuntimeError: the client's own error"}[mood]
    with pytest.raises(OSError, match=rf"cannot read the shard flaky://shards/train-00000.tar: given up .*{says}"):
        read_all("flaky:/")
    assert time.monotonic() - start < 6


def test_a_scheme_that_nothing_opens_says_what_to_install() -> None:
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(
            ValueError, match=r"s3://b/index.json: nothing here opens s3:// .*pip install 'adala\[s3\]'"
        ):
            load_index(["s3://b/train-*.tar"], remote=IMPATIENT)
    with pytest.raises(ValueError, match=r"nothing here opens foo:// \(Protocol not known: foo.*copy the shards"):
        load_index(["foo://b/train-*.tar"], remote=IMPATIENT)


@pytest.fixture
def gsutil(tmp_path: Path, monkeypatch, folder) -> Callable[[str], None]:
    """Puts a ``gsutil`` on the path whose ``cat`` does what a line of shell says with the file "$file"."""
    if importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gcsfs takes the place of the command")
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def write(line: str) -> None:
        path = programs / "gsutil"
        path.write_text(f'#!/bin/bash\nfile="{folder}/$(basename "$2")"; tries="{tmp_path}/tries"\n{line}\n')
        path.chmod(0o755)

    return write


def test_shards_by_a_command(gsutil, expected) -> None:
    gsutil('exec cat "$file"')
    assert read_all("gs://bucket") == expected
    gsutil("""
        if [ "${file: -5}" != 0.tar -o -e "$tries" ]; then exec cat "$file"; fi
        touch "$tries"; head -c 9000 "$file"; exit 3""")
    assert read_all("gs://bucket") == expected
    gsutil("echo no >&2; exit 4")
    with pytest.raises(ValueError, match=r"given up at byte 0 after 4 attempts, since the command gsutil ended with 4"):
        read_all("gs://bucket")


def test_a_command_that_is_stuck_is_ended(gsutil, tmp_path) -> None:
    gsutil("""
        echo $$ >> "$tries"
        if [ "${file: -5}" = 0.tar ]; then head -c 9000 "$file"; exec sleep 60; fi
        exec cat "$file\"""")
    start = time.monotonic()
    with pytest.raises(OSError, match=r"given up at byte 9000 .*nothing came for 0\.5 s"):
        read_all("gs://bucket")
    assert time.monotonic() - start < 6
    pids = [int(line) for line in (tmp_path / "tries").read_text().split()]
    assert len(pids) > 4 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_read_text_of_other_encodings(files) -> None:
    with FaultServer({"/latin": "größe".encode("latin-1"), "/bom": b"\xef\xbb\xbfx"}) as server:
        assert read_text(f"{server.url}/bom", IMPATIENT) == "x"
        with pytest.raises(UnicodeDecodeError):
            read_text(f"{server.url}/latin", IMPATIENT)
        with pytest.raises(AbsentError):
            read_text(f"{server.url}/none", IMPATIENT)
    assert issubclass(AbsentError, RemoteError) and issubclass(RemoteError, OSError)


def batches_of(index: ShardIndex) -> list[dict]:
    """Batches of two data workers, in training and in an evaluation."""
    view = View((8, 8), (0.5,) * 3, (0.5,) * 3, (4, 4))
    images, held_out = (prepare_images(view.image_transform(augmentation)) for augmentation in ("shift", None))
    batch = {"global_batch_size": 5, "micro_batch_size": 5}
    stream = iter(TrainLoader(index, images, **batch, seed=3, num_workers=2, shuffle_buffer=4))
    batches = [next(stream) for _ in range(4)]
    stream.close()
    return [*batches, *EvaluationLoader(index, held_out, batch_size=3, num_workers=2)]


@pytest.mark.parametrize("cached", [False, True])
def test_data_workers_read_over_a_failing_server_what_lies_on_the_disk(folder, files, tmp_path, cached) -> None:
    options = replace(IMPATIENT, total_timeout_s=20, stall_timeout_s=5, cache_dir=str(tmp_path) if cached else None)
    local = batches_of(load_index([str(folder)]))
    with FaultServer(files, {SHARD: lambda exchange: exchange.good(upto=exchange.range_start + 20000)}) as server:
        remote = batches_of(load_index([f"{server.url}/shards/*.tar"], remote=options))
        if cached:
            # In four parts, once for all workers and epochs.
            assert server.requests[SHARD] == 4
    assert [batch["id"] for batch in remote] == [batch["id"] for batch in local]
    assert all(torch.equal(ours["image"], theirs["image"]) for ours, theirs in zip(remote, local, strict=True))


def test_a_data_workers_failure_reaches_the_trainer(files) -> None:
    with FaultServer({**files, SHARD: PAGE}) as server:
        index = load_index([f"{server.url}/shards/*.tar"], remote=IMPATIENT)
        with pytest.raises(OSError, match=r"cannot read the shard http://localhost:\d+/shards/train-00000.tar: given"):
            batches_of(index)
