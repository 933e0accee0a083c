"""Teachers of every family, from files and folders too; no weights are fetched."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_run import write_tiny_recipe
from tiny_teacher import TINY_ARGS, build_tiny_teacher

from adala.backbones import build_backbone, load_teacher
from adala.config import load_recipe
from adala.export import load_student, save_student
from adala.plan import resolve_run
from adala.students import linearize

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


# Modules of timm with models that are VisionTransformers, with a distillation token or without.
MODULES = ["vision_transformer", "deit", "vision_transformer_hybrid", "vitamin"]
IN_THE_WAY = {
    "patch_embed is a HybridEmbed": 27,
    "blocks.0 is a ParallelThingsBlock": 2,
    "blocks.0 is a ResPostBlock": 1,
    "blocks.0 is a ParallelScalingBlock": 4,
    "blocks.0 is a DiffParallelScalingBlock": 1,
    "blocks.0.attn is a DiffAttention": 2,
}


def test_every_plain_vit_of_timm_runs_and_every_other_is_refused_by_what_is_in_the_way() -> None:
    """One block of each, 32 wide where it is accepted."""
    refused, accepted = dict.fromkeys(IN_THE_WAY, 0), 0
    for name in timm.list_models(module=MODULES):
        patch = 14 if "patch14" in name else 32
        try:
            with torch.device("meta"):
                build_backbone(name, [8 * patch, 8 * patch], {"depth": 1})
        except ValueError as error:
            matches = [reason for reason in IN_THE_WAY if reason in str(error)]
            assert len(matches) == 1, error
            refused[matches[0]] += 1
        else:
            check_it_runs(name, patch)
            accepted += 1
    assert refused == IN_THE_WAY
    assert accepted == 169


def check_it_runs(name: str, patch: int) -> None:
    teacher = build_backbone(name, [2 * patch, 2 * patch], {"depth": 1, "embed_dim": 32, "num_heads": 2}).eval()
    height, width = teacher.patch_embed.patch_size
    linear, softmax = (linearize(teacher, mechanism).eval() for mechanism in ("linear", "softmax"))
    for size in (teacher.patch_embed.img_size, (3 * height, 2 * width)):
        images = torch.randn(2, 3, *size)
        features = teacher(images)
        tokens = teacher.num_prefix_tokens + (size[0] // height) * (size[1] // width)
        assert features.shape == linear(images).shape == (2, tokens, 32), name
        assert torch.equal(features, teacher.forward_features(images)), name
        assert torch.equal(features, softmax(images)), name


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_embed": "none"}, {"no_embed_class": True, "reg_tokens": 4}, {"pre_norm": True}, {"global_pool": "avg"},
        {"global_pool": "map"}, {"dynamic_img_pad": True}, {"final_norm": False}, {"patch_size": [4, 4]},
        {"patch_size": None},
    ],
    ids=str,
)  # fmt: skip
def test_variants_give_what_forward_features_does(changes: dict) -> None:
    teacher = build_backbone("vit_tiny_patch16_224", [16, 16], {**TINY_ARGS, **changes}).eval()
    student = linearize(teacher, "softmax").eval()
    for size in ((16, 16), (16, 32)):
        images = torch.randn(2, 3, *size)
        assert torch.equal(teacher(images), teacher.forward_features(images))
        assert torch.equal(student(images), teacher(images))


def test_the_norm_of_models_that_pool_first_comes_after_the_blocks(tmp_path: Path) -> None:
    """timm calls it fc_norm there, and applies it to the pooled token alone."""
    source = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, global_pool="avg", num_classes=0, **TINY_ARGS
    ).eval()
    torch.nn.init.normal_(source.fc_norm.weight)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    arguments = {**TINY_ARGS, "global_pool": "avg"}
    teacher = load_teacher("vit_tiny_patch16_224", [16, 16], tmp_path / "weights.safetensors", model_args=arguments)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher.forward_features(images), source.fc_norm(source.forward_features(images)))
    assert torch.equal(teacher(images), teacher.forward_features(images))
    again = load_teacher("vit_tiny_patch16_224", [16, 16], tmp_path / "weights.safetensors", model_args=TINY_ARGS)
    assert torch.equal(again(images), teacher(images))


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"patch_size": "14"}, "model_args.patch_size is '14'"),
        ({"depth": -1}, "model_args.depth is -1"),
        ({"num_heads": 3}, "num_heads=3 in model_args .*divisible"),
        ({"num_heads": -2}, "model_args.num_heads is -2"),
        ({"in_chans": 1}, "model_args.in_chans is 1: images are read as RGB"),
        ({"img_size": 16}, "model_args.img_size cannot be set"),
        ({"num_classes": 10}, "model_args.num_classes cannot be set"),
        ({"features_only": True}, "model_args.features_only cannot be set"),
        ({"dynamic_img_size": False}, "model_args.dynamic_img_size cannot be set"),
        ({"global_pool": "sum"}, "global_pool='sum' in model_args"),
        ({"embed_dims": 32}, "no argument of timm's VisionTransformer: did you mean embed_dim"),
        ({"cache_dir": "x"}, "model_args.cache_dir is no argument"),
        ({"drop_path_rate": 2}, "model_args.drop_path_rate is 2"),
        ({"act_layer": "nonsense"}, "act_layer='nonsense' in model_args .*KeyError"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4' in model_args .*TypeError"),
        ({"reg_tokens": -1}, "reg_tokens=-1 in model_args .*RuntimeError"),
        ({"pos_embed": "rope"}, "pos_embed='rope' in model_args .*AssertionError"),
        ({"patch_drop_rate": 0.5}, "vit_tiny_patch16_224: patch_drop"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_sentence(model_args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        build_backbone("vit_tiny_patch16_224", [16, 16], {**TINY_ARGS, **model_args})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch14_dinov2", "did you mean vit_small_patch14_dinov2"),
        ("vit_small_patch14_dinov2.lvd142", "knows no weights 'lvd142' of vit_small_patch14_dinov2: it has lvd142m"),
        ("timm/vit_small_patch14_dinov2", "with local-dir: before it"),
        ("torchhub:facebook/dino", "local-dir:FOLDER or hf-hub:ORGANISATION/NAME"),
        ("hf-hub:", "is no name of a model"),
        ("local-dir:/nowhere", "/nowhere/config.json does not exist"),
    ],
)
def test_names_that_lead_nowhere_say_what_may_be_meant(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(name, [112, 112])


@pytest.fixture
def saved_by_timm(tmp_path: Path) -> Path:
    """A folder with a space in its name, as timm itself writes it; with a head, and a mean of its own."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=5, **TINY_ARGS)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    folder = tmp_path / "my teacher"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm.models.save_for_hf(model, folder, safe_serialization="both")
    return folder


