"""A fully softmax student as a folder that plain timm loads, without AdaLA."""

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

from adala.attention import AttentionShell, mechanism_name
from adala.attention.softmax import SoftmaxMixer
from adala.export.agreement import Model

WEIGHTS = "model.safetensors"


def check_softmax(model: nn.Module) -> None:
    """Raises ValueError where a block's attention is not timm's softmax."""
    for name, module in model.named_modules():
        if isinstance(module, AttentionShell) and not _is_softmax(module):
            raise ValueError(
                f"{name} is {mechanism_name(module.token_mixer)} attention ({module.token_mixer.options}), which timm "
                "does not have: --to onnx or --to torch keep it, and adala.load_student reads the student's own folder"
            )


def _is_softmax(shell: AttentionShell) -> bool:
    mixer = shell.token_mixer
    return type(mixer) is SoftmaxMixer and mixer.options.scale in (None, shell.head_dim**-0.5)


def write_timm(
    model: nn.Module,
    folder: Path,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    model_args: Mapping[str, Any] | None,
) -> None:
    """Writes a backbone's weights under timm's keys, and ``config.json``, as ``timm.models.save_for_hf`` does.

    Args:
        model: The backbone, whose blocks are all softmax; its ``pretrained_cfg`` is changed.
        folder: Where they go.
        image_size: Height and width in pixels that it is at.
        mean: Per-channel mean of the input.
        std: Its standard deviation.
        model_args: Arguments of timm's constructor, where they are known; else what timm itself noted of them.
    """
    known = {} if model_args is None else {**model_args, "img_size": list(image_size), "dynamic_img_size": True}
    # What timm reads of images when it saves; its older versions take no other word for it.
    images = {"input_size": (3, *image_size), "mean": tuple(mean), "std": tuple(std)}
    model.pretrained_cfg = {**model.pretrained_cfg, **images}
    save_for_hf(model, str(folder), model_args=known, safe_serialization=True)
    # safetensors writes files that only their owner may read.
    (folder / WEIGHTS).chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))


def run_timm(folder: Path) -> Model:
    """The model that plain timm makes of the folder."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
