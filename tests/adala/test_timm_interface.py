"""A student is a timm model: what code around timm calls and reads of one gives what it gives of the teacher."""

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer
from tiny_teacher import build_tiny_teacher
from torch import Tensor, nn

from adala.families.vision_transformer import LinearizedVisionTransformer
from adala.students import LinearizedModel, linearize

REGISTERS = {"reg_tokens": 4, "no_embed_class": True}
METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers", "forward_head")
OPTIONS = [
    {"indices": indices, "norm": norm, "output_fmt": form, "return_prefix_tokens": prefix, "stop_early": early}
    for indices, norm, form, (prefix, early) in itertools.product(
        (None, 2, [0, 2]), (False, True), ("NCHW", "NLC"), ((False, True), (True, False))
    )
]


@pytest.fixture(params=[{}, REGISTERS], ids=["class-token", "registers"])
def teacher(request: pytest.FixtureRequest) -> VisionTransformer:
    return build_tiny_teacher(**request.param)


@pytest.fixture
def softmax(teacher: VisionTransformer) -> LinearizedModel:
    """A student whose shells compute the teacher's own attention."""
    return linearize(teacher, "softmax").eval()


@pytest.fixture
def linear(teacher: VisionTransformer) -> LinearizedModel:
    return linearize(teacher, "linear").eval()


def assert_equal(ours: Any, theirs: Any) -> None:
    """To the bit, through lists, tuples and dicts of tensors."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        assert_equal(list(ours.values()), list(theirs.values()))
    else:
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)


def shapes(found: Any) -> Any:
    if isinstance(found, Tensor):
        return tuple(found.shape)
    return {k: shapes(v) for k, v in found.items()} if isinstance(found, dict) else [shapes(each) for each in found]


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_of_timms_method_is_taken(method: str) -> None:
    theirs, ours = (getattr(of, method) for of in (VisionTransformer, LinearizedVisionTransformer))
    arguments = {name: None for name in inspect.signature(theirs).parameters}
    inspect.signature(ours).bind(**arguments)


@torch.no_grad()
def test_softmax_shells_give_the_teachers_own_features(teacher, softmax, images: Tensor) -> None:
    assert_equal(softmax.forward_features(images), teacher.forward_features(images))
    assert_equal(softmax(images), teacher(images))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_softmax_shells_give_the_teachers_own_intermediates(teacher, softmax, images: Tensor, options: dict) -> None:
    for further in ({}, {"intermediates_only": True}, {"output_dict": True}):
        expected = teacher.forward_intermediates(images, **options, **further)
        assert_equal(softmax.forward_intermediates(images, **options, **further), expected)


@torch.no_grad()
def test_softmax_shells_give_the_teachers_own_layers(teacher, softmax, images: Tensor) -> None:
    for n, reshape, prefix, norm in itertools.product((1, [0, 1]), *[(False, True)] * 3):
        expected = teacher.get_intermediate_layers(images, n, reshape, prefix, norm)
        assert_equal(softmax.get_intermediate_layers(images, n, reshape, prefix, norm), expected)


@torch.no_grad()
def test_a_linear_students_intermediates_are_of_the_teachers_shapes_and_end_in_its_features(
    teacher, linear, images: Tensor
) -> None:
    for options in OPTIONS:
        expected = teacher.forward_intermediates(images, **options)
        assert shapes(linear.forward_intermediates(images, **options)) == shapes(expected)
    final, blocks = linear.forward_intermediates(images, norm=True, output_fmt="NLC")
    assert torch.equal(final, linear(images)) and torch.equal(final, linear.forward_features(images))
    assert torch.equal(blocks[-1], final[:, linear.num_prefix_tokens :])
    assert not torch.allclose(final, teacher(images), atol=1e-2)


@torch.no_grad()
def test_a_student_is_a_feature_pyramid_as_timm_wraps_one(teacher, softmax, linear, images: Tensor) -> None:
    getters = [FeatureGetterNet(model, out_indices=[0, 1]) for model in map(copy.deepcopy, (teacher, softmax, linear))]
    of_teacher, of_softmax, of_linear = (getter(images) for getter in getters)
    assert_equal(of_softmax, of_teacher)
    assert [tuple(each.shape) for each in of_linear] == [(4, 32, 4, 4)] * 2
    assert len(getters[2].model.blocks) == 2 and len(linear.blocks) == 3


@torch.no_grad()
def test_a_classifier_can_be_put_on_a_student(teacher, softmax, linear, images: Tensor) -> None:
    for model in (teacher, softmax, linear):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model.reset_classifier(7, "avg")
    assert_equal(softmax(images), teacher(images))
    patches = linear.forward_features(images)[:, linear.num_prefix_tokens :]
    assert torch.allclose(linear(images), F.linear(patches.mean(1), linear.head.weight, linear.head.bias), atol=1e-6)
    assert linear.get_classifier() is linear.head and linear.num_classes == 7


def test_gradient_checkpointing_changes_no_gradient(teacher, softmax, linear, images: Tensor) -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.train().requires_grad_(True).zero_grad()
        model(images).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = {model: gradients(model) for model in (teacher, softmax, linear)}
    for model in expected:
        model.set_grad_checkpointing(True)
        assert_equal(gradients(model), expected[model])
        assert model.grad_checkpointing
    assert all(block.grad_checkpointing for block in linear.blocks)
    assert_equal(expected[softmax], expected[teacher])


def test_timm_says_the_same_of_a_students_images() -> None:
    of_images = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.7}
    teacher = timm.create_model("vit_tiny_patch16_224", depth=1, pretrained_cfg_overlay=of_images)
    found = timm.data.resolve_model_data_config(linearize(teacher, "linear"))
    assert found == timm.data.resolve_model_data_config(teacher) and found.items() >= of_images.items()


@torch.no_grad()
def test_set_input_size_resamples_as_timm_does(teacher, softmax, linear) -> None:
    images = torch.randn(2, 3, 20, 12, generator=torch.Generator().manual_seed(2))
    before = linear(images)
    for model in (teacher, softmax, linear):
        model.set_input_size((20, 12))
        assert model.patch_embed.grid_size == (5, 3)
    assert_equal(softmax(images), teacher(images))
    # A model of another size resamples its position embedding at every image, this one did once.
    assert torch.allclose(linear(images), before, atol=1e-5)


def eomt_attention(attn: nn.Module, x: Tensor) -> Tensor:
    """As EoMT, and masked decoders after it, compute a timm block's attention from its parts."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    if attn.fused_attn:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        mixed = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1) @ v
    return attn.proj(mixed.transpose(1, 2).flatten(2))


