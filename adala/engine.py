"""DeepSpeed behind a few verbs: call, backward, step, and what is to be saved. The only file that imports deepspeed."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from adala.distributed import (
    all_reduce_sum,
    device,
    raise_together,
    rank,
    set_timeouts,
    unlink_allreduce_buffers,
    uses_gpu,
    world_size,
)
from adala.ds_config import DeepSpeedConfig
from adala.nonfinite import NonFiniteWatch
from adala.slices import AVERAGE, WEIGHTS, Slice, SliceReader

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
    """A stage module under DeepSpeed: ``losses = engine(batch); engine.backward(loss); engine.step()``.

    Attributes:
        module: The stage.
        watch: Which says where a number that is not finite first arises.
        keeps_average: Whether the trained weights are averaged over steps.
    """

    def __init__(
        self,
        module: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: DeepSpeedConfig,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        gradient_clipping: float,
        keeps_average: bool = False,
    ):
        """Wraps ``module``, whose frozen parameters stay as they are.

        Args:
            module: The stage; moved to this rank's device and cast to the configuration's precision.
            build_optimizer: Called with the moved module.
            config: ZeRO and precision.
            micro_batch_size: Samples per rank and forward pass.
            gradient_accumulation_steps: Forward passes per optimizer step.
            gradient_clipping: Largest global gradient norm; 0 is none.
            keeps_average: Whether the trained weights are averaged over steps, see :meth:`update_average`.
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
        self.watch = NonFiniteWatch(module)
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
        set_timeouts()
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
        self.keeps_average = keeps_average
        # By the float32 tensor that the optimizer updates: of ZeRO's flat ones this rank's part, laid out alike.
        self._averages = {master: master.detach().clone() for master in self._masters()} if keeps_average else {}

    def _masters(self) -> list[Tensor]:
        """What the optimizer updates on this rank, in float32."""
        if self.zero_stage == 0:
            return [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return list(dict.fromkeys(place.flat for place in self._places() if place.flat is not None))

    def _restore_masters(self) -> None:
        """Gives the optimizer the weights as they came: DeepSpeed copies its float32 weights from the rounded ones."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                _set_master(parameter, self._unrounded[name].float().to(device()))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        self.watch.begin_forward()
        outputs = self._engine(batch)
        self.watch.end_forward(outputs)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients; DeepSpeed divides the loss by the accumulation steps itself."""
        self._engine.backward(loss)
        self.watch.end_backward()

    def step(self) -> None:
        """Counts a forward pass, and updates the weights when a whole global batch has been seen.

        A gradient that is not finite leaves the weights as they are; :meth:`was_step_applied` tells.
        """
        self._is_norm_finite = None
        updates = self._engine.is_gradient_accumulation_boundary()
        if updates:
            self._first_non_finite = self.watch.first()
        if self.zero_stage == 0 and updates:
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

    def set_accumulation(self, micro_batch_size: int, gradient_accumulation_steps: int) -> None:
        """Cuts global batches otherwise from the next step on.

        Args:
            micro_batch_size: Samples per rank and forward pass.
            gradient_accumulation_steps: Forward passes per optimizer step.
        """
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self._engine.set_train_micro_batch_size(micro_batch_size)
        self._engine.set_train_batch_size(micro_batch_size * gradient_accumulation_steps * world_size())
        # It tells the last micro-batch of a step by the remainder of their count.
        self._engine.micro_steps = 0
        if self.zero_stage:
            self._engine.optimizer.gradient_accumulation_steps = gradient_accumulation_steps

    def set_rate(self, factor: float) -> None:
        """Sets each parameter group's rate to ``factor`` times its peak."""
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = factor * peak

    def was_step_applied(self) -> bool:
        """Whether the last :meth:`step` changed the weights; a gradient that is not finite is passed over."""
        return self._engine.was_step_applied() and self._is_norm_finite is not False

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Has the average of the trained weights follow them after a step; nothing where that was skipped.

        Each rank averages what its optimizer updates; nothing is communicated.

        Args:
            decay: What stays of the average; the weights are the rest.
        """
        if self._averages and self.was_step_applied():
            masters = [master.detach() for master in self._averages]
            torch._foreach_lerp_(list(self._averages.values()), masters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the module's weights are their average, where one is kept; every rank enters it.

        It leaves without communication, so that a rank may also leave by an exception. Nothing trains within.
        """
        if not self.keeps_average:
            yield
            return
        held, places = {}, self._places_by_name()
        self._release_gathered()
        try:
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    part = getattr(parameter, "ds_tensor", parameter).detach()
                    held[part] = part.clone()
                    self._show_average(parameter, places[name])
            yield
        finally:
            self._release_gathered()
            for part, value in held.items():
                part.copy_(value)

    def _show_average(self, parameter: nn.Parameter, places: list["_Place"]) -> None:
        if not hasattr(parameter, "ds_tensor"):
            parameter.detach().copy_(self._full_average(parameter, places))
            return
        for place in places:
            place.weights.copy_(place.within(self._averages[place.flat]))

    def _full_average(self, parameter: nn.Parameter, places: list["_Place"]) -> Tensor:
        """The average of a whole trained parameter, in float32; every rank calls it with its own ``places`` of it."""
        if self.zero_stage == 0:
            return self._averages[parameter]
        full = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), device=device())
        for place in places:
            full[place.start : place.start + place.length] = place.within(self._averages[place.flat])
        # The ranks' parts do not overlap: the sum is exact.
        return all_reduce_sum(full).view(getattr(parameter, "ds_shape", parameter.shape))

    def outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the last step, on this rank's device: whether it was skipped (0 or 1), and else the global gradient norm
        before clipping; which of the ``watch``'s places was the first that was not finite on this rank."""
        first = self._first_non_finite
        if not self.was_step_applied():
            return torch.ones((), device=device()), torch.zeros((), device=device()), first
        norm = self._norm if self.zero_stage == 0 else self._engine.get_global_grad_norm()
        return torch.zeros((), device=device()), torch.as_tensor(norm, dtype=torch.float32, device=device()), first

    def has_finite_weights(self) -> bool:
        """Whether this rank's part of the weights holds neither NaN nor infinity."""
        parts = (getattr(parameter, "ds_tensor", parameter) for parameter in self.module.parameters())
        return bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())

    def train(self) -> None:
        # Once, not before every step: it goes through all modules, which takes milliseconds.
        if not self._trains:
            self._engine.train()
        self._trains = True

    def eval(self) -> None:
        self._engine.eval()
        self._trains = False

    def slices(self) -> list[Slice]:
        """What this rank holds of the training's state: views, which the next step changes.

        Over all ranks together each element of every parameter and buffer once, with its optimizer state: what ZeRO has
        cut stays on the rank that has it, what all ranks hold alike is shared out among them.
        """
        found = [self._slice_of(place) for place in self._places()]
        for name, tensor in self._unpartitioned():
            whole = tensor.detach().flatten()
            state = self._optimizer.state.get(tensor, {}) if self.zero_stage == 0 else {}
            kept = {kind: value.flatten() for kind, value in self._kept(state, tensor).items()}
            found.append(Slice(name, 0, {WEIGHTS: whole, **kept}, _steps_of(state)))
        return found

    def _slice_of(self, place: "_Place") -> Slice:
        if place.flat is None:
            return Slice(place.name, place.start, {WEIGHTS: place.weights})
        state = self._optimizer.state.get(place.flat, {})
        kept = {kind: place.within(value) for kind, value in self._kept(state, place.flat).items()}
        return Slice(place.name, place.start, {WEIGHTS: place.within(place.flat.detach()), **kept}, _steps_of(state))

    def _kept(self, state: Mapping[str, Any], master: Tensor) -> dict[str, Tensor]:
        """What is kept for each element of ``master`` beside it."""
        average = {AVERAGE: self._averages[master]} if master in self._averages else {}
        return {**_kept_of(state, master), **average}

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The plain optimizer, whose parameters are ZeRO's flat float32 tensors where there is ZeRO."""
        return self._engine.optimizer.optimizer if self.zero_stage else self._engine.optimizer

    def _places(self) -> Iterator["_Place"]:
        """Where ZeRO keeps this rank's parts of parameters."""
        zero = self._engine.optimizer
        # The optimizer that DeepSpeed takes for ZeRO-1 with bf16 weights and float32 gradients names them otherwise.
        flats = getattr(zero, "fp32_groups_flat_partition", getattr(zero, "single_partition_of_fp32_groups", ()))
        for name, parameter in self.module.named_parameters():
            if hasattr(parameter, "ds_tensor"):
                share = parameter.ds_tensor.numel()  # padded, so that all ranks' are equal
                start = rank() * share
                length = min(share, parameter.ds_numel - start)
                if length <= 0:
                    continue
                weights = parameter.ds_tensor.detach().flatten()[:length]
                if parameter.requires_grad:
                    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                    yield _Place(name, start, length, weights, zero.fp32_partitioned_groups_flat[group], offset)
                else:
                    yield _Place(name, start, length, weights)
            elif getattr(parameter, "_hp_mapping", None) is not None:
                mapping = parameter._hp_mapping
                within, held = mapping.lp_fragment_address, mapping.hp_fragment_address
                weights = parameter.detach().flatten()[within.start : within.start + within.numel]
                yield _Place(name, within.start, within.numel, weights, flats[mapping.param_group_index], held.start)

    def _places_by_name(self) -> Mapping[str, list["_Place"]]:
        places = defaultdict(list)
        for place in self._places():
            places[place.name].append(place)
        return places

    def _unpartitioned(self) -> list[tuple[str, Tensor]]:
        """This rank's share of what all ranks hold alike, about equal in bytes."""
        whole = [
            (name, parameter)
            for name, parameter in self.module.named_parameters()
            if not (hasattr(parameter, "ds_tensor") or (self.zero_stage and parameter.requires_grad))
        ]
        whole += self._buffers().items()
        total, before, mine = sum(tensor.nbytes for _, tensor in whole), 0, []
        for name, tensor in whole:
            if before * world_size() // max(1, total) == rank():
                mine.append((name, tensor))
            before += tensor.nbytes
        return mine

    def _buffers(self) -> dict[str, Tensor]:
        """Those that a state dict holds."""
        parameters = dict(self.module.named_parameters())
        return {name: value for name, value in self.module.state_dict().items() if name not in parameters}

    def restore(self, reader: SliceReader) -> None:
        """Takes over what :meth:`slices` gave, on whatever number of ranks and under whatever ZeRO stage.

        Raises:
            ValueError: It is not of this module, or cannot be read; every rank raises.
        """
        error = None
        try:
            self._check_fits(reader)
            self._take_over(reader)
        except ValueError as raised:
            error = raised
        raise_together(error)
        if self.zero_stage == 3:
            self._engine.optimizer.checkpoint_event_epilogue()

    def _take_over(self, reader: SliceReader) -> None:
        self._release_gathered()
        for place in self._places():
            if place.flat is not None:
                self._restore_flat(reader, place)
            elif self.zero_stage == 3:
                place.weights.copy_(reader.read(place.name, WEIGHTS, place.start, place.start + place.length))
        with torch.no_grad():
            for name, tensor in [*self.module.named_parameters(), *self._buffers().items()]:
                if hasattr(tensor, "ds_tensor"):
                    continue
                tensor.copy_(reader.read(name, WEIGHTS).view(tensor.shape))
                if self.zero_stage == 0 and tensor.requires_grad:
                    self._restore_kept(reader, _Place(name, 0, tensor.numel(), tensor, tensor, 0))

    def _check_fits(self, reader: SliceReader) -> None:
        wanted = {name: getattr(p, "ds_numel", p.numel()) for name, p in self.module.named_parameters()}
        wanted |= {name: buffer.numel() for name, buffer in self._buffers().items()}
        for name, length in wanted.items():
            if reader.length(name) != length:
                raise ValueError(
                    f"the checkpoint holds {reader.length(name)} elements of {name}, which has {length}: it is of "
                    "another model; add --overwrite to begin the stage anew, or choose another --run_name"
                )

    def _release_gathered(self) -> None:
        """Has ZeRO-3 forget whole parameters that it keeps gathered: it would not see that their parts change."""
        gathered = [p for p in self.module.parameters() if hasattr(p, "ds_tensor") and p.ds_status.name == "AVAILABLE"]
        if gathered:
            gathered[0].partition(gathered)

    def _restore_flat(self, reader: SliceReader, place: "_Place") -> None:
        weights = reader.read(place.name, WEIGHTS, place.start, place.start + place.length)
        place.within(place.flat.detach()).copy_(weights)
        place.weights.copy_(weights)
        self._restore_kept(reader, place)

    def _restore_kept(self, reader: SliceReader, place: "_Place") -> None:
        """The average and the optimizer's moments of a place."""
        if place.flat in self._averages:
            average = reader.read(place.name, AVERAGE, place.start, place.start + place.length)
            place.within(self._averages[place.flat]).copy_(average)
        steps = reader.steps(place.name)
        if not steps:
            return
        state = self._optimizer.state[place.flat]
        for kind in reader.kinds(place.name) - {WEIGHTS, AVERAGE}:
            if kind not in state:
                state[kind] = torch.zeros_like(place.flat, requires_grad=False)
            place.within(state[kind]).copy_(reader.read(place.name, kind, place.start, place.start + place.length))
        # As torch's own optimizers keep it: beside the weights where one kernel updates them, else on the CPU.
        where = place.flat.device if self._optimizer.param_groups[0].get("fused") else "cpu"
        state["step"] = torch.tensor(float(max(steps, _steps_of(state))), device=where)

    def full_state(self) -> dict[str, Tensor]:
        """All parameters and buffers on the CPU, gathered from whatever ZeRO stage; every rank calls it.

        Parameters are float32: trained ones from the optimizer's float32 copies, or their average where one is kept.
        What training left alone comes unrounded, from before the cast to bf16; what it changed, as it is now. Only
        rank 0 gets the tensors; other ranks get an empty dict.
        """
        state, places = {}, self._places_by_name()
        for name, parameter in self.module.named_parameters():
            full = self._full_parameter(parameter, places[name])
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

    def _full_parameter(self, parameter: nn.Parameter, places: list["_Place"]) -> Tensor:
        if parameter.requires_grad and self.keeps_average:
            return self._full_average(parameter, places)
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
        self.watch.close()
        self._engine.destroy()


@dataclass(frozen=True)
class _Place:
    """Where this rank keeps a stretch of a parameter.

    Attributes:
        name: The parameter's.
        start: The stretch's first element within it.
        length: Number of elements.
        weights: The stretch itself, in the model's dtype.
        flat: The optimizer's float32 tensor that holds it; None where it does not train.
        offset: Where it begins in ``flat``.
    """

    name: str
    start: int
    length: int
    weights: Tensor
    flat: Tensor | None = None
    offset: int = 0

    def within(self, flat: Tensor) -> Tensor:
        """The stretch of a tensor that is laid out as ``flat`` is."""
        return flat.view(-1)[self.offset : self.offset + self.length]


def _kept_of(state: Mapping[str, Any], weights: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps for each element of ``weights``, by its name there."""
    tensors = {kind: value for kind, value in state.items() if torch.is_tensor(value) and kind != "step"}
    return {kind: value for kind, value in tensors.items() if value.shape == weights.shape}


def _steps_of(state: Mapping[str, Any]) -> int:
    return int(state.get("step", 0))


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
