"""What the first samples of a data set say of its labels."""

from pathlib import Path

import pytest
from PIL import Image

import adala.sources
from adala.data import write_shards
from adala.sources import Sources
from adala.tasks import Classification


def write(folder: Path, labels: list[int | None]) -> list[str]:
    """Shards of nine samples, of which those with None have no label."""
    image = Image.new("RGB", (8, 8))
    samples = [{"png": image} | ({} if label is None else {"cls": label}) for label in labels]
    write_shards(samples, folder, "train", samples_per_shard=100)
    return [str(folder / "train-*.tar")]


@pytest.mark.parametrize(("missing", "labelled"), [(0, True), (4, True), (5, False), (6, False), (10, False)])
def test_a_set_is_labelled_where_more_than_half_of_it_is(tmp_path: Path, missing: int, labelled: bool) -> None:
    sources = write(tmp_path, [None] * missing + [1] * (10 - missing))
    assert Sources(tmp_path / "embedded").is_labelled(sources) is labelled


def test_the_first_64_samples_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, reads = write(tmp_path, [0] * 64 + [7] * 6), []
    read_shard = adala.sources.read_shard
    monkeypatch.setattr(adala.sources, "read_shard", lambda *given: reads.append(1) or read_shard(*given))
    sources = Sources(tmp_path / "embedded")
    assert len(sources.first_samples(names)) == 64
    sources.check_targets(Classification(num_classes=1), names, "data.train")
    assert sources.is_labelled(names) and sources.index(names) is sources.index(names) and reads == [1]


def test_a_label_that_the_task_cannot_have_is_told_with_its_sample(tmp_path: Path) -> None:
    names = write(tmp_path, [0, 1, 2])
    sources = Sources(tmp_path / "embedded")
    sources.check_targets(Classification(num_classes=3), names, "data.train")
    with pytest.raises(ValueError, match=r"data.train, sample train-00000.tar/\S+: a sample has the label 2, but"):
        sources.check_targets(Classification(num_classes=2), names, "data.train")


def test_samples_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    names = write(tmp_path, [None, 1, 1])
    Sources(tmp_path / "embedded").check_targets(Classification(num_classes=2), names, "data.train")
    unlabelled = write(tmp_path / "plain", [None, None, 1])
    with pytest.raises(ValueError, match=r"the samples of data.val have no \.cls files: name labelled shards"):
        Sources(tmp_path / "embedded").check_targets(Classification(num_classes=2), unlabelled, "data.val")


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
