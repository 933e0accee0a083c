"""Where a number that is not finite first arises in a step, told without waiting for a device.

A NaN spreads: forwards from the block that it arises in to the loss, backwards from there to all that comes before. Of
every block's output, of the gradients that pass from block to block, and of each part's own gradients one number is
kept in a step; the first that is not finite names the part.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

BLOCKS, LOSS, EMBEDDING = "student.blocks", "loss", "embedding"


@dataclass(frozen=True)
class Place:
    """Where a number arises, in words.

    Attributes:
        part: ``block 7``, counted from 0; ``embedding``, which is all before the blocks; what comes after them by the
            name of its module (``norm``, ``head``); ``loss``.
        direction: ``forward`` or ``backward``.
    """

    part: str
    direction: str


@dataclass(frozen=True)
class Fault:
    """The first number of a step that is not finite.

    Attributes:
        place: Where it arises; None where every rank's own numbers are finite, and their sum is not.
        ranks: On which ranks.
    """

    place: Place | None
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.place is None:
            return "it is finite on every rank by itself, and not where ranks and blocks are added up"
        ranks = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks[:4]))}"
        more = f" and {len(self.ranks) - 4} more" if len(self.ranks) > 4 else ""
        part = self.place.part if self.place.part.startswith("block ") else f"the {self.place.part}"
        return f"it begins in {part}, in the {self.place.direction} pass, on {ranks}{more}"

    def to_row(self) -> dict[str, Any]:
        """What a line of ``metrics.jsonl`` says of it."""
        part, direction = (None, None) if self.place is None else (self.place.part, self.place.direction)
        return {"first_in": part, "pass": direction, "ranks": list(self.ranks)}


class NonFiniteWatch:
    """Looks at a stage's forward and backward passes while it trains, in one call for each of its parts.

    Attributes:
        places: All that it knows, in the order of a step: forwards by depth, the loss, then backwards.
    """

    def __init__(self, module: nn.Module):
        """Hooks into blocks and trained parameters; before DeepSpeed, which moves gradients, and mixes in other ranks'.

        Args:
            module: A stage, whose student has blocks.
        """
        blocks = list(module.get_submodule(BLOCKS))
        self._blocks = [f"block {index}" for index in range(len(blocks))]
        named = dict(zip(module.named_parameters(), _parts(module), strict=True))
        # Registered in the order of depth.
        self._parts = list(dict.fromkeys([EMBEDDING, *self._blocks[:1], *named.values(), *self._blocks, LOSS]))
        forward = [Place(part, "forward") for part in (EMBEDDING, *self._blocks, LOSS)]
        self.places = (*forward, *(Place(part, "backward") for part in reversed(self._parts)))
        self._number = {place: number for number, place in enumerate(self.places)}
        self._is_on = False
        self._outputs: list[tuple[int, Tensor]] = []
        self._open: tuple[int, list[Tensor]] = (-1, [])
        self._norms: list[tuple[int, Tensor]] = []
        self._numbers: dict[tuple[int, ...], Tensor] = {}
        trained = {name: part for (name, parameter), part in named.items() if parameter.requires_grad}
        self._trained = Counter(self._number[Place(part, "backward")] for part in trained.values())
        self._due = self._trained.copy()
        self._handles = [blocks[0].register_forward_pre_hook(lambda _, inputs: self._after(0, inputs[0]))]
        for index, block in enumerate(blocks, 1):
            self._handles.append(block.register_forward_hook(partial(self._after_block, index)))
        for name, part in trained.items():
            hook = partial(self._after_gradient, self._number[Place(part, "backward")])
            self._handles.append(module.get_parameter(name).register_post_accumulate_grad_hook(hook))

    def begin_forward(self) -> None:
        """From now on what blocks give counts; not what they give once more to a backward pass, or to an evaluation."""
        self._is_on, self._due = torch.is_grad_enabled(), self._trained.copy()

    def end_forward(self, losses: Mapping[str, Any]) -> None:
        """Takes the stage's losses: ``loss``, and those of single blocks (``block07_loss``)."""
        if not self._is_on:
            return
        for name, value in losses.items():
            of_block = re.fullmatch(r"block(\d+)_loss", name)
            if of_block or name == LOSS:
                part = f"block {int(of_block[1])}" if of_block else LOSS
                self._outputs.append((self._number[Place(part, "forward")], value.detach()))
        self._look(*zip(*self._outputs, strict=True))
        self._outputs = []

    def end_backward(self) -> None:
        """Looks at what is left: a part some of whose parameters got no gradient."""
        self._close_part()
        self._is_on = False

    def first(self) -> Tensor:
        """Since it was last asked, the number of the first of :attr:`places` with a value that is not finite; how many
        there are where there is none. It stays on the device."""
        numbers, norms = zip(*self._norms, strict=True)
        self._norms = []
        is_finite = torch.stack(norms) < math.inf
        if numbers not in self._numbers:  # copied to the device once, not in every step
            self._numbers[numbers] = torch.tensor(numbers, device=is_finite.device)
        return self._numbers[numbers].masked_fill(is_finite, len(self.places)).min()

    def fault(self, first_of_ranks: Sequence[int]) -> Fault:
        """What the answers of all ranks to :meth:`first` say together."""
        first = min(first_of_ranks)
        if first == len(self.places):
            return Fault(None)
        return Fault(self.places[first], tuple(rank for rank, each in enumerate(first_of_ranks) if each == first))

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _look(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        # Sums of absolute values, of which none is finite by chance; two kernels on a GPU, however many tensors.
        self._norms += zip(numbers, torch._foreach_norm(list(tensors), 1), strict=True)

    def _after_block(self, index: int, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._after(index, output)

    def _after(self, index: int, x: Tensor) -> None:
        """Takes what comes out of the embedding (0) or of a block (from 1 on)."""
        if not self._is_on or not torch.is_grad_enabled():
            return
        # Held until the forward pass ends, and by the backward pass anyway.
        self._outputs.append((index, x.detach()))
        if x.requires_grad:
            part = ([EMBEDDING, *self._blocks])[index]
            # It comes out of what follows, after the gradients of all parameters there.
            number = self._number[Place(self._parts[self._parts.index(part) + 1], "backward")]
            self._due[number] += 1
            x.register_hook(partial(self._take, number))

    def _after_gradient(self, number: int, parameter: nn.Parameter) -> None:
        # Under another name: DeepSpeed puts another tensor in its place.
        self._take(number, parameter.grad.detach())

    def _take(self, number: int, gradient: Tensor) -> None:
        """Keeps a gradient until its part is through; the last part, too, before DeepSpeed adds up those of ranks."""
        if not self._is_on:
            return
        if number != self._open[0]:
            self._close_part()
            self._open = (number, [])
        self._open[1].append(gradient)
        if len(self._open[1]) == self._due[number]:
            self._close_part()

    def _close_part(self) -> None:
        number, gradients = self._open
        if gradients:
            self._look([number] * len(gradients), gradients)
        self._open = (-1, [])


def _parts(module: nn.Module) -> Iterator[str]:
    """The part of a stage that each of its parameters lies in, by their order: all that is registered before the blocks
    is their embedding, and what comes after them goes by its own name."""
    is_embedding = True
    for name, _ in module.named_parameters():
        of_block = re.match(rf"{re.escape(BLOCKS)}\.(\d+)\.", name)
        is_embedding = is_embedding and not of_block
        own = name.removeprefix("student.").partition(".")[0]
        yield f"block {int(of_block[1])}" if of_block else EMBEDDING if is_embedding else own
