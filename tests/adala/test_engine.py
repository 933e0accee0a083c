"""The engine's verbs in forked ranks, against plain PyTorch. What every stage and ZeRO gives: tests/distributed."""

import math
from pathlib import Path

# The engine imports it, and with it all of torch's compiler: once here, not in every forked rank.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import torch
from ranks import on_ranks
from tiny_teacher import build_tiny_teacher

from adala.distributed import rank
from adala.ds_config import load_ds_config
from adala.engine import Engine
from adala.optim import build_optimizer, freeze_matching
from adala.stages import FeatureAlignment
from adala.students import linearize

LR, ZEROS = 0.01, ["zero0", "zero1", "zero2", "zero3", "zero1_bf16"]
SHIPPED = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def batch(seed: int) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def build_stage() -> FeatureAlignment:
    """A stage that trains all but its position embedding, and has a buffer."""
    teacher = build_tiny_teacher()
    stage = FeatureAlignment(linearize(teacher, "linear"), teacher, "mse")
    freeze_matching(stage, ["student.pos_embed"])
    stage.register_buffer("counted", torch.tensor([1.0001, 2.0]))
    return stage


def build_engine(zero: str, accumulation: int = 1, clipping: float = 0.0) -> Engine:
    return Engine(
        build_stage(),
        lambda module: build_optimizer(module, LR, 0.0, (0.9, 0.999)),
        load_ds_config(zero),
        micro_batch_size=2,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=clipping,
    )


def train(engine: Engine, *seeds: int) -> None:
    engine.train()
    for seed in seeds:
        engine.backward(engine(batch(seed))["loss"])
        engine.step()


def plain_gradients(*seeds: int) -> dict[str, torch.Tensor]:
    """Of the mean loss over the batches."""
    stage = build_stage()
    for seed in seeds:
        (stage(batch(seed))["loss"] / len(seeds)).backward()
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def norm_and_rates(zero: str) -> tuple[list[float], list[int], list[float]]:
    engine = build_engine(zero, accumulation=2, clipping=1e-3)
    engine.set_rate(0.25)
    before, norms, moved = engine.full_state(), [], []
    for seeds in ((1, 2), (3, 4)):
        train(engine, *seeds)
        norms.append(float(engine.outcome()[1]))
        after = engine.full_state()
        moved.append(float((after["student.norm.weight"] - before["student.norm.weight"]).abs().max()))
        before = after
    assert engine.was_step_applied() and engine.has_finite_weights()
    unmoved = [name for name, value in after.items() if torch.equal(value, build_stage().state_dict()[name])]
    return norms, unmoved, moved


@pytest.mark.parametrize("zero", ZEROS)
def test_norm_and_rate(zero: str) -> None:
    """The norm is that of the mean gradient before clipping; Adam's first step is the rate however it is clipped."""
    ((norms, unmoved, moved),) = on_ranks(1, norm_and_rates, zero)
    expected = math.sqrt(sum(float(gradient.square().sum()) for gradient in plain_gradients(1, 2).values()))
    assert norms[0] == pytest.approx(expected, rel=2e-2 if "bf16" in zero else 1e-4)
    assert moved[0] == pytest.approx(0.25 * LR, rel=1e-2)
    assert set(unmoved) == {"student.pos_embed", "counted"}


def states_of(zero: str) -> tuple[dict[str, torch.Tensor], list[torch.dtype]]:
    engine = build_engine(zero)
    return engine.full_state(), [parameter.dtype for parameter in engine.module.parameters()]


@pytest.mark.parametrize("zero", SHIPPED)
def test_what_comes_out_untrained_is_what_went_in(zero: str) -> None:
    expected = build_stage().state_dict()
    (found, dtypes), (nothing, _) = on_ranks(2, states_of, zero)
    assert set(found) == set(expected) and nothing == {}, "rank 0 alone gets them"
    assert all(torch.equal(value, expected[name]) and value.dtype == torch.float32 for name, value in found.items())
    assert set(dtypes) == {torch.bfloat16 if "bf16" in zero else torch.float32}


def on_two_ranks(zero: str) -> float:
    engine = build_engine(zero)
    train(engine, 1 + rank())
    return float(engine.outcome()[1])


@pytest.mark.parametrize("zero", ["zero0", "zero1"])
def test_gradients_are_averaged_over_ranks(zero: str) -> None:
    first, second = on_ranks(2, on_two_ranks, zero)
    expected = math.sqrt(sum(float(gradient.square().sum()) for gradient in plain_gradients(1, 2).values()))
    assert first == second == pytest.approx(expected, rel=1e-4)


