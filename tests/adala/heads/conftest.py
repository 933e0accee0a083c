"""Small options of every segmentation head, and features that a head can tell apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_teacher import build_tiny_teacher
from torch import nn

from adala.heads import build_segmentation_head
from adala.students import linearize

SMALL: dict[str, dict[str, Any]] = {
    "linear": {},
    "pmt": {"num_queries": 6, "num_blocks": 2},
    "mask2former": {
        "num_queries": 6,
        "width": 32,
        "num_heads": 2,
        "pixel_decoder_layers": 1,
        "pixel_decoder_mlp_width": 32,
        "decoder_layers": 2,
        "decoder_mlp_width": 32,
    },
}


@pytest.fixture
def student() -> VisionTransformer:
    return linearize(build_tiny_teacher(), "linear")


@pytest.fixture
def build_head() -> Callable[..., nn.Module]:
    """Builds a small head from a seed, for three classes unless told otherwise."""

    def build(name: str, model: VisionTransformer, num_classes: int = 3, seed: int = 0, **options: Any) -> nn.Module:
        if name == "mask2former":
            pytest.importorskip("transformers", reason="the head mask2former needs the extra mask2former")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_segmentation_head(name, model, num_classes, SMALL[name] | options)

    return build
