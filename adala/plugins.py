"""What goes by a name and may come from anybody's package: mechanisms and tasks, found through entry points."""

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any


def find_plugins(kind: str, group: str, built_in: Mapping[str, str]) -> dict[str, str]:
    """Import paths (``module:attribute``) by name: the built-in ones, then those of installed packages.

    Args:
        kind: What they are, for messages.
        group: Of the entry points.
        built_in: Those of this package.

    Raises:
        ValueError: Two packages offer one name.
    """
    targets = dict(built_in)
    for point in entry_points(group=group):
        if targets.setdefault(point.name, point.value) != point.value:
            raise ValueError(
                f"two installed packages offer the {kind} {point.name!r} ({targets[point.name]} and {point.value}): "
                "uninstall one of them"
            )
    return targets


def load_plugin(kind: str, name: str, targets: Mapping[str, str]) -> Any:
    """What stands under a name among ``targets``.

    Raises:
        ValueError: Nothing has this name (the message lists what there is), or its package cannot be imported.
    """
    if name not in targets:
        raise ValueError(f"unknown {kind} {name!r}: known are {', '.join(targets)}")
    module, _, attribute = targets[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # Anybody's code runs here, which may fail at anything.
        raise ValueError(
            f"{kind} {name!r} cannot be imported from {targets[name]} ({type(error).__name__}: {error}): mend or "
            "uninstall the package that offers it"
        ) from error
