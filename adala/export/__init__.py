"""Students as folders, and what they become elsewhere: ONNX, torch.export, timm.

    from adala.export import load_student, save_student         # folders, see ``folder``
    adala.export(student, "student.onnx", size=448)             # other programs' forms, see ``portable``
    python -m adala.export runs/mine/stage2 --to onnx           # the same on the command line, see ``command``

The package is itself what is called by the name ``adala.export``, see :mod:`adala.verbs`.
"""

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
from adala.verbs import call_module

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


call_module(__name__, "adala.export.portable:export_model")
