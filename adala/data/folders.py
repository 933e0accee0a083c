"""Files in folders that people have, without what programs leave behind in them."""

import os
from collections.abc import Sequence
from pathlib import Path

# Left behind by macOS in archives.
NO_DATA = ("__MACOSX",)


def is_passed_over(name: str) -> bool:
    """Whether a file or folder is no part of the data: ``.ipynb_checkpoints``, macOS' ``._NAME``."""
    return name.startswith(".") or name in NO_DATA


def files_below(folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Files in a folder and all folders below it, links followed; with ``names``, below these alone.

    Raises:
        OSError: A folder cannot be read, whose files would be missing without a word.
    """
    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        # A link that leads back up would be followed for ever.
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        inside = folders if names is None or parent != str(folder) else names
        folders[:] = sorted(name for name in inside if not is_passed_over(name))
        found += [Path(parent) / name for name in sorted(files) if not is_passed_over(name)]
    return found


def _refuse(error: OSError) -> None:
    raise error
