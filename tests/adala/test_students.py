"""Teacher to student: names, values, layouts, hybrids, refusals."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.layers import Attention
from tiny_teacher import build_tiny_teacher

from adala.attention import AttentionShell, TokenLayout
from adala.students import linearize, linearized_blocks

LAYOUTS = {
    "no_prefix": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "class_token": {},
    "class_token_and_registers": {"reg_tokens": 4},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_a_softmax_student_equals_its_teacher_to_the_bit(changes, images) -> None:
    teacher = build_tiny_teacher(**changes)
    student = linearize(teacher, "softmax").eval()
    assert len(linearized_blocks(student)) == 3
    assert torch.equal(student(images), teacher(images))


@pytest.mark.parametrize("mechanism", ["softmax", "linear"])
def test_keys_and_weights_stay_timms(teacher, mechanism: str) -> None:
    student = linearize(teacher, mechanism)
    expected = teacher.state_dict()
    assert set(student.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in student.state_dict().items())
    student.load_state_dict(expected, strict=True)
    copy.deepcopy(teacher).load_state_dict(student.state_dict(), strict=True)


def test_the_teacher_is_left_alone(teacher, images) -> None:
    before = teacher(images)
    student = linearize(teacher, "linear")
    with torch.no_grad():
        student.blocks[0].attn.qkv.weight.zero_()
    assert torch.equal(teacher(images), before)
    assert all(type(block.attn) is Attention for block in teacher.blocks)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_kept_blocks_stay_timms_softmax(teacher, images) -> None:
    student = linearize(teacher, "linear", keep=[0, 2])
    assert [type(block.attn) for block in student.blocks] == [Attention, AttentionShell, Attention]
    assert torch.equal(linearize(teacher, "linear", keep=[0, 1, 2]).eval()(images), teacher(images))
    assert not torch.allclose(student.eval()(images), teacher(images), atol=1e-3)


def test_single_blocks_have_other_mechanisms_with_options_of_their_own(teacher, images) -> None:
    options = {"window": {"window": 2}}
    student = linearize(teacher, "linear", [0], {"den_added": 0.5}, 0, {1: "window"}, options).eval()
    assert type(student.blocks[0].attn) is Attention
    mixers = [shell.token_mixer for shell in linearized_blocks(student).values()]
    assert [repr(mixer.options) for mixer in mixers] == [
        "WindowOptions(window=2, summary=0, stripes=False)",
        "LinearOptions(den_added=0.5)",
    ]
    for block in (1, 2):
        whole = linearize(
            teacher, "window" if block == 1 else "linear", (), (options["window"], {"den_added": 0.5})[block - 1]
        )
        x = torch.randn(2, 17, 32)
        assert torch.equal(student.blocks[block].attn(x), whole.blocks[block].attn(x))
    assert student.state_dict().keys() == teacher.state_dict().keys() and student(images).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": [1]}, "block 1 stands in keep and in block_mechanisms: leave it out of one of them"),
        ({"block_mechanisms": {3: "window"}}, "block_mechanisms={3: 'window'}: the model has the blocks 0 to 2, not 3"),
        ({"block_mechanisms": {1: "square"}}, "unknown mechanism 'square'"),
        ({"block_mechanism_options": {"window": {"den_added": 1}}}, "mechanism 'window' has no option 'den_added'"),
        ({"block_mechanism_options": {"monarch": {}}}, "options of monarch, which no block has"),
        ({"block_mechanism_options": {"linear": {}}}, "options of linear, .*: give them as mechanism_options"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_single_blocks_cannot_have_is_one_sentence(teacher, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linearize(teacher, **{"block_mechanisms": {1: "window"}, **changes})


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [(16, 16), (16, 32), (12, 8)], ids=str)
@pytest.mark.parametrize("mechanism", ["linear", "monarch"])
def test_other_and_non_square_image_sizes(changes, size: tuple[int, int], mechanism: str) -> None:
    student = linearize(build_tiny_teacher(**changes), mechanism).eval()
    tokens = size[0] * size[1] // 16 + student.num_prefix_tokens
    assert student(torch.randn(2, 3, *size)).shape == (2, tokens, 32)


# Two grids with as many tokens as each other: nothing but the layout tells them apart. Monarch's blocks are image rows.
WIDE, HIGH = (8, 32), (32, 8)


def mixed_sizes() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, *size, generator=generator) for size in (WIDE, HIGH, (16, 16), WIDE)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mechanism", ["linear", "monarch"])
def test_several_sizes_before_one_backward_pass_under_checkpointing(
    teacher, monkeypatch: pytest.MonkeyPatch, mechanism: str, reentrant: bool
) -> None:
    """What is computed again in the backward pass knows the layout of its own images."""
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
    gradients = {}
    for checkpointing in (False, True):
        student = linearize(teacher, mechanism, keep=[1])
        student.set_grad_checkpointing(checkpointing)
        sum(student(images).square().mean() for images in mixed_sizes()).backward()
        gradients[checkpointing] = [parameter.grad for parameter in student.parameters()]
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("mechanism", ["linear", "monarch"])
def test_threads_with_different_sizes_do_not_disturb_each_other(teacher, mechanism: str) -> None:
    student = linearize(teacher, mechanism).eval()
    batches = mixed_sizes()
    with torch.no_grad():
        expected = [student(images) for images in batches]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(60):
                found = list(pool.map(torch.no_grad()(student), batches))
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [(24, 24), (16, 32), (8, 12)], ids=str)
@pytest.mark.parametrize("keep", [[], [0]], ids=["all", "keep0"])
@pytest.mark.parametrize("mechanism", ["linear", "cosformer", "nystromformer", "monarch", "performer", "softmax"])
def test_a_student_set_to_another_size_is_the_student_of_a_teacher_of_that_size(
    mechanism: str, keep: list[int], size: tuple[int, int]
) -> None:
    """Called with images, and its attention with bare tokens, which lie as the model is set."""
    student = linearize(build_tiny_teacher(reg_tokens=4), mechanism, keep)
    student.set_input_size(img_size=size)
    teacher = build_tiny_teacher(reg_tokens=4)
    teacher.set_input_size(img_size=size)
    expected = linearize(teacher, mechanism, keep)
    expected.load_state_dict(student.state_dict())
    images, tokens = torch.randn(2, 3, *size), torch.randn(2, size[0] * size[1] // 16 + 5, 32)
    assert torch.equal(student.eval()(images), expected.eval()(images))
    assert torch.equal(student.blocks[1].attn(tokens), expected.blocks[1].attn(tokens))
    assert not torch.equal(student.pos_embed, build_tiny_teacher(reg_tokens=4).pos_embed)


@pytest.mark.parametrize("keep", [[], [0]], ids=["all", "keep0"])
def test_what_linformer_holds_for_each_token_follows_the_size(keep: list[int]) -> None:
    student = linearize(build_tiny_teacher(), "linformer", keep, {"num_landmarks": 4}).eval()
    before = student.blocks[1].attn.token_mixer.key_projection.clone()
    with pytest.raises(ValueError, match="37 tokens, but this Linformer layer has projections for 17: call set_input"):
        student(torch.randn(1, 3, 24, 24))
    for size in ((24, 24), (16, 32)):
        student.set_input_size(size)
        assert student(torch.randn(1, 3, *size)).shape[1] == size[0] * size[1] // 16 + 1
        mixer = student.blocks[1].attn.token_mixer
        assert mixer.key_projection.shape[0] == mixer.shape.layout.num_tokens
        assert mixer.shape.layout == student.token_layout(torch.empty(1, 3, *size))
        # Sums over all tokens keep their size, whatever their number.
        torch.testing.assert_close(mixer.key_projection.sum(0), before.sum(0), rtol=0.2, atol=0.05)


def test_a_size_that_the_patch_does_not_divide_is_refused_and_changes_nothing(teacher, images) -> None:
    student = linearize(teacher, "monarch").eval()
    before = student(images)
    with pytest.raises(ValueError, match="image size 18 x 16 is not divisible by the patch size 4 x 4: 16 x 16 would"):
        student.set_input_size((18, 16))
    assert torch.equal(student(images), before)
    student.set_input_size(32)
    assert student(torch.randn(1, 3, 32, 32)).shape == (1, 65, 32)
    student.set_input_size(patch_size=8)
    assert student(torch.randn(1, 3, 32, 32)).shape == (1, 17, 32)


def test_bare_tokens_lie_as_the_model_was_built_for_or_in_a_square() -> None:
    teacher = build_tiny_teacher(image_size=(8, 32))
    attention = linearize(teacher, "monarch").eval().blocks[0].attn
    for grid_size in ((2, 8), (5, 5)):
        tokens = torch.randn(1, grid_size[0] * grid_size[1] + 1, 32)
        assert torch.equal(attention(tokens), attention(tokens, attn_mask=TokenLayout(grid_size, 1)))
    tokens = torch.randn(1, 17, 32)
    assert not torch.equal(attention(tokens), attention(tokens, attn_mask=TokenLayout((4, 4), 1)))


def test_intermediate_features_know_the_layout_too(teacher) -> None:
    student = linearize(teacher, "monarch", keep=[1]).eval()
    for images in mixed_sizes():
        final, intermediates = student.forward_intermediates(images, norm=True, output_fmt="NLC")
        assert torch.equal(final, student(images))
        assert torch.equal(intermediates[-1], final[:, 1:])
        assert torch.equal(student.get_intermediate_layers(images, norm=True)[0], final[:, 1:])
        with pytest.raises(ValueError, match="masked or causal attention"):
            student.forward_intermediates(images, attn_mask=torch.ones(17, 17))


def test_random_parameters_follow_the_seed_and_leave_the_generator_alone(teacher) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = (linearize(teacher, "performer", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    key = "blocks.0.attn.token_mixer.projection"
    assert torch.equal(first.state_dict()[key], second.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], first.state_dict()[key.replace("0", "1")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mechanism": "quadratic"}, "unknown mechanism 'quadratic': known are softmax, linear"),
        ({"mechanism": "linear", "options": {"eps": 1}}, "no option 'eps': it has den_added"),
        ({"keep": [3]}, "the model has the blocks 0 to 2, not 3"),
    ],
    ids=["mechanism", "option", "keep"],
)
def test_mistakes_are_named(teacher, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linearize(teacher, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer is not a plain timm ViT"),
        ("vit_tiny_patch16_224", {"attn_drop_rate": 0.1}, "blocks.0.attn.attn_drop"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.1}, "patch_drop"),
        ("vit_tiny_patch16_224", {"depth": 0}, "blocks: the model has none"),
        ("deit_tiny_distilled_patch16_224", {"attn_drop_rate": 0.1}, "blocks.0.attn.attn_drop"),
        ("vit_tiny_r_s16_p8_224", {}, "patch_embed is a HybridEmbed"),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "blocks.0 is a "),
    ],
    ids=["windowed", "attention_dropout", "patch_dropout", "no_blocks", "distilled", "hybrid", "parallel"],
)
def test_what_is_not_supported_is_named(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linearize(timm.create_model(name, **arguments))


def test_a_student_is_not_linearized_again(teacher) -> None:
    with pytest.raises(ValueError, match="linearized already"):
        linearize(linearize(teacher))


def test_a_real_mask_is_refused(teacher) -> None:
    attention = linearize(teacher, "linear").blocks[0].attn
    tokens = torch.randn(1, 17, 32)
    attention(tokens, attn_mask=None, is_causal=False)
    for arguments in ({"attn_mask": torch.ones(17, 17)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="masked or causal attention"):
            attention(tokens, **arguments)
    with pytest.raises(ValueError, match="7 tokens reached an attention layer"):
        attention(tokens[:, :7])
    with pytest.raises(ValueError, match="17 tokens reached an attention layer, but a 2 x 2 patch grid"):
        attention(tokens, attn_mask=TokenLayout((2, 2), 1))


@pytest.mark.parametrize("mechanism", ["linear", "monarch"])
def test_torch_compile_follows_the_image_size(teacher, mechanism: str) -> None:
    """One graph a size, the reading of the size in it."""
    student = linearize(teacher, mechanism).eval()
    compiled = torch.compile(copy.deepcopy(student), backend="eager", fullgraph=True, dynamic=False)
    for size in ((16, 16), (12, 20), (16, 16)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(images), student(images))
