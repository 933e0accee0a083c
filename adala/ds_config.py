"""A DeepSpeed configuration that holds ZeRO and precision only, read and checked without importing deepspeed."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# That of the working directory, that beside the package in its repository, and that in an installed package.
_PACKAGE = Path(__file__).resolve().parent
CONFIG_FOLDERS = (Path("ds_configs"), _PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")
RECIPE_KEYS = {
    "train_batch_size": "stageN.global_batch_size",
    "train_micro_batch_size_per_gpu": "stageN.micro_batch_size",
    "gradient_accumulation_steps": "stageN.micro_batch_size (the rest of the global batch is accumulated)",
    "gradient_clipping": "stageN.gradient_clipping",
    "optimizer": "stageN.lr, stageN.weight_decay and stageN.betas",
    "scheduler": "stageN.schedule and stageN.warmup_steps",
}
SECTIONS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types")
# What else decides how DeepSpeed communicates or what it measures, not what is trained. It ignores a key that it does
# not know, so that a misspelt section would be trained without.
OTHER_KEYS = (
    "communication_data_type", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
# Modules whose weights and gradients DeepSpeed communicates in autocast's dtype, by class name.
LOW_PRECISION = "lower_precision_safe_modules"
AUTOCAST_KEYS = ("enabled", "dtype", LOW_PRECISION)
GRADIENT_DTYPES = ("fp32", "bf16")
# Elements of a bucket of gradients. DeepSpeed makes buckets at their full size, by default 5e8 elements (2 GB in
# float32), however small the model is; this is a sixth of a ViT-L. What it does to speed was not measured.
REDUCE_BUCKET = 50_000_000


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

    @property
    def rounds_weights(self) -> bool:
        """Whether DeepSpeed keeps or gathers weights in bf16: float32 ones must be held elsewhere to be exported."""
        return self.dtype != torch.float32 or bool(self._sections().get("torch_autocast", {}).get(LOW_PRECISION))

    def completed(self, trained: int) -> dict[str, Any]:
        """What DeepSpeed gets: ``values``, and where these are silent what is better than its own defaults.

        Gradients of bf16 weights are added up over micro-batches and reduced over ranks in float32, and those under
        autocast are reduced in float32, most of which DeepSpeed would reduce in bf16: a sum over many ranks loses what
        is below 2^-8 of it. Buckets are no larger than the gradients that go through them.

        Args:
            trained: Elements of the trained parameters.
        """
        values = self._sections()
        if self.zero_stage > 0:
            bucket = {"reduce_bucket_size": max(1, min(trained, REDUCE_BUCKET))}
            values["zero_optimization"] = {**bucket, **values["zero_optimization"]}
        return values

    def _sections(self) -> dict[str, Any]:
        """:meth:`completed` but for what depends on the model."""
        values = dict(self.values)
        if self.dtype == torch.bfloat16:
            values["data_types"] = {"grad_accum_dtype": "fp32", **values.get("data_types", {})}
            # It looks at every gradient in a dozen calls; their norm tells as much (see Engine).
            values["bf16"] = {"check_grad_overflow": False, **values["bf16"]}
            values = {"communication_data_type": "fp32", **values}
        if self.autocast_dtype is not None:
            values["torch_autocast"] = {LOW_PRECISION: [], **values["torch_autocast"]}
        return values


def load_ds_config(name: str) -> DeepSpeedConfig:
    """Reads a DeepSpeed configuration that holds ZeRO and precision only.

    Args:
        name: Name in ``ds_configs/`` or path to a JSON file.

    Raises:
        ValueError: No such file, not a JSON object of sections, a key that the recipe owns (batch, rate, clipping: two
            places that say the same would one day disagree), a value that a key cannot have, or a precision that gives
            wrong results. What DeepSpeed alone knows to refuse, ``adala.engine.check_ds_config`` finds.
    """
    path = _find(name)
    try:
        values = json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        _check_keys(values)
        config = DeepSpeedConfig(name, values)
        _check_precision(config)
    except UnicodeDecodeError as error:
        raise ValueError(f"ds_config {path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"ds_config {path}: not valid JSON ({error})") from error
    except OSError as error:
        raise ValueError(f"ds_config {path}: it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"ds_config {path}: {error}") from error
    return config


def _find(name: str) -> Path:
    named = [folder / f"{name}.json" for folder in CONFIG_FOLDERS] if "/" not in name else []
    path = Path(os.path.expanduser(name))
    found = next((candidate for candidate in [*named, path] if candidate.is_file()), None)
    if found is None and path.is_dir():
        raise ValueError(f"ds_config {name}: it is a folder; give the .json file in it")
    if found is None:
        known = sorted({p.stem for folder in CONFIG_FOLDERS for p in folder.glob("*.json")})
        raise ValueError(
            f"ds_config {name}: there is no such configuration; known are {', '.join(known)}, or give the path of a "
            ".json file"
        )
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} stands twice in one object")
    return values


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number that a configuration can have")


def _check_keys(values: Any) -> None:
    """Refuses what is no object of known sections of the right types."""
    if not isinstance(values, dict):
        raise ValueError("it must be a JSON object, with sections such as zero_optimization")
    for key, owner in RECIPE_KEYS.items():
        if key in values:
            raise ValueError(f"{key} belongs into the recipe, as {owner}: remove it here")
    for key in values:
        if key not in SECTIONS + OTHER_KEYS:
            raise ValueError(f"{key} is not a key that it can have: {', '.join(SECTIONS + OTHER_KEYS)}")
    for key in (*SECTIONS, "aio", "comms_logger", "flops_profiler"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"{key} must be an object, not {json.dumps(values[key])}")
    for key in _automatic(values):
        raise ValueError(
            f'{key} is "auto", which only Hugging Face fills in: remove it for the default, or set a value'
        )
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {json.dumps(stage)}: it must be 0, 1, 2 or 3")
    for section in ("bf16", "fp16", "torch_autocast"):
        enabled = values.get(section, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise ValueError(f"{section}.enabled is {json.dumps(enabled)}: it must be true or false")
    for key in values.get("torch_autocast", {}):
        if key not in AUTOCAST_KEYS:
            raise ValueError(f"torch_autocast.{key} is not a key that it can have: {', '.join(AUTOCAST_KEYS)}")
    for key in ("offload_param", "offload_optimizer"):
        section = values.get("zero_optimization", {}).get(key) or {}
        if isinstance(section, dict) and section.get("device") == "nvme":
            raise ValueError(
                f'zero_optimization.{key}.device is "nvme", where checkpoints and exports do not reach: use "cpu"'
            )
    dtype = values.get("torch_autocast", {}).get("dtype", "bfloat16")
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f'torch_autocast.dtype is {json.dumps(dtype)}: it must be "bfloat16"')
    modules = values.get("torch_autocast", {}).get(LOW_PRECISION, [])
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ValueError(f"torch_autocast.{LOW_PRECISION} is {json.dumps(modules)}: it must be a list of class names")
    for key, value in values.get("data_types", {}).items():
        if key != "grad_accum_dtype":
            raise ValueError(f"data_types.{key} is not a key that it can have: grad_accum_dtype")
        if value not in GRADIENT_DTYPES:
            raise ValueError(f'data_types.{key} is {json.dumps(value)}: it must be "fp32" or "bf16"')


def _automatic(values: Any, key: str = "") -> Iterator[str]:
    """The dotted keys whose value is ``auto``."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _automatic(value, f"{key}{name}.")
        elif value == "auto":
            yield f"{key}{name}"


def _check_precision(config: DeepSpeedConfig) -> None:
    bf16, fp16 = config.values.get("bf16", {}), config.values.get("fp16", {})
    if fp16.get("enabled") or config.autocast_dtype == torch.float16:
        raise ValueError("fp16 overflows in linear attention's token sums: use bf16 or neither")
    if bf16.get("enabled") and config.zero_stage == 0:
        # DeepSpeed's optimizer for this pair keeps no float32 weights that can be exported, and its first AdamW step
        # counts as the second.
        raise ValueError("bf16 without ZeRO rounds what is exported: use zero_optimization.stage 1")
    if not config.values.get("zero_optimization", {}).get("compute_grad_norm", True):
        raise ValueError(
            "zero_optimization.compute_grad_norm false lets a gradient that is not finite into the weights, since "
            "nothing but its norm tells: remove it"
        )
    if config.values.get("data_types") and config.dtype == torch.float32:
        raise ValueError("data_types.grad_accum_dtype is of bf16 weights: without bf16.enabled gradients are float32")
