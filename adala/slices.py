"""What training has to remember, cut into slices that do not depend on how many ranks hold it, or how.

A slice is a stretch of one flattened parameter, or of a buffer, with what an optimizer keeps for it. Each rank writes
the slices that it holds into one safetensors file; whoever reads asks for a stretch of a parameter, and gets it from
whichever files hold parts of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# What a slice may hold besides an optimizer's own: the weights, in float32 where they train, and as they are elsewhere.
WEIGHTS = "weights"
# The average of the weights over steps, in float32, where one is kept.
AVERAGE = "average"


@dataclass(frozen=True)
class Slice:
    """A stretch of a flattened parameter or buffer.

    Attributes:
        name: The parameter's.
        start: Its first element.
        tensors: By what they are (``weights``, ``exp_avg``, ...): 1-D, equally long.
        steps: Updates that the optimizer has counted for it; 0 where it has seen none.
    """

    name: str
    start: int
    tensors: Mapping[str, Tensor]
    steps: int = 0

    @property
    def length(self) -> int:
        """Its number of elements."""
        return self.tensors[WEIGHTS].numel()

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def snapshot(slices: Iterable[Slice], pinned: dict[str, Tensor]) -> list[Slice]:
    """Copies on the CPU, which what trains on does not change.

    Args:
        slices: From wherever they lie.
        pinned: Memory of the last snapshot, which is used again; filled here. It belongs to the copies until they are
            written.
    """
    copies, on_gpu = [], False
    for part in slices:
        tensors = {}
        for kind, tensor in part.tensors.items():
            tensor = tensor.detach()
            key = f"{kind}/{part.name}@{part.start}"
            memory = pinned.get(key)
            if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
                memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            on_gpu = on_gpu or tensor.is_cuda
            pinned[key] = tensors[kind] = memory.copy_(tensor, non_blocking=True)
        copies.append(Slice(part.name, part.start, tensors, part.steps))
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return copies


def write_slices(path: Path, slices: Sequence[Slice]) -> None:
    """Writes one rank's slices.

    Raises:
        OSError: The file cannot be written.
    """
    tensors = {f"{kind}/{part.name}@{part.start}": tensor for part in slices for kind, tensor in part.tensors.items()}
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def describe_slices(slices: Sequence[Slice]) -> list[list[Any]]:
    """What a file of slices holds, for whoever looks for a stretch: name, first element, length, steps, kinds.

    Kinds are one text, with spaces between them.
    """
    return [[part.name, part.start, part.length, part.steps, " ".join(sorted(part.tensors))] for part in slices]


class SliceReader:
    """Reads stretches of parameters out of the files of all ranks that wrote them."""

    def __init__(self, folder: Path, contents: Mapping[str, Sequence[Sequence[Any]]]):
        """Opens nothing yet.

        Args:
            folder: Where the files lie.
            contents: By file name, what :func:`describe_slices` said of it.
        """
        self._folder = folder
        self._parts: dict[str, list[tuple[int, int, str]]] = {}
        self._steps: dict[str, int] = {}
        self._kinds: dict[str, set[str]] = {}
        self._open: dict[str, Any] = {}
        for file, described in contents.items():
            for name, start, length, steps, kinds in described:
                self._parts.setdefault(name, []).append((start, length, file))
                self._steps[name] = max(self._steps.get(name, 0), steps)
                self._kinds.setdefault(name, set()).update(kinds.split())

    @property
    def names(self) -> set[str]:
        """Parameters and buffers of which there is something."""
        return set(self._parts)

    def length(self, name: str) -> int:
        """Elements of a parameter; 0 where there is none of that name."""
        return max((start + length for start, length, _ in self._parts.get(name, ())), default=0)

    def steps(self, name: str) -> int:
        """Updates that the optimizer has counted for a parameter."""
        return self._steps.get(name, 0)

    def kinds(self, name: str) -> set[str]:
        """What was kept for a parameter."""
        return self._kinds.get(name, set())

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements ``start`` to ``stop`` (None: the last) of one tensor kept for a parameter, 1-D on the CPU.

        Raises:
            ValueError: No file holds some of them.
        """
        stop = self.length(name) if stop is None else stop
        found, at = [], start
        for begin, length, file in sorted(self._parts.get(name, ())):
            if at < stop and begin <= at < begin + length:
                end = min(stop, begin + length)
                found.append(self._stored(file, f"{kind}/{name}@{begin}")[at - begin : end - begin])
                at = end
        if at < stop:
            raise ValueError(f"the checkpoint {self._folder} holds no {kind} of {name} from element {at} on")
        return torch.cat(found) if found else torch.empty(0)

    def _stored(self, file: str, key: str) -> Any:
        try:
            return self._file(file).get_slice(key)
        except SafetensorError as error:
            raise ValueError(f"the checkpoint file {self._folder / file} does not hold {key}: {error}") from error

    def _file(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self._folder / file, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"the checkpoint file {self._folder / file} cannot be read: {error}") from error
        return self._open[file]
