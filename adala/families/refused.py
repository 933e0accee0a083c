"""Classes of timm's that look like a plain ViT and have no adapter, each with the reason."""

from timm.models.beit import Beit
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

REFUSED: dict[type[nn.Module], str] = {
    Beit: "its blocks.*.attn add a learned bias for each pair of tokens to the scores of softmax "
    "(relative_position_bias_table), and a linear mechanism, which never forms the pairs, has no place for it",
    VisionTransformerSAM: "its blocks.*.attn add the relative position of each pair of tokens to the scores of softmax "
    "(rel_pos_h, rel_pos_w), and a linear mechanism, which never forms the pairs, has no place for it; most of its "
    "blocks attend in windows, and its neck gives maps of another width in the place of tokens",
}


def refuse_by_reason(model_class: type[nn.Module], prefix: str = "") -> None:
    """Refuses a class, and what is derived from it, with a ValueError that says why, if there is a reason.

    Args:
        model_class: timm's.
        prefix: Of the message.
    """
    for refused, reason in REFUSED.items():
        if issubclass(model_class, refused):
            raise ValueError(f"{prefix}{model_class.__name__} is not supported: {reason}")
