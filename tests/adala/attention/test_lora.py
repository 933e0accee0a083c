"""Adapters: nothing changes at first, the formula holds, and merging changes nothing at all."""

import copy

import pytest
import torch
from torch import nn

from adala.attention import LoraLinear, insert_lora, merge_lora
from adala.students import linearize


def randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)


@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 2), (1,)], ids=str)
def test_each_part_has_an_adapter_of_its_own(parts: tuple[int, ...]) -> None:
    base = nn.Linear(6, 12, dtype=torch.float64)
    layer = LoraLinear(base, rank=2, alpha=5.0, num_parts=3, parts=parts)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x))
    randomise(layer)
    expected = list(base(x).chunk(3, dim=-1))
    for position, part in enumerate(parts):
        expected[part] = expected[part] + 2.5 * x @ layer.lora_A[position].T @ layer.lora_B[position].T
    torch.testing.assert_close(layer(x), torch.cat(expected, dim=-1))
    merged = merge_lora(layer.state_dict())
    assert set(merged) == {"weight", "bias"}
    torch.testing.assert_close(nn.functional.linear(x, **merged), layer(x))


@pytest.mark.parametrize("targets", [("q", "k", "v", "proj"), ("q", "v"), ("proj",)], ids="_".join)
def test_a_merged_student_is_the_adapted_student_under_timms_names(teacher, images, targets) -> None:
    # In float64: adapters of unit scale give scores whose exponentials magnify float32's rounding beyond any tolerance.
    student, images = linearize(teacher, "lolcats").eval().double(), images.double()
    plain = copy.deepcopy(student)
    for block in student.blocks:
        insert_lora(block.attn, 2, 4.0, targets)
    torch.testing.assert_close(student(images), plain(images))
    randomise(student)
    assert not torch.allclose(student(images), plain(images), atol=1e-2)
    plain.load_state_dict(merge_lora(student.state_dict()), strict=True)
    torch.testing.assert_close(plain(images), student(images), rtol=1e-8, atol=1e-8)


def test_an_unknown_target_is_named(teacher) -> None:
    with pytest.raises(ValueError, match="LoRA target 'mlp': known are q, k, v, proj"):
        insert_lora(linearize(teacher, "linear").blocks[0].attn, 2, 4.0, ("q", "mlp"))
