"""LoLCATs: Hedgehog's linear attention, taught by matching outputs and finished with low-rank adapters.

Paper: "LoLCATs: On Low-Rank Linearizing of Large Language Models", arXiv 2410.10254.

Shapes: as in ``baselines.hedgehog``, whose feature maps it shares.
"""

from dataclasses import dataclass
from typing import ClassVar

from adala.conversion import Conversion, ConversionStep, LoraSpec
from baselines.hedgehog import HedgehogMixer, HedgehogOptions

NATIVE = Conversion(
    name="native",
    steps=(
        ConversionStep(
            "attention_alignment",
            trainable=("blocks.*.attn.token_mixer.*",),
            loss="head_output_mse_1000",
            lr=1e-2,
            weight_decay=0.0,
        ),
        ConversionStep("finetuning", trainable=("*lora_*",), lr=1e-4, lora=LoraSpec(rank=8, alpha=16.0)),
    ),
)


@dataclass(frozen=True)
class LolcatsOptions(HedgehogOptions):
    """Options of LoLCATs: those of Hedgehog, with the same defaults."""


class LolcatsMixer(HedgehogMixer):
    """Linear attention over trained softmax features. 2 N D f + 4 N D f MACs, 2 H d f parameters.

    Paper: arXiv 2410.10254: attention transfer, then low-rank adjustment.
    Differs: without the sliding window of softmax attention, which is causal and made for language.
    """

    Options = LolcatsOptions
    native_conversion: ClassVar[Conversion] = NATIVE
