"""Three optimizer steps of Stages 1 and 2 under every ZeRO stage; rank 0 writes weights and gradients to a file.

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
from adala.stages import AttentionAlignment, FeatureAlignment, Stage
from adala.students import linearize

GLOBAL_BATCH, STEPS, LR = 8, 3, 1e-2
CLIPPING = {"attention_alignment": 0.0, "feature_alignment": 0.1}


def global_batches() -> torch.Tensor:
    """(steps, global batch, 3, 16, 16)."""
    return torch.randn(STEPS, GLOBAL_BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def build_stage(name: str, release: bool = True) -> Stage:
    teacher = build_tiny_teacher()
    if name == "attention_alignment":
        student = linearize(teacher, "linear", keep=[1])
        freeze_except(student, QKV_PATTERNS)
        return AttentionAlignment(student, teacher, "mse", release_activations=release)
    # No softmax block here: the gradient of its key bias is zero but for rounding, which AdamW would blow up.
    return FeatureAlignment(linearize(teacher, "linear"), teacher, "mse")


def build_stage_optimizer(stage: torch.nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(stage, LR, weight_decay=0.1, betas=(0.9, 0.99))


def micro_batches(step: int, accumulation: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of a global batch, in ``accumulation`` pieces."""
    mine = global_batches()[step].chunk(world_size())[rank()]
    yield from ({"image": piece} for piece in mine.chunk(accumulation))


def run(name: str, zero: str, accumulation: int) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    from adala.engine import Engine, load_ds_config, zero_stage

    config = load_ds_config(zero)
    stage = build_stage(name, release=zero_stage(config) < 3)
    micro = GLOBAL_BATCH // world_size() // accumulation
    engine = Engine(stage, build_stage_optimizer, config, micro, accumulation, CLIPPING[name])
    result = {}
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


def main() -> None:
    init_distributed()
    results = {}
    for name in ("attention_alignment", "feature_alignment"):
        for zero in ("zero0", "zero1", "zero2", "zero3", "zero1_bf16", "zero1_autocast"):
            for accumulation in (1, 2):
                results[f"{name}/{zero}/{accumulation}"] = run(name, zero, accumulation)
    if rank() == 0:
        torch.save(results, Path(sys.argv[-1]))
    close_distributed()


if __name__ == "__main__":
    main()
