"""A traced model as a file of torch.export, or compiled ahead of time into a package."""

from pathlib import Path

import torch
from torch import Tensor

from adala.export.agreement import Model


def check_compiler() -> None:
    """Raises ValueError where there is no C++ compiler, without which nothing can be compiled ahead of time."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "compiling ahead of time needs a C++ compiler, and there is none: install g++ or name one in CXX, or leave "
            "--compile out"
        ) from error


def write_torch(program: torch.export.ExportedProgram, path: Path, compiled: bool) -> None:
    """Writes a traced model.

    Args:
        program: From images (B, 3, H, W).
        path: Of the file, which ends in ``.pt2``.
        compiled: As a package of AOTInductor, for the device that the weights are on and machines like this one;
            otherwise as operators.
    """
    if compiled:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        torch.export.save(program, path)


def run_torch(path: Path, compiled: bool, device: torch.device) -> Model:
    """The file, read back, as a function of images."""
    module = torch._inductor.aoti_load_package(str(path)) if compiled else torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        return module(images.to(device))

    return run
