"""Modules that repeat in depth under torch.compile, all of which share one compiled graph."""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def compiled_call(backend: str = "inductor") -> Callable[..., Any]:
    """A compiled ``call(function, module, *inputs)`` with a cache of its own.

    torch.compile keeps what it compiled at the code object of the function: ten networks through one function would
    search each other's entries at every call, and fall back to eager at the eighth. Through one such function, modules
    that are built alike share one graph, whose inputs their weights are: a graph of the whole network would hold the
    same block 24 times over and take a minute to compile instead of seconds.
    """

    def call(function: Callable[..., Any], module: nn.Module, *inputs: Any, **arguments: Any) -> Any:
        return function(module, *inputs, **arguments)

    own = types.FunctionType(call.__code__.replace(co_name="call_of_one_model"), call.__globals__)
    return torch.compile(own, backend=backend, dynamic=False)


class CompiledModules:
    """Has a method of modules built alike run compiled while ``is_on``.

    Off where batches come in many sizes (an evaluation), each of which would be compiled.
    """

    def __init__(self, modules: Iterable[nn.Module], method: str = "forward", backend: str = "inductor"):
        """Takes the place of ``method`` on every one of ``modules``; their hooks and ``__call__`` stay outside."""
        self.is_on = False
        self._call = compiled_call(backend)
        for module in modules:
            function = getattr(type(module), method)
            setattr(module, method, functools.partial(self._run, function, module))

    def _run(self, function: Callable[..., Any], module: nn.Module, *inputs: Any, **arguments: Any) -> Any:
        call = self._call if self.is_on else _call_eagerly
        return call(function, module, *inputs, **arguments)


def _call_eagerly(function: Callable[..., Any], module: nn.Module, *inputs: Any, **arguments: Any) -> Any:
    return function(module, *inputs, **arguments)
