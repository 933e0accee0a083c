"""Mechanisms by name: the three of this package, and whatever installed packages offer as entry points."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from adala.attention.base import AttentionShape, TokenMixer
from adala.plugins import find_plugins, load_plugin

ENTRY_POINT_GROUP = "adala.mechanisms"
BUILT_IN = {
    "softmax": "adala.attention.softmax:SoftmaxMixer",
    "linear": "adala.attention.linear:LinearMixer",
    "window": "adala.attention.window:WindowMixer",
}


@functools.cache
def _targets() -> dict[str, str]:
    return find_plugins("mechanism", ENTRY_POINT_GROUP, BUILT_IN)


def mechanism_names() -> list[str]:
    """The names of all mechanisms that can be used here, the built-in ones first."""
    return list(_targets())


def mechanism_name(mixer: TokenMixer) -> str:
    """The name that a mixer's mechanism goes by; its class's where it has none."""
    target = f"{type(mixer).__module__}:{type(mixer).__qualname__}"
    return next((name for name, known in _targets().items() if known == target), type(mixer).__qualname__)


def resolve_mechanism(name: str) -> type[TokenMixer]:
    """The token mixer class of a mechanism.

    Raises:
        ValueError: No mechanism has this name (the message lists those there are), or its package cannot be imported.
    """
    return load_plugin("mechanism", name, _targets())


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
