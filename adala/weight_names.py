"""The names of a ViT's weights, as others save them: where in a checkpoint it lies, and Hugging Face's own names.

What comes out has the names of timm or of the original repositories (DINOv2's, DINOv3's, OpenAI CLIP's), which timm's
filters read. D is the embed dim.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# One weight that every model of a naming has, at its end what tells the naming.
TIMM, OPENAI = "patch_embed.proj.weight", "class_embedding"
HUGGING_FACE = (
    "embeddings.patch_embeddings.projection.weight",  # ViT, DeiT, DINOv2
    "embeddings.patch_embeddings.weight",  # DINOv3
    "embeddings.patch_embedding.weight",  # CLIP, SigLIP
)
# What timm's filters take away themselves, and choose the naming by.
KEPT_PREFIXES = ("visual.trunk.", "visual.", "vision_encoder.")
# Of several models in one file, averaged weights come first, and what a teacher was trained against last.
PREFERRED, LAST = ("ema", "teacher"), ("student", "online")

# Within a Hugging Face layer, in order.
LAYER = re.compile(r"(?:(?:encoder|model)\.)?layers?\.(\d+)\.(.+)")
LAYER_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(?:norm1|layernorm_before|layer_norm1)\.", "norm1."),
        (r"(?:norm2|layernorm_after|layer_norm2)\.", "norm2."),
        (r"(?:attention|self_attn)\.(?:attention\.)?(?:q_proj|query)\.", "attn.q."),
        (r"(?:attention|self_attn)\.(?:attention\.)?(?:k_proj|key)\.", "attn.k."),
        (r"(?:attention|self_attn)\.(?:attention\.)?(?:v_proj|value)\.", "attn.v."),
        (r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
        (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
        (r"(?:mlp\.fc1|intermediate\.dense)\.", "mlp.fc1."),
        (r"(?:mlp\.fc2|output\.dense)\.", "mlp.fc2."),
        (r"mlp\.(?:weights_in)\.", "mlp.w12."),
        (r"mlp\.(?:weights_out)\.", "mlp.w3."),
    )
)
TOP_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    **{
        f"{anchor.removesuffix('weight')}{kind}": f"patch_embed.proj.{kind}"
        for anchor in HUGGING_FACE
        for kind in ("weight", "bias")
    },
    **{f"pre_layrnorm.{kind}": f"norm_pre.{kind}" for kind in ("weight", "bias")},
    **{
        f"{norm}.{kind}": f"norm.{kind}"
        for norm in ("layernorm", "norm", "post_layernorm")
        for kind in ("weight", "bias")
    },
}
# Of a whole model, what a backbone has no use for; position_ids are a buffer of numbers from 0.
DROPPED = ("pooler.", "classifier.", "head.", "cls_classifier.", "distillation_classifier.", "embeddings.position_ids")
DROPPED_SUFFIXES = ("rope_embeddings.inv_freq",)


def original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the ViT in a checkpoint, under the names of timm or of their original repository.

    What comes before the names of the model itself is taken away, and what lies beside it (a text tower, a decoder,
    a student beside its teacher) is left out. Blocks in chunks, as DINOv2's trainer saves them, are counted through.

    Args:
        tensors: As saved; names that no rule is for stay as they are.
    """
    found = _cut_out(tensors, TIMM)
    if found is not None:
        return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in found.items()}
    found = _cut_out(tensors, OPENAI) if any(name.endswith("conv1.weight") for name in tensors) else None
    if found is not None:
        return found if "visual.class_embedding" in found else {f"visual.{name}": each for name, each in found.items()}
    for anchor in HUGGING_FACE:
        found = _cut_out(tensors, anchor)
        if found is not None:
            return _from_hugging_face(found)
    return dict(tensors)


def _cut_out(tensors: Mapping[str, Tensor], anchor: str) -> dict[str, Tensor] | None:
    """What begins as the anchor's name does, without that beginning; None where nothing ends with the anchor."""
    prefixes = [name.removesuffix(anchor) for name in tensors if name == anchor or name.endswith(f".{anchor}")]
    if not prefixes:
        return None

    def rank(prefix: str) -> tuple[bool, bool]:
        return any(word in prefix for word in LAST), not any(word in prefix for word in PREFERRED)

    prefix = min(prefixes, key=rank)
    kept = next((each for each in KEPT_PREFIXES if prefix.endswith(each)), "")
    return {
        kept + name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
    } | _beside(tensors, prefix, kept)


def _beside(tensors: Mapping[str, Tensor], prefix: str, kept: str) -> dict[str, Tensor]:
    """What timm's filters look for beside a tower that they know: OpenCLIP's projection."""
    outer = prefix.removesuffix("trunk.")
    head = f"{outer}head.proj.weight"
    return {"visual.head.proj.weight": tensors[head]} if kept == "visual.trunk." and head in tensors else {}


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {_renamed(name): value for name, value in tensors.items() if not _is_dropped(name)}
    if "pos_embed" in renamed and renamed["pos_embed"].ndim == 2:
        renamed["pos_embed"] = renamed["pos_embed"][None]
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    is_dinov3 = "pos_embed" not in renamed
    if is_dinov3 and "register_tokens" in renamed:
        renamed["storage_tokens"] = renamed.pop("register_tokens")
    return _with_packed(renamed, is_dinov3)


def _is_dropped(name: str) -> bool:
    return name.startswith(DROPPED) or name.endswith(DROPPED_SUFFIXES)


def _renamed(name: str) -> str:
    layer = LAYER.fullmatch(name)
    if layer is None:
        return TOP_NAMES.get(name, name)
    rest = layer[2]
    for pattern, own in LAYER_NAMES:
        if pattern.match(rest):
            rest = pattern.sub(own, rest, count=1)
            break
    return f"blocks.{layer[1]}.{rest}"


def _with_packed(tensors: Mapping[str, Tensor], is_dinov3: bool) -> dict[str, Tensor]:
    """Projections that the original model has in one: of queries, keys and values, and of a gate and what it gates.

    Keys without a bias get one of zeros, as DINOv3's own files have it.
    """
    packed = {}
    for name, value in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".attn.q"):
            parts = [tensors.get(f"{stem[:-1]}{part}.{kind}", torch.zeros_like(value)) for part in "qkv"]
            packed[f"{stem[:-1]}qkv.{kind}"] = torch.cat(parts)
        elif stem.endswith((".attn.k", ".attn.v")):
            continue
        elif stem.endswith((".gate_proj", ".up_proj", ".down_proj")):
            packed |= _mlp(tensors, stem, kind, is_dinov3)
        else:
            packed[name] = value
    return packed


def _mlp(tensors: Mapping[str, Tensor], stem: str, kind: str, is_dinov3: bool) -> dict[str, Tensor]:
    """One projection of an MLP whose layers are called after what they do."""
    mlp, _, layer = stem.rpartition(".")
    value, gate = tensors[f"{stem}.{kind}"], tensors.get(f"{mlp}.gate_proj.{kind}")
    if gate is None:
        return {f"{mlp}.{'fc1' if layer == 'up_proj' else 'fc2'}.{kind}": value}
    if is_dinov3:
        return {f"{mlp}.{dict(gate_proj='w1', up_proj='w2', down_proj='w3')[layer]}.{kind}": value}
    if layer == "gate_proj":
        return {f"{mlp}.w12.{kind}": torch.cat([gate, tensors[f"{mlp}.up_proj.{kind}"]])}
    return {f"{mlp}.w3.{kind}": value} if layer == "down_proj" else {}
