"""The recipes in the package: each names a ViT that timm can build, and sizes that fit it."""

import pytest
import timm

from adala.backbones import build_backbone
from adala.config import RECIPE_FOLDER, load_recipe
from adala.ds_config import load_ds_config

NAMES = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def test_all_families_have_a_recipe() -> None:
    assert set(NAMES) >= {
        "tiny", "dinov2_small", "dinov2_base", "dinov2_large", "clip_large", "siglip_large", "vit_large_in1k",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_teacher(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.teacher.pretrained:
        assert timm.get_pretrained_cfg(recipe.teacher.name).has_weights
    shallow = {**recipe.teacher.model_args, "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = build_backbone(recipe.teacher.name, recipe.data.image_size, shallow)
    assert model.num_prefix_tokens == (0 if "siglip" in name else 1)
    assert load_ds_config(recipe.ds_config).zero_stage == 1
    for number in (1, 2, 3):
        assert recipe.stage(number).warmup_steps < recipe.stage(number).steps
