"""The engine's verbs in forked ranks, against plain PyTorch. What every stage and ZeRO gives: tests/distributed."""

import json
import math
from pathlib import Path

# The engine imports it, and with it all of torch's compiler: once here, not in every forked rank.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from ranks import on_ranks
from tiny_teacher import build_tiny_teacher

from adala.distributed import barrier, rank
from adala.ds_config import load_ds_config
from adala.engine import Engine
from adala.optim import build_optimizer, freeze_matching
from adala.slices import SliceReader, describe_slices, write_slices
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


def build_engine(zero: str, accumulation: int = 1, clipping: float = 0.0, keeps_average: bool = False) -> Engine:
    return Engine(
        build_stage(),
        lambda module: build_optimizer(module, LR, 0.0, (0.9, 0.999)),
        load_ds_config(zero),
        micro_batch_size=2,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=clipping,
        keeps_average=keeps_average,
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


def save_slices(engine: Engine, folder: Path) -> None:
    slices = engine.slices()
    write_slices(folder / f"{rank()}.safetensors", slices)
    (folder / f"{rank()}.json").write_text(json.dumps(describe_slices(slices)))
    barrier()


def read_slices(folder: Path) -> SliceReader:
    contents = {path.with_suffix(".safetensors").name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return SliceReader(folder, contents)


def trained_and_saved(zero: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """The state that was saved, that after one more step, and the bytes of this rank's slices."""
    engine = build_engine(zero)
    train(engine, 1, 2)
    save_slices(engine, folder)
    saved, size = engine.full_state(), sum(part.bytes for part in engine.slices())
    train(engine, 3)
    return saved, engine.full_state(), size


def restored_and_trained(zero: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """As :func:`trained_and_saved`, of an engine that had gone another way and takes over what was saved."""
    engine = build_engine(zero)
    train(engine, 7)
    engine.restore(read_slices(folder))
    restored = engine.full_state()
    train(engine, 3)
    return restored, engine.full_state()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero", SHIPPED)
def test_a_restored_engine_goes_on_as_if_nothing_had_been(tmp_path: Path, zero: str, ranks: int) -> None:
    saved, expected, _ = on_ranks(ranks, trained_and_saved, zero, tmp_path)[0]
    restored, found = on_ranks(ranks, restored_and_trained, zero, tmp_path)[0]
    for name in expected:
        assert torch.equal(restored[name], saved[name]), name
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    "offloaded", [(2, ["offload_optimizer"]), (3, ["offload_optimizer", "offload_param"])], ids=str
)
def test_what_is_offloaded_to_the_cpu_is_saved_too(tmp_path: Path, offloaded: tuple[int, list[str]]) -> None:
    stage, keys = offloaded
    config, folder = tmp_path / "offload.json", tmp_path / "saved"
    folder.mkdir()
    zero = {"stage": stage, **{key: {"device": "cpu"} for key in keys}}
    config.write_text(json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}))
    _, expected, _ = on_ranks(2, trained_and_saved, str(config), folder)[0]
    _, found = on_ranks(2, restored_and_trained, str(config), folder)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("zero1", 2), ("zero1", 3)),
        (("zero1", 2), ("zero1", 1)),
        (("zero2", 2), ("zero0", 3)),
        (("zero3", 2), ("zero2", 1)),
        (("zero0", 2), ("zero3", 3)),
        (("zero3", 3), ("zero3", 2)),
        (("zero3", 1), ("zero1", 2)),
        (("zero1_bf16", 2), ("zero3_bf16", 3)),
        (("zero2_autocast", 3), ("zero1_autocast", 2)),
    ],
    ids=lambda place: f"{place[0]}x{place[1]}",
)
def test_other_ranks_under_another_zero_stage_go_on(tmp_path: Path, before, after) -> None:
    """All ranks see the same batch, so that the global one is the same whatever their number."""
    saved, expected, _ = on_ranks(before[1], trained_and_saved, before[0], tmp_path)[0]
    restored, found = on_ranks(after[1], restored_and_trained, after[0], tmp_path)[0]
    for name in expected:
        assert torch.equal(restored[name], saved[name]), name
        # Gradients of bf16 weights are rounded, otherwise under another ZeRO stage: where one is next to nothing, a
        # step may go another way.
        atol = 5e-3 if "bf16" in after[0] else 1e-6
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=1e-4)
        assert (found[name] - expected[name]).abs().mean() < 1e-4
    moved = max(float((expected[name] - saved[name]).abs().max()) for name in expected)
    assert moved > 1e-3, "a step after the checkpoint that changes nothing would show nothing"


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero3", "zero1_bf16"])
def test_each_element_is_saved_once(tmp_path: Path, zero: str) -> None:
    sizes = [size for _, _, size in on_ranks(2, trained_and_saved, zero, tmp_path)]
    weights = sum(p.numel() for p in build_stage().parameters())
    frozen, width = build_stage().student.pos_embed.numel(), 2 if "bf16" in zero else 4
    counted = 8  # DeepSpeed leaves buffers in float32
    assert sum(sizes) == width * frozen + 12 * (weights - frozen) + counted
    assert max(sizes) < 0.75 * sum(sizes)
    reader = read_slices(tmp_path)
    assert reader.names == set(build_stage().state_dict())
    assert reader.kinds("student.norm.weight") == {"weights", "exp_avg", "exp_avg_sq"}
    assert reader.steps("student.norm.weight") == 2