def test_a_folder_that_timm_saved_is_a_teacher(saved_by_timm: Path, tmp_path: Path, monkeypatch) -> None:
    plain = load_teacher("vit_tiny_patch16_224", [16, 16], saved_by_timm / "model.safetensors", model_args=TINY_ARGS)
    images = torch.randn(2, 3, 16, 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (saved_by_timm, "my teacher", "~/my teacher"):
        assert torch.equal(load_teacher(f"local-dir:{path}", [16, 16], pretrained=True)(images), plain(images))
    (saved_by_timm / "model.safetensors").unlink()
    assert torch.equal(load_teacher(f"local-dir:{path}", [16, 16], pretrained=True)(images), plain(images))
    (saved_by_timm / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"my teacher holds no weights: there is neither model.safetensors nor"):
        load_teacher(f"local-dir:{path}", [16, 16], pretrained=True)


def test_a_student_of_a_saved_teacher_needs_its_folder_no_more(saved_by_timm: Path, tmp_path: Path) -> None:
    def plan(folder: Path):
        teacher = {"name": f"local-dir:{folder}", "pretrained": True}
        return resolve_run(load_recipe(str(write_tiny_recipe(tmp_path, teacher=teacher))), (1,))

    first = plan(saved_by_timm)
    assert first.model.student.backbone == "vit_tiny_patch16_224"
    assert first.model.student.mean == [0.1, 0.2, 0.3]
    assert {key: first.model.student.model_args[key] for key in TINY_ARGS} == TINY_ARGS
    moved = saved_by_timm.rename(tmp_path / "moved")
    assert plan(moved).stages[0].conditions == first.stages[0].conditions
    student = linearize(load_teacher(f"local-dir:{moved}", [16, 16], pretrained=True)).eval()
    save_student(tmp_path / "student", student.state_dict(), first.model.student)
    (moved / "config.json").unlink()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_student(tmp_path / "student")(images), student(images))


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"architecture": 3}', '{"architecture": "vit_nonsense"}', "\xff"]
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config.json does not describe a model of timm's|timm knows no model"):
        build_backbone(f"local-dir:{tmp_path}", [16, 16])


def hub_error(name: str, tmp_path: Path, **environment: str) -> str:
    """What loading ``name`` with its weights says in a process of its own, with an empty cache of the hub."""
    code = f"from adala.backbones import load_teacher; load_teacher({name!r}, [224, 224], pretrained=True)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[2], text=True, capture_output=True,
        env={**os.environ, "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), **environment}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "hub cannot be reached: bring a file .* teacher.checkpoint"),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", "hub cannot be reached: bring a file .* teacher.checkpoint"),
        ("vit_base_patch32_plus_256", "timm has no pretrained weights of vit_base_patch32_plus_256: bring a file"),
    ],
)
def test_weights_out_of_reach_are_one_sentence(name: str, message: str, tmp_path: Path) -> None:
    error = hub_error(name, tmp_path, HF_HUB_OFFLINE="1")
    assert error.startswith("ValueError: ")
    assert re.search(message, error), error


def test_a_repository_in_the_cache_is_a_teacher(saved_by_timm: Path, tmp_path: Path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (repository / "snapshots").mkdir()
    saved_by_timm.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    teacher = {"name": "hf-hub:someone/tiny", "pretrained": True}
    plan = resolve_run(load_recipe(str(write_tiny_recipe(tmp_path, teacher=teacher))), (1,))
    assert plan.model.teacher.name == "hf-hub:someone/tiny"
    assert plan.model.teacher.digest.startswith("sha256:")
    assert plan.model.student.backbone == "vit_tiny_patch16_224"
    weights = load_file(repository / "snapshots" / ("0" * 40) / "model.safetensors")
    loaded = load_teacher("hf-hub:someone/tiny", [16, 16], pretrained=True)
    assert torch.equal(loaded.cls_token, weights["cls_token"])


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
