"""How long training stands still for a checkpoint: DeepSpeed's own, ours when it is waited for, and ours as it is.

    python bench/checkpoint_pause.py --model vit_large_patch14_dinov2 --folder /tmp/checkpoints

One process; the state is real (weights and AdamW's moments after a step on a tiny image), the folder too. The last
column is what steps cost while a checkpoint is written beside them, against steps alone.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from adala.checkpoint import Checkpoints
from adala.distributed import close_distributed, init_distributed
from adala.ds_config import load_ds_config
from adala.engine import Engine
from adala.machine import machine_description
from adala.optim import build_optimizer

MIB = 2**20


class Shrinking(nn.Module):
    """Any backbone under some loss: what is measured is its state."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.student(batch["image"]).float().square().mean()}


def build_engine(name: str, zero: str) -> tuple[Engine, dict[str, Tensor]]:
    """An engine around timm's model of that name with random weights, and a batch of one tiny image for it."""
    patch = timm.create_model(name, num_classes=0).patch_embed.patch_size[0]
    model = timm.create_model(name, num_classes=0, img_size=2 * patch)
    engine = Engine(
        Shrinking(model),
        lambda module: build_optimizer(module, 1e-6, 0.0, (0.9, 0.999)),
        load_ds_config(zero),
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_clipping=1.0,
    )
    return engine, {"image": torch.randn(1, 3, 2 * patch, 2 * patch)}


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def step(engine: Engine, batch: dict[str, Tensor]) -> None:
    engine.backward(engine(batch)["loss"])
    engine.step()


def measure(name: str, zero: str, folder: Path, rounds: int) -> dict[str, float]:
    """Medians over rounds, in seconds; each round measures all of it one after the other."""
    engine, batch = build_engine(name, zero)
    engine.train()
    for _ in range(2):
        step(engine, batch)
    found: dict[str, list[float]] = {key: [] for key in ("deepspeed", "waited", "pause", "step", "step_beside")}
    checkpoints = Checkpoints(folder / "ours", engine)
    checkpoints.begin(0, {})  # the memory of its copy is there afterwards
    checkpoints.finish()
    for number in range(1, rounds + 1):
        theirs = folder / "deepspeed"
        save = engine._engine.save_checkpoint
        found["deepspeed"].append(seconds(lambda: save(str(theirs), tag="x", save_latest=False)))  # noqa: B023
        shutil.rmtree(theirs)
        found["step"].append(seconds(lambda: step(engine, batch)))
        found["pause"].append(seconds(lambda: checkpoints.begin(number, {})))  # noqa: B023
        while checkpoints.is_writing:
            found["step_beside"].append(seconds(lambda: step(engine, batch)))
        checkpoints.finish()
        found["waited"].append(seconds(lambda: (checkpoints.begin(number + rounds, {}), checkpoints.finish())))  # noqa: B023
    size = sum(part.bytes for part in engine.slices()) / MIB
    medians = {key: statistics.median(values) for key, values in found.items() if values}
    return {**medians, "steps_beside": len(found["step_beside"]) / rounds, "mib": size}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch14_dinov2", help="timm model, with random weights")
    parser.add_argument("--zero", default="zero1", help="name in ds_configs/")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints go; what is written is removed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    init_distributed()
    try:
        found = measure(options.model, options.zero, options.folder, options.rounds)
    finally:
        for name in ("ours", "deepspeed"):
            shutil.rmtree(options.folder / name, ignore_errors=True)
        close_distributed()
    print(json.dumps({"model": options.model, "zero": options.zero, **found, "machine": machine_description()}))
    print(
        f"{options.model}, {options.zero}, {found['mib']:,.0f} MiB: training stands still for "
        f"{found['deepspeed']:.2f} s under DeepSpeed's own, {found['waited']:.2f} s for ours if waited for, and "
        f"{found['pause']:.2f} s as it is"
    )
    beside = f", and {found['step_beside']:.2f} s beside the writing" if "step_beside" in found else ""
    print(f"a step takes {found['step']:.2f} s{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
