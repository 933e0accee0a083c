"""What every mechanism owes its users, over all that are installed."""

import dataclasses

import pytest
import torch

from adala.attention import AttentionShape, TokenLayout, build_mixer, mechanism_names, resolve_mechanism
from adala.conversion import STAGE_NAMES, Conversion

NAMES = mechanism_names()
LAYOUT = TokenLayout((5, 7), 1)

# Parameters that hold one slice for each head, along their first dimension; all others are shared by the heads.
PER_HEAD_PARAMETERS = {"hedgehog": ("query_weight", "key_weight"), "lolcats": ("query_weight", "key_weight")}

# How far a constant V may come out from the constant: the weights of a row sum to 1 up to each mechanism's epsilon.
ROW_SUM_TOLERANCE = {
    "softmax": 1e-12,
    "linear": 1e-6,
    "window": 1e-12,
    "hedgehog": 1e-11,
    "lolcats": 1e-11,
    "performer": 1e-12,
    "cosformer": 1e-12,
    "monarch": 1e-11,
}
# Linformer's rows sum to whatever its learned F says, Nystromformer's only about to 1.
ROWS_DO_NOT_SUM_TO_ONE = {"linformer", "nystromformer"}


def test_all_ten_mechanisms_are_installed():
    expected = {"softmax", "linear", "hedgehog", "lolcats", "linformer", "performer", "cosformer", "nystromformer"}
    assert set(NAMES) >= expected | {"monarch", "window"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shape_and_dtype_of_the_values_come_back(name, dtype, packed_qkv, small_mixer):
    inputs = [x.to(dtype) for x in packed_qkv(LAYOUT)]
    out = small_mixer(name, LAYOUT).to(dtype)(*inputs, LAYOUT)
    assert out.shape == inputs[2].shape
    assert out.dtype == dtype


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"softmax"}))  # softmax follows autocast, as it does in timm
def test_autocast_does_not_change_one_bit(name, packed_qkv, small_mixer):
    mixer = small_mixer(name, LAYOUT).float()
    inputs = [x.float() for x in packed_qkv(LAYOUT)]
    expected = mixer(*inputs, LAYOUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixer(*inputs, LAYOUT), expected)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_lose_no_more_than_their_rounding(name, packed_qkv, small_mixer):
    """The output of bfloat16 inputs is the float64 output of the same rounded inputs, rounded once."""
    mixer = small_mixer(name, LAYOUT)
    inputs = [x.bfloat16() for x in packed_qkv(LAYOUT)]
    expected = mixer(*(x.double() for x in inputs), LAYOUT)
    out = mixer.float()(*inputs, LAYOUT).double()
    assert (out - expected).norm() < 2**-7 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name, packed_qkv, small_mixer):
    mixer = small_mixer(name, LAYOUT)
    inputs = [x.detach().requires_grad_() for x in packed_qkv(LAYOUT)]
    mixer(*inputs, LAYOUT).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in mixer.named_parameters()}
    gradients |= dict(zip("qkv", (x.grad for x in inputs), strict=True))
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, packed_qkv, small_mixer):
    """Finite differences. All mechanisms are smooth here: cosFormer's relu (and the second derivative of ELU at 0) has
    its kink at zero entries, Monarch's guards and Nystromformer's largest column sum where a maximum changes hands,
    and random inputs kept away from zero are at none of these."""
    layout = TokenLayout((2, 3), 1)
    options = {
        "linformer": {"num_landmarks": 3},
        "performer": {"num_features": 6},
        "nystromformer": {"num_landmarks": 3},
    }
    mixer = small_mixer(name, layout, num_heads=2, head_dim=4, options=options.get(name))
    inputs = [x + 0.05 * x.sign() for x in packed_qkv(layout, batch=1, num_heads=2, head_dim=4)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    parameters = dict(mixer.named_parameters())

    def run(q, k, v, *values):
        return torch.func.functional_call(mixer, dict(zip(parameters, values, strict=True)), (q, k, v, layout))

    assert torch.autograd.gradcheck(
        run, (*leaves, *parameters.values()), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_makes_another_mixer_the_same(name, packed_qkv, small_mixer):
    mixer, inputs = small_mixer(name, LAYOUT), packed_qkv(LAYOUT)
    torch.manual_seed(77)
    other = build_mixer(name, mixer.shape, dataclasses.asdict(mixer.options)).double()
    if mixer.state_dict():
        assert not torch.equal(other(*inputs, LAYOUT), mixer(*inputs, LAYOUT))
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(*inputs, LAYOUT), mixer(*inputs, LAYOUT))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic_and_leaves_the_mixer_as_it_was(name, packed_qkv, small_mixer):
    mixer, inputs = small_mixer(name, LAYOUT).eval(), packed_qkv(LAYOUT)
    before = {key: value.clone() for key, value in mixer.state_dict().items()}
    first = mixer(*inputs, LAYOUT)
    assert torch.equal(mixer(*inputs, LAYOUT), first)
    assert all(torch.equal(value, before[key]) for key, value in mixer.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_under_inference_mode_does_not_spoil_training(name, packed_qkv, small_mixer):
    layout = TokenLayout((4, 11), 1)  # of no other test, so that a cache of this size is filled here
    mixer, inputs = small_mixer(name, layout), packed_qkv(layout)
    with torch.inference_mode():
        evaluated = mixer(*inputs, layout)
    leaves = [x.detach().requires_grad_() for x in inputs]
    trained = mixer(*leaves, layout)
    trained.sum().backward()
    assert torch.equal(trained.detach(), evaluated)
    assert leaves[2].grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_images_do_not_depend_on_their_batch_mates(name, packed_qkv, small_mixer):
    mixer, inputs = small_mixer(name, LAYOUT), packed_qkv(LAYOUT, batch=3)
    alone = mixer(*(x[1:2] for x in inputs), LAYOUT)
    torch.testing.assert_close(mixer(*inputs, LAYOUT)[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_heads_permutes_the_output(name, packed_qkv, small_mixer):
    mixer, inputs = small_mixer(name, LAYOUT), packed_qkv(LAYOUT)
    order = [2, 0, 1]
    expected = mixer(*inputs, LAYOUT)[:, order]
    with torch.no_grad():
        for key in PER_HEAD_PARAMETERS.get(name, ()):
            parameter = mixer.get_parameter(key)
            parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(mixer(*(x[:, order] for x in inputs), LAYOUT), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_value_comes_out_where_rows_sum_to_one(name, packed_qkv, small_mixer):
    mixer = small_mixer(name, LAYOUT)
    q, k, v = packed_qkv(LAYOUT)
    constant = v[:, :, :1].expand_as(v)
    deviation = (mixer(q, k, constant, LAYOUT) - constant).abs().max()
    if name in ROWS_DO_NOT_SUM_TO_ONE:
        assert deviation > 1e-4
    else:
        assert deviation < ROW_SUM_TOLERANCE[name]


def test_linformer_at_its_start_keeps_a_constant_value(packed_qkv):
    mixer = build_mixer("linformer", AttentionShape(3, 8, LAYOUT), {"num_landmarks": 6}).double()
    q, k, v = packed_qkv(LAYOUT)
    constant = v[:, :, :1].expand_as(v)
    assert (mixer(q, k, constant, LAYOUT) - constant).abs().max() < 1e-6  # the averages were made in float32


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs_equal_contiguous_ones(name, packed_qkv, small_mixer):
    mixer, inputs = small_mixer(name, LAYOUT), packed_qkv(LAYOUT)
    assert not any(x.is_contiguous() for x in inputs)
    contiguous = mixer(*(x.contiguous() for x in inputs), LAYOUT)
    torch.testing.assert_close(mixer(*inputs, LAYOUT), contiguous, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_large_bfloat16_inputs_stay_finite(name, packed_qkv, small_mixer):
    """Queries and keys at eight times unit scale, head dim 64, as real ViTs have them in places."""
    layout = TokenLayout((9, 11), 1)
    mixer = small_mixer(name, layout, head_dim=64).bfloat16()
    inputs = [(8 * x).bfloat16().requires_grad_() for x in packed_qkv(layout, head_dim=64)]
    out = mixer(*inputs, layout)
    assert out.isfinite().all()
    out.float().square().mean().backward()
    for tensor in (*inputs, *mixer.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"softmax", "linear", "window"}))
def test_native_conversion_is_a_description_in_the_order_of_the_stages(name):
    conversion = resolve_mechanism(name).native_conversion
    assert isinstance(conversion, Conversion)
    assert conversion.name == "native"
    order = [list(STAGE_NAMES.values()).index(step.stage) for step in conversion.steps]
    assert order == sorted(set(order))
    assert conversion.step("finetuning") is not None


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_documented(name):
    options_class = resolve_mechanism(name).Options
    documentation = "".join(base.__doc__ or "" for base in options_class.__mro__ if base is not object)
    for field in dataclasses.fields(options_class):
        assert f"{field.name}: " in documentation, field.name


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_makes_one_graph_of_it(name, packed_qkv, small_mixer):
    """``fullgraph`` refuses whatever would be left to Python, such as the switch of TF32."""
    mixer = small_mixer(name, LAYOUT).float().eval()
    inputs = [x.float() for x in packed_qkv(LAYOUT)]
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, LAYOUT), mixer(*inputs, LAYOUT))
