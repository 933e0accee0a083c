"""Whatever a server does, reading ends within its time, with every sample once and in order or with one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import Case, Layout, cases
from memory_bounds import growth_below
from served_shards import IMPATIENT, SHARD, as_served, check_outcome, layout_of, try_case, write_folder

from adala.data.index import load_index
from adala.data.order import shards_in_order
from adala.data.samples import read_positions

pytestmark = pytest.mark.faults

NAMES = list(cases(Layout(0, 0, 0, 0, 0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("served") / "shards", 8, 3)


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:
    return as_served(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list:
    index = load_index([str(folder)])
    sequence = shards_in_order([shard.samples for shard in index.shards])
    return [(raw.id, raw.fields) for raw in read_positions(index, sequence, range(index.num_samples))]


@pytest.fixture(scope="module")
def table(files: dict[str, bytes]) -> dict[str, Case]:
    return cases(layout_of(files[SHARD]))


def test_there_are_many_cases() -> None:
    assert len(NAMES) >= 60


@pytest.mark.parametrize("cached", [False, True], ids=["streamed", "cached"])
@pytest.mark.parametrize("name", NAMES)
def test_reading_ends_in_time_with_all_samples_or_a_sentence(name, cached, table, files, expected, tmp_path) -> None:
    case = table[name]
    with growth_below(400):
        outcome = try_case(case, files, replace(IMPATIENT, cache_dir=str(tmp_path / "cache") if cached else None))
    check_outcome(case, outcome, expected, cached)
