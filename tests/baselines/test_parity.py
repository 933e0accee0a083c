"""Every mixer against its own dense N x N reference: the output and the gradient of every input and parameter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adala.attention import AttentionShape, TokenLayout, TokenMixer, mechanism_names, resolve_mechanism

CASES: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {}),
    ("softmax", {"scale": 0.2}),
    ("linear", {}),
    ("window", {"window": 4}),
    ("window", {"window": 3}),
    ("window", {}),
    ("hedgehog", {}),
    ("hedgehog", {"activation": "exp"}),
    ("hedgehog", {"half": True, "feature_dim": 5, "den_added": 0.1}),
    ("hedgehog", {"tied": True}),
    ("lolcats", {}),
    ("linformer", {}),
    ("linformer", {"init": "uniform", "scale": 0.5}),
    ("performer", {}),
    ("performer", {"mode": "max"}),
    ("performer", {"mode": "relu", "row_norms": "constant"}),
    ("cosformer", {}),
    ("cosformer", {"prefix_position": "middle"}),
    ("cosformer", {"two_dimensional": True}),
    ("nystromformer", {}),
    ("nystromformer", {"conv_kernel": 5, "pinv_iterations": 3}),
    ("nystromformer", {"pinv_init": "global"}),
    ("nystromformer", {"num_landmarks": 64, "conv_kernel": 5}),
    ("monarch", {}),
    ("monarch", {"num_steps": 1}),
    ("monarch", {"num_steps": 3, "block_size": 4, "padding_side": "right"}),
    ("monarch", {"eps": 1e-2}),
    ("monarch", {"eps": None, "num_steps": 3}),
]

LAYOUTS = [TokenLayout((5, 7), 0), TokenLayout((5, 7), 1), TokenLayout((9, 4), 5)]


def relative_rms(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach(), reference.detach()
    return float((reference - ours).square().mean().sqrt() / reference.square().mean().sqrt())


def case_id(case) -> str:
    name, options = case
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.num_prefix_tokens}prefix")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_output_and_gradients_equal_those_of_the_dense_reference(case, layout, packed_qkv, small_mixer):
    name, options = case
    mixer = small_mixer(name, layout, options=options)
    inputs = [x.detach().requires_grad_() for x in packed_qkv(layout)]
    sources = {"q": inputs[0], "k": inputs[1], "v": inputs[2], **dict(mixer.named_parameters())}
    out_gradient = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    results = []
    for out in (mixer(*inputs, layout), mixer.reference(*inputs, layout)):
        results.append(
            {"out": out}
            | dict(zip(sources, torch.autograd.grad(out, list(sources.values()), out_gradient), strict=True))
        )
    ours, expected = results
    errors = {key: relative_rms(ours[key], expected[key]) for key in expected}
    assert all(error < 1e-11 for error in errors.values()), errors


@pytest.mark.parametrize("name", ["linformer", "cosformer", "monarch", "nystromformer", "window"])
def test_a_current_image_of_another_size_than_at_construction(name, packed_qkv, small_mixer):
    """The mechanisms that know N or the grid follow the current image, here a smaller and non-square one."""
    mixer, layout = small_mixer(name, TokenLayout((6, 6), 1)), TokenLayout((3, 7), 1)
    q, k, v = packed_qkv(layout)
    assert relative_rms(mixer(q, k, v, layout), mixer.reference(q, k, v, layout)) < 1e-12


@pytest.mark.parametrize("name", mechanism_names())
def test_a_reference_of_one_head_is_that_head_of_the_whole(name, packed_qkv, small_mixer):
    options = {"conv_kernel": 3} if name == "nystromformer" else {}
    mixer, layout = small_mixer(name, TokenLayout((5, 7), 1), options=options).float(), TokenLayout((5, 7), 1)
    q, k, v = packed_qkv(layout)
    whole = mixer.reference(q, k, v, layout)
    head = mixer.reference(*(x[:, 1:2] for x in (q, k, v)), layout, slice(1, 2))
    assert whole.dtype == head.dtype == torch.float64, "float32 weights, but float64 inputs"
    torch.testing.assert_close(head, whole[:, 1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in mechanism_names() if resolve_mechanism(name).rows_are_independent])
def test_rows_said_to_be_independent_are(name, packed_qkv, small_mixer):
    mixer, layout = small_mixer(name, TokenLayout((5, 7), 1)), TokenLayout((5, 7), 1)
    q, k, v = packed_qkv(layout)
    rows = torch.tensor([0, 9, 35])
    expected = mixer.reference(q, k, v, layout)[:, :, rows]
    torch.testing.assert_close(mixer.reference(q[:, :, rows], k, v, layout), expected, rtol=1e-12, atol=1e-12)


def test_a_mixer_without_a_reference_says_so():
    with pytest.raises(NotImplementedError, match="TokenMixer has no reference"):
        TokenMixer(AttentionShape(1, 1, TokenLayout((1, 1), 0))).reference(*torch.zeros(3, 1, 1, 1, 1), None)
