"""What the first samples of a data set say of its labels."""

from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import FaultServer
from PIL import Image

import adala.sources
from adala.data import write_shards
from adala.data.remote import DEFAULT_OPTIONS
from adala.sources import Sources
from adala.tasks import Classification

TASK = Classification(num_classes=10)
IMAGE = Image.new("RGB", (8, 8))


def write(
    folder: Path, labels: list[int | str | None], samples_per_shard: int = 100, image: object = IMAGE
) -> list[str]:
    """Shards of samples, of which those with None have no label."""
    samples = [{"png": image} | ({} if label is None else {"cls": label}) for label in labels]
    write_shards(samples, folder, "train", samples_per_shard)
    return [str(folder / "train-*.tar")]


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "embedded")


@pytest.mark.parametrize(("missing", "labelled"), [(0, True), (4, True), (5, False), (6, False), (10, False)])
def test_a_set_is_labelled_where_more_than_half_of_it_is(sources, tmp_path: Path, missing: int, labelled: bool) -> None:
    names = write(tmp_path, [None] * missing + [1] * (10 - missing))
    assert (sources.missing_targets(TASK, names) is None) is labelled


def test_all_shards_must_have_labels_and_the_one_without_is_named(sources, tmp_path: Path) -> None:
    mixed, whole = write(tmp_path / "mixed", [0] * 30 + [None] * 10, 10), write(tmp_path / "whole", [1] * 9)
    assert sources.missing_targets(TASK, whole) is None
    for sets in ([mixed], [whole, mixed]):
        assert "most samples of" in sources.missing_targets(TASK, *sets)
        assert (
            "mixed/train-00003.tar are of no use for classification: it has no label: none"
            in sources.missing_targets(TASK, *sets)
        )
    with pytest.raises(
        ValueError, match=r"Stage 3 needs targets for classification, and data.train has none: .*mixed/train-00003.tar"
    ):
        sources.check_targets(Classification(num_classes=2), mixed, "data.train")


def test_text_labels_need_one_list_of_classes(sources, tmp_path: Path) -> None:
    names, others = write(tmp_path / "a", ["cat", "dog"]), write(tmp_path / "b", ["dog", "cat"])
    assert "'cat' is a name: list the names" in sources.missing_targets(TASK, names)
    (tmp_path / "a/classes.txt").write_text("cat\ndog")
    (tmp_path / "b/classes.txt").write_text("dog\ncat")
    sources = Sources(tmp_path / "embedded")
    assert sources.missing_targets(TASK, names) is None and sources.missing_targets(TASK, others) is None
    assert "lie beside different lists of classes" in sources.missing_targets(TASK, names, others)
    assert Sources(tmp_path, str(tmp_path / "a/classes.txt")).missing_targets(TASK, names, others) is None


def test_64_samples_of_up_to_eight_shards_are_looked_at_once(sources, tmp_path: Path, monkeypatch) -> None:
    reads = []
    read_shard = adala.sources.read_shard
    monkeypatch.setattr(adala.sources, "read_shard", lambda *given: reads.append(given[0].name) or read_shard(*given))
    names = write(tmp_path / "one", [0] * 64 + [7] * 6)
    assert len(sources.first_samples(names)) == 64
    sources.check_targets(TASK, names, "data.train")
    assert sources.index(names) is sources.index(names) and reads == ["train-00000.tar"]
    reads.clear()
    assert len(sources.first_samples(write(tmp_path / "many", [0] * 180, 10))) == 6 * 10
    assert reads == [f"train-{number:05d}.tar" for number in range(0, 18, 3)]


def test_a_look_at_a_remote_set_fetches_no_shard_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "shards", [0] * 30 + [1] * 30, 30)
    files = {f"/{path.name}": path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    remote = replace(DEFAULT_OPTIONS, cache_dir=str(tmp_path / "cache"))
    with FaultServer(files) as server:
        sources = Sources(tmp_path / "embedded", remote=remote)
        assert sources.missing_targets(TASK, [f"{server.url}/train-*.tar"]) is None
        assert sources.index([f"{server.url}/train-*.tar"]).remote == remote
    assert not (tmp_path / "cache").exists()


def test_a_set_that_is_mostly_unusable_is_refused_whatever_its_index_says(sources, tmp_path: Path) -> None:
    names = write(tmp_path, [0] * 5, image=b"no image")
    with pytest.raises(ValueError, match=r"5 of 5 images that were tried cannot be decoded in .*train-\*.tar"):
        sources.index(names)


def test_a_label_that_the_task_cannot_have_is_told_with_its_sample(tmp_path: Path) -> None:
    names = write(tmp_path, [0, 1, 2])
    sources = Sources(tmp_path / "embedded")
    sources.check_targets(Classification(num_classes=3), names, "data.train")
    with pytest.raises(ValueError, match=r"data.train: the sample train-00000.tar/\S+: it has the label 2, but"):
        sources.check_targets(Classification(num_classes=2), names, "data.train")


def test_samples_without_a_label_are_passed_over(sources, tmp_path: Path) -> None:
    sources.check_targets(Classification(num_classes=2), write(tmp_path, [None, 1, 1]), "data.train")


def test_every_source_of_a_mixture_is_looked_at(sources, tmp_path: Path) -> None:
    """A small one among large ones, too; and each with the classes beside it."""
    large = write(tmp_path / "large", [0, 1] * 100, 10)
    mixture = [{"source": large[0], "weight": 9}, {"source": write(tmp_path / "small", [2] * 3), "weight": 1}]
    index = sources.index(mixture)
    assert [(source.weight, source.num_shards) for source in index.sources] == [(9, 20), (1, 1)]
    assert {shard.source for shard in index.shards[:-1]} == {0} and index.shards[-1].source == 1
    assert sources.index(mixture) is index and sources.index(large).sources == ()
    assert len(sources.first_samples(mixture)) == len(sources.first_samples(large)) + 3
    with pytest.raises(ValueError, match=r"data.train: the sample train-00000.tar/\S+: it has the label 2, but"):
        sources.check_targets(Classification(num_classes=2), mixture, "data.train")
    sources.check_targets(Classification(num_classes=3), mixture, "data.train")
    plain = [mixture[0], {"source": write(tmp_path / "plain", [None] * 3), "weight": 1}]
    assert "plain/train-00000.tar are of no use" in sources.missing_targets(TASK, plain)


def test_the_embedded_data_have_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write_embedded(folder: Path) -> None:
        written.append(folder)
        write(folder, [0, 1])

    monkeypatch.setattr(adala.sources, "write_embedded", write_embedded)
    sources = Sources(tmp_path / "embedded")
    assert sources.index(write(tmp_path / "own", [1, 2, 3])).num_samples == 3 and written == []
    for _ in range(2):
        assert sources.index(["embedded:train"]).num_samples == 2
    assert written == [tmp_path / "embedded"]
    with pytest.raises(ValueError, match="embedded:test: the embedded data are embedded:train and embedded:val"):
        sources.index(["embedded:test"])
