"""AdaLA: pretrained softmax Vision Transformers adapted to linear attention.

student = adala.load_student("runs/demo/stage2")
features = student(images)                      # (B, N, D), all tokens after the final norm
"""

import importlib

_PUBLIC = {
    "linearize": "adala.linearize",
    "load_teacher": "adala.backbones",
    "load_student": "adala.export",
    "load_classifier": "adala.export",
    "mechanism_names": "adala.attention",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    # Lazily: a mechanism's package imports adala.attention, and need not pay for timm and the rest.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'adala' has no attribute {name!r}")
