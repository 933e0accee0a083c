"""Segmentation heads by name, and what all their predictions are read as.

Shapes: B batch, Q queries, K classes, H x W pixels.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adala.families import Backbone
from adala.heads.dense import LinearSegmentationHead
from adala.heads.mask2former import Mask2FormerHead
from adala.heads.pmt import PmtHead

SEGMENTATION_HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearSegmentationHead,
    "mask2former": Mask2FormerHead,
    "pmt": PmtHead,
}

# What the value of an option must be, by the type of its field.
KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number, 1 or more", lambda value: type(value) is int and value >= 1),
    float: ("a number above 0", lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0),
    str: ("a name", lambda value: isinstance(value, str)),
    dict[str, Any]: ("a mapping", lambda value: isinstance(value, Mapping)),
}


def build_segmentation_head(
    name: str, student: Backbone, num_classes: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """A fresh segmentation head: called with features (B, N, D) and their layout, it gives a prediction.

    Args:
        name: Of the head, see ``SEGMENTATION_HEADS``.
        student: Whose features it reads, a linearized student or a plain timm ViT.
        num_classes: K.
        options: By field name of the head's ``Options``.

    Raises:
        ValueError: An unknown head, an option that it does not have, or a value that an option cannot have.
    """
    if name not in SEGMENTATION_HEADS:
        raise ValueError(f"unknown segmentation head {name!r}: known are {', '.join(SEGMENTATION_HEADS)}")
    head_class = SEGMENTATION_HEADS[name]
    return head_class(student, num_classes, _read_options(name, head_class.Options, options or {}))


def _read_options(name: str, options_class: type, options: Mapping[str, Any]) -> Any:
    known = {field.name: field for field in dataclasses.fields(options_class)}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"head {name} has no option {key!r}: it has {', '.join(known)}")
        words, holds = KINDS[known[key].type]
        if not holds(value):
            raise ValueError(f"head {name}: {key} is {value!r}: it must be {words}")
    return options_class(**options)


def semantic_logits(prediction: Tensor | Mapping[str, Any], size: tuple[int, int]) -> Tensor:
    """What the argmax over classes of is the predicted mask.

    Args:
        prediction: Of any segmentation head.
        size: (H, W) in pixels.

    Returns:
        (B, K, H, W), float32: logits of a dense head, upsampled bilinearly; of a mask head the sum over queries of
        class probability times mask probability, masks upsampled as logits.
    """
    if isinstance(prediction, Tensor):
        return _upsample(prediction, size)
    classes = prediction["class_logits"].float().softmax(dim=-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", classes, _upsample(prediction["mask_logits"], size).sigmoid())


def _upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