def refused_state(folder: Path, spoil: str) -> str:
    engine = build_engine("zero1")
    if rank() == 0 and spoil == "damaged":
        (folder / "1.safetensors").write_bytes(b"nothing")
    barrier()
    reader = read_slices(folder)
    if spoil == "other":
        reader._parts["student.norm.weight"] = reader._parts["student.norm.weight"][:1]
        reader._parts.pop("counted")
    with pytest.raises(ValueError) as raised:
        engine.restore(reader)
    return str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [("other", "holds 0 elements of counted, which has 2: it is of another model"), ("damaged", "cannot be read")],
)
def test_a_state_that_does_not_fit_is_refused_on_all_ranks(tmp_path: Path, spoil: str, sentence: str) -> None:
    on_ranks(2, trained_and_saved, "zero1", tmp_path)
    for said in on_ranks(2, refused_state, tmp_path, spoil):
        assert sentence in said


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


DECAYS = (0.1, 0.5, 0.9)


def averaging(zero: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[list]]:
    """Three steps, of which the second is skipped, then a checkpoint: the average as it is exported and as DeepSpeed's
    own functions would have it, and features before, with and after the average in the weights' place."""
    engine = build_engine(zero, keeps_average=True)
    expected = {name: value.clone() for name, value in masters_of(engine).items()}
    for number, decay in enumerate(DECAYS):
        spoil = engine.module.student.norm.weight.register_hook(
            lambda gradient, factor=math.nan if number == 1 else 1.0: gradient * factor
        )
        train(engine, 1 + number)
        spoil.remove()
        engine.update_average(decay)
        if number != 1:
            expected = {name: torch.lerp(expected[name], now, 1 - decay) for name, now in masters_of(engine).items()}
    save_slices(engine, folder)
    exported = engine.full_state()
    engine.eval()
    with torch.no_grad():
        before = engine(batch(9))["features"].tolist()
        with engine.averaged():
            seen = [before, engine(batch(9))["features"].tolist()]
        seen.append(engine(batch(9))["features"].tolist())
    train(engine, 5)
    return exported, expected, [*seen, float(engine.outcome()[1])]


def masters_of(engine: Engine) -> dict[str, torch.Tensor]:
    """The whole float32 weights of what trains, by DeepSpeed's own function."""
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if engine.zero_stage == 0:
        return {name: parameter.detach() for name, parameter in trained.items()}
    return {name: safe_get_full_fp32_param(parameter) for name, parameter in trained.items()}


def not_averaging(zero: str) -> float:
    """The norm of the gradient of the step that follows the same three, of an engine that evaluates nothing."""
    engine = build_engine(zero)
    for number in range(len(DECAYS)):
        spoil = engine.module.student.norm.weight.register_hook(
            lambda gradient, factor=math.nan if number == 1 else 1.0: gradient * factor
        )
        train(engine, 1 + number)
        spoil.remove()
    train(engine, 5)
    return float(engine.outcome()[1])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero", [*ZEROS, "zero3_bf16", "zero2_autocast"])
def test_the_average_follows_the_weights_and_takes_their_place(tmp_path: Path, zero: str, ranks: int) -> None:
    exported, expected, (before, averaged, after, norm) = on_ranks(ranks, averaging, zero, tmp_path)[0]
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-5, atol=1e-7, msg=name)
    teacher = build_tiny_teacher()
    student = linearize(teacher, "linear")
    student.load_state_dict({name.removeprefix("student."): v for name, v in exported.items() if "student." in name})
    with torch.no_grad():
        features = student.eval()(batch(9)["image"])
    tolerance = 0.1 if "bf16" in zero or "autocast" in zero else 1e-4
    torch.testing.assert_close(torch.tensor(averaged), features, atol=tolerance, rtol=tolerance)
    assert before == after != averaged
    assert on_ranks(ranks, not_averaging, zero)[0] == norm, "to evaluate the average changes no training"


def averages_restored(zero: str, folder: Path) -> dict[str, torch.Tensor]:
    engine = build_engine(zero, keeps_average=True)
    train(engine, 7)
    engine.update_average(0.3)
    engine.restore(read_slices(folder))
    return engine.full_state()


@pytest.mark.parametrize(
    ("before", "after"),
    [(("zero1", 2), ("zero1", 2)), (("zero1", 2), ("zero3", 1)), (("zero3", 2), ("zero0", 1)),
     (("zero0", 1), ("zero2", 2)), (("zero1_bf16", 1), ("zero3_bf16", 2))],
    ids=lambda place: f"{place[0]}x{place[1]}",
)  # fmt: skip
def test_the_average_goes_on_under_any_zero_stage(tmp_path: Path, before, after) -> None:
    exported, *_ = on_ranks(before[1], averaging, before[0], tmp_path)[0]
    restored = on_ranks(after[1], averages_restored, after[0], tmp_path)[0]
    assert all(torch.equal(restored[name], value) for name, value in exported.items())


def cut_otherwise(zero: str, changes: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps of one and then two micro-batches, or of two from the start, the first of which are the same."""
    engine = build_engine(zero, accumulation=1 if changes else 2)
    norms = []
    for number, seeds in enumerate([(0,), (1, 2), (3, 4)]):
        if changes and number == 1:
            engine.set_accumulation(micro_batch_size=2, gradient_accumulation_steps=2)
        train(engine, *(seeds if changes or len(seeds) == 2 else 2 * seeds))
        assert engine.was_step_applied()
        norms.append(float(engine.outcome()[1]))
    return norms, engine.full_state()


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero1_bf16"])
def test_global_batches_can_be_cut_otherwise_on_the_way(zero: str) -> None:
    """Ranks see the same, so that a step's gradient is the mean over its micro-batches however it is cut."""
    (norms, found), (expected_norms, expected) = (on_ranks(2, cut_otherwise, zero, c)[0] for c in (True, False))
    assert norms == pytest.approx(expected_norms, rel=2e-2 if "bf16" in zero else 1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=5e-3 if "bf16" in zero else 1e-4, rtol=1e-3, msg=name)
