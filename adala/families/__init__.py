"""Backbone families: what tells one class of timm's models from another, an adapter in a file each."""

import functools

import timm
from timm.models import split_model_name_tag
from torch import nn

from adala.families.base import (
    Backbone,
    Family,
    LinearizedModel,
    check_divisible,
    linearized_blocks,
    refuse_mask,
    token_layout,
    usual_layout,
)
from adala.families.refused import REFUSED, refuse_by_reason
from adala.plugins import find_plugins, load_plugin

__all__ = [
    "Backbone",
    "Family",
    "LinearizedModel",
    "check_divisible",
    "families",
    "family_of",
    "family_of_name",
    "linearized_blocks",
    "refuse_mask",
    "token_layout",
    "usual_layout",
]

ENTRY_POINT_GROUP = "adala.families"
# By the name of timm's class. The first is what a name of an unknown module is taken for.
BUILT_IN = {
    "VisionTransformer": "adala.families.vision_transformer:VisionTransformerFamily",
    "VisionTransformerDistilled": "adala.families.distilled:DistilledFamily",
    "Eva": "adala.families.eva:EvaFamily",
    "NaFlexVit": "adala.families.naflex:NaFlexFamily",
}


@functools.cache
def families() -> tuple[Family, ...]:
    """All families that can be used here, the built-in ones first.

    Raises:
        ValueError: The package that offers one cannot be imported.
    """
    targets = find_plugins("backbone family", ENTRY_POINT_GROUP, BUILT_IN)
    return tuple(load_plugin("backbone family", name, targets)() for name in targets)


def family_of(model: nn.Module) -> Family:
    """The family of a timm model.

    Raises:
        ValueError: There is none, or the model is a student already.
    """
    if isinstance(model, LinearizedModel):
        raise ValueError("this model is linearized already: linearize its teacher")
    kind = type(model).__name__
    for family in families():
        if family.takes(model):
            return family
    refuse_by_reason(type(model))
    for family in families():
        if isinstance(model, family.model_class):
            raise ValueError(
                f"the model is a {kind}; only timm's plain {family.name} is supported, whose prefix tokens are "
                f"{family.tokens}"
            )
    raise ValueError(
        f"{kind} is not a plain timm ViT, which is one of {', '.join(family.name for family in families())}: "
        "windowed and hierarchical models are not supported"
    )


def family_of_name(name: str) -> Family:
    """The family that a name of timm's leads to most likely; the model decides once it is built.

    Args:
        name: Known to timm, with or without a tag.

    Raises:
        ValueError: Models of this name are refused for a reason of their own.
    """
    module = timm.models.model_entrypoint(split_model_name_tag(name)[0]).__module__.rpartition(".")[2]
    for refused in REFUSED:
        if module == refused.__module__.rpartition(".")[2]:
            refuse_by_reason(refused, f"{name}: ")
    return next((family for family in families() if module in family.modules), families()[0])
