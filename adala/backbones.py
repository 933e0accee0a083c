"""Pretrained timm ViTs as frozen softmax teachers that return the features of all tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from adala.students import check_supported

# What a backbone that only gives features has no use for; a checkpoint may hold it all the same.
HEAD_PREFIXES = ("head.", "head_dist.", "attn_pool.", "fc_norm.", "pre_logits.", "mask_token")


def build_backbone(
    name: str,
    image_size: Sequence[int],
    model_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> VisionTransformer:
    """A timm ViT without its head: ``model(images)`` gives the final norm's output for all tokens, (B, N, D).

    Other image sizes than its own work too, non-square ones included: the position embedding is resampled.

    Args:
        name: timm model name.
        image_size: Height and width in pixels that the position embedding is resampled to once.
        model_args: Further arguments of timm's constructor.
        pretrained: Whether timm fetches the weights.

    Raises:
        ValueError: Unknown name, a model that is not a plain ViT, or an image size that the patch does not divide.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"timm knows no model {name!r}: see timm.list_models('vit_*')")
    arguments = {"img_size": tuple(image_size), "dynamic_img_size": True, **(model_args or {})}
    try:
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise ValueError(f"{name} is not a plain timm ViT that takes {', '.join(arguments)} ({error})") from error
    check_supported(model)
    check_image_size(model, image_size)
    model.reset_classifier(0, "")
    return model


def check_image_size(model: VisionTransformer, image_size: Sequence[int]) -> None:
    """Refuses an image size (height, width) that the patch size does not divide, with a ValueError."""
    patch = model.patch_embed.patch_size
    if any(size % p for size, p in zip(image_size, patch, strict=True)):
        nearest = [max(p, size // p * p) for size, p in zip(image_size, patch, strict=True)]
        raise ValueError(
            f"image size {image_size[0]} x {image_size[1]} is not divisible by the patch size {patch[0]} x {patch[1]}: "
            f"{nearest[0]} x {nearest[1]} would be"
        )


def load_checkpoint(model: VisionTransformer, path: str | Path) -> None:
    """Loads local weights under timm's, DINOv2's or OpenAI CLIP's names; position embeddings are resampled to fit.

    Raises:
        ValueError: No such file, or weights of another architecture; the message names the first key that differs.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        state = checkpoint_filter_fn(load_state_dict(str(path)), model)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        wrong = [f"{k} is {tuple(state[k].shape)}, not {tuple(s)}" for k, s in shapes.items() if _differs(state, k, s)]
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"checkpoint {path} could not be read as a ViT's weights: {error}") from error
    missing = [f"{key} is missing" for key in shapes if key not in state]
    surplus = [f"{key} is unknown" for key in state if key not in shapes and not key.startswith(HEAD_PREFIXES)]
    if wrong or missing or surplus:
        first = (wrong + missing + surplus)[0]
        count = len(wrong) + len(missing) + len(surplus)
        raise ValueError(f"checkpoint {path} is for another architecture than {model.default_cfg.get('architecture')}: "
                         f"{first} ({count} keys differ)")  # fmt: skip
    model.load_state_dict({key: state[key] for key in shapes})


def _differs(state: Mapping[str, torch.Tensor], key: str, shape: torch.Size) -> bool:
    return key in state and state[key].shape != shape


def load_teacher(
    name: str,
    image_size: Sequence[int],
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> VisionTransformer:
    """A frozen softmax teacher in eval mode; ``teacher(images)`` gives (B, N, D) features of all tokens.

    Args:
        name: timm model name.
        image_size: Height and width in pixels.
        checkpoint: Local weights (.safetensors or .pth); takes precedence over ``pretrained``.
        pretrained: Whether timm fetches the weights.
        model_args: Further arguments of timm's constructor.

    Raises:
        ValueError: See :func:`build_backbone` and :func:`load_checkpoint`.
    """
    model = build_backbone(name, image_size, model_args, pretrained=pretrained and checkpoint is None)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval().requires_grad_(False)
