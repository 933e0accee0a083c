"""What an evaluation measures, and how: a YAML protocol plus dotted overrides, as frozen dataclasses.

    protocol = load_protocol("dinov2_linear", ["--knn.k", "[10, 20]"])

The string below each field is its documentation; units stand in it. What its value may be stands in
:mod:`adala.rules`, and is checked as soon as a dataclass is made.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from adala.config import build_settings, explained, read_settings, settings_path
from adala.rules import MEASURES, Checked

PROTOCOL_FOLDER = Path(__file__).parent / "protocols"
DEFAULT_PROTOCOL = "tiny"
# Keys that are read only where another key of their section has a certain value.
_READ_WITH = {
    "probe": {
        **dict.fromkeys(
            ("rates", "epochs", "batch_size", "momentum", "weight_decay", "selection_fraction"), ("solver", "sgd")
        ),
        "l2": ("solver", "lbfgs"),
    },
}


@dataclasses.dataclass(frozen=True)
class BlockConfig(Checked):
    """Error by block against the teacher."""

    images: int = 256
    """Held-out images that blocks are compared on (the first ones, in shard order)."""


@dataclasses.dataclass(frozen=True)
class KnnConfig(Checked):
    """Weighted nearest neighbours on frozen features."""

    k: list[int] = dataclasses.field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbours; each gives a score of its own."""
    temperature: float = 0.07
    """T of a neighbour's weight exp(cosine / T)."""
    pooling: Literal["cls", "patch", "cls_patch"] = "cls"
    """Which features: the class token, the mean patch token, or both side by side."""


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Checked):
    """A linear classifier on frozen features."""

    solver: Literal["sgd", "lbfgs"] = "lbfgs"
    """``sgd`` trains one classifier a rate, all at once, under a cosine to 0; ``lbfgs`` goes to convergence and has no
    rate."""
    rates: list[float] = dataclasses.field(default_factory=lambda: [0.1])
    """Peak learning rates of SGD for a batch of 256; they are multiplied by batch_size / 256."""
    epochs: int = 10
    """Passes of SGD over the training features."""
    batch_size: int = 1024
    """Samples per step of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    l2: float = 1e-3
    """L2 penalty of L-BFGS on standardised features, per sample."""
    pooling: Literal["cls", "patch", "cls_patch"] = "cls_patch"
    """Which features: the class token, the mean patch token, or both side by side."""
    selection_fraction: float = 0.1
    """Share of the training samples that is held back to choose among rates; not read with a single rate."""
    train_samples: int | None = None
    """Training samples (the first ones, in shard order); null takes all."""
    seed: int = 0
    """Seed of the order of samples and of the share that is held back."""


@dataclasses.dataclass(frozen=True)
class SegmentationConfig(Checked):
    """A frozen linear head for masks: batch norm and a 1x1 convolution on each patch token beside a global one, by
    AdamW under a cosine to 0. It is fitted on images cut to the evaluation size, and scored as the recipe's task says
    of any head (its ``inference``)."""

    rates: list[float] = dataclasses.field(default_factory=lambda: [1e-3])
    """Peak learning rates, one head each, whatever the batch."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 16
    """Images per step."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    selection_fraction: float = 0.1
    """Share of the training images that is held back to choose among rates; not read with a single rate."""
    train_samples: int | None = None
    """Training images (the first ones, in shard order); null takes all."""
    fit_scale: int = 4
    """The loss compares at most so many pixels a patch along each side. Scores are always taken at the masks' size."""
    colour_bins: int = 16
    """Bins for each of red, green and blue of the colour table that stands in the results as a baseline."""
    seed: int = 0
    """Seed of the order of images and of the share that is held back."""


@dataclasses.dataclass(frozen=True)
class SpeedConfig(Checked):
    """Images per second and peak memory at the evaluation size."""

    batch_size: int = 32
    """Images per forward pass."""
    rounds: int = 20
    """Timed rounds; all models take turns in each, and the median counts."""
    warmup: int = 3
    """Forward passes of each model before the first round."""


@dataclasses.dataclass(frozen=True)
class Protocol(Checked):
    """How models are compared; the same for teacher and students."""

    name: str = DEFAULT_PROTOCOL
    """What results are printed under."""
    description: str = "every measure there is"
    """Where the protocol is from and where it departs from that, in a sentence or two."""
    measures: list[str] | str = dataclasses.field(default_factory=lambda: list(MEASURES))
    """What is measured: ``features`` (cosine and relative error to the teacher), ``blocks`` (the same by block),
    ``knn``, ``probe`` (linear), ``head`` (of a fine-tuned student), ``segmentation`` (a frozen linear head),
    ``speed``. Those that data or models do not allow are left out, with a note."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the backbones: bf16 is by autocast; ``auto`` takes it on a GPU, float32 on a CPU."""
    held_out_samples: int | None = None
    """Held-out samples that models are scored on (the first ones of each set, in shard order); null takes all."""
    blocks: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    """Error by block."""
    knn: KnnConfig = dataclasses.field(default_factory=KnnConfig)
    """Nearest neighbours."""
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    """Linear probe."""
    segmentation: SegmentationConfig = dataclasses.field(default_factory=SegmentationConfig)
    """Frozen linear head for masks."""
    speed: SpeedConfig = dataclasses.field(default_factory=SpeedConfig)
    """Speed and memory."""


@functools.cache
def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_class_arguments(Protocol, nested_key=None)
    return parser


def load_protocol(name: str = DEFAULT_PROTOCOL, overrides: Sequence[str] = ()) -> Protocol:
    """A protocol by name or path.

    Args:
        name: Of a file in ``adala/protocols``, or the path of a YAML file.
        overrides: Dotted keys and their values as text, such as ``["--knn.k", "[10, 20]"]``.

    Raises:
        ValueError: Unknown protocol, unknown key, or a value of the wrong type or out of range; the message names the
            key.
    """
    parser, path = _build_parser(), settings_path(name, PROTOCOL_FOLDER, "protocol")
    defaults = read_settings(parser, path, Protocol, "protocol")
    try:
        return build_settings(Protocol, parser.parse_args(list(overrides), namespace=defaults).as_dict())
    except (ArgumentError, OverflowError, ValueError) as error:
        raise ValueError(f"protocol {name}: {explained(error, Protocol)}") from error


def describe(protocol: Protocol) -> dict[str, Any]:
    """The protocol for a results document: every key that something which is measured reads.

    Where a protocol of that name is in the package, ``changed`` lists the keys by which this one differs from it.
    """
    described = {name: value for name, value in dataclasses.asdict(protocol).items() if _is_read(protocol, name)}
    if (PROTOCOL_FOLDER / f"{protocol.name}.yaml").is_file():
        published = load_protocol(protocol.name)
        described["changed"] = [key for key, value in _flat(protocol).items() if value != _flat(published)[key]]
    for section, keys in _READ_WITH.items():
        for key, (decides, value) in keys.items():
            if section in described and described[section][decides] != value:
                del described[section][key]
    return described


def _is_read(protocol: Protocol, name: str) -> bool:
    return not isinstance(getattr(protocol, name), Checked) or name in protocol.measures


def _flat(protocol: Protocol) -> dict[str, Any]:
    """Values by dotted key."""
    values = dataclasses.asdict(protocol)
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    below = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {name: value for name, value in values.items() if name not in sections} | below
