"""Remote shards on a node's disk: fetched once, within a limit, whoever is killed meanwhile."""

import fcntl
import json
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from fault_server import Exchange, FaultServer, close, cut_at, first, stall_at
from served_shards import IMPATIENT, SHARD, as_served, layout_of, read_all, write_folder

from adala.data import cache
from adala.data.addresses import open_stream
from adala.data.cache import ShardCache, fetch_ahead
from adala.data.index import load_index
from adala.data.order import shards_in_order
from adala.data.remote import Patience, RemoteOptions
from adala.data.samples import read_positions

OTHER = "/shards/train-00001.tar"
forked = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("served") / "shards", 8, 3)


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:
    return as_served(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list:
    return read_all(str(folder.parent))


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    cache._warn.cache_clear()
    return replace(IMPATIENT, cache_dir=str(tmp_path / "cache" / "of-this-node"))


@pytest.fixture
def lying(options: RemoteOptions) -> Callable[[str], list[Path]]:
    """The files in the cache of one kind: complete ones, or parts."""
    return lambda suffix: sorted(Path(options.cache_dir).glob(f"*{suffix}"))


def read(url: str, options: RemoteOptions, size: int | None = None) -> bytes:
    with open_stream(url, options, size) as stream:
        return stream.read()


def start(target: Callable, *arguments: object) -> ForkProcess:
    process = forked.Process(target=target, args=arguments)
    process.start()
    return process


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_shard_is_asked_for_once(files, expected, options, lying) -> None:
    with FaultServer(files) as server:
        assert read_all(server.url, options) == expected
        assert read_all(server.url, options) == expected
        assert (server.requests[SHARD], server.requests[OTHER]) == (1, 1)
    assert sorted(path.stat().st_size for path in lying(".shard")) == sorted([len(files[SHARD]), len(files[OTHER])])
    assert not lying(".part")


def test_shards_of_another_address_or_size_are_others(files, options) -> None:
    with FaultServer(files) as server:
        assert read(server.url + SHARD, options, len(files[SHARD])) == files[SHARD]
        assert read(server.url + "/moved.tar", options, len(files[SHARD])) == files[SHARD]
        assert (server.requests[SHARD], server.requests["/moved.tar"]) == (1, 1)
        server.files[SHARD] = files[OTHER]
        assert read(server.url + SHARD, options, len(files[OTHER])) == files[OTHER]


def test_what_was_not_read_for_longest_makes_room(tmp_path, lying, options) -> None:
    served = {f"/{name}.tar": bytes([number]) * 1000 for number, name in enumerate("abcd")}
    limited = replace(options, cache_gib=3500 / 2**30)
    with FaultServer(served) as server:
        for names, asked in (("abc", 1), ("a", 1), ("d", 1), ("acd", 1), ("b", 2)):
            for name in names:
                assert read(f"{server.url}/{name}.tar", limited, 1000) == served[f"/{name}.tar"]
                assert server.requests[f"/{name}.tar"] == asked
                assert sum(path.stat().st_size for path in lying(".shard")) <= 3500
        assert server.requests["/a.tar"] == 1


def test_a_shard_that_is_being_read_stays_and_others_are_read_past_the_cache(files, options, caplog, lying) -> None:
    small, large = files[OTHER], files[SHARD]
    limited = replace(options, cache_gib=(len(large) + 100) / 2**30)
    with FaultServer(files) as server, caplog.at_level(logging.WARNING):
        with open_stream(server.url + SHARD, limited, len(large)) as stream:
            begun = stream.read(1000)
            for _ in range(3):
                assert read(server.url + OTHER, limited, len(small)) == small
            assert server.requests[OTHER] == 3
            assert begun + stream.read() == large
        assert [record.getMessage() for record in caplog.records] == [
            f"data.cache_dir {options.cache_dir}: a shard does not fit into what is free of its "
            f"{limited.cache_gib:g} GiB; shards are read past it"
        ]
        assert not lying(".part")
        for _ in range(2):
            assert read(server.url + OTHER, limited, len(small)) == small
        assert server.requests[OTHER] == 4
        assert [path.stat().st_size for path in lying(".shard")] == [len(small)]


def test_a_shard_evicted_or_replaced_while_it_is_read_is_read_to_its_end(files, options, lying) -> None:
    with FaultServer(files) as server, open_stream(server.url + SHARD, options, len(files[SHARD])) as stream:
        begun = stream.read(1000)
        for path in lying(".shard"):
            path.unlink()
        assert read(server.url + SHARD, options, len(files[SHARD])) == files[SHARD]
        assert begun + stream.read() == files[SHARD]
        assert server.requests[SHARD] == 2


def test_readers_and_evictions_at_once(options, lying) -> None:
    """Four processes read twelve shards in turn through a cache for three."""
    served = {f"/{number}.tar": bytes([number]) * 5000 for number in range(12)}
    limited = replace(options, cache_gib=16000 / 2**30, total_timeout_s=20, stall_timeout_s=5)

    def work(url: str, seed: int) -> None:
        for number in range(60):
            path = f"/{(number * (2 * seed + 1) + seed) % 12}.tar"
            assert read(url + path, limited, 5000) == served[path]

    with FaultServer(served) as server:
        workers = [start(work, server.url, seed) for seed in range(4)]
        for worker in workers:
            worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sum(path.stat().st_size for path in lying(".shard")) <= 16000 and not lying(".part")


def test_two_processes_share_one_request(files, options) -> None:
    patient = replace(options, total_timeout_s=20, stall_timeout_s=5)

    def slowly(exchange: Exchange) -> None:
        exchange.wait(0.5)
        exchange.good()

    def work(url: str) -> None:
        assert read(url, patient, len(files[SHARD])) == files[SHARD]

    with FaultServer(files, {SHARD: slowly}) as server:
        workers = [start(work, server.url + SHARD) for _ in range(3)]
        for worker in workers:
            worker.join(30)
        assert [worker.exitcode for worker in workers] == [0] * 3
        assert server.requests[SHARD] == 1


def test_who_waits_for_a_shard_gets_it_while_its_fetcher_reads_on(files, options) -> None:
    patient, gates = replace(options, total_timeout_s=20, stall_timeout_s=5), [threading.Event(), threading.Event()]

    def when_asked(exchange: Exchange) -> None:
        gates[0].wait(10)
        exchange.good()

    def fetch_and_hold(url: str) -> None:
        with open_stream(url, patient, len(files[SHARD])):
            gates[1].wait(20)

    with FaultServer(files, {SHARD: when_asked}) as server:
        fetcher = threading.Thread(target=fetch_and_hold, args=[server.url + SHARD])
        fetcher.start()
        wait_until(lambda: server.requests[SHARD] == 1)
        waiting = start(read, server.url + SHARD, patient, len(files[SHARD]))
        time.sleep(0.3)
        gates[0].set()
        waiting.join(8)
        assert waiting.exitcode == 0 and fetcher.is_alive()
        gates[1].set()
        fetcher.join()
        assert server.requests[SHARD] == 1


def test_what_is_being_fetched_has_its_room_from_the_beginning(options, lying) -> None:
    served = {"/a.tar": bytes(1000), "/b.tar": bytes(1000)}
    limited = replace(options, cache_gib=1500 / 2**30, total_timeout_s=20, stall_timeout_s=5)
    go_on = threading.Event()

    def in_two_parts(exchange: Exchange) -> None:
        exchange.head(Content_Length=1000)
        exchange.send(bytes(100))
        go_on.wait(10)
        exchange.send(bytes(900))

    with FaultServer(served, {"/a.tar": in_two_parts}) as server:
        fetch_ahead(f"{server.url}/a.tar", 1000, limited)
        wait_until(lambda: len(lying(".json")) == 1)
        assert read(f"{server.url}/b.tar", limited, 1000) == served["/b.tar"]
        assert not lying(".shard")
        go_on.set()
        wait_until(lambda: len(lying(".shard")) == 1)
        assert read(f"{server.url}/a.tar", limited, 1000) == served["/a.tar"]
        assert server.requests["/a.tar"] == 1


@pytest.mark.parametrize("place", ["nothing", "one-byte", "some", "nearly-all"])
def test_what_a_killed_process_has_fetched_is_gone_on_with(files, options, lying, place) -> None:
    whole = files[SHARD]
    byte = {"nothing": 0, "one-byte": 1, "some": layout_of(whole).image, "nearly-all": len(whole) - 1}[place]
    asked = []

    def stalls_first(exchange: Exchange) -> None:
        asked.append(exchange.range_start)
        (stall_at(byte) if exchange.number == 0 else Exchange.good)(exchange)

    patient = replace(options, total_timeout_s=60, stall_timeout_s=30)
    with FaultServer(files, {SHARD: stalls_first}) as server:
        killed = start(read, server.url + SHARD, patient, len(whole))
        # The last bytes may be in the process's memory.
        wait_until(lambda: asked != [] and sum(path.stat().st_size for path in lying(".part")) > byte - 2**14)
        time.sleep(0.1)
        waiting = start(read, server.url + SHARD, patient, len(whole))
        time.sleep(0.3)
        assert waiting.is_alive()
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        waiting.join(20)
        assert waiting.exitcode == 0
        assert read(server.url + SHARD, patient, len(whole)) == whole
    assert len(asked) == 2 and asked[0] == 0 and byte - 2**14 < asked[1] <= byte
    assert not lying(".part")


def test_kills_at_random_moments_leave_nothing_that_blocks(files, options) -> None:
    """A process that drips shards into the cache is killed again and again; the last one reads all of both."""
    patient = replace(options, total_timeout_s=60, stall_timeout_s=30)

    def slowly(exchange: Exchange) -> None:
        exchange.head("206 Partial Content" if exchange.range_start else "200 OK", **answer_of(exchange))
        for start_byte in range(exchange.range_start, len(exchange.content), 3000):
            exchange.send(exchange.content[start_byte : start_byte + 3000])
            exchange.wait(0.02)

    def answer_of(exchange: Exchange) -> dict[str, object]:
        begin, whole = exchange.range_start, len(exchange.content)
        return {
            "ETag": '"a1"',
            "Content_Length": whole - begin,
            "Content_Range": f"bytes {begin}-{whole - 1}/{whole}" if begin else None,
        }

    with FaultServer(files, {SHARD: slowly, OTHER: slowly}) as server:
        for number in range(8):
            worker = start(read_all, server.url, patient)
            worker.join(0.03 + 0.03 * number)
            worker.kill()
            worker.join()
        begin = time.monotonic()
        last = start(read_all, server.url, patient)
        last.join(30)
        assert last.exitcode == 0 and time.monotonic() - begin < 20
        assert read_all(server.url, patient) == read_all(server.url, replace(patient, cache_dir=None))


def test_a_complete_part_needs_its_name_alone(files, options, lying) -> None:
    with FaultServer(files) as server:
        read(server.url + SHARD, options, len(files[SHARD]))
        (shard,) = lying(".shard")
        shard.rename(shard.with_suffix(".part"))
        assert read(server.url + SHARD, options, len(files[SHARD])) == files[SHARD]
        assert server.requests[SHARD] == 1 and lying(".shard") == [shard]


def leave_a_part(url: str, options: RemoteOptions, size: int) -> None:
    """A cache in which a shard was begun."""
    with pytest.raises(OSError, match="given up at byte 9000"):
        read(url, options, size)


@pytest.mark.parametrize("what", ["boot", "validator", "bytes", "record"])
def test_a_part_that_may_be_of_something_else_is_not_gone_on_with(files, options, lying, what) -> None:
    whole = files[SHARD]
    with FaultServer(files, {SHARD: first(4, cut_at(9000))}) as server:
        leave_a_part(server.url + SHARD, options, len(whole))
        (part,), (record,) = lying(".part"), lying(".json")
        content = json.loads(record.read_text())
        changed = {
            "boot": {"boot": "before"},
            "validator": {"validator": '"b2"'},
            "bytes": {"bytes": 100},
            "record": {},
        }
        record.write_text(json.dumps(content | changed[what]) if what != "record" else "{")
        if what != "validator":
            part.write_bytes(b"x" * 9000)
        assert read(server.url + SHARD, options, len(whole)) == whole
        assert server.requests[SHARD] == 5


def test_a_shard_that_changed_since_a_process_was_killed_is_fetched_from_its_beginning(files, options) -> None:
    whole = files[SHARD]
    changed = bytes(1000) + whole[1000:]
    with FaultServer(files, {SHARD: first(4, cut_at(9000), lambda e: e.good(content=changed, etag='"b2"'))}) as server:
        leave_a_part(server.url + SHARD, options, len(whole))
        assert read(server.url + SHARD, options, len(whole)) == changed


@pytest.mark.parametrize("boot", ["same", "another"])
def test_a_shard_torn_by_the_end_of_the_machine_is_fetched_again(files, options, lying, caplog, boot) -> None:
    """Looked at when the machine has started anew, and not each time: of the same start it is read as it lies."""
    whole = files[SHARD]
    with FaultServer(files) as server:
        read(server.url + SHARD, options, len(whole))
        (shard,), (record,) = lying(".shard"), lying(".json")
        shard.write_bytes(torn := whole[:20000] + bytes(len(whole) - 20000))
        if boot == "another":
            record.write_text(json.dumps(json.loads(record.read_text()) | {"boot": "before"}))
        assert read(server.url + SHARD, options, len(whole)) == (torn if boot == "same" else whole)
        assert ("is damaged: fetching the shard again" in caplog.text) == (boot == "another")
        assert server.requests[SHARD] == (1 if boot == "same" else 2)


def test_a_whole_shard_of_another_start_is_looked_at_once(files, options, lying, monkeypatch) -> None:
    looked, file_checksum = [], cache.file_checksum
    monkeypatch.setattr(cache, "file_checksum", lambda path: looked.append(path) or file_checksum(path))
    with FaultServer(files) as server:
        read(server.url + SHARD, options)
        (record,) = lying(".json")
        record.write_text(json.dumps(json.loads(record.read_text()) | {"boot": "before"}))
        for _ in range(3):
            assert read(server.url + SHARD, options) == files[SHARD]
        assert server.requests[SHARD] == 1
    assert looked == lying(".shard")


@pytest.mark.parametrize("damage", ["shorter", "longer", "other-bytes"])
def test_damage_in_the_cache_costs_one_more_request(files, expected, options, lying, damage) -> None:
    with FaultServer(files) as server:
        read_all(server.url, options)
        for path in lying(".shard"):
            content = path.read_bytes()
            path.write_bytes(
                {"shorter": content[:-5000], "longer": content + bytes(512), "other-bytes": b"x" * len(content)}[damage]
            )
        assert read_all(server.url, options) == expected
        assert server.requests[SHARD] == 2
        assert read_all(server.url, options) == expected
        assert server.requests[SHARD] == 2


def test_who_holds_a_shard_for_too_long_is_not_waited_for(files, options, caplog) -> None:
    whole = files[SHARD]
    Path(options.cache_dir).mkdir(parents=True)
    with FaultServer(files) as server:
        entry = ShardCache(Path(options.cache_dir), 2**30)._entry(server.url + SHARD, len(whole))
        with entry.partial.open("wb") as stopped:
            fcntl.flock(stopped, fcntl.LOCK_EX)
            begin = time.monotonic()
            assert read(server.url + SHARD, options, len(whole)) == whole
            assert IMPATIENT.total_timeout_s < time.monotonic() - begin < 2 * IMPATIENT.total_timeout_s + 1
    assert "another process has been fetching a shard for too long; shards are read past it" in caplog.text


def test_a_process_that_is_stuck_while_it_makes_room_is_not_waited_for(files, options, monkeypatch, caplog) -> None:
    monkeypatch.setattr(cache, "ALONE_WITHIN_S", 0.2)
    Path(options.cache_dir).mkdir(parents=True)
    with FaultServer(files) as server, (Path(options.cache_dir) / ".lock").open("w") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        assert read(server.url + SHARD, options, len(files[SHARD])) == files[SHARD]
    assert "it cannot be used (another process is stuck with its lock); shards are read past it" in caplog.text


def test_a_full_disk_is_told_once_and_read_past(files, expected, options, lying) -> None:
    """A limit of the system on the size of files stands for the disk."""

    def work(url: str, told: multiprocessing.Queue) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        cache.logger.addHandler(handler := logging.Handler())
        handler.emit = lambda record: told.put(record.getMessage())
        assert read_all(url, options) == expected
        assert read_all(url, options) == expected

    told = forked.Queue()
    with FaultServer(files) as server:
        worker = start(work, server.url, told)
        worker.join(30)
        assert worker.exitcode == 0
    assert told.get(timeout=5) == (
        f"data.cache_dir {options.cache_dir}: it cannot be used (File too large); shards are read past it"
    )
    time.sleep(0.1)
    assert told.empty()
    assert not lying(".part") or all(path.stat().st_size <= 20000 for path in lying(".part"))


def test_a_folder_that_cannot_be_used_is_read_past(files, expected, options, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        with FaultServer(files) as server:
            assert read_all(server.url, replace(options, cache_dir=str(path))) == expected
        assert [record.getMessage().partition("(")[0] for record in caplog.records] == [
            f"data.cache_dir {path}: it cannot be used "
        ]


def test_a_shard_that_cannot_be_fetched_is_one_sentence_and_leaves_nothing(files, options, lying) -> None:
    with FaultServer({path: content for path, content in files.items() if path != SHARD}) as server:
        with pytest.raises(OSError, match=r"cannot read the shard http.*train-00000.tar: the server answers 404"):
            read_all(server.url, options)
        server.handlers[SHARD] = close
        with pytest.raises(OSError, match=r"cannot read the shard http.*train-00000.tar: given up at byte 0"):
            read_all(server.url, options)
    assert not lying(".part") and not lying(".shard")


def test_threads_of_one_process_share_the_cache_as_well(files, options) -> None:
    patient, seen = replace(options, total_timeout_s=20, stall_timeout_s=5), []
    with FaultServer(files) as server:
        arguments = (server.url + SHARD, patient, len(files[SHARD]))
        threads = [threading.Thread(target=lambda: seen.append(read(*arguments))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert seen == [files[SHARD]] * 6
        assert server.requests[SHARD] == 1


def test_no_time_is_spent_on_what_is_there(files, options) -> None:
    with FaultServer(files) as server:
        read(server.url + SHARD, options, len(files[SHARD]))
        patience = Patience(options, len(files[SHARD]))
        before = patience.allow(1e9)
        with open_stream(server.url + SHARD, options, len(files[SHARD]), patience) as stream:
            stream.read()
        assert patience.allow(1e9) == before


def test_the_next_shard_is_fetched_while_one_is_read(files, expected, options, lying) -> None:
    with FaultServer(files) as server:
        index = load_index([f"{server.url}/shards/*.tar"], remote=options)
        samples = read_positions(index, shards_in_order([8, 3]), range(11))
        begun = [next(samples)]
        wait_until(lambda: len(lying(".shard")) == 2)
        server.handlers = {SHARD: close, OTHER: close}
        assert [(raw.id, raw.fields) for raw in [*begun, *samples]] == expected
        assert server.requests[OTHER] == 1


def test_what_fails_ahead_is_told_where_it_is_needed(files, options) -> None:
    with FaultServer({path: content for path, content in files.items() if path != OTHER}) as server:
        index = load_index([f"{server.url}/shards/*.tar"], remote=options)
        samples = read_positions(index, shards_in_order([8, 3]), range(11))
        assert len([next(samples) for _ in range(8)]) == 8
        with pytest.raises(OSError, match=r"cannot read the shard http.*train-00001.tar: the server answers 404"):
            next(samples)


def test_a_lock_ends_with_the_download_where_a_process_was_forked_meanwhile(files, options) -> None:
    """As data workers are that start while a thread fetches a shard."""
    patient = replace(options, total_timeout_s=20, stall_timeout_s=5)

    def slowly(exchange: Exchange) -> None:
        exchange.wait(0.5)
        exchange.good()

    with FaultServer(files, {SHARD: slowly}) as server:
        fetch_ahead(server.url + SHARD, len(files[SHARD]), patient)
        wait_until(lambda: server.requests[SHARD] == 1)
        sleeper = start(time.sleep, 10)
        begin = time.monotonic()
        assert read(server.url + SHARD, patient, len(files[SHARD])) == files[SHARD]
        assert time.monotonic() - begin < 5 and sleeper.is_alive()
        sleeper.kill()
        sleeper.join()
