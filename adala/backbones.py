"""Pretrained timm ViTs as frozen softmax teachers that return the features of all tokens."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import split_model_name_tag
from torch import Tensor

from adala.families import Backbone, Family, check_divisible, families, family_of, family_of_name
from adala.weight_names import original_names
from adala.weights import find_difference, in_float32, read_weights

# What a backbone that only gives features has no use for; a checkpoint may hold it all the same.
HEAD_PREFIXES = (
    "head.", "head_dist.", "attn_pool.", "fc_norm.", "pre_logits.", "mask_token", "dino_head.", "ibot_head."
)  # fmt: skip
# Set by this module or without meaning to a model that gives the features of all tokens.
SET_ELSEWHERE = {
    "img_size": "the image size is set by data.image_size (image_size)",
    "dynamic_img_size": "it is always on, so that a model takes several image sizes",
    "num_classes": "a backbone has no classifier; classes are set by stage3.task.num_classes",
    "features_only": "a backbone always gives the features of all tokens",
}
CONFIG = "config.json"
# As timm writes them, and the older form.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
BRING_A_FILE = "bring a file of weights and name it in teacher.checkpoint"
# What building a model from wrong arguments raises: assertions, arithmetic and shapes deep within timm and torch.
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class NamedModel:
    """What a teacher's name stands for.

    Attributes:
        architecture: timm's name of it, with the tag that was asked for.
        model_args: Arguments of its constructor: those that were saved with it, under those that were asked for.
        mean: Per-channel mean in [0, 1] of the images that it was saved with; None where timm's own holds.
        std: Their standard deviation.
        folder: Where a ``local-dir:`` name leads.
        repository: Where an ``hf-hub:`` name leads.
    """

    architecture: str
    model_args: dict[str, Any]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    folder: Path | None = None
    repository: str | None = None

    def weights(self) -> Path | None:
        """The file of its weights; None where timm itself knows where they are.

        Raises:
            ValueError: There is none, or the hub cannot be reached.
        """
        if self.folder is not None:
            found = next((self.folder / name for name in WEIGHT_FILES if (self.folder / name).exists()), None)
            if found is None:
                raise ValueError(f"{self.folder} holds no weights: there is neither {' nor '.join(WEIGHT_FILES)}")
            return found
        return None if self.repository is None else _from_hub(self.repository, WEIGHT_FILES)


def resolve_name(name: str, model_args: Mapping[str, Any] | None = None) -> NamedModel:
    """What ``name`` stands for: a name of timm's, ``local-dir:FOLDER`` or ``hf-hub:ORGANISATION/NAME``.

    A folder and a repository hold a ``config.json`` as ``timm.models.save_for_hf`` writes it.

    Raises:
        ValueError: An unknown name, a folder or repository that is not timm's, or a hub that cannot be reached.
    """
    source, is_prefixed, identifier = name.partition(":")
    if not is_prefixed:
        _check_registered(name)
        return NamedModel(name, dict(model_args or {}))
    source = source.replace("_", "-")
    if source not in ("local-dir", "hf-hub") or not identifier:
        raise ValueError(
            f"{name!r} is no name of a model: use timm's names, local-dir:FOLDER or hf-hub:ORGANISATION/NAME"
        )
    folder = Path(identifier).expanduser() if source == "local-dir" else None
    if folder is not None and not (folder / CONFIG).is_file():
        raise ValueError(f"{name} is no folder that timm saved a model in: {folder / CONFIG} does not exist")
    path = folder / CONFIG if folder is not None else _from_hub(identifier, (CONFIG,))
    architecture, saved, images = _read_config(path)
    mean, std = (tuple(images[key]) if images.get(key) else None for key in ("mean", "std"))
    repository = identifier if folder is None else None
    return NamedModel(architecture, {**saved, **(model_args or {})}, mean, std, folder, repository)


def _check_registered(name: str) -> None:
    base, tag = split_model_name_tag(name)
    if "/" in name:
        raise ValueError(
            f"{name!r} is no name of a model: with local-dir: before it, it is a folder, with hf-hub: one on the hub"
        )
    if not timm.is_model(base):
        modules = [module for family in families() for module in family.modules]
        near = difflib.get_close_matches(base, timm.list_models(module=modules), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models('vit_*')"
        raise ValueError(f"timm knows no model {name!r}: {hint}")
    if tag:
        tags = [known.partition(".")[2] for known in timm.list_models(f"{base}.*", include_tags=True)]
        if tag not in tags:
            hint = f"it has {', '.join(tags)}" if any(tags) else "it has none"
            raise ValueError(f"timm knows no weights {tag!r} of {base}: {hint}")


def _read_config(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, constructor's arguments and what is said of images, from timm's ``config.json``."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture, arguments = config["architecture"], dict(config.get("model_args") or {})
        images = config.get("pretrained_cfg") or config
        _check_registered(architecture)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not describe a model of timm's, as timm.models.save_for_hf does ({error!r})"
        ) from error
    # The head's, and those that hold for one image size.
    return architecture, {key: value for key, value in arguments.items() if key not in SET_ELSEWHERE}, images


def _from_hub(identifier: str, names: Sequence[str]) -> Path:
    """The first of these files that a repository has, from the cache or the hub."""
    repository, _, revision = identifier.partition("@")
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except LocalEntryNotFoundError as error:
            raise ValueError(_unreachable(f"hf-hub:{identifier}")) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # of several HTTP libraries, without a base of their own
            reason = _in_one_line(error)
            raise ValueError(f"hf-hub:{identifier} could not be fetched ({reason}): {BRING_A_FILE}") from error
    raise ValueError(f"hf-hub:{identifier} has no {' or '.join(names)}: {BRING_A_FILE}")


def _unreachable(name: str) -> str:
    return (
        f"the weights of {name} are not in the cache, and the Hugging Face hub cannot be reached: {BRING_A_FILE}, or "
        "fetch them once where there is a network and bring the cache (HF_HOME)"
    )


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def build_backbone(
    name: str,
    image_size: Sequence[int],
    model_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> Backbone:
    """A timm ViT without its head: ``model(images)`` gives the final norm's output for all tokens, (B, N, D).

    Other image sizes than its own work too, non-square ones included: the position embedding is resampled. Models that
    timm builds without a final norm (RADIO's) give what their last block does.

    Args:
        name: What a model is called, see :func:`resolve_name`.
        image_size: Height and width in pixels that the position embedding is resampled to once.
        model_args: Further arguments of timm's constructor.
        pretrained: Whether the weights that go by the name are loaded.

    Raises:
        ValueError: Unknown name, wrong arguments, a model of no supported family, an image size that the patch does
            not divide, or weights that cannot be had.
    """
    named = resolve_name(name, model_args)
    _check_arguments(family_of_name(named.architecture), named.model_args)
    path = named.weights() if pretrained else None
    if pretrained and path is None:
        with torch.device("meta"):
            # What is wrong with the arguments is said as such, and before anything is fetched.
            _build(named, image_size)
        model = _build_pretrained(named, image_size)
    else:
        model = _build(named, image_size)
    if path is not None:
        load_checkpoint(model, path)
    return model


def _check_arguments(family: Family, model_args: Mapping[str, Any]) -> None:
    known = [name for name in family.constructor_arguments() if name not in (*SET_ELSEWHERE, "device", "dtype")]
    for key, value in model_args.items():
        if key in SET_ELSEWHERE:
            raise ValueError(f"model_args.{key} cannot be set: {SET_ELSEWHERE[key]}")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"model_args.{key} is no argument of timm's {family.name}: {hint}")
        if value is None:  # timm takes its own
            continue
        if key == "in_chans" and value != 3:
            raise ValueError(f"model_args.in_chans is {value!r}: images are read as RGB, so it can only be 3")
        sizes = value if key == "patch_size" and isinstance(value, list | tuple) and len(value) == 2 else [value]
        if key in ("embed_dim", "depth", "num_heads", "patch_size") and not all(
            type(n) is int and n > 0 for n in sizes
        ):
            raise ValueError(f"model_args.{key} is {value!r}: it must be a whole number of at least 1")
        if key.endswith("_rate") and not (isinstance(value, int | float) and 0 <= value < 1):
            raise ValueError(f"model_args.{key} is {value!r}: it must be a number of at least 0 and below 1")


def _build(named: NamedModel, image_size: Sequence[int], pretrained: bool = False) -> Backbone:
    own = family_of_name(named.architecture).build_arguments(image_size)
    try:
        model = timm.create_model(named.architecture, pretrained=pretrained, **own, **named.model_args)
    except BUILD_ERRORS as error:
        if pretrained:
            raise
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise ValueError(f"{named.architecture} is not a plain timm ViT: it takes no {unknown[1]}") from error
        asked = ", ".join(
            f"{key}={value!r}" for key, value in {"img_size": tuple(image_size), **named.model_args}.items()
        )
        reason = f"{type(error).__name__}: {_in_one_line(error)}"
        raise ValueError(f"timm cannot build {named.architecture} with {asked} in model_args ({reason})") from error
    try:
        family = family_of(model)
        family.check(model)
    except ValueError as error:
        raise ValueError(f"{named.architecture}: {error}") from error
    family.make_backbone(model, image_size)
    check_image_size(model, image_size)
    return model


def _build_pretrained(named: NamedModel, image_size: Sequence[int]) -> Backbone:
    """With the weights that timm itself knows of. Whatever network, hub and files raise becomes one sentence."""
    try:
        return _build(named, image_size, pretrained=True)
    except LocalEntryNotFoundError as error:
        raise ValueError(_unreachable(named.architecture)) from error
    except Exception as error:  # of several HTTP libraries and file formats, without a base of their own
        if "No pretrained weights exist" in str(error):
            raise ValueError(f"timm has no pretrained weights of {named.architecture}: {BRING_A_FILE}") from error
        raise ValueError(
            f"the pretrained weights of {named.architecture} could not be had, or do not fit model_args "
            f"({_in_one_line(error)}): {BRING_A_FILE}"
        ) from error


def check_image_size(model: Backbone, image_size: Sequence[int]) -> None:
    """Refuses an image size (height, width) that the patch size does not divide, with a ValueError."""
    check_divisible(image_size, model.patch_embed.patch_size)


def read_checkpoint(model: Backbone, path: str | Path) -> dict[str, Tensor]:
    """Local weights in float32 under the names of ``model``, which may lie on the meta device.

    They may have timm's names, those that its family knows besides (DINOv2's, DINOv3's, OpenAI CLIP's, say) or those of
    Hugging Face's models, and lie inside a training checkpoint; position embeddings are resampled to fit.

    Raises:
        ValueError: No such file, one that holds no weights, weights of another architecture or such that are not
            finite; the message names the first key that differs.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist")
    tensors, family = original_names(read_weights(path)), family_of(model)
    try:
        state = family.read_state(tensors, model)
    except (KeyError, RuntimeError, IndexError, AttributeError, ValueError, AssertionError) as error:
        raise ValueError(f"checkpoint {path} could not be read as a ViT's weights: {_in_one_line(error)}") from error
    if "norm.weight" not in state:
        # As in Family.make_backbone: the final norm of a model that pools before it.
        state = {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in state.items()}
    difference = find_difference(model, state, optional=HEAD_PREFIXES)
    if difference:
        architecture = model.default_cfg.get("architecture")
        raise ValueError(f"checkpoint {path} is for another architecture than {architecture}: {difference}")
    return in_float32(path, state, model)


def load_checkpoint(model: Backbone, path: str | Path) -> None:
    """Loads local weights.

    Raises:
        ValueError: See :func:`read_checkpoint`.
    """
    model.load_state_dict(read_checkpoint(model, path))


def load_teacher(
    name: str,
    image_size: Sequence[int],
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> Backbone:
    """A frozen softmax teacher in eval mode; ``teacher(images)`` gives (B, N, D) features of all tokens.

    Args:
        name: What a model is called, see :func:`resolve_name`.
        image_size: Height and width in pixels.
        checkpoint: Local weights, a safetensors or torch file; takes precedence over ``pretrained``.
        pretrained: Whether the weights that go by the name are loaded, from its folder, the cache or the network.
        model_args: Further arguments of timm's constructor.

    Raises:
        ValueError: See :func:`build_backbone` and :func:`read_checkpoint`.
    """
    model = build_backbone(name, image_size, model_args, pretrained=pretrained and checkpoint is None)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval().requires_grad_(False)
