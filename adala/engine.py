"""DeepSpeed behind four verbs: call, backward, step, save. The only file that imports deepspeed."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adala.distributed import device, rank, world_size

if not torch.cuda.is_available():
    # Without it DeepSpeed asks every accelerator in turn, which prints warnings and can pick one torch cannot use.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param

CONFIG_FOLDERS = (Path("ds_configs"), Path(__file__).resolve().parent.parent / "ds_configs")
RECIPE_KEYS = {
    "train_batch_size": "stageN.global_batch_size",
    "train_micro_batch_size_per_gpu": "stageN.micro_batch_size",
    "gradient_accumulation_steps": "stageN.micro_batch_size (the rest of the global batch is accumulated)",
    "gradient_clipping": "stageN.gradient_clipping",
    "optimizer": "stageN.lr, stageN.weight_decay and stageN.betas",
    "scheduler": "stageN.schedule and stageN.warmup_steps",
}


def load_ds_config(name: str) -> dict[str, Any]:
    """Reads a DeepSpeed configuration that holds ZeRO and precision only.

    Args:
        name: Name in ``ds_configs/`` or path to a JSON file.

    Raises:
        ValueError: No such file, not JSON, or a key that the recipe owns (batch, rate, clipping): two places that say
            the same would one day disagree.
    """
    candidates = [Path(name)] if name.endswith(".json") else [folder / f"{name}.json" for folder in CONFIG_FOLDERS]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted({p.stem for folder in CONFIG_FOLDERS for p in folder.glob("*.json")})
        raise ValueError(f"ds_config {name}: there is no such configuration; known are {', '.join(known)}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"ds_config {path}: not valid JSON ({error})") from error
    for key, owner in RECIPE_KEYS.items():
        if key in config:
            raise ValueError(f"ds_config {path}: {key} belongs into the recipe, as {owner}: remove it here")
    if config.get("fp16", {}).get("enabled"):
        raise ValueError(f"ds_config {path}: fp16 overflows in linear attention's token sums: use bf16 or neither")
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the student's weights and activations: bfloat16 or float32."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


class Engine:
    """A stage module under DeepSpeed: ``losses = engine(batch); engine.backward(loss); engine.step()``."""

    def __init__(
        self,
        module: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: Mapping[str, Any],
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        gradient_clipping: float,
    ):
        """Wraps ``module``, whose frozen parameters stay as they are.

        Args:
            module: The stage; moved to this rank's device and cast to the configuration's precision.
            build_optimizer: Called with the moved module.
            config: ZeRO and precision, from :func:`load_ds_config`.
            micro_batch_size: Samples per rank and forward pass.
            gradient_accumulation_steps: Forward passes per optimizer step.
            gradient_clipping: Largest global gradient norm; 0 is none.
        """
        deepspeed.utils.logger.setLevel("WARNING")
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.zero_stage = zero_stage(config)
        self._full_precision = _frozen_copies(module) if rank() == 0 else {}
        module.to(device())
        optimizer = build_optimizer(module)
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        full_config = {
            **config,
            "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size(),
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "gradient_clipping": gradient_clipping,
            "steps_per_print": 10**9,
        }
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=full_config, dist_init_required=False
        )
        self.module: nn.Module = self._engine.module

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients; DeepSpeed divides the loss by the accumulation steps itself."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Counts a forward pass, and updates the weights when a whole global batch has been seen."""
        self._engine.step()

    def set_rate(self, factor: float) -> None:
        """Sets each parameter group's rate to ``factor`` times its peak."""
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = factor * peak

    def was_step_applied(self) -> bool:
        """Whether the last :meth:`step` changed the weights; DeepSpeed skips steps that overflow without a word."""
        return self._engine.was_step_applied()

    def gradient_norm(self) -> float:
        """Global gradient norm of the last step before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer of all ranks below ``folder``; every rank calls it."""
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load(self, folder: Path) -> None:
        """Reads what :meth:`save` wrote, on as many ranks and under the same ZeRO stage.

        Raises:
            ValueError: It was written under other conditions.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise ValueError(f"checkpoint {folder}: DeepSpeed finds nothing to load there")

    def full_state(self) -> dict[str, Tensor]:
        """All parameters and buffers in float32 on the CPU, gathered from whatever ZeRO stage; every rank calls it.

        Trained parameters come from the optimizer's float32 copies and frozen ones from before the cast to bf16, so
        that nothing is rounded. Only rank 0 gets the tensors; other ranks get an empty dict.
        """
        state = {}
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            full = self._full_parameter(parameter)
            if rank() == 0:
                state[name] = self._full_precision.get(name, full).detach().float().cpu().clone()
        if rank() == 0:
            for name, buffer in self.module.state_dict().items():
                if name not in parameters:
                    state[name] = self._full_precision.get(name, buffer).detach().cpu().clone()
        return state

    def _full_parameter(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            if full is not None:
                return full
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter

    def close(self) -> None:
        """Lets go of optimizer and hooks, so that a further stage can be built in the same process."""
        self._engine.destroy()


def _frozen_copies(module: nn.Module) -> dict[str, Tensor]:
    """What training does not change, before it is cast: frozen parameters and floating-point buffers."""
    frozen = {name: p.detach().cpu().clone() for name, p in module.named_parameters() if not p.requires_grad}
    buffers = {name: b.detach().cpu().clone() for name, b in module.named_buffers() if b.is_floating_point()}
    return {**frozen, **buffers}
