"""AdaLA: pretrained softmax Vision Transformers adapted to linear attention.

student = adala.load_student("runs/demo/stage2")
features = student(images)                      # (B, N, D), all tokens after the final norm

Of one's own, in four verbs: ``linearize``, ``align``, ``evaluate``, ``export``.
"""

import importlib

# At once: importing the module later, by whatever way, would put the module in the place of the function.
from adala.students import linearize, restore_softmax

_LAZY = {
    "align": "adala.notebook",
    "choose_softmax_blocks": "adala.notebook",
    "load_teacher": "adala.backbones",
    "load_student": "adala.export",
    "load_task_model": "adala.export",
    "load_classifier": "adala.export",
    "mechanism_names": "adala.attention",
}

# Modules that can be called.
_VERBS = ("evaluate", "export")

__all__ = [*_VERBS, "linearize", "restore_softmax", *_LAZY]


def __getattr__(name: str) -> object:
    # Lazily: a mechanism's package imports adala.attention, and need not pay for all the rest.
    if name in _VERBS:
        return importlib.import_module(f"adala.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'adala' has no attribute {name!r}")
