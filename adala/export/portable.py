"""A model in the forms that other programs read: written beside its place, run, compared, and only then put there.

Shapes: B batch, N tokens, D embed dim, H, W height and width of an image in pixels.
"""

import copy
import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from timm.layers import Format, to_2tuple
from torch import nn

from adala.attention import TokenMixer, chosen_kernel, mechanism_name
from adala.backbones import check_image_size
from adala.export.agreement import Agreement, Model, compare, sample_images
from adala.export.folder import StudentDescription, TaskModel, load_student, load_task_model, read_description
from adala.export.onnx_form import check_packages, run_onnx, write_onnx
from adala.export.timm_form import check_softmax, run_timm, write_timm
from adala.export.torch_form import check_compiler, run_torch, write_torch
from adala.families import Backbone
from adala.files import remove_tree, sync_folder

Form = Literal["onnx", "torch", "timm", "hf"]
ENDINGS: dict[Form, str] = {"onnx": ".onnx", "torch": ".pt2", "timm": "", "hf": ""}
# Folders, of a model without its head.
FOLDERS = ("timm", "hf")
# A traced batch of 1 would be taken for a constant.
TRACED_BATCH = 2
COMPARED_BATCHES = (TRACED_BATCH, 1, 3)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file, or timm's folder.
        form: ``onnx``, ``torch`` or ``timm``.
        image_size: Height and width in pixels of the images that it takes.
        output: What it gives: ``features`` (B, N, D) or ``scores``.
        agreement: How close it is to PyTorch's model.
    """

    path: Path
    form: Form
    image_size: tuple[int, int]
    output: str
    agreement: Agreement

    def __str__(self) -> str:
        height, width = self.image_size
        return f"{self.path} takes images of {height} x {width} and gives {self.output}; {self.agreement}"


@dataclass(frozen=True)
class _Source:
    """What is exported: a model, and what is known of it beyond its weights."""

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: StudentDescription | None = None
    folder: Path | None = None

    @property
    def backbone(self) -> Backbone:
        return _backbone(self.model)

    @property
    def mechanism(self) -> str:
        mixers = [module for module in self.backbone.modules() if isinstance(module, TokenMixer)]
        return " + ".join(dict.fromkeys(map(mechanism_name, mixers))) or "softmax"


def export_model(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    to: Form | None = None,
    size: int | Sequence[int] | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    compiled: bool = False,
    images: Iterable[str | Path] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    licence: str = "other",
) -> Exported:
    """Writes a model for use elsewhere, in float32 and for one image size.

    What was written is run and compared with PyTorch's model on real images; if they disagree, nothing is left behind.
    Fused kernels give way to plain operators. The model itself is left as it is.

    Args:
        model: A student, a student with its head (:class:`TaskModel`), a timm ViT, or the folder of an exported
            student, whose head comes along where it has one (not to timm or Hugging Face).
        path: What is written: a file for ONNX and torch, a new folder for timm and Hugging Face.
        to: ``onnx``; ``torch``, a program of torch.export; ``timm``, weights and ``config.json`` of a model whose
            attention is softmax throughout; ``hf``, a model of transformers, of a student's folder. None goes by the
            ending of ``path``: ``.onnx``, ``.pt2``, or none for timm.
        size: Height and width of the images in pixels, or the one that is both; position embeddings are resampled to it
            once. None is the model's own.
        batch: How many images at once; ``dynamic`` is any number, which it always is for timm and Hugging Face.
        compiled: To torch alone: compiled ahead of time (AOTInductor), for the device that the weights are on.
        images: Files of images to compare on, or folders of them; None takes those that travel in the package.
        mean: Per-channel mean of the input, in [0, 1]; None is the exported student's, or what timm says of the model.
        std: Per-channel standard deviation of the input, likewise.
        licence: To Hugging Face alone: of the weights, as the hub calls it, for the model card.

    Raises:
        ValueError: A model, form, size or batch that cannot be; a package or compiler that is missing; a mechanism with
            an operator that the form does not have; or a result that is not PyTorch's.
    """
    path = Path(path).expanduser()
    form = _form_of(path, to)
    _check(form, path, batch, compiled)
    source = _source(model, form, mean, std)
    image_size = _image_size(source.backbone, size)
    expected = _at_size(source.model, image_size)
    largest = max(COMPARED_BATCHES) if batch == "dynamic" else batch
    sizes = COMPARED_BATCHES if batch == "dynamic" else (batch,)
    shown = sample_images(largest, image_size, source.mean, source.std, images)
    shown = shown.to(next(expected.parameters()).device)
    with torch.no_grad():
        # Before anything is traced: what is computed once and kept (cosFormer's angles) must not be a tracer's.
        output = "features" if expected(shown[:1]).ndim == 3 else "scores"
    with _in_place_when_done(path) as partial_path, _flags_kept():
        if form == "hf":
            run = _write_hugging_face(source, expected, image_size, partial_path, licence)
        else:
            run = _write(form, source, expected, image_size, partial_path, output, batch, compiled)
        agreement = compare(run, expected, shown, sizes)
    return Exported(path, form, image_size, output, agreement)


def _form_of(path: Path, to: str | None) -> Form:
    if to is None:
        to = next((form for form, ending in ENDINGS.items() if path.suffix == ending), None)
        if to is None:
            raise ValueError(
                f"{path} does not say what it is to be: end it in .onnx or .pt2, or give a folder (without an ending) "
                "for timm"
            )
    if to not in get_args(Form):
        raise ValueError(f"unknown form {to!r}: known are {', '.join(get_args(Form))}")
    return to


def _check(form: Form, path: Path, batch: int | str, compiled: bool) -> None:
    """What can be told before anything is built."""
    if batch != "dynamic" and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise ValueError(f"batch is {batch!r}: it must be a whole number of at least 1, or 'dynamic'")
    if compiled and form != "torch":
        raise ValueError(f"only a program of torch can be compiled ahead of time, not {form}: take --to torch")
    if form in FOLDERS and path.exists():
        raise ValueError(f"{path} exists already: name a folder that does not, or remove it")
    if form not in FOLDERS and path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if form == "torch" and path.suffix != ENDINGS["torch"]:
        raise ValueError(f"{path} must end in .pt2, by which torch knows its programs")
    if form == "onnx":
        check_packages()
    if form == "hf" and importlib.util.find_spec("transformers") is None:
        raise ValueError("--to hf needs transformers, which is not installed: pip install 'adala[hf]'")
    if compiled:
        check_compiler()


def _source(
    model: nn.Module | str | Path, form: Form, mean: Sequence[float] | None, std: Sequence[float] | None
) -> _Source:
    if isinstance(model, str | Path):
        described = read_description(model)
        has_head = described.task is not None and form not in FOLDERS
        loaded = (load_task_model if has_head else load_student)(model)
        own = (tuple(mean or described.mean), tuple(std or described.std))
        return _Source(loaded, *own, described, Path(model).expanduser())
    if form == "hf":
        raise ValueError("to hf goes the folder of an exported student, which says what it is built from: name that")
    said = getattr(_backbone(model), "pretrained_cfg", None) or {}
    return _Source(
        model.student if form == "timm" and isinstance(model, TaskModel) else model,
        tuple(mean or said.get("mean") or (0.5, 0.5, 0.5)),
        tuple(std or said.get("std") or (0.5, 0.5, 0.5)),
    )


def _backbone(model: nn.Module) -> Backbone:
    backbone = model.student if isinstance(model, TaskModel) else model
    if not hasattr(backbone, "patch_embed") or not hasattr(backbone, "set_input_size"):
        raise ValueError(
            f"a {type(model).__name__} cannot be exported: give a student, what load_task_model loads, a timm ViT, or "
            "the folder of an exported student"
        )
    return backbone


def _image_size(backbone: Backbone, size: int | Sequence[int] | None) -> tuple[int, int]:
    if size is None:
        return tuple(backbone.patch_embed.img_size)
    sides = to_2tuple(size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size is {size!r}: it must be one whole number of pixels, or height and width")
    check_image_size(backbone, sides)
    return sides


def _at_size(model: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    """A copy in eval mode and float32 whose own image size this is."""
    resized = copy.deepcopy(model).eval().float().requires_grad_(False)
    backbone = _backbone(resized)
    if tuple(backbone.patch_embed.img_size) != image_size:
        backbone.set_input_size(image_size)
    return resized


def _write(
    form: Form,
    source: _Source,
    expected: nn.Module,
    image_size: tuple[int, int],
    path: Path,
    output: str,
    batch: int | str,
    compiled: bool,
) -> Model:
    """Writes the model to ``path``; returns what was written as a function of images."""
    described = source.description
    if form == "timm":
        check_softmax(source.model)
        model_args = None if described is None else described.model_args
        write_timm(_backbone(expected), path, image_size, source.mean, source.std, model_args)
        return run_timm(path)
    program = _trace(expected, source.mechanism, image_size, batch)
    if form == "torch":
        write_torch(program, path, compiled)
        return run_torch(path, compiled, next(expected.parameters()).device)
    notes = {"image_size": image_size, "mean": source.mean, "std": source.std, "mechanism": source.mechanism}
    write_onnx(program, path, output, batch == "dynamic", source.mechanism, notes)
    return run_onnx(path, source.mechanism)


def _write_hugging_face(
    source: _Source, expected: nn.Module, image_size: tuple[int, int], path: Path, licence: str
) -> Model:
    # Imported here: transformers is an extra.
    from adala.export.huggingface import measured_by, run_hugging_face, write_hugging_face

    images = {"image_size": list(image_size), "mean": list(source.mean), "std": list(source.std)}
    description = dataclasses.replace(source.description, **images)
    write_hugging_face(expected, description, path, licence, measured=measured_by(source.folder))
    return run_hugging_face(path)


def _trace(
    model: nn.Module, mechanism: str, image_size: tuple[int, int], batch: int | str
) -> torch.export.ExportedProgram:
    """The model as a program of torch.export, in plain operators."""
    traced = copy.deepcopy(model)
    _fix_size(_backbone(traced))
    device = next(traced.parameters()).device
    images = torch.zeros(TRACED_BATCH if batch == "dynamic" else batch, 3, *image_size, device=device)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if batch == "dynamic" else None
    try:
        with torch.no_grad(), chosen_kernel("reference"):
            return torch.export.export(traced, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # anybody's mechanism is traced here, which may fail at anything
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"a model with mechanism {mechanism} cannot be traced by torch.export ({type(error).__name__}: {reason})"
        ) from error


def _fix_size(backbone: Backbone) -> None:
    """Has a model take its own image size alone.

    Under torch.export timm resamples position embeddings of models that take any size even where nothing changes, so
    that the graph would hold a bicubic interpolation with antialiasing.
    """
    if getattr(backbone, "dynamic_img_size", False):
        rope = getattr(backbone, "rope", None)
        if rope is not None:
            # Its table too, which timm's modules compute anew for each size unless they were built for one.
            table = rope.get_embed(shape=list(backbone.patch_embed.grid_size)).detach()
            rope.get_embed = lambda *_, **__: table
        backbone.dynamic_img_size = False
        # As timm's constructors leave them then: tokens in one row, which a grid is for other sizes.
        backbone.patch_embed.flatten, backbone.patch_embed.output_fmt = True, Format.NCHW


@contextmanager
def _flags_kept() -> Iterator[None]:
    """Has torch.export find one flag of TF32 for all of cuDNN, and puts back what it has changed.

    For its time it switches libraries off. It asks for that one flag meanwhile, fails where TF32 was set for
    convolutions or recurrent networks alone, and then leaves oneDNN off for the rest of the process (seen with PyTorch
    2.14).
    """
    cudnn, uses_onednn = torch.backends.cudnn, torch.backends.mkldnn.enabled
    apart: tuple[str, str] | None = None
    try:
        _ = cudnn.allow_tf32
    except RuntimeError:
        apart = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        cudnn.allow_tf32 = True  # which is what the one flag was, as nobody has set it
    try:
        yield
    finally:
        if apart is not None:
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = apart
        torch.backends.mkldnn.enabled = uses_onednn


@contextmanager
def _in_place_when_done(path: Path) -> Iterator[Path]:
    """A place of the same name in a folder beside ``path``, which is moved there unless an error ends the context."""
    # Of folders that are not there yet, none must be left after an error either.
    above = next(folder for folder in path.absolute().parents if folder.exists())
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=above))
    try:
        yield workplace / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        # What a file names as lying beside it (ONNX's external data) first.
        for written in sorted(workplace.iterdir(), key=lambda each: each.name == path.name):
            written.replace(path.parent / written.name)
        sync_folder(path.parent)
    finally:
        remove_tree(workplace)
