"""Teachers of every family, from checkpoints too; no weights are fetched."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_teacher import TINY_ARGS, build_tiny_teacher

from adala.backbones import load_teacher

FAMILIES = {
    "vit_small_patch14_dinov2.lvd142m": 1,
    "vit_small_patch14_reg4_dinov2.lvd142m": 5,
    "vit_base_patch16_clip_224.openai": 1,
    "vit_base_patch16_siglip_224.webli": 0,
    "vit_small_patch16_224.augreg_in21k_ft_in1k": 1,
}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(("name", "prefix"), FAMILIES.items(), ids=FAMILIES)
def test_families_give_the_features_of_all_tokens(name: str, prefix: int) -> None:
    teacher = load_teacher(name, [112, 112], model_args=SMALL)
    patch = teacher.patch_embed.patch_size[0]
    assert teacher.num_prefix_tokens == prefix
    assert teacher(torch.randn(2, 3, 112, 112)).shape == (2, (112 // patch) ** 2 + prefix, 32)
    assert teacher(torch.randn(1, 3, 112, 224)).shape[1] == 2 * (112 // patch) ** 2 + prefix
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_checkpoint_with_a_head_and_another_resolution(tmp_path, suffix: str) -> None:
    source = build_tiny_teacher()
    state = {**source.state_dict(), "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    images = torch.randn(2, 3, 16, 16)
    same = load_teacher("vit_tiny_patch16_224", [16, 16], checkpoint=path, model_args=TINY_ARGS)
    assert torch.equal(same(images), source(images))
    larger = load_teacher("vit_tiny_patch16_224", [24, 32], checkpoint=path, model_args=TINY_ARGS)
    assert larger.pos_embed.shape[1] == 6 * 8 + 1


def test_a_checkpoint_for_another_architecture_is_refused(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(build_tiny_teacher(embed_dim=64).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"for another architecture than .*cls_token is \(1, 1, 64\), not \(1, 1, 32\)"
    ):
        load_teacher("vit_tiny_patch16_224", [16, 16], checkpoint=path, model_args=TINY_ARGS)
    save_file(build_tiny_teacher(depth=2).state_dict(), path)
    with pytest.raises(ValueError, match=r"blocks\.2\.norm1\.weight is missing"):
        load_teacher("vit_tiny_patch16_224", [16, 16], checkpoint=path, model_args=TINY_ARGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_nonsense"}, "timm knows no model 'vit_nonsense'"),
        ({"name": "resnet18"}, "not a plain timm ViT"),
        ({"image_size": [100, 112]}, "100 x 112 is not divisible by the patch size 14 x 14: 98 x 112 would be"),
        ({"checkpoint": "nowhere.pth"}, "checkpoint nowhere.pth does not exist"),
    ],
    ids=["unknown", "no_vit", "image_size", "no_file"],
)
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    defaults = {"name": "vit_small_patch14_dinov2", "image_size": [112, 112], "model_args": SMALL}
    with pytest.raises(ValueError, match=message):
        load_teacher(**(defaults | arguments))
