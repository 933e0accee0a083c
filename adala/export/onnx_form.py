"""A traced model as an ONNX file, and that file under onnxruntime."""

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adala.export.agreement import Model

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT = "images"


def check_packages() -> None:
    """Raises ValueError where a package is missing that writing ONNX, or running it, takes."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install 'adala[onnx]' installs what is missing")


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    output: str,
    any_batch: bool,
    mechanism: str,
    notes: Mapping[str, Any],
) -> None:
    """Writes a traced model as ONNX; weights of more than 1.5 GB go into a file beside it, named after it (``.data``).

    Args:
        program: From images (B, 3, H, W).
        path: Of the file.
        output: Name of the output.
        any_batch: Whether the model was traced for any number of images, an axis that is called ``batch`` then.
        mechanism: For messages.
        notes: What the file says of itself, values in JSON.

    Raises:
        ValueError: An operator of the mechanism has no ONNX form.
    """
    names = {"input_names": [INPUT], "output_names": [output], "dynamic_shapes": [{0: "batch"}] if any_batch else None}
    try:
        with _quietly():
            written = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(
            f"mechanism {mechanism} cannot become ONNX: {_reason(error)}; --to torch keeps every operator"
        ) from error
    written.model.metadata_props.update({key: json.dumps(value) for key, value in notes.items()})
    written.save(str(path))


def _reason(error: BaseException) -> str:
    """Of what the exporter raised, which operator is at fault; its innermost error's first line where none is."""
    innermost = error
    while innermost.__cause__ is not None:
        found = re.search(r"No ONNX function found for <OpOverload\(op='([^']*)'", str(innermost))
        if found:
            break
        innermost = innermost.__cause__
    found = re.search(r"No ONNX function found for (?:<OpOverload\(op=')?([^'>]+)", str(innermost))
    if found:
        return f"its operator {found[1]} has no ONNX form"
    return next(iter(str(innermost).splitlines()), type(innermost).__name__)


@contextmanager
def _quietly() -> Iterator[None]:
    """A context without what the exporter and its libraries warn of, which is nothing that a user could act on."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def run_onnx(path: Path, mechanism: str) -> Model:
    """The file under onnxruntime on the CPU, as a function of images.

    Raises:
        ValueError: onnxruntime cannot run it; the message says which operator it lacks.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own, without a common base
        raise ValueError(
            f"mechanism {mechanism} cannot become ONNX: onnxruntime does not run it ({str(error).splitlines()[0]})"
        ) from error

    def run(images: Tensor) -> Tensor:
        (found,) = session.run(None, {INPUT: images.cpu().numpy()})
        return torch.from_numpy(found)

    return run
