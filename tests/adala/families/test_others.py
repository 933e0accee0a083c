"""What the other families have of their own, and what is refused, with its reason."""

import sys
import types

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_families import OTHERS, TINY, build_tiny
from torch import nn

from adala.attention import TokenLayout
from adala.backbones import build_backbone, load_teacher
from adala.families import Family, families, family_of, family_of_name
from adala.students import linearize


def random_images(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def test_a_distilled_teacher_gives_both_its_prefix_tokens() -> None:
    """timm's averages class and distillation token, heads or no heads."""
    teacher = build_tiny("distilled")
    assert (teacher.num_prefix_tokens, teacher.has_class_token) == (2, True)
    assert teacher(random_images((16, 16))).shape == (2, 18, 32)
    plain = timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, num_classes=0, **TINY).eval()
    plain.load_state_dict(teacher.state_dict())
    features = teacher(random_images((16, 16)))
    torch.testing.assert_close(plain(random_images((16, 16))), features[:, :2].mean(1))


@pytest.mark.parametrize("kind", OTHERS)
def test_files_with_heads_and_of_another_size(kind: str, tmp_path) -> None:
    source, (name, arguments), path = build_tiny(kind), OTHERS[kind], tmp_path / "weights.safetensors"
    heads = {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10), "head_dist.weight": torch.zeros(10, 32)}
    save_file({**source.state_dict(), **heads}, path)
    images = random_images((16, 16))
    same = load_teacher(name, [16, 16], path, model_args={**TINY, **arguments})
    assert torch.equal(same(images), source(images))
    larger = load_teacher(name, [24, 32], path, model_args={**TINY, **arguments})
    if kind == "distilled":
        assert larger.pos_embed.shape == (1, 48 + 2, 32)
    assert torch.equal(larger.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_a_naflexvit_reads_the_weights_of_a_plain_vit(tmp_path) -> None:
    arguments = {**TINY, "no_embed_class": True, "reg_tokens": 4, "init_values": 1.0}
    plain = build_backbone("vit_tiny_patch16_224", [16, 16], arguments).eval()
    nn.init.normal_(plain.pos_embed)
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_teacher(
        "naflexvit_base_patch16_gap", [16, 16], tmp_path / "weights.safetensors",
        model_args={**TINY, "class_token": True, "pos_embed_grid_size": (4, 4)},
    )  # fmt: skip
    images = random_images((16, 16))
    torch.testing.assert_close(teacher(images), plain(images), rtol=1e-4, atol=1e-5)


def test_a_linearized_naflexvit_takes_images_alone() -> None:
    student = linearize(build_tiny("naflex"), "linear")
    batch = {"patches": torch.randn(1, 4, 48), "patch_coord": torch.zeros(1, 4, 2), "patch_valid": torch.ones(1, 4)}
    for given in (batch, torch.randn(1, 4, 48)):
        with pytest.raises(ValueError, match=r"takes images .*: batches of patches come with a mask"):
            student(given)
    with pytest.raises(ValueError, match="the patch size of a NaFlexVit cannot change"):
        student.set_input_size(patch_size=8)
    student.set_input_size(patch_size=4)


def test_a_naflexvit_of_timms_is_sized_by_its_position_embedding() -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", pos_embed_grid_size=(4, 6), **TINY)
    student = linearize(model, "linformer", options={"num_landmarks": 4}).eval()
    assert student.blocks[0].attn.token_mixer.shape.layout == TokenLayout((4, 6), 4)
    assert student.patch_embed.img_size == (16, 24)
    student(random_images((16, 24)))


def test_a_naflexvit_with_rotary_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0 is a EvaBlock; only timm's plain Block is supported"):
        build_backbone("naflexvit_base_patch16_gap", [16, 16], {**TINY, "rope_type": "axial"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beit_base_patch16_224", "beit_base_patch16_224: Beit is not supported: .*relative_position_bias_table"),
        ("samvit_base_patch16", "samvit_base_patch16: VisionTransformerSAM is not supported: .*rel_pos_h, rel_pos_w"),
    ],
)
def test_relative_positions_are_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(name, [224, 224])
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=message.partition(": ")[2]):
        linearize(model)


class Narrow(timm.models.vision_transformer.VisionTransformer):
    """Somebody's own, of which nothing is known."""


def test_a_class_derived_from_a_known_one_is_another_model() -> None:
    with pytest.raises(ValueError, match="the model is a Narrow; only timm's plain VisionTransformer is supported"):
        family_of(Narrow(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2))


def test_a_family_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    own = type("NarrowFamily", (type(families()[0]),), {"model_class": Narrow, "modules": ("resnet",)})
    module = types.ModuleType("narrow_package")
    module.NarrowFamily = own
    monkeypatch.setitem(sys.modules, "narrow_package", module)
    monkeypatch.setattr("adala.plugins.entry_points", lambda group: [Point] if group == "adala.families" else [])
    families.cache_clear()
    try:
        assert [family.name for family in families()][-1] == "Narrow"
        assert family_of_name("resnet18").name == "Narrow"
        model = Narrow(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0, global_pool="")
        assert isinstance(family_of(model), Family)
        assert linearize(model)(random_images((16, 16))).shape == (2, 17, 32)
    finally:
        families.cache_clear()


class Point:
    """What importlib.metadata gives of an installed entry point."""

    name, value = "Narrow", "narrow_package:NarrowFamily"