def attention_map(attn: nn.Module, x: Tensor) -> Tensor:
    """As pictures of attention are made."""
    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)


def attention_in_training(attn: nn.Module, x: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p)


def attention_weights_dropped(attn: nn.Module, x: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.attn_drop((q @ k.transpose(-2, -1) / attn.head_dim**0.5).softmax(-1)) @ v


@torch.no_grad()
@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (eomt_attention, "fused_attn"),
        (attention_map, "scale"),
        (attention_in_training, "attn_drop"),
        (attention_weights_dropped, "attn_drop"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_softmax_computed_from_a_shells_parts_is_refused(
    teacher, linear, compute: Callable[[nn.Module, Tensor], Tensor], name: str
) -> None:
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(4))
    assert compute(teacher.blocks[0].attn, x).isfinite().all()
    with pytest.raises(ValueError, match=rf"attn\.{name} belongs to softmax, .*call the whole attention"):
        compute(linear.blocks[0].attn, x)


def test_a_model_may_be_searched_for_fused_attention_and_copied(teacher, linear, images: Tensor) -> None:
    expected = linear(images)
    for module in linear.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    shell = pickle.loads(pickle.dumps(copy.deepcopy(linear))).blocks[0].attn
    assert (shell.num_heads, shell.head_dim) == (teacher.blocks[0].attn.num_heads, teacher.blocks[0].attn.head_dim)
    with pytest.raises(ValueError, match=r"attn\.scale belongs to softmax"):
        eomt_attention(shell, torch.zeros(1, 17, 32))
    assert torch.equal(linear(images), expected)
    assert list(linear.state_dict()) == list(teacher.state_dict())
