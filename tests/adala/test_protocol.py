"""Protocols: the named ones, overrides, and errors that name the key."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml

from adala.protocol import (
    PROTOCOL_FOLDER,
    BlockConfig,
    KnnConfig,
    ProbeConfig,
    Protocol,
    SegmentationConfig,
    SpeedConfig,
    describe,
    load_protocol,
)

NAMES = sorted(path.stem for path in PROTOCOL_FOLDER.glob("*.yaml"))


def test_the_named_protocols() -> None:
    assert {"dinov2_linear", "ironvit", "tiny"} <= set(NAMES)
    for name in NAMES:
        protocol = load_protocol(name)
        assert protocol.name == name and describe(protocol)["changed"] == []
        assert "protocol" in protocol.description or "DINOv2" in protocol.description


def test_dinov2s_numbers() -> None:
    """As dinov2/eval/knn.py and dinov2/eval/linear.py have them: 12,500 steps of 8 GPUs with 128 images."""
    protocol = load_protocol("dinov2_linear")
    assert (protocol.knn.k, protocol.knn.temperature, protocol.knn.pooling) == ([10, 20, 100, 200], 0.07, "cls")
    decades = [factor * 10.0**power for power in range(-5, -1) for factor in (1, 2, 5)]
    assert protocol.probe.rates == pytest.approx([*decades, 0.1]) and len(protocol.probe.rates) == 13
    assert (protocol.probe.solver, protocol.probe.momentum, protocol.probe.weight_decay) == ("sgd", 0.9, 0.0)
    steps_of_imagenet = protocol.probe.epochs * 1_281_167 / protocol.probe.batch_size
    assert steps_of_imagenet == pytest.approx(12_500, rel=2e-3)
    masks = protocol.segmentation
    assert (masks.rates, masks.batch_size, masks.weight_decay) == ([1e-3], 16, 1e-4)
    assert masks.epochs * 20_210 / masks.batch_size == pytest.approx(40_000, rel=2e-2)


def test_overrides_win_over_the_file_and_are_told(tmp_path: Path) -> None:
    overrides = ["--knn.k", "[10, 20]", "--measures=knn", "--probe.train_samples", "null", "--precision", "bf16"]
    protocol = load_protocol("tiny", [*overrides, "--knn.temperature", "0.1"])
    assert (protocol.knn.k, protocol.knn.temperature, protocol.measures) == ([10, 20], 0.1, ["knn"])
    assert protocol.probe.train_samples is None and protocol.precision == "bf16"
    # knn.k is what the file has anyway.
    assert set(describe(protocol)["changed"]) == {"knn.temperature", "measures", "probe.train_samples", "precision"}
    (tmp_path / "mine.yaml").write_text("name: mine\nspeed: {rounds: 7}")
    mine = load_protocol(str(tmp_path / "mine.yaml"))
    assert mine == Protocol(name="mine", speed=SpeedConfig(rounds=7)) and "changed" not in describe(mine)


def test_a_protocol_written_out_reads_back_the_same(tmp_path: Path) -> None:
    for name in NAMES:
        protocol = load_protocol(name)
        (tmp_path / "copy.yaml").write_text(yaml.safe_dump(dataclasses.asdict(protocol)))
        assert load_protocol(str(tmp_path / "copy.yaml")) == protocol


def test_a_description_has_what_is_read_and_nothing_else() -> None:
    whole = describe(load_protocol("tiny"))
    assert json.loads(json.dumps(whole)) == whole
    assert set(whole["probe"]) == {"solver", "l2", "pooling", "train_samples", "seed"}
    by_sgd = describe(load_protocol("dinov2_linear"))
    assert "l2" not in by_sgd["probe"] and len(by_sgd["probe"]["rates"]) == 13
    part = describe(load_protocol("tiny", ["--measures", "[features, speed]"]))
    sections = [name for name, value in part.items() if isinstance(value, dict)]
    assert sections == ["speed"] and part["speed"]["rounds"] == 5


NAN, INFINITE = math.nan, math.inf
REFUSED = {
    Protocol: {
        "name": ["", 3],
        "description": [" "],
        "measures": [[], ["knn", "knn"], ["knn", "speeds"], "all", 3, [["knn"]]],
        "precision": ["fp16", None],
        "held_out_samples": [0, 2.5],
        "knn": [None, {}],
    },
    BlockConfig: {"images": [0, 1.5]},
    KnnConfig: {
        "k": [[], [0], [10, 10], [1.0], 10, None],
        "temperature": [0, -1, NAN, INFINITE, "x"],
        "pooling": ["mean"],
    },
    ProbeConfig: {
        "solver": ["adam"],
        "rates": [[], [0.0], [11], [NAN], 0.1],
        "epochs": [0],
        "batch_size": [0],
        "momentum": [-0.1, 1.0],
        "weight_decay": [-1],
        "l2": [-1e-9, NAN],
        "pooling": [None],
        "selection_fraction": [0, 0.0, 1.0],
        "train_samples": [0, 2.5],
        "seed": [-1],
    },
    SegmentationConfig: {
        "rates": [[]],
        "epochs": [0],
        "batch_size": [-1],
        "weight_decay": [-1],
        "selection_fraction": [1],
        "train_samples": [0],
        "fit_scale": [0, 2.0, 65],
        "colour_bins": [1, 65],
        "seed": [0.5],
    },
    SpeedConfig: {"batch_size": [0], "rounds": [0], "warmup": [-1]},
}


@pytest.mark.parametrize("built", REFUSED, ids=lambda built: built.__name__)
def test_values_out_of_range_are_refused_by_name(built: type) -> None:
    for key, values in REFUSED[built].items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{key} is .*: it must be "):
                built(**{key: value})


def test_every_key_has_values_that_it_refuses() -> None:
    sections = {"knn", "blocks", "probe", "segmentation", "speed"}
    for built, keys in REFUSED.items():
        assert {field.name for field in dataclasses.fields(built)} - set(keys) <= sections, built


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nowhere", [], "--protocol nowhere: there is no such protocol; known are dinov2_linear, ironvit, tiny"),
        ("tiny", ["--knn.kk", "3"], "protocol tiny: unrecognized arguments: --knn.kk"),
        ("tiny", ["--knn.k", "ten"], r"protocol tiny: knn\.k is ten: it must be a list of whole numbers"),
        ("tiny", ["--knn.k", "[0]"], r"protocol tiny: knn\.k is \[0\]: it must be a list of whole numbers"),
        ("tiny", ["--measures", "[knn, fid]"], r"protocol tiny: measures is .*'fid'\]: it must be one or more of feat"),
        ("tiny", ["--precision", "fp8"], "protocol tiny: precision is fp8: it must be one of auto, float32, bf16"),
        ("tiny", ["--speed.rounds"], "protocol tiny: .*--speed.rounds: expected one argument"),
    ],
)
def test_mistakes_on_the_command_line(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_protocol(name, overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty: it must be a mapping of keys such as name and blocks"),
        ("knn: 3", "knn is 3: it must have keys of its own"),
        ("knn: {k: [1]}\nknn.k: [2]", "knn.k stands here twice"),
        ("knn: {kk: [1]}", "kk"),
        ("run_name: tiny", "run_name"),
        ("speed: {rounds: 1.5}", r"speed\.rounds is 1.5: it must be a whole number, 1 or more"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"protocol {path}: .*{message}"):
        load_protocol(str(path))
