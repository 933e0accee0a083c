"""Checks a converted checkpoint against the graph it came from: ``python verify.py CHECKPOINT REFERENCE``.

REFERENCE holds images and the features that the ONNX graph gave for them, written by ``checkpoint.py``.
"""

import sys

import torch
from safetensors.torch import load_file

from adala.backbones import load_teacher
from adala.similarity import relative_error

MODEL = "vit_small_patch14_dinov2.lvd142m"
# Two runtimes in float32 sum in different orders; a wrong weight shows up above 1e-2.
TOLERANCE = 1e-4


def main(checkpoint: str, reference: str) -> int:
    expected = load_file(reference)
    teacher = load_teacher(MODEL, expected["images"].shape[-2:], checkpoint)
    with torch.no_grad():
        difference = relative_error(teacher(expected["images"]), expected["features"]).item()
    size = sum(parameter.numel() for parameter in teacher.parameters()) / 1e6
    print(f"checkpoint: {size:.2f} M parameters, final features differ from the ONNX graph's by {difference:.1e}")
    if difference > TOLERANCE:
        print(f"error: more than {TOLERANCE:.0e}: the conversion does not fit this graph", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
