"""The command line of an export: a student's folder, and the form that it is to have."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adala.export.folder import read_description
from adala.export.portable import ENDINGS, FOLDERS, export_model


def build_export_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m adala.export",
        allow_abbrev=False,
        description="Writes an exported student, with its head where it has one, for use elsewhere. What is written is "
        "compared with PyTorch's model on real images, and refused where it differs.",
    )
    parser.add_argument("folder", type=Path, help="with student.safetensors and model.json")
    parser.add_argument("--to", choices=list(ENDINGS), required=True, help="the form")
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="height and width, or both in one (the student's own)"
    )
    parser.add_argument("--out", type=Path, help="where it goes (FOLDER/student-HxW.onnx, .pt2, or FOLDER/FORM-HxW)")
    parser.add_argument("--batch", default="dynamic", help="images at once: a number, or dynamic for any (dynamic)")
    parser.add_argument("--licence", default="other", help="of hf: of the weights, for the model card (other)")
    parser.add_argument("--compile", action="store_true", help="of torch: compiled ahead of time, by AOTInductor")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="PATH", help="images to compare on (those that travel in the package)"
    )
    return parser


def run_export(arguments: Sequence[str]) -> None:
    """Carries out a command line and says what was compared.

    Raises:
        ValueError: See :func:`adala.export.portable.export_model`.
    """
    options = build_export_parser().parse_args(arguments)
    folder = options.folder.expanduser()
    size = list(options.size or read_description(folder).image_size)
    if len(size) > 2:
        raise ValueError(f"--size is {' '.join(map(str, size))}: it is one number of pixels, or height and width")
    out = options.out or folder / _default_name(options.to, size[0], size[-1])
    batch = int(options.batch) if options.batch.isdecimal() else options.batch
    done = export_model(
        folder,
        out,
        to=options.to,
        size=(size[0], size[-1]),
        batch=batch,
        compiled=options.compile,
        images=options.images,
        licence=options.licence,
    )
    print(f"wrote {done}")


def _default_name(form: str, height: int, width: int) -> str:
    return f"{form if form in FOLDERS else 'student'}-{height}x{width}{ENDINGS[form]}"
