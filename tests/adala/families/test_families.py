"""Every kind of backbone that has an adapter: a softmax student is its teacher, and a linear one trains."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_families import ALL, EVA, TINY, build_tiny
from torch import nn

from adala.activations import SavedActivations
from adala.attention import AttentionShell
from adala.conversion import QKV_PATTERNS, with_unpacked
from adala.export import StudentDescription, load_student, save_student
from adala.heads import build_segmentation_head, semantic_logits
from adala.optim import build_optimizer, freeze_except
from adala.stages import AttentionAlignment, FeatureAlignment
from adala.students import linearize, linearized_blocks

CORE = ["dinov3", "eva02_inner_norm", "rope_mixed", "sapiens2", "distilled", "naflex"]
SIZES = [(16, 16), (16, 32), (12, 8), (40, 24)]


def random_images(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_softmax_student_gives_what_its_teacher_does(kind: str, fused: bool) -> None:
    # timm's two ways differ by more than 1e-5 themselves in float32, and students have the fused one.
    dtype = torch.float32 if fused else torch.float64
    teacher = build_tiny(kind).to(dtype)
    for block in teacher.blocks:
        block.attn.fused_attn = fused
    student, hybrid = linearize(teacher, "softmax"), linearize(teacher, "softmax", keep=[0, 2])
    assert len(linearized_blocks(student)) == 3 and len(linearized_blocks(hybrid)) == 1
    for size in SIZES:
        images = random_images(size).to(dtype)
        expected = teacher(images)
        assert expected.shape == (2, teacher.num_prefix_tokens + size[0] * size[1] // 16, 32)
        assert torch.equal(expected, teacher.forward_features(images))
        for model in (student, hybrid):
            for mode in (True, False):
                torch.testing.assert_close(model.train(mode)(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_attention_and_positions_matter_to_these_teachers(kind: str) -> None:
    """Else a student that leaves out either would pass the tests here."""
    teacher = build_tiny(kind)
    images = random_images((16, 16))
    assert not torch.allclose(linearize(teacher, "linear").eval()(images), teacher(images), atol=1e-2)
    if getattr(teacher, "rope", None) is not None:
        expected = teacher(images)
        teacher.rope = None
        assert not torch.allclose(teacher(images), expected, atol=1e-2)


@pytest.mark.parametrize("mechanism", ["softmax", "linear"])
@pytest.mark.parametrize("kind", ALL)
def test_keys_and_weights_stay_timms(kind: str, mechanism: str) -> None:
    teacher = build_tiny(kind)
    student, expected = linearize(teacher, mechanism), teacher.state_dict()
    assert set(student.state_dict()) == set(expected)
    student.load_state_dict(expected, strict=True)
    copy.deepcopy(teacher).load_state_dict(student.state_dict(), strict=True)
    assert all(isinstance(block.attn, AttentionShell) for block in student.blocks)
    assert not any(isinstance(module, AttentionShell) for module in teacher.modules())


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_student_equal_to_its_teacher_has_no_stage_1_loss(kind: str) -> None:
    teacher = build_tiny(kind)
    for loss in ("mse", "head_output_mse_1000"):
        stage = AttentionAlignment(linearize(teacher, "softmax", keep=[1]), teacher, loss).train()
        assert stage({"image": random_images((16, 24))})["loss"].item() < 1e-8


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        *((kind, "normalized_mse") for kind in ALL),
        *((kind, loss) for kind in CORE for loss in ("head_output_mse_1000", "attention_map_cross_entropy")),
    ],
)
def test_stage_1_aligns_and_trains_projections_alone(kind: str, loss: str) -> None:
    teacher, batch = build_tiny(kind), {"image": random_images((16, 24))}
    student = linearize(teacher, "hedgehog" if loss.startswith("attention") else "linear")
    trained = set(freeze_except(student, with_unpacked(QKV_PATTERNS)))
    expected = {f"blocks.{i}.attn.{name}" for i in range(3) for name in projections(student.blocks[i].attn)}
    assert {name for name in trained if "token_mixer" not in name} == expected
    stage = AttentionAlignment(student, teacher, loss).train()
    stage.calibrate([batch])
    first = train(stage, batch)
    # The entropy of the teacher's maps stays.
    assert train(stage, batch, steps=20) < (0.99 if loss.startswith("attention") else 0.9) * first


def projections(attention: nn.Module) -> set[str]:
    names = ("qkv.weight", "qkv.bias", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias")
    return {name for name, _ in attention.named_parameters() if name.startswith(names)}


def train(stage: nn.Module, batch: dict[str, torch.Tensor], steps: int = 1) -> float:
    """The loss before the last of some steps; every gradient of every one is finite, and none of them missing."""
    optimizer = build_optimizer(stage, 3e-3, 0.0, (0.9, 0.99))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = stage(batch)["loss"]
        loss.backward()
        for name, parameter in stage.named_parameters():
            # The values and what comes after them do not enter maps of attention, nor do unused parts.
            if parameter.requires_grad and parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
        optimizer.step()
    assert loss.isfinite()
    return loss.item()


@pytest.mark.parametrize("kind", ALL)
def test_stage_2_trains_the_whole_student(kind: str) -> None:
    teacher, batch = build_tiny(kind), {"image": random_images((16, 24))}
    student = linearize(teacher, "linear", keep=[1])
    stage = FeatureAlignment(student, teacher, "mse").train()
    stage(batch)["loss"].backward()
    missing = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert missing == set()
    gradients = [p.grad for p in student.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().max() > 0 for gradient in gradients) > 0.9 * len(gradients)
    before = stage(batch)["loss"].item()
    assert train(stage, batch, steps=20) < 0.9 * before


@pytest.mark.parametrize("kind", ALL)
def test_several_sizes_before_one_backward_pass_under_checkpointing(kind: str) -> None:
    teacher, gradients, held = build_tiny(kind), {}, {}
    # Two grids with as many tokens as each other among them.
    sizes = [(8, 32), (32, 8), (16, 16), (8, 32)]
    for checkpointing in (False, True):
        student = linearize(teacher, "monarch", keep=[1])
        student.set_grad_checkpointing(checkpointing)
        # timm's own switch would have the blocks computed again around those that do it themselves.
        assert student.grad_checkpointing == (checkpointing and isinstance(student, VisionTransformer))
        with SavedActivations(student.parameters()) as saved:
            loss = sum(student(random_images(size)).square().mean() for size in sizes)
        loss.backward()
        held[checkpointing] = saved.peak_bytes
        gradients[checkpointing] = {name: p.grad for name, p in student.named_parameters()}
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, msg=name)
    assert held[True] < 0.7 * held[False]


@pytest.mark.parametrize("kind", ALL)
def test_a_student_set_to_another_size_is_the_student_of_a_teacher_of_that_size(kind: str) -> None:
    size = (16, 32)
    student = linearize(build_tiny(kind), "monarch", keep=[0]).eval()
    student.set_input_size(img_size=size)
    expected = linearize(build_tiny(kind, size), "monarch", keep=[0]).eval()
    expected.load_state_dict(student.state_dict())
    assert student.blocks[1].attn.token_mixer.shape == expected.blocks[1].attn.token_mixer.shape
    images = random_images(size)
    assert torch.equal(student(images), expected(images))
    with pytest.raises(ValueError, match="image size 18 x 16 is not divisible by the patch size 4 x 4"):
        student.set_input_size((18, 16))


@pytest.mark.parametrize("kind", ALL)
def test_intermediate_features_know_the_layout_too(kind: str) -> None:
    student = linearize(build_tiny(kind), "monarch", keep=[1]).eval()
    for size in ((8, 32), (32, 8)):
        images = random_images(size)
        final, intermediates = student.forward_intermediates(images, norm=True, output_fmt="NLC")
        assert torch.equal(final, student(images))
        assert torch.equal(intermediates[-1], final[:, student.num_prefix_tokens :])
    with pytest.raises(ValueError, match="masked or causal attention"):
        student.forward_features(images, attn_mask=torch.ones(17, 17))


@pytest.mark.parametrize("kind", ALL)
def test_an_exported_student_comes_back(kind: str, tmp_path) -> None:
    name, arguments = ALL[kind]
    model_args = {**TINY, **arguments}
    student = linearize(build_tiny(kind), "linear", keep=[2]).eval()
    description = StudentDescription(name, model_args, [16, 16], "linear", {}, [2], [0.5] * 3, [0.5] * 3)
    save_student(tmp_path, student.state_dict(), description)
    for size in ((16, 16), (16, 24)):
        assert torch.equal(load_student(tmp_path)(random_images(size)), student(random_images(size)))


@pytest.mark.parametrize("kind", CORE)
def test_torch_compile_follows_the_image_size(kind: str) -> None:
    student = linearize(build_tiny(kind), "linear").eval()
    compiled = torch.compile(copy.deepcopy(student), backend="eager", dynamic=False)
    for size in ((16, 16), (12, 20), (16, 16)):
        torch.testing.assert_close(compiled(random_images(size)), student(random_images(size)))


@pytest.mark.parametrize("kind", ALL)
def test_timms_own_models_are_linearized_with_their_heads_on(kind: str) -> None:
    """As a user has them from timm, for one image size."""
    name, arguments = ALL[kind]
    size = {} if kind.startswith(("naflex", "radio")) else {"img_size": 16}
    model = timm.create_model(name, num_classes=7, **{**size, **TINY, **arguments})
    images = random_images((16, 16))
    student = linearize(model.eval(), "softmax").eval()
    assert student(images).shape == (2, 7)
    torch.testing.assert_close(student(images), model(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="linearized already"):
        linearize(student)


@pytest.mark.parametrize("head", ["linear", "pmt"])
@pytest.mark.parametrize("kind", [*CORE, "no_prefix"])
def test_heads_of_segmentation_read_the_features_of_every_family(kind: str, head: str) -> None:
    student = linearize(build_tiny(kind), "linear").eval()
    images = random_images((16, 24))
    module = build_segmentation_head(head, student, 5).eval()
    prediction = module(student(images), student.token_layout(images))
    logits = semantic_logits(prediction, (16, 24))
    assert logits.shape == (2, 5, 16, 24)
    logits.square().mean().backward()
    assert student.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", CORE)
def test_a_teacher_that_computes_activations_again_has_a_student_that_does(kind: str) -> None:
    teacher = build_tiny(kind)
    teacher.set_grad_checkpointing(True)
    assert all(block.grad_checkpointing for block in linearize(teacher, "linear").blocks)


def test_every_kind_of_eva_is_of_its_family() -> None:
    assert all(type(build_tiny(kind)).__name__ == "Eva" for kind in EVA)
