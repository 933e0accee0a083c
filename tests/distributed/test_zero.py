"""ZeRO 0, 1, 2 and 3 on two ranks against plain PyTorch on the same global batch: gradients and three AdamW steps."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch
from zero_worker import CLIPPING, STEPS, build_stage, build_stage_optimizer, global_batches

STAGES = tuple(CLIPPING)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp("zero") / "results.pt"
    finished = launch(Path(__file__).with_name("zero_worker.py"), str(output))
    assert finished.returncode == 0, finished.stdout
    return torch.load(output)


@pytest.fixture(scope="module", params=STAGES)
def plain(request: pytest.FixtureRequest) -> tuple[str, dict[str, torch.Tensor]]:
    """The same stage without DeepSpeed, without ranks, and with one graph over the whole global batch."""
    stage = build_stage(request.param, release=False).train()
    optimizer = build_stage_optimizer(stage)
    result = {}
    for step, batch in enumerate(global_batches()):
        optimizer.zero_grad()
        stage(batch)["loss"].backward()
        if step == 0:
            named = stage.named_parameters()
            result |= {f"gradient/{key}": p.grad.clone() for key, p in named if p.requires_grad}
        if CLIPPING[request.param]:
            torch.nn.utils.clip_grad_norm_(stage.parameters(), CLIPPING[request.param])
        optimizer.step()
    assert step == STEPS - 1
    return request.param, result | {f"weight/{key}": value for key, value in stage.state_dict().items()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_zero_agrees_with_plain_pytorch(plain, results, zero: str, accumulation: int) -> None:
    name, expected = plain
    found = {key: v for key, v in results[f"{name}/{zero}/{accumulation}"].items() if not key.startswith("start/")}
    assert set(found) == set(expected)
    assert any(key.startswith("gradient/") and value.abs().max() > 0 for key, value in expected.items())
    start = {f"weight/{key}": value for key, value in build_stage(name).state_dict().items()}
    for key, value in expected.items():
        # Gradients to rounding. Of weights the path from the start: AdamW turns a gradient near zero into a full step,
        # so that single elements may differ by more than rounding.
        scale = (value - start[key]).norm() if key in start else value.norm()
        assert (found[key] - value).norm() <= (1e-3 if key in start else 1e-5) * scale, key


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_bf16_follows_plain_pytorch(plain, results, precision: str, accumulation: int) -> None:
    name, expected = plain
    found = results[f"{name}/zero1_{precision}/{accumulation}"]
    gradients = [key for key in expected if key.startswith("gradient/")]
    ours = torch.cat([found[key].flatten() for key in gradients])
    theirs = torch.cat([expected[key].flatten() for key in gradients])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


@pytest.mark.parametrize("zero", ["zero1_bf16", "zero3_bf16"])
@pytest.mark.parametrize("name", STAGES)
def test_bf16_rounds_nothing_that_training_has_not_touched(results, name: str, zero: str) -> None:
    """Trained weights at the start, frozen ones at the end too."""
    state, found = build_stage(name).state_dict(), results[f"{name}/{zero}/1"]
    assert any(not torch.equal(value, value.bfloat16().float()) for value in state.values())
    for key, value in state.items():
        assert torch.equal(found[f"start/{key}"], value), key
    for key, parameter in build_stage(name).named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(found[f"weight/{key}"], state[key]), key


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero1_bf16"])
def test_a_gradient_that_is_not_finite_on_one_rank_leaves_the_weights_alone(results, zero: str) -> None:
    found, start = results[f"poisoned/{zero}"], build_stage("feature_alignment").state_dict()
    assert found["loss/0"].isfinite() and not found["applied/0"]
    assert found["applied/1"] and found["finite/0"] and found["finite/1"]
    assert not found["finite/spoilt"]
    for key, value in start.items():
        assert torch.equal(found[f"weight/0/{key}"], value), key
    assert any(not torch.equal(found[f"weight/1/{key}"], value) for key, value in start.items())
