"""Weights under other names: prefixes and wrappers, chunks, and Hugging Face's models beside timm's own."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.layers import SwiGLUPacked
from timm.models import eva, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adala.backbones import load_teacher
from adala.weight_names import original_names

SIZES = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
THEIRS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
ROTARY = {
    **SIZES, "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_grid_offset": 0.0,
    "num_reg_tokens": 4, "use_fc_norm": False, "dynamic_img_size": True, "rope_rotate_half": True, "init_values": 1.0,
    "rope_temperature": 100, "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}  # fmt: skip
NORM_12 = {"norm_layer": partial(nn.LayerNorm, eps=1e-12)}
# Of each model of transformers: what it is built with, timm's counterpart, and the prefix that its files have.
MODELS = {
    "Dinov2": ({}, lambda: VisionTransformer(init_values=1.0, **SIZES), "dinov2."),
    "Dinov2 gated": (
        {"use_swiglu_ffn": True},
        lambda: VisionTransformer(
            init_values=1.0, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=5.5, **SIZES
        ),
        "",
    ),
    "Dinov2WithRegisters": (
        {"num_register_tokens": 4},
        lambda: VisionTransformer(init_values=1.0, reg_tokens=4, no_embed_class=True, **SIZES),
        "backbone.",
    ),
    "ViT": ({"intermediate_size": 128}, lambda: VisionTransformer(**NORM_12, **SIZES), "vit."),
    "DeiT": ({"intermediate_size": 128}, lambda: VisionTransformerDistilled(**NORM_12, **SIZES), "deit."),
    "SiglipVision": (
        {"intermediate_size": 128, "hidden_act": "gelu"},
        lambda: VisionTransformer(class_token=False, global_pool="", **SIZES),
        "vision_model.",
    ),
    "CLIPVision": (
        {"intermediate_size": 128, "hidden_act": "gelu"},
        lambda: VisionTransformer(pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5), **SIZES),
        "vision_model.",
    ),
    "DINOv3ViT": (
        {"intermediate_size": 128, "num_register_tokens": 4, "query_bias": True, "value_bias": True, "key_bias": False},
        lambda: Eva(qkv_bias=True, **ROTARY),
        "",
    ),
    "DINOv3ViT gated": (
        {"intermediate_size": 128, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu",
         "query_bias": False, "value_bias": False, "key_bias": False},
        lambda: Eva(qkv_bias=False, swiglu_mlp=True, mlp_ratio=4, swiglu_align_to=8, **ROTARY),
        "",
    ),
}  # fmt: skip
# As files on the hub have it, where the models of today have other names.
ON_THE_HUB = {
    "Dinov2": ("encoder.layer.", "old"),
    "Dinov2WithRegisters": ("encoder.layer.", "old"),
    "ViT": ("encoder.layer.", "oldest"),
    "DeiT": ("encoder.layer.", "oldest"),
    "DINOv3ViT": ("layer.", ""),
}


def as_on_the_hub(names: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layers, age = ON_THE_HUB[names]
    swapped = {}
    for name, value in tensors.items():
        name = re.sub(r"^(?:encoder\.|model\.)?layers?\.", layers, name)
        if age:
            for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
                name = name.replace(f"attention.{new}_proj", f"attention.attention.{old}")
            name = name.replace("attention.o_proj", "attention.output.dense")
        if age == "oldest":
            name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        swapped[name] = value
    return swapped


@pytest.mark.parametrize("naming", ["today", "hub"])
@pytest.mark.parametrize("name", MODELS)
def test_hugging_faces_models_give_timms_features(name: str, naming: str) -> None:
    transformers = pytest.importorskip("transformers")
    options, build, prefix = MODELS[name]
    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(**THEIRS, **options)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    tensors = dict(theirs.state_dict())
    if naming == "hub":
        if name not in ON_THE_HUB:
            pytest.skip("it has the same names there")
        tensors = as_on_the_hub(name, tensors)
    ours = build().eval()
    read = (eva if isinstance(ours, Eva) else vision_transformer).checkpoint_filter_fn
    ours.load_state_dict(read(original_names({f"{prefix}{key}": value for key, value in tensors.items()}), ours))
    images = torch.randn(2, 3, 28, 28, generator=generator)
    with torch.no_grad():
        expected, found = theirs(pixel_values=images).last_hidden_state, ours.forward_features(images)
        if kind == "CLIPVision":  # which normalises the class token only
            expected = ours.norm(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_is_loaded_from_a_file_of_hugging_faces(tmp_path: Path) -> None:
    """Inside a training checkpoint, beside a decoder."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(**THEIRS)).eval()
    tensors = {f"module.backbone.{name}": value for name, value in theirs.state_dict().items()}
    path = tmp_path / "dinov2.pth"
    torch.save({"state_dict": {**tensors, "module.decoder.weight": torch.ones(3)}, "epoch": 7}, path)
    sizes = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    teacher = load_teacher("vit_small_patch14_dinov2", (28, 28), path, model_args=sizes)
    images = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), theirs(pixel_values=images).last_hidden_state)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "teacher.backbone.", "backbone.", "student.", "model.visual_encoder.", "_forward_module.net."],
)
def test_what_wrappers_and_other_parts_put_around_a_model_is_taken_away(prefix: str) -> None:
    model = VisionTransformer(**SIZES).state_dict()
    beside = {"decode_head.conv.weight": torch.ones(1), "text.token_embedding.weight": torch.ones(2)} if prefix else {}
    found = original_names({f"{prefix}{name}": value for name, value in model.items()} | beside)
    assert found.keys() == model.keys() and all(torch.equal(found[name], value) for name, value in model.items())


@pytest.mark.parametrize(("taken", "left"), [("teacher", "student"), ("model_ema", "model"), ("target", "online")])
def test_of_two_models_the_averaged_one_is_taken(taken: str, left: str) -> None:
    for order in ((taken, left), (left, taken)):
        tensors = {f"{of}.backbone.patch_embed.proj.weight": torch.full((1,), float(of == taken)) for of in order}
        assert original_names(tensors)["patch_embed.proj.weight"].item() == 1


def test_chunked_blocks_are_counted_through() -> None:
    """As DINOv2's trainer saves them: blocks.CHUNK.BLOCK, numbered over all chunks."""
    names = ["patch_embed.proj.weight", "blocks.0.0.norm1.weight", "blocks.1.11.attn.qkv.weight"]
    found = original_names({name: torch.zeros(1) for name in names})
    assert list(found) == ["patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.11.attn.qkv.weight"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("model.visual.trunk.patch_embed.proj.weight", "visual.trunk.patch_embed.proj.weight"),
        ("visual.trunk.patch_embed.proj.weight", "visual.trunk.patch_embed.proj.weight"),
        ("clip.visual.class_embedding", "visual.class_embedding"),
        ("class_embedding", "visual.class_embedding"),
        ("vision_encoder.patch_embed.proj.weight", "vision_encoder.patch_embed.proj.weight"),
        ("something.else", "something.else"),
    ],
)
def test_towers_that_timm_knows_keep_the_name_that_it_knows_them_by(given: str, expected: str) -> None:
    beside = given.replace("class_embedding", "conv1.weight")
    assert expected in original_names({given: torch.zeros(1), beside: torch.zeros(1)})


def test_a_head_beside_openclips_tower_is_kept() -> None:
    names = ["m.visual.trunk.patch_embed.proj.weight", "m.visual.head.proj.weight", "m.logit_scale"]
    assert set(original_names({name: torch.zeros(1) for name in names})) == {
        "visual.trunk.patch_embed.proj.weight", "visual.head.proj.weight"
    }  # fmt: skip