def summed(zero: str) -> float:
    """The norm of a gradient that is told to each rank and micro-batch, of which bf16 cannot hold the sum."""
    engine = build_engine(zero, accumulation=2)
    told = iter([[256.0, 1.0], [0.5, 0.25]][rank()])
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and name != "student.norm.bias":
            parameter.register_hook(torch.zeros_like)
    engine.module.student.norm.bias.register_hook(lambda gradient: torch.full_like(gradient, next(told)))
    train(engine, 1, 2)
    return float(engine.outcome()[1])


@pytest.mark.parametrize("zero", SHIPPED)
def test_gradients_are_added_up_and_reduced_in_float32(zero: str) -> None:
    width = build_stage().student.norm.bias.numel()
    # In bf16 256 + 1 is 256, and (257 + 0.75) / 2 is 129.
    expected = (256 + 1 + 0.5 + 0.25) / 2 * math.sqrt(width)
    for norm in on_ranks(2, summed, zero):
        assert norm == pytest.approx(expected, rel=1e-6)


def bucket_bytes(zero: str) -> int:
    engine, held = build_engine(zero), []
    optimizer = engine._engine.optimizer

    def look(_: torch.Tensor) -> None:
        buffers = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
        tensors = [tensor for each in buffers for tensor in (each if isinstance(each, list) else [each])]
        held.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    engine.module.student.blocks[0].attn.qkv.weight.register_post_accumulate_grad_hook(look)
    train(engine, 1)
    return max(held)


@pytest.mark.parametrize("zero", ["zero1", "zero2_bf16", "zero3", "zero3_autocast"])
def test_buckets_are_no_larger_than_the_gradients(zero: str) -> None:
    trained = sum(p.numel() for p in build_stage().parameters() if p.requires_grad)
    (found,) = on_ranks(1, bucket_bytes, zero)
    assert 0 < found <= 4 * trained


def save_and_load(zero: str, folder: Path) -> tuple[int, int]:
    engine = build_engine(zero)
    train(engine, 1, 2)
    engine.save(folder / "saved")
    train(engine, 3)
    expected = engine.full_state()
    restored = build_engine(zero)
    with pytest.raises(ValueError, match="DeepSpeed finds nothing to load there"):
        restored.load(folder / "nowhere")
    restored.load(folder / "saved")
    train(restored, 3)
    for name, value in restored.full_state().items():
        assert torch.equal(value, expected[name]), name
    written = sum(path.stat().st_size for path in (folder / "saved").rglob("*") if path.is_file())
    return written, engine.checkpoint_bytes()


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero3", "zero1_bf16"])
def test_a_restored_engine_goes_on_as_if_nothing_had_been(tmp_path: Path, zero: str) -> None:
    ((written, announced),) = on_ranks(1, save_and_load, zero, tmp_path)
    weights = sum(p.numel() for p in build_stage().parameters())
    trained = weights - build_stage().student.pos_embed.numel()
    assert announced == (2 if "bf16" in zero else 4) * weights + (12 if zero != "zero0" else 8) * trained
    # Beside the numbers: names, shapes and a few kilobytes of settings in each file.
    assert announced * 0.8 < written < announced * 1.5 + 300_000


def poisoned(zero: str) -> tuple[bool, ...]:
    engine = build_engine(zero)
    before = engine.full_state()
    handle = engine.module.student.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    train(engine, 1)
    applied_poisoned, after = engine.was_step_applied(), engine.full_state()
    unchanged = all(torch.equal(value, before[name]) for name, value in after.items())
    handle.remove()
    train(engine, 1)
    applied, finite = engine.was_step_applied(), engine.has_finite_weights()
    # A single one among many weights.
    weight = engine.module.student.blocks[1].norm1.bias
    getattr(weight, "ds_tensor", weight).data[-1] = math.inf
    return applied_poisoned, unchanged, applied, finite, engine.has_finite_weights()


@pytest.mark.parametrize("zero", SHIPPED)
def test_a_gradient_that_is_not_finite_is_passed_over(zero: str) -> None:
    assert on_ranks(1, poisoned, zero) == [(False, True, True, True, False)]


def modes() -> list[bool]:
    engine = build_engine("zero1")
    seen = []
    for switch in (engine.train, engine.eval, engine.eval, engine.train, engine.train):
        switch()
        seen.append(engine.module.training)
    return seen


def test_it_is_put_into_training_mode_and_back() -> None:
    assert on_ranks(1, modes) == [[True, False, False, True, True]]
