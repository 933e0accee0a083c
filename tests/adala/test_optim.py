"""Groups, freezing, rates."""

import pytest
from torch import nn

from adala.optim import average_decay, build_optimizer, freeze_except, freeze_matching, rate_factor


def test_groups_by_decay_and_rate(teacher) -> None:
    module = nn.ModuleDict({"student": teacher.requires_grad_(True), "head": nn.Linear(32, 3)})
    teacher.norm.requires_grad_(False)
    optimizer = build_optimizer(module, 1e-3, 0.1, (0.9, 0.99), {"head.": 1e-2})
    names = {id(p): name for name, p in module.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found["student.blocks.0.attn.qkv.weight"] == (1e-3, 0.1)
    assert found["student.blocks.0.attn.qkv.bias"] == (1e-3, 0.0)
    assert found["student.pos_embed"] == (1e-3, 0.0)
    assert found["head.weight"] == (1e-2, 0.1)
    assert found["head.bias"] == (1e-2, 0.0)
    assert not any("student.norm." in name for name in found)
    assert len(found) == sum(p.requires_grad for p in module.parameters())


def test_freeze_except(teacher) -> None:
    names = freeze_except(teacher, ["blocks.*.attn.qkv.*"])
    assert names == [f"blocks.{i}.attn.qkv.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert {n for n, p in teacher.named_parameters() if p.requires_grad} == set(names)


def test_freeze_matching(teacher) -> None:
    freeze_matching(teacher.requires_grad_(True), ["patch_embed.*", "pos_embed"])
    frozen = {n for n, p in teacher.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    with pytest.raises(ValueError, match="no parameter matches 'patch_embedding"):
        freeze_matching(teacher, ["patch_embedding.*"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze_matching(teacher, ["*"])


def test_rate_warms_up_and_falls_to_its_floor() -> None:
    factors = [rate_factor(step, 100, 10, "cosine", 0.1) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == 1.0
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert {rate_factor(step, 100, 0, "constant") for step in range(100)} == {1.0}
    # Lengths that would divide by zero.
    assert rate_factor(0, 1, 0, "cosine") == 1.0 and rate_factor(3, 3, 3, "cosine", 0.1) == 1.0


def test_the_average_follows_faster_at_the_start() -> None:
    assert [average_decay(step, 0.9) for step in (0, 8, 79, 80, 81, 500)] == pytest.approx(
        [0.1, 0.5, 80 / 89, *3 * [0.9]]
    )
    assert average_decay(0, 0.05) == 0.05
