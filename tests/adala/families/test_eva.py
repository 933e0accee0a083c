"""Eva's own: where queries and keys are rotated, by which table, and the files of DINOv3."""

import math

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import EVA, TINY, build_tiny, stir
from torch import Tensor, nn

from adala.attention import TokenLayout, insert_lora, merge_lora
from adala.backbones import build_backbone, load_teacher
from adala.evaluation import measure_block_errors
from adala.stages import AttentionAlignment, FeatureAlignment
from adala.students import linearize, linearized_blocks

DINOV3 = "vit_small_patch16_dinov3"
ROTARY = [kind for kind in EVA if kind not in ("eva", "eva02_post_norm")]


def random_images(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def calls_of_attention(model: nn.Module, images: Tensor) -> list[tuple[Tensor, dict, Tensor]]:
    """Input, named arguments and output of each block's attention."""
    calls = []
    handles = [
        block.attn.register_forward_hook(lambda _, x, named, out: calls.append((x[0], named, out)), with_kwargs=True)
        for block in model.blocks
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return calls


def rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """(B, H, N, d), pair by pair: a + ib times cos + i sin, for the patches."""
    d = x.shape[-1]
    sine, cosine = rope[..., :d], rope[..., d:]
    first = torch.arange(d // 2) if half else torch.arange(0, d, 2)
    second = first + d // 2 if half else first + 1
    out, patches = x.clone(), x[:, :, prefix:]
    a, b = patches[..., first], patches[..., second]
    out[:, :, prefix:, first] = a * cosine[..., first] - b * sine[..., first]
    out[:, :, prefix:, second] = b * cosine[..., second] + a * sine[..., second]
    return out


@pytest.mark.parametrize("kind", ROTARY)
def test_queries_and_keys_are_rotated_before_the_mechanism_sees_them(kind: str) -> None:
    """By hand: projections, norms, rotation of the patches, shared keys, and the mechanism's own reference."""
    student, images = linearize(build_tiny(kind), "linear").eval().double(), random_images((16, 24)).double()
    layout = student.token_layout(images)
    for x, named, out in calls_of_attention(student, images):
        assert named["attn_mask"] == layout and named["rope"] is not None
        attention = next(block.attn for block in student.blocks if torch.equal(block.attn(x, **named), out))
        heads = (len(x), layout.num_tokens, -1, attention.head_dim)
        if attention.qkv is None:
            q, k, v = (
                part(x).view(heads).transpose(1, 2) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
        else:
            bias = attention.qkv.bias
            if attention.q_bias is not None:
                bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
            packed = nn.functional.linear(x, attention.qkv.weight, bias)
            q, k, v = (part.reshape(heads).transpose(1, 2) for part in packed.chunk(3, dim=-1))
        turn = (named["rope"], student.num_prefix_tokens, attention.rotate_half)
        q, k = rotated(attention.q_norm(q), *turn), rotated(attention.k_norm(k), *turn)
        groups = q.shape[1] // k.shape[1]
        k, v = (torch.stack([part[:, head // groups] for head in range(q.shape[1])], dim=1) for part in (k, v))
        mixed = attention.token_mixer.reference(q, k, v, layout).transpose(1, 2).flatten(2)
        expected = attention.proj(attention.norm(mixed))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-8)


def test_prefix_tokens_are_not_rotated() -> None:
    attention = linearize(build_tiny("dinov3"), "linear").blocks[0].attn
    table = torch.randn(16, 2 * attention.head_dim)
    x = torch.randn(1, 21, 32)
    for turned, plain in zip(attention.project(x, table)[:2], attention.project(x)[:2], strict=True):
        assert torch.equal(turned[:, :, :5], plain[:, :, :5])
        assert not torch.isclose(turned[:, :, 5:], plain[:, :, 5:]).all()


@pytest.mark.parametrize("dynamic", [True, False], ids=["any_size", "one_size"])
@pytest.mark.parametrize("kind", EVA)
def test_positions_are_what_the_forward_pass_hands_on(kind: str, dynamic: bool) -> None:
    teacher = build_tiny(kind)
    if not dynamic:
        import timm

        name, arguments = EVA[kind]
        teacher = timm.create_model(name, img_size=16, dynamic_img_size=False, **{**TINY, **arguments}).eval()
    student = linearize(teacher, "linear").eval()
    for size in ((16, 16), (12, 20)) if dynamic else ((16, 16),):
        images = random_images(size)
        for ours, (_, named, _) in zip(student.positions(images), calls_of_attention(student, images), strict=True):
            assert (named.get("rope") is None) == (ours == {})
            assert ours == {} or torch.equal(ours["rope"], named["rope"])


def dinov3_table(rows: int, columns: int, head_dim: int) -> Tensor:
    """Sines and cosines of DINOv3 (arXiv 2508.10104): patch centres in [-1, 1] on each axis, periods 100^(4 i / d)."""
    angles = []
    for row in range(rows):
        for column in range(columns):
            centre = (2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1)
            frequencies = [100.0 ** (-4 * index / head_dim) for index in range(head_dim // 4)]
            angles.append([2 * math.pi * at * frequency for at in centre for frequency in frequencies] * 2)
    angles = torch.tensor(angles, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


@pytest.mark.parametrize("size", [(112, 112), (224, 224), (224, 448), (512, 384), (1024, 1024)], ids=str)
def test_the_rotary_table_of_dinov3_follows_the_image_size(size: tuple[int, int]) -> None:
    """Of one model at all sizes, whatever it was built for; teacher, student and the paper have one table."""
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = build_backbone(DINOV3, [224, 224], arguments).eval()
    stir(teacher)
    student, images = linearize(teacher, "linear").eval(), random_images(size, 1)
    with torch.no_grad():
        ours, theirs = calls_of_attention(student, images), calls_of_attention(teacher, images)
    expected = dinov3_table(size[0] // 16, size[1] // 16, 64)
    for block in range(2):
        table = ours[block][1]["rope"]
        assert torch.equal(table, theirs[block][1]["rope"])
        assert torch.equal(table, student.positions(images)[block]["rope"])
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-5)
    assert torch.equal(ours[0][0], theirs[0][0])


def test_a_student_of_half_the_bits_keeps_its_rotary_table_in_float32() -> None:
    student = linearize(build_tiny("dinov3"), "linear").eval().bfloat16()
    images = random_images((16, 24))
    expected = linearize(build_tiny("dinov3"), "linear").eval().positions(images)[0]["rope"]
    assert torch.equal(student.positions(images.bfloat16())[0]["rope"], expected)
    assert student(images.bfloat16()).dtype == torch.bfloat16


def test_coordinates_stay_as_they_are_while_a_student_trains() -> None:
    """Sapiens2's are scaled at random in timm's training mode, and no teacher's are."""
    teacher = build_tiny("sapiens2")
    assert teacher.rope.aug_active
    student, images = linearize(teacher, "softmax").train(), random_images((16, 16))
    torch.testing.assert_close(student(images), teacher(images), rtol=1e-5, atol=1e-5)
    assert teacher.rope.aug_active


@pytest.mark.parametrize("kind", ["dinov3_qkvb", "eva02_base", "eva02_small", "perception_encoder"])
def test_adapters_train_and_merge(kind: str) -> None:
    """In blocks that were kept, too, whose projection timm reads past the module."""
    student, images = linearize(build_tiny(kind), "linear", keep=[1]).eval(), random_images((16, 16))
    before = student(images)
    for block in student.blocks:
        insert_lora(block.attn, 2, 4.0, ("q", "v", "proj"))
    torch.testing.assert_close(student(images), before, rtol=1e-5, atol=1e-5)
    adapters = {name: p for name, p in student.named_parameters() if "lora_" in name}
    separate = student.blocks[0].attn.qkv is None
    adapted = {"q_proj", "v_proj", "proj"} if separate else {"qkv", "proj"}
    assert {name.split(".")[3] for name in adapters} == adapted and len(adapters) == 3 * 2 * len(adapted)
    for name, parameter in adapters.items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    adapted = student(images)
    adapted.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters.values())
    merged = linearize(build_tiny(kind), "linear", keep=[1]).eval()
    merged.load_state_dict(merge_lora(student.state_dict()), strict=True)
    torch.testing.assert_close(merged(images), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, before, atol=1e-2)


@pytest.mark.parametrize("kind", ["dinov3", "rope_mixed", "eva02_base"])
def test_a_softmax_student_has_no_error_in_any_block(kind: str) -> None:
    teacher = build_tiny(kind)
    students = {mechanism: linearize(teacher, mechanism).eval() for mechanism in ("softmax", "linear")}
    found = measure_block_errors(teacher, students, [{"image": random_images((16, 24), 3)}]).students
    for place in (*found["softmax"].attention, *found["softmax"].stream, found["softmax"].features):
        assert place["relative_error"] < 1e-5
        assert place["cls_cosine"] == pytest.approx(1, abs=1e-5)
    assert all(place["relative_error"] > 1e-2 for place in found["linear"].attention)


def test_the_packed_projection_is_read_as_it_lies_where_nothing_is_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    for kind in ("eva", "dinov3", "sapiens2", "eva02_small"):
        student = linearize(build_tiny(kind), "linear").eval()
        mixer = student.blocks[0].attn.token_mixer
        packed = mixer.mix_packed
        monkeypatch.setattr(mixer, "mix_packed", lambda *a, mix=packed, k=kind: read.append(k) or mix(*a))
        student(random_images((16, 16)))
    assert read == ["eva"]


def in_dinov3s_names(state: dict[str, Tensor], bias: float) -> dict[str, Tensor]:
    """What torch.hub's models have: registers, LayerScale, packed biases with a mask, the rotary periods."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    if any("fc1_g" in name for name in state):
        names |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    renamed = {}
    for name, value in state.items():
        name = (
            name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        )
        name = name.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2")
        if name.endswith(("q_bias", "v_bias")):
            continue
        renamed[name.replace("mlp.fc2", "mlp.w3") if "mlp.fc1_g.weight" in str(list(state)) else name] = value
    width = state["cls_token"].shape[-1]
    for block in range(3):
        attention = f"blocks.{block}.attn"
        q, v = (state.get(f"{attention}.{part}_bias", torch.full((width,), bias)) for part in "qv")
        renamed[f"{attention}.qkv.bias"] = torch.cat([q, torch.full((width,), 7.0), v])
        renamed[f"{attention}.qkv.bias_mask"] = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
    return {**renamed, "rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, width)}


@pytest.mark.parametrize("kind", ["dinov3", "dinov3_qkvb", "dinov3_plus"])
def test_files_of_dinov3_are_read_under_both_names(kind: str, tmp_path, capsys) -> None:
    source, (name, arguments) = build_tiny(kind), EVA[kind]
    images = random_images((16, 24))
    for number, state in enumerate((source.state_dict(), in_dinov3s_names(source.state_dict(), bias=0.0))):
        path = tmp_path / f"{number}.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, path)
        teacher = load_teacher(name, [32, 16], path, model_args={**TINY, **arguments})
        assert torch.equal(teacher(images), source(images))
    assert capsys.readouterr().out == ""


def test_biases_of_dinov3_that_a_model_has_no_place_for_are_refused(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(in_dinov3s_names(build_tiny("dinov3").state_dict(), bias=0.1), path)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.qkv\.bias is not zero, and the model has no such bias: .*_qkvb"
    ):
        load_teacher(DINOV3, [16, 16], path, model_args=TINY)


@pytest.mark.parametrize("kind", ["eva", "eva02_base", "perception_encoder", "rope_mixed"])
def test_position_embeddings_of_another_size_are_resampled(kind: str, tmp_path) -> None:
    path, (name, arguments) = tmp_path / "weights.safetensors", EVA[kind]
    save_file(build_tiny(kind).state_dict(), path)
    teacher = load_teacher(name, [24, 32], path, model_args={**TINY, **arguments})
    rows = 48 + (0 if teacher.no_embed_class else teacher.num_prefix_tokens)
    assert teacher.pos_embed.shape == (1, rows, 32)
    expected = build_tiny(kind, (24, 32))
    assert not torch.equal(teacher.pos_embed, expected.pos_embed)


@pytest.mark.parametrize("kind", ["eva02_base", "sbb"])
def test_the_norm_of_models_that_pool_first_comes_after_the_blocks(kind: str) -> None:
    teacher = build_tiny(kind)
    assert isinstance(teacher.norm, nn.LayerNorm) and isinstance(teacher.fc_norm, nn.Identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_drop_rate": 0.1}, "patch_drop: models that drop patches"),
        ({"attn_drop_rate": 0.1}, r"blocks\.0\.attn\.attn_drop: dropout of attention weights"),
        ({"reg_tokens": 4}, "model_args.reg_tokens is no argument of timm's Eva: did you mean num_reg_tokens"),
        ({"dynamic_img_size": False}, "model_args.dynamic_img_size cannot be set"),
        ({"num_kv_heads": 1}, "timm cannot build .* only supported with attn_type"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(DINOV3, [16, 16], {**TINY, **arguments})


def test_a_layout_and_masks_are_checked_as_in_a_plain_vit() -> None:
    attention, tokens = linearize(build_tiny("dinov3"), "linear").blocks[0].attn, torch.randn(1, 21, 32)
    attention(tokens, attn_mask=None, is_causal=False)
    for arguments in ({"attn_mask": torch.ones(21, 21)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="masked or causal attention"):
            attention(tokens, **arguments)
    with pytest.raises(ValueError, match="21 tokens reached an attention layer, but a 2 x 2 patch grid"):
        attention(tokens, attn_mask=TokenLayout((2, 2), 5))


def test_stage_1_gives_each_side_its_own_models_table() -> None:
    """A student whose frequencies have been trained is compared as it will run."""
    teacher, batch = build_tiny("rope_mixed"), {"image": random_images((16, 24))}
    student = linearize(teacher, "softmax")
    student.rope.freqs.data.mul_(1.5)
    losses = AttentionAlignment(student, teacher, "mse")(batch)
    for index, (x, named, out) in enumerate(calls_of_attention(teacher, batch["image"])):
        table = student.positions(batch["image"])[index]["rope"]
        assert not torch.equal(table, named["rope"])
        ours = student.blocks[index].attn(x, student.token_layout(batch["image"]), rope=table)
        expected = (ours - out).square().mean()
        assert losses[f"block{index:02d}_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert expected > 1e-3


def test_a_model_without_a_class_token_has_none() -> None:
    teacher = build_tiny("no_prefix")
    assert (teacher.has_class_token, teacher.num_prefix_tokens) == (False, 0)
    student = linearize(teacher, "linear")
    losses = FeatureAlignment(student, teacher, "mse")({"image": random_images((16, 16))})
    assert "patch_cosine" in losses and "cls_cosine" not in losses
    assert linearize(build_tiny("dinov3"), "linear").has_class_token


def test_learned_frequencies_train_with_the_whole_student() -> None:
    teacher = build_tiny("rope_mixed")
    student = linearize(teacher, "linear")
    FeatureAlignment(student, teacher, "mse")({"image": random_images((16, 16))})["loss"].backward()
    assert student.rope.freqs.grad.abs().max() > 0
    assert len(linearized_blocks(student)) == 3
