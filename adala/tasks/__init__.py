"""Tasks: all that Stage 3, the loaders, the evaluation and the export know of targets, heads and metrics."""

from adala.tasks.base import Prediction, Task
from adala.tasks.classification import Classification
from adala.tasks.registry import describe_task, read_task, resolve_task, task_names

__all__ = ["Classification", "Prediction", "Task", "describe_task", "read_task", "resolve_task", "task_names"]
