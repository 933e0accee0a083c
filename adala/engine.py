"""DeepSpeed behind four verbs: call, backward, step, save. The only file that imports deepspeed."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from adala.distributed import device, raise_together, rank, unlink_allreduce_buffers, uses_gpu, world_size
from adala.ds_config import DeepSpeedConfig

if not uses_gpu():
    # Without it DeepSpeed asks every accelerator in turn, which prints warnings and can pick one torch cannot use.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param


def check_ds_config(config: DeepSpeedConfig) -> None:
    """Has DeepSpeed read a configuration, so that what it refuses is refused before anything is built.

    Raises:
        ValueError: It refuses a key or a value, which the message names.
    """
    deepspeed.utils.logger.setLevel("WARNING")
    try:
        deepspeed.DeepSpeedConfig({**config.values, "train_micro_batch_size_per_gpu": 1})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"ds_config {config.name}: DeepSpeed refuses {key} {first['input']!r} in {error.title}: {first['msg']}"
        ) from error
    except (
        deepspeed.runtime.config.DeepSpeedConfigError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        raise ValueError(f"ds_config {config.name}: DeepSpeed refuses it: {error}") from error


class Engine:
    """A stage module under DeepSpeed: ``losses = engine(batch); engine.backward(loss); engine.step()``."""

    def __init__(
        self,
        module: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: DeepSpeedConfig,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        gradient_clipping: float,
    ):
        """Wraps ``module``, whose frozen parameters stay as they are.

        Args:
            module: The stage; moved to this rank's device and cast to the configuration's precision.
            build_optimizer: Called with the moved module.
            config: ZeRO and precision.
            micro_batch_size: Samples per rank and forward pass.
            gradient_accumulation_steps: Forward passes per optimizer step.
            gradient_clipping: Largest global gradient norm; 0 is none.
        """
        deepspeed.utils.logger.setLevel("WARNING")
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.zero_stage = config.zero_stage
        # As they are before DeepSpeed casts them to bf16.
        kept = _tensors(module) if config.rounds_weights else ()
        self._unrounded = {name: tensor.detach().cpu().clone() for name, tensor in kept}
        module.to(device())
        optimizer = build_optimizer(module)
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        full_config = {
            **config.completed(trained),
            "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size(),
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "gradient_clipping": gradient_clipping,
            "steps_per_print": 10**9,
            # It waits for the device in every step, and nobody reads it.
            "timers": {"throughput": {"enabled": False}},
        }
        try:
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=full_config, dist_init_required=False
            )
        except ZeRORuntimeException as error:
            raise ValueError(f"ds_config {config.name}: DeepSpeed refuses it: {error}") from error
        self.module: nn.Module = self._engine.module
        self._trains = False
        self._norm = math.nan
        self._is_norm_finite: bool | None = None
        # What has this switch looks at the norms of float32 gradients alone where it is off; all others look at all.
        looks = getattr(self._engine.optimizer, "check_grad_overflow", True) or config.dtype == torch.float32
        if self.zero_stage == 0 or not looks:
            self._guard_updates(optimizer)
        if not uses_gpu():
            unlink_allreduce_buffers()
        if config.rounds_weights:
            self._restore_masters()

    def _restore_masters(self) -> None:
        """Gives the optimizer the weights as they came: DeepSpeed copies its float32 weights from the rounded ones."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                _set_master(parameter, self._unrounded[name].float().to(device()))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients; DeepSpeed divides the loss by the accumulation steps itself."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Counts a forward pass, and updates the weights when a whole global batch has been seen.

        A gradient that is not finite leaves the weights as they are; :meth:`was_step_applied` tells.
        """
        self._is_norm_finite = None
        if self.zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = float(nn.utils.get_total_norm(gradients))
        self._engine.step()

    def _guard_updates(self, optimizer: torch.optim.Optimizer) -> None:
        """Has an update left out where the norm of the gradient is not finite.

        Without ZeRO nobody else looks at it, and of bf16 gradients DeepSpeed's optimizer of ZeRO 1 and 2 only with a
        check of every single one, which takes more calls than all else in a step. A norm is the same on all ranks.
        """
        update = optimizer.step

        def step(*arguments: Any, **options: Any) -> Any:
            if self._is_norm_finite is None:  # it is called once a group
                norm = self._norm if self.zero_stage == 0 else self._engine.optimizer._global_grad_norm
                self._is_norm_finite = math.isfinite(norm)
            return update(*arguments, **options) if self._is_norm_finite else None

        optimizer.step = step

    def set_rate(self, factor: float) -> None:
        """Sets each parameter group's rate to ``factor`` times its peak."""
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = factor * peak

    def was_step_applied(self) -> bool:
        """Whether the last :meth:`step` changed the weights; a gradient that is not finite is passed over."""
        return self._engine.was_step_applied() and self._is_norm_finite is not False

    def outcome(self) -> tuple[Tensor, Tensor]:
        """Of the last step, on this rank's device: whether it was skipped (0 or 1), and else the global gradient norm
        before clipping."""
        if not self.was_step_applied():
            return torch.ones((), device=device()), torch.zeros((), device=device())
        norm = self._norm if self.zero_stage == 0 else self._engine.get_global_grad_norm()
        return torch.zeros((), device=device()), torch.as_tensor(norm, dtype=torch.float32, device=device())

    def has_finite_weights(self) -> bool:
        """Whether this rank's part of the weights holds neither NaN nor infinity."""
        parts = (getattr(parameter, "ds_tensor", parameter) for parameter in self.module.parameters())
        return all(bool(part.detach().isfinite().all()) for part in parts)

    def train(self) -> None:
        # Once, not before every step: it goes through all modules, which takes milliseconds.
        if not self._trains:
            self._engine.train()
        self._trains = True

    def eval(self) -> None:
        self._engine.eval()
        self._trains = False

    def checkpoint_bytes(self) -> int:
        """About how many bytes :meth:`save` writes on all ranks together."""
        counted = [
            (getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in self.module.parameters()
        ]
        weights = sum(numel * size for numel, size, _ in counted)
        # AdamW's two moments, and under ZeRO the float32 weights.
        per_trained = 12 if self.zero_stage else 8
        return weights + per_trained * sum(numel for numel, _, trains in counted if trains)

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer of all ranks below ``folder``; every rank calls it.

        Raises:
            ValueError: A rank could not write its part.
        """
        error: Exception | None = None
        writer = self._engine.checkpoint_engine
        write = writer.save

        def keep_error(*arguments: Any, **options: Any) -> Any:
            # DeepSpeed's other ranks wait for this one: it may fail only after the last barrier.
            nonlocal error
            try:
                return write(*arguments, **options)
            except (OSError, RuntimeError) as raised:
                error = raised

        writer.save = keep_error
        try:
            self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        finally:
            writer.save = write
        if error is not None:
            error = ValueError(f"could not write the checkpoint {folder}: {error}; is the disk full?")
        raise_together(error)

    def load(self, folder: Path) -> None:
        """Reads what :meth:`save` wrote, on as many ranks and under the same ZeRO stage.

        Raises:
            ValueError: There is none.
        """
        # For a folder that is not there DeepSpeed raises an AssertionError.
        if not (folder / "deepspeed").is_dir():
            raise ValueError(f"checkpoint {folder}: DeepSpeed finds nothing to load there")
        self._engine.load_checkpoint(str(folder), tag="deepspeed")

    def full_state(self) -> dict[str, Tensor]:
        """All parameters and buffers on the CPU, gathered from whatever ZeRO stage; every rank calls it.

        Parameters are float32: trained ones from the optimizer's float32 copies. What training left alone comes
        unrounded, from before the cast to bf16; what it changed, as it is now. Only rank 0 gets the tensors; other
        ranks get an empty dict.
        """
        state = {}
        for name, parameter in self.module.named_parameters():
            full = self._full_parameter(parameter)
            if rank() == 0:
                state[name] = self._unless_changed(name, full).float()
        if rank() == 0:
            for name, buffer in self.module.state_dict().items():
                if name not in state:
                    state[name] = self._unless_changed(name, buffer)
        return state

    def _unless_changed(self, name: str, now: Tensor) -> Tensor:
        """A copy on the CPU of the tensor before it was rounded, where it is still that, else of what it is now."""
        now = now.detach().cpu()
        before = self._unrounded.get(name)
        if before is not None and before.shape == now.shape and torch.equal(before.to(now.dtype), now):
            return before.clone()
        return now.clone()

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


def _set_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets the optimizer's float32 copy of a whole parameter; every rank calls it."""
    if not hasattr(parameter, "ds_tensor"):
        safe_set_full_fp32_param(parameter, value)
        return
    # DeepSpeed's own function for ZeRO-3 cuts a rank's share out of the value, and fails where the ranks do not divide
    # its length: shares are padded.
    share = parameter.ds_tensor.numel()
    padded = nn.functional.pad(value.flatten(), (0, share * world_size() - value.numel()))
    safe_set_local_fp32_param(parameter, padded[share * rank() : share * (rank() + 1)])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, those that a state dict leaves out too."""
    yield from module.named_parameters()
    yield from module.named_buffers()
