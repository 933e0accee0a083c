"""Students under Hugging Face's transformers: saved, loaded, and as the backbone of three of its models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import adala
from adala.export import StudentDescription, load_student, read_description, save_student
from adala.export.huggingface import AdalaBackbone, AdalaConfig, AdalaModel
from adala.students import linearize

SIZE = (32, 32)
NAME, MODEL_ARGS = "vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
IMAGES = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def export_student(folder: Path, mechanism: str = "linear", name: str = NAME, **changes) -> Path:
    from adala.backbones import build_backbone

    arguments = {**MODEL_ARGS, **changes}
    torch.manual_seed(0)
    student = linearize(build_backbone(name, SIZE, arguments), mechanism, keep=[1])
    description = StudentDescription(name, arguments, list(SIZE), mechanism, {}, [1], [0.5] * 3, [0.25] * 3)
    save_student(folder, student.state_dict(), description)
    return folder


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def folder(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (student_folder / "finished.json").write_text(json.dumps({"metrics": {"patch_cosine": 0.9876543}}))
    out = tmp_path_factory.mktemp("hub") / "my-student"
    done = adala.export(student_folder, out, to="hf", licence="apache-2.0")
    assert done.agreement.worst_cosine > 0.9999 and done.output == "features"
    return out


def test_the_features_are_the_students(student_folder: Path, folder: Path) -> None:
    student = load_student(student_folder)
    for load in (transformers.AutoModel, AdalaModel):
        model = load.from_pretrained(str(folder)).eval()
        with torch.no_grad():
            for images in (IMAGES, torch.randn(1, 3, 24, 48)):
                expected, found = student(images), model(images)
                assert torch.equal(found.last_hidden_state, expected)
                assert torch.equal(found.pooler_output, expected[:, 0])
                assert torch.equal(model(images, return_dict=False)[0], expected)


def test_feature_maps_are_those_of_the_blocks(student_folder: Path, folder: Path) -> None:
    student = load_student(student_folder)
    backbone = AdalaBackbone.from_pretrained(str(folder), out_indices=[0, 2, 4]).eval()
    assert backbone.out_features == ["stem", "stage2", "stage4"] and backbone.channels == [32, 32, 32]
    images = torch.randn(2, 3, 24, 48)
    with torch.no_grad():
        found = backbone(images, output_hidden_states=True)
        features, second = student(images), student.forward_intermediates(images, indices=[1], norm=True)[1][0]
    assert [tuple(each.shape) for each in found.feature_maps] == [(2, 32, 6, 12)] * 3
    torch.testing.assert_close(found.feature_maps[2].flatten(2).transpose(1, 2), features[:, 1:])
    torch.testing.assert_close(found.feature_maps[1], second)
    assert [tuple(each.shape) for each in found.hidden_states] == [(2, 73, 32)] * 5
    torch.testing.assert_close(student.norm(found.hidden_states[4]), features)
    backbone.config.reshape_hidden_states = backbone.config.apply_layernorm = False
    with torch.no_grad():
        maps = backbone(images, return_dict=False)[0]
    assert all(torch.equal(tokens, found.hidden_states[i]) for tokens, i in zip(maps, (0, 2, 4), strict=True))


def small_config(folder: Path, indices: list[int]) -> AdalaConfig:
    config = transformers.AutoConfig.from_pretrained(str(folder))
    config.out_indices = indices
    return config


def build_dpt(config: AdalaConfig):
    return transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            backbone_config=config, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
            is_hybrid=False,
        )
    )  # fmt: skip


def build_upernet(config: AdalaConfig):
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=config, hidden_size=8, pool_scales=[1, 2], num_labels=3, auxiliary_in_channels=32,
            auxiliary_channels=8,
        )
    )  # fmt: skip


def build_mask2former(config: AdalaConfig):
    return transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(
            backbone_config=config, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
            dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=4, num_labels=3,
            feature_strides=[4, 4, 4, 4],
        )
    )  # fmt: skip


BUILDERS = {"dpt": build_dpt, "upernet": build_upernet, "mask2former": build_mask2former}


@pytest.mark.parametrize("head", BUILDERS)
def test_it_is_a_backbone_of_transformers_models(folder: Path, head: str) -> None:
    """Forward and backward, over the very weights of the folder."""
    config = small_config(folder, [1, 2, 3, 4])
    config.reshape_hidden_states = head != "dpt"  # which wants tokens, the class token first
    model = BUILDERS[head](config)
    owner = model.model.pixel_level_module if head == "mask2former" else model
    slot = "encoder" if head == "mask2former" else "backbone"
    assert type(getattr(owner, slot)) is AdalaBackbone
    setattr(owner, slot, AdalaBackbone.from_pretrained(str(folder), config=config))
    outputs = model.train()(IMAGES)
    predicted = {"dpt": "predicted_depth", "upernet": "logits", "mask2former": "masks_queries_logits"}[head]
    value = getattr(outputs, predicted)
    assert value.isfinite().all() and value.shape[0] == 2
    value.square().mean().backward()
    gradient = getattr(owner, slot).student.blocks[0].attn.qkv.weight.grad
    assert gradient.isfinite().all() and gradient.any()


def test_tables_that_are_computed_and_not_saved_survive(tmp_path: Path) -> None:
    """transformers fills models on the meta device with what is in the file, and leaves the rest to them."""
    folder = export_student(tmp_path / "student", "cosformer")
    adala.export(folder, tmp_path / "hub", to="hf")
    student = load_student(folder)
    computed = {name: buffer.clone() for name, buffer in student.named_buffers()}
    model = AdalaModel.from_pretrained(str(tmp_path / "hub"))
    for name, buffer in model.student.named_buffers():
        assert torch.equal(buffer, computed[name]), name
    with torch.no_grad():
        assert torch.equal(model(IMAGES).last_hidden_state, student(IMAGES))


def test_blocks_of_several_mechanisms_come_along(tmp_path: Path) -> None:
    folder = export_student(tmp_path / "student")
    described = json.loads((folder / "model.json").read_text())
    described |= {"block_mechanisms": {"2": "window"}, "block_mechanism_options": {"window": {"window": 2}}}
    (folder / "model.json").write_text(json.dumps(described))
    adala.export(folder, tmp_path / "hub", to="hf")
    model = AdalaModel.from_pretrained(str(tmp_path / "hub"))
    assert (
        "window=2" in repr(model.student.blocks[2].attn)
        and "kept softmax: 1;" in (tmp_path / "hub/README.md").read_text()
    )
    with torch.no_grad():
        assert torch.equal(model(IMAGES).last_hidden_state, load_student(folder)(IMAGES))
    assert model.config.description == read_description(folder)


def test_autobackbone_finds_it_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it asks whether a repository of this name exists; a folder it does not look for."""
    answering = SimpleNamespace(repo_exists=lambda name: True)
    monkeypatch.setattr("transformers.models.auto.auto_factory.hf_api", lambda: answering)
    backbone = transformers.AutoBackbone.from_pretrained(str(folder), out_features=["stage1", "stage4"])
    assert type(backbone) is AdalaBackbone and backbone.out_indices == [1, 4]
    assert len(backbone(IMAGES).feature_maps) == 2


