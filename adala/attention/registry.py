"""Mechanisms by name: the two of this package, and whatever installed packages offer as entry points."""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from adala.attention.base import AttentionShape, TokenMixer

ENTRY_POINT_GROUP = "adala.mechanisms"
BUILT_IN = {"softmax": "adala.attention.softmax:SoftmaxMixer", "linear": "adala.attention.linear:LinearMixer"}


@functools.cache
def _targets() -> dict[str, str]:
    """Import path (``module:class``) of every known mechanism."""
    targets = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if targets.setdefault(point.name, point.value) != point.value:
            raise ValueError(
                f"two installed packages offer the mechanism {point.name!r} ({targets[point.name]} and {point.value}): "
                "uninstall one of them"
            )
    return targets


def mechanism_names() -> list[str]:
    """The names of all mechanisms that can be used here, the built-in ones first."""
    return list(_targets())


def resolve_mechanism(name: str) -> type[TokenMixer]:
    """The token mixer class of a mechanism.

    Raises:
        ValueError: No mechanism has this name (the message lists those there are), or its package cannot be imported.
    """
    if name not in _targets():
        raise ValueError(f"unknown mechanism {name!r}: known are {', '.join(mechanism_names())}")
    module, _, attribute = _targets()[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # Anybody's code runs here, which may fail at anything.
        raise ValueError(
            f"mechanism {name!r} cannot be imported from {_targets()[name]} ({type(error).__name__}: {error}): mend or "
            "uninstall the package that offers it"
        ) from error


def build_mixer(name: str, shape: AttentionShape, options: Mapping[str, Any] | None = None) -> TokenMixer:
    """A token mixer by name, with options by field name.

    Raises:
        ValueError: Unknown mechanism, or an option that it does not have.
    """
    mixer_class = resolve_mechanism(name)
    known = {field.name for field in dataclasses.fields(mixer_class.Options)}
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise ValueError(
            f"mechanism {name!r} has no option {unknown[0]!r}: it has {', '.join(sorted(known)) or 'none at all'}"
        )
    return mixer_class(shape, mixer_class.Options(**(options or {})))
