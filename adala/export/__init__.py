"""Students as folders, and what they become elsewhere: ONNX, torch.export, timm.

    from adala.export import load_student, save_student         # folders, see ``folder``
    adala.export(student, "student.onnx", size=448)             # other programs' forms, see ``portable``
    python -m adala.export runs/mine/stage2 --to onnx           # the same on the command line, see ``command``

The package is itself what is called by the name ``adala.export``: an import puts a module in the place of any function
of its name, so that the module has to be the function.
"""

import sys
from types import ModuleType
from typing import Any

from adala.export.folder import (
    DESCRIPTION,
    HEAD_WEIGHTS,
    WEIGHTS,
    StudentDescription,
    TaskModel,
    has_student,
    load_classifier,
    load_student,
    load_task_model,
    read_description,
    save_student,
)

__all__ = [
    "DESCRIPTION",
    "HEAD_WEIGHTS",
    "WEIGHTS",
    "StudentDescription",
    "TaskModel",
    "has_student",
    "load_classifier",
    "load_student",
    "load_task_model",
    "read_description",
    "save_student",
]


class _CallableModule(ModuleType):
    def __call__(self, model: Any, path: Any, **options: Any) -> Any:
        """:func:`adala.export.portable.export_model`."""
        # Imported here: whoever loads a student need not pay for it.
        from adala.export.portable import export_model

        return export_model(model, path, **options)


sys.modules[__name__].__class__ = _CallableModule
