"""Tasks by name: those of this package, and whatever installed packages offer as entry points."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from adala.plugins import find_plugins, load_plugin
from adala.tasks.base import Task

ENTRY_POINT_GROUP = "adala.tasks"
BUILT_IN = {
    "classification": "adala.tasks.classification:Classification",
    "multilabel": "adala.tasks.multilabel:Multilabel",
    "segmentation": "adala.tasks.segmentation:Segmentation",
}


@functools.cache
def _targets() -> dict[str, str]:
    return find_plugins("task", ENTRY_POINT_GROUP, BUILT_IN)


def task_names() -> list[str]:
    """The names of all tasks that can be used here, the built-in ones first."""
    return list(_targets())


def resolve_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: No task has this name (the message lists those there are), its package cannot be imported, or offers
            something else.
    """
    found = load_plugin("task", name, _targets())
    if not (isinstance(found, type) and issubclass(found, Task) and dataclasses.is_dataclass(found)):
        raise ValueError(
            f"what {_targets()[name]} offers as the task {name!r} is none: it must be a dataclass derived from "
            "adala.tasks.Task"
        )
    return found


def describe_task(task: Task) -> dict[str, Any]:
    """A task as JSON gives it back, every option written out; :func:`read_task` makes the task of it."""
    return _as_json_gives_it_back({"name": task.name, **dataclasses.asdict(task)})


def _as_json_gives_it_back(value: dict[str, Any]) -> dict[str, Any]:
    # What a mapping has as numbers to the left is text there: what a recipe says, and what a file says that was made of
    # it, must be the same.
    return json.loads(json.dumps(value))


def read_task(description: Mapping[str, Any]) -> Task:
    """The task of a description, which is its ``name`` and some of its options.

    Raises:
        ValueError: An unknown task, or options that it does not have, lacks, or cannot be so.
    """
    options = dict(description)
    name = options.pop("name", None)
    if not isinstance(name, str):
        said = "the name of the task is missing" if name is None else f"name is {name!r}, which is no name"
        raise ValueError(f"{said}: known are {', '.join(task_names())}")
    task_class = resolve_task(name)
    fields = {field.name: field for field in dataclasses.fields(task_class)}
    unknown = next((key for key in options if key not in fields), None)
    if unknown is not None:
        raise ValueError(f"task {name}: it has no option {unknown!r}, but {', '.join(fields)}")
    missing = next((key for key, field in fields.items() if key not in options and _is_required(field)), None)
    if missing is not None:
        raise ValueError(f"task {name}: it needs the option {missing!r}")
    try:
        return task_class(**_as_json_gives_it_back(options))
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from error


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
