"""What autograd holds for the backward pass: bytes of activations, counted on any device, ``meta`` included."""

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class SavedActivations(AbstractContextManager):
    """Counts the memory of the tensors that autograd saves while the context lasts, parameters left out.

    A storage counts once, however many views of it are saved, from when the first is saved until the last is let go.

    Attributes:
        bytes: Held now.
        peak_bytes: The most that was held at once.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()):
        """Counts nothing yet; ``parameters`` (weights, frozen ones and buffers too) are memory of the model anyway."""
        self.bytes = self.peak_bytes = 0
        self._ignored = {_storage_key(parameter) for parameter in parameters}
        self._holders: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Held.unpack)

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> "_Held":
        held, key = _Held(tensor), _storage_key(tensor)
        if key not in self._ignored:
            size = tensor.untyped_storage().nbytes()
            if not self._holders[key]:
                self.bytes += size
                self.peak_bytes = max(self.peak_bytes, self.bytes)
            self._holders[key] += 1
            weakref.finalize(held, self._let_go, key, size)
        return held

    def _let_go(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.bytes -= size


class _Held:
    """A saved tensor, whose end can be seen."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def unpack(self) -> Tensor:
        return self.tensor


def _storage_key(tensor: Tensor) -> int:
    # Not the address of the data, of which tensors on `meta` have none.
    return tensor.untyped_storage()._cdata
