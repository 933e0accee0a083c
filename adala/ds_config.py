"""A DeepSpeed configuration that holds ZeRO and precision only, read and checked without importing deepspeed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONFIG_FOLDERS = (Path("ds_configs"), Path(__file__).resolve().parent.parent / "ds_configs")
RECIPE_KEYS = {
    "train_batch_size": "stageN.global_batch_size",
    "train_micro_batch_size_per_gpu": "stageN.micro_batch_size",
    "gradient_accumulation_steps": "stageN.micro_batch_size (the rest of the global batch is accumulated)",
    "gradient_clipping": "stageN.gradient_clipping",
    "optimizer": "stageN.lr, stageN.weight_decay and stageN.betas",
    "scheduler": "stageN.schedule and stageN.warmup_steps",
}
SECTIONS = ("zero_optimization", "bf16", "fp16", "torch_autocast")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """ZeRO and precision of a run.

    Attributes:
        name: As the recipe names it.
        values: What DeepSpeed gets, without what the recipe adds.
    """

    name: str
    values: Mapping[str, Any]

    @property
    def zero_stage(self) -> int:
        return self.values.get("zero_optimization", {}).get("stage", 0)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the student's weights and activations: bfloat16 or float32."""
        return torch.bfloat16 if self.values.get("bf16", {}).get("enabled") else torch.float32

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that matrix products are cast to under autocast; None without autocast."""
        section = self.values.get("torch_autocast", {})
        return getattr(torch, section.get("dtype", "bfloat16")) if section.get("enabled") else None

    @property
    def precision(self) -> str:
        """In words, and what decides results of all this: ``float32``, ``bfloat16`` or ``autocast to ...``."""
        if self.autocast_dtype is not None:
            return f"autocast to {str(self.autocast_dtype).removeprefix('torch.')}"
        return str(self.dtype).removeprefix("torch.")


def load_ds_config(name: str) -> DeepSpeedConfig:
    """Reads a DeepSpeed configuration that holds ZeRO and precision only.

    Args:
        name: Name in ``ds_configs/`` or path to a JSON file.

    Raises:
        ValueError: No such file, not a JSON object of sections, a key that the recipe owns (batch, rate, clipping: two
            places that say the same would one day disagree), or a precision that gives wrong results.
    """
    candidates = [Path(name)] if name.endswith(".json") else [folder / f"{name}.json" for folder in CONFIG_FOLDERS]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted({p.stem for folder in CONFIG_FOLDERS for p in folder.glob("*.json")})
        raise ValueError(f"ds_config {name}: there is no such configuration; known are {', '.join(known)}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"ds_config {path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"ds_config {path}: it must be a JSON object, with sections such as zero_optimization")
    for key in SECTIONS:
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"ds_config {path}: {key} must be an object, not {values[key]!r}")
    for key, owner in RECIPE_KEYS.items():
        if key in values:
            raise ValueError(f"ds_config {path}: {key} belongs into the recipe, as {owner}: remove it here")
    config = DeepSpeedConfig(name, values)
    _check_precision(path, config)
    return config


def _check_precision(path: Path, config: DeepSpeedConfig) -> None:
    bf16, fp16 = config.values.get("bf16", {}), config.values.get("fp16", {})
    if config.zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"ds_config {path}: zero_optimization.stage is {config.zero_stage!r}: it must be 0, 1, 2 or 3")
    if fp16.get("enabled") or config.autocast_dtype == torch.float16:
        raise ValueError(f"ds_config {path}: fp16 overflows in linear attention's token sums: use bf16 or neither")
    if bf16.get("enabled") and config.zero_stage == 0:
        # DeepSpeed's optimizer for this pair keeps no float32 weights that can be exported, and its first AdamW step
        # counts as the second.
        raise ValueError(f"ds_config {path}: bf16 without ZeRO rounds what is exported: use zero_optimization.stage 1")
    if not bf16.get("check_grad_overflow", True):
        raise ValueError(
            f"ds_config {path}: bf16.check_grad_overflow false lets a gradient that is not finite into the weights: "
            "remove it"
        )