def test_saved_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    model = AdalaModel.from_pretrained(str(folder))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = transformers.AutoModel.from_pretrained(str(tmp_path))(IMAGES).last_hidden_state
        assert torch.equal(again, model(IMAGES).last_hidden_state)


def test_gradient_checkpointing_is_the_students(folder: Path) -> None:
    model = AdalaModel.from_pretrained(str(folder))
    model.gradient_checkpointing_enable()
    assert model.student.blocks[0].grad_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.student.blocks[0].grad_checkpointing


def test_the_folder_says_what_it_is(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nlicense: apache-2.0\n")
    assert "`vit_tiny_patch16_224`" in card and "`linear`" in card and "| patch_cosine | 0.987654 |" in card
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["size"]) == ([0.5] * 3, {"height": 32, "width": 32})
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "adala" and config["auto_map"]["AutoBackbone"] == "modeling_adala.AdalaBackbone"


def test_trust_remote_code_finds_the_classes(folder: Path) -> None:
    """In a process that has not imported this package; without it, one sentence says what to install."""
    program = (
        "import sys; from transformers import AutoModel; {block}"
        f"print(type(AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)).__module__)"
    )
    hub = {"HF_HOME": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **hub}
    found = subprocess.run(
        [sys.executable, "-c", program.format(block="")], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().splitlines()[-1] == "adala.export.huggingface"
    missing = subprocess.run(
        [sys.executable, "-c", program.format(block="sys.modules['adala.export.huggingface'] = None; ")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert missing.returncode != 0 and "pip install 'adala[hf]'" in missing.stderr


def test_nothing_is_written_over(folder: Path, student_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already: name a folder"):
        adala.export(student_folder, folder, to="hf")
    with pytest.raises(ValueError, match="holds no exported student"):
        adala.export(tmp_path, tmp_path / "out", to="hf")
    with pytest.raises(ValueError, match="to hf goes the folder of an exported student"):
        adala.export(load_student(student_folder), tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_a_configuration_without_a_student_says_so() -> None:
    with pytest.raises(ValueError, match="AdalaConfig: student is missing"):
        AdalaModel(AdalaConfig())


def test_another_size_is_the_models_own_from_then_on(student_folder: Path, tmp_path: Path) -> None:
    done = adala.export(student_folder, tmp_path / "hub", to="hf", size=(24, 40))
    model = AdalaModel.from_pretrained(str(tmp_path / "hub"))
    assert model.config.image_size == [24, 40] and done.image_size == (24, 40)
    assert tuple(model.student.patch_embed.grid_size) == (6, 10)
    assert json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())["size"]["width"] == 40
