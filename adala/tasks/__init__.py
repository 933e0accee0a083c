"""Tasks by name: what Stage 3, the loaders, the evaluation and the export know of a target, a head and its metrics."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adala.tasks.base import Task
from adala.tasks.classification import Classification

TASKS: dict[str, type[Task]] = {Classification.name: Classification}

__all__ = ["TASKS", "Classification", "Task", "describe_task", "read_task"]


def describe_task(task: Task) -> dict[str, Any]:
    """A task as JSON can hold it; :func:`read_task` gives it back."""
    return {"name": task.name, **dataclasses.asdict(task)}


def read_task(description: Mapping[str, Any]) -> Task:
    """The task of a description.

    Raises:
        ValueError: An unknown task, or options that it does not have.
    """
    options = dict(description)
    name = options.pop("name", None)
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: known are {', '.join(TASKS)}")
    try:
        return TASKS[name](**options)
    except TypeError as error:
        raise ValueError(f"task {name}: {error}") from error
