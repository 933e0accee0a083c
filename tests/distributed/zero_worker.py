"""Three optimizer steps of each stage with its default loss under every ZeRO stage; rank 0 writes what came out.

Run by test_zero.py through the DeepSpeed launcher; the last argument is the output file.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_teacher import build_tiny_teacher

from adala.conversion import QKV_PATTERNS
from adala.distributed import close_distributed, init_distributed, rank, world_size
from adala.optim import build_optimizer, freeze_except
from adala.stages import AttentionAlignment, FeatureAlignment, Finetuning, Stage
from adala.students import linearize
from adala.tasks import Classification

GLOBAL_BATCH, STEPS, LR = 8, 3, 1e-2
CLIPPING = {"attention_alignment": 0.0, "feature_alignment": 0.1, "finetuning": 0.1}
NUM_CLASSES = 3


def global_batches() -> list[dict[str, torch.Tensor]]:
    """One a step; contrast differs a hundredfold between its images, and with it what they are compared with."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(STEPS, GLOBAL_BATCH, 3, 16, 16, generator=generator)
    images = images * torch.logspace(-1, 1, GLOBAL_BATCH)[:, None, None, None]
    labels = torch.randint(NUM_CLASSES, (STEPS, GLOBAL_BATCH), generator=generator)
    return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]


def build_stage(name: str, release: bool = True) -> Stage:
    teacher = build_tiny_teacher()
    if name == "attention_alignment":
        student = linearize(teacher, "linear", keep=[1])
        freeze_except(student, QKV_PATTERNS)
        stage = AttentionAlignment(student, teacher, release_activations=release)
    else:
        # No softmax block here: the gradient of its key bias is zero but for rounding, which AdamW would blow up.
        student = linearize(teacher, "linear")
        stage = FeatureAlignment(student, teacher)
        if name == "finetuning":
            task = Classification(NUM_CLASSES, label_smoothing=0.1)
            torch.manual_seed(0)
            stage = Finetuning(student, teacher, task, task.build_head(student))
    stage.calibrate(global_batches()[:1])
    return stage


def build_stage_optimizer(stage: torch.nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(stage, LR, weight_decay=0.1, betas=(0.9, 0.99))


def micro_batches(step: int, accumulation: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of a global batch, in ``accumulation`` pieces."""
    pieces = {
        name: value.chunk(world_size())[rank()].chunk(accumulation) for name, value in global_batches()[step].items()
    }
    yield from (dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True))


def run(name: str, zero: str, accumulation: int) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    from adala.ds_config import load_ds_config
    from adala.engine import Engine

    config = load_ds_config(zero)
    stage = build_stage(name, release=config.zero_stage < 3)
    micro = GLOBAL_BATCH // world_size() // accumulation
    engine = Engine(stage, build_stage_optimizer, config, micro, accumulation, CLIPPING[name])
    # Before any step: what a stage starts with must come out of the engine as it went in.
    result = {f"start/{key}": value for key, value in engine.full_state().items()}
    for step in range(STEPS):
        for index, batch in enumerate(micro_batches(step, accumulation)):
            engine.train()
            engine.backward(engine(batch)["loss"])
            if step == 0 and index == accumulation - 1:
                for key, parameter in engine.module.named_parameters():
                    if parameter.requires_grad:
                        result[f"gradient/{key}"] = safe_get_full_grad(parameter).detach().float().cpu().clone()
            engine.step()
        assert engine.was_step_applied()
    result |= {f"weight/{key}": value for key, value in engine.full_state().items()}
    engine.close()
    return result


def run_poisoned(zero: str) -> dict[str, torch.Tensor]:
    """Two steps, of which the first has a finite loss and a gradient that is not finite on one rank."""
    from adala.ds_config import load_ds_config
    from adala.engine import Engine

    stage = build_stage("feature_alignment")
    engine = Engine(stage, build_stage_optimizer, load_ds_config(zero), GLOBAL_BATCH // world_size(), 1, 1.0)
    poisoned = engine.module.student.norm.weight
    handle = poisoned.register_hook(lambda gradient: gradient * (float("nan") if rank() == 0 else 1.0))
    result = {}
    for step in range(2):
        (batch,) = micro_batches(step, 1)
        engine.train()
        loss = engine(batch)["loss"]
        engine.backward(loss)
        engine.step()
        handle.remove()
        result[f"loss/{step}"], result[f"applied/{step}"] = loss.detach(), torch.tensor(engine.was_step_applied())
        result |= {f"weight/{step}/{key}": value for key, value in engine.full_state().items()}
        result[f"finite/{step}"] = torch.tensor(engine.has_finite_weights())
    getattr(poisoned, "ds_tensor", poisoned).data.fill_(float("nan"))
    result["finite/spoilt"] = torch.tensor(engine.has_finite_weights())
    engine.close()
    return result


def main() -> None:
    init_distributed()
    results = {}
    for zero in ("zero0", "zero1", "zero2", "zero3", "zero1_bf16"):
        results[f"poisoned/{zero}"] = run_poisoned(zero)
    for name in CLIPPING:
        for zero in ("zero0", "zero1", "zero2", "zero3", "zero1_bf16", "zero1_autocast"):
            for accumulation in (1, 2):
                results[f"{name}/{zero}/{accumulation}"] = run(name, zero, accumulation)
        # Among its parameters are some whose elements two ranks cannot share evenly.
        results[f"{name}/zero3_bf16/1"] = run(name, "zero3_bf16", 1)
    if rank() == 0:
        torch.save(results, Path(sys.argv[-1]))
    close_distributed()


if __name__ == "__main__":
    main()
