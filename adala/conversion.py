"""How a pretrained model is converted, as data: a sequence of steps that ``adala.stages`` executes.

ViT-AdaLA's three stages are one such description; each baseline's ``native`` conversion is another. A recipe gives
the lengths, batches and data; what a description leaves None is the recipe's to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

StageName = Literal["attention_alignment", "feature_alignment", "finetuning"]

STAGE_NAMES: dict[int, StageName] = {1: "attention_alignment", 2: "feature_alignment", 3: "finetuning"}


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on the attention projections, with separate ones for q, k and v.

    W' = W + (alpha / rank) B A with B = 0 at the start.

    Paper: arXiv 2106.09685, eq. 3.

    Attributes:
        rank: Inner dimension r.
        alpha: Numerator of the scale.
        targets: Which of ``q``, ``k``, ``v`` and ``proj`` get an adapter.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "proj")


@dataclass(frozen=True)
class ConversionStep:
    """One step of a conversion.

    Attributes:
        stage: The adaptation stage that executes it.
        trainable: Patterns (fnmatch) over the student's parameter names; what matches none is frozen. ``*`` is the
            whole student.
        loss: Name of the alignment loss (see ``adala.losses``); None is the recipe's.
        lr: Peak rate; None is the recipe's.
        weight_decay: None is the recipe's.
        lora: Adapters to insert before the step; they are merged when the student is exported.
    """

    stage: StageName
    trainable: tuple[str, ...] = ("*",)
    loss: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    lora: LoraSpec | None = None


@dataclass(frozen=True)
class Conversion:
    """A named sequence of steps, at most one for each stage, in the order of the stages.

    Attributes:
        name: ``adala`` or ``native``.
        steps: The steps.
    """

    name: str
    steps: tuple[ConversionStep, ...]

    def step(self, stage: StageName) -> ConversionStep | None:
        """The step that ``stage`` executes, or None where the conversion has no such step."""
        return next((step for step in self.steps if step.stage == stage), None)


PACKED = "blocks.*.attn.qkv.*"
QKV_PATTERNS = (PACKED, "blocks.*.attn.token_mixer.*")
# What a model may hold in the place of a packed projection: three of them, and biases beside it.
UNPACKED = (*(f"blocks.*.attn.{part}_proj.*" for part in "qkv"), "blocks.*.attn.q_bias", "blocks.*.attn.v_bias")

ADALA = Conversion(
    name="adala",
    steps=(
        ConversionStep("attention_alignment", trainable=QKV_PATTERNS),
        ConversionStep("feature_alignment"),
        ConversionStep("finetuning"),
    ),
)


def with_unpacked(patterns: Sequence[str]) -> tuple[str, ...]:
    """Patterns of parameters, in which the packed projection means also what other families hold in its place.

    A step names the packed one alone: its digest is a condition of what was trained before there were others.
    """
    return (*patterns, *(UNPACKED if PACKED in patterns else ()))
