"""Modules that are verbs: ``adala.export(...)`` is the module ``adala.export``, and calls a function.

An import of a module puts it in the place of whatever its package has under that name, a function among it. So where
one name is to be both, the module has to be what is called.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


def call_module(name: str, target: str) -> None:
    """Has a module be called like a function, which is imported with the first call.

    Args:
        name: Of the module, ``__name__`` in it.
        target: Of the function, ``package.module:function``.
    """
    module, _, function = target.partition(":")

    class Verb(ModuleType):
        __slots__ = ()

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(module), function)(*arguments, **options)

    Verb.__call__.__doc__ = f":func:`{module}.{function}`."
    sys.modules[name].__class__ = Verb
