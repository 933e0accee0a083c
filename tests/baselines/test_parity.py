"""Every mixer against its dense N x N reference: the output and the gradient of every input and parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adala.attention import TokenLayout, TokenMixer
from adala.attention.linear import elu_attention_reference
from adala.attention.softmax import softmax_attention_reference
from baselines.cosformer import cosformer_reference
from baselines.hedgehog import hedgehog_reference
from baselines.linformer import linformer_reference
from baselines.lolcats import lolcats_reference
from baselines.monarch import monarch_reference
from baselines.nystromformer import nystromformer_reference
from baselines.performer import performer_reference

Reference = Callable[[TokenMixer, Tensor, Tensor, Tensor, TokenLayout], Tensor]


def hedgehog(mixer, q, k, v, layout):
    key_weight = mixer.query_weight if mixer.options.tied else mixer.key_weight
    return hedgehog_reference(q, k, v, mixer.query_weight, key_weight, mixer.options)


def lolcats(mixer, q, k, v, layout):
    return lolcats_reference(q, k, v, mixer.query_weight, mixer.key_weight, mixer.options)


def linformer(mixer, q, k, v, layout):
    return linformer_reference(q, k, v, mixer.key_projection, mixer.value_projection, mixer.options.scale)


def performer(mixer, q, k, v, layout):
    return performer_reference(q, k, v, mixer.projection, mixer.options)


def cosformer(mixer, q, k, v, layout):
    return cosformer_reference(q, k, v, layout, mixer.options)


def nystromformer(mixer, q, k, v, layout):
    return nystromformer_reference(q, k, v, mixer.options, mixer.conv_weight)


def monarch(mixer, q, k, v, layout):
    return monarch_reference(q, k, v, mixer.options.block_size or layout.grid_size[1], mixer.options)


def softmax(mixer, q, k, v, layout):
    return softmax_attention_reference(q, k, v, mixer.options.scale)


def linear(mixer, q, k, v, layout):
    return elu_attention_reference(q, k, v, mixer.options.den_added)


CASES: list[tuple[str, dict[str, Any], Reference]] = [
    ("softmax", {}, softmax),
    ("softmax", {"scale": 0.2}, softmax),
    ("linear", {}, linear),
    ("hedgehog", {}, hedgehog),
    ("hedgehog", {"activation": "exp"}, hedgehog),
    ("hedgehog", {"half": True, "feature_dim": 5, "den_added": 0.1}, hedgehog),
    ("hedgehog", {"tied": True}, hedgehog),
    ("lolcats", {}, lolcats),
    ("linformer", {}, linformer),
    ("linformer", {"init": "uniform", "scale": 0.5}, linformer),
    ("performer", {}, performer),
    ("performer", {"mode": "max"}, performer),
    ("performer", {"mode": "relu", "row_norms": "constant"}, performer),
    ("cosformer", {}, cosformer),
    ("cosformer", {"prefix_position": "middle"}, cosformer),
    ("cosformer", {"two_dimensional": True}, cosformer),
    ("nystromformer", {}, nystromformer),
    ("nystromformer", {"conv_kernel": 5, "pinv_iterations": 3}, nystromformer),
    ("nystromformer", {"pinv_init": "global"}, nystromformer),
    ("monarch", {}, monarch),
    ("monarch", {"num_steps": 1}, monarch),
    ("monarch", {"num_steps": 3, "block_size": 4, "padding_side": "right"}, monarch),
    ("monarch", {"eps": 1e-2}, monarch),
    ("monarch", {"eps": None, "num_steps": 3}, monarch),
]

LAYOUTS = [TokenLayout((5, 7), 0), TokenLayout((5, 7), 1), TokenLayout((9, 4), 5)]


def relative_rms(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach(), reference.detach()
    return float((reference - ours).square().mean().sqrt() / reference.square().mean().sqrt())


def case_id(case) -> str:
    name, options, _ = case
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.num_prefix_tokens}prefix")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_output_and_gradients_equal_those_of_the_dense_reference(case, layout, packed_qkv, small_mixer):
    name, options, reference = case
    mixer = small_mixer(name, layout, options=options)
    inputs = [x.detach().requires_grad_() for x in packed_qkv(layout)]
    sources = {"q": inputs[0], "k": inputs[1], "v": inputs[2], **dict(mixer.named_parameters())}
    out_gradient = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    results = []
    for out in (mixer(*inputs, layout), reference(mixer, *inputs, layout)):
        results.append(
            {"out": out}
            | dict(zip(sources, torch.autograd.grad(out, list(sources.values()), out_gradient), strict=True))
        )
    ours, expected = results
    errors = {key: relative_rms(ours[key], expected[key]) for key in expected}
    assert all(error < 1e-11 for error in errors.values()), errors


@pytest.mark.parametrize("name", ["linformer", "cosformer", "monarch", "nystromformer"])
def test_a_current_image_of_another_size_than_at_construction(name, packed_qkv, small_mixer):
    """The mechanisms that know N or the grid follow the current image, here a smaller and non-square one."""
    reference = next(reference for case_name, _, reference in CASES if case_name == name)
    mixer, layout = small_mixer(name, TokenLayout((6, 6), 1)), TokenLayout((3, 7), 1)
    q, k, v = packed_qkv(layout)
    assert relative_rms(mixer(q, k, v, layout), reference(mixer, q, k, v, layout)) < 1e-12
