"""Students as folders: ``student.safetensors`` under timm's keys, and ``model.json`` that says how to build them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adala.backbones import build_backbone
from adala.files import sync_file, write_json
from adala.students import LinearizedVisionTransformer, linearize
from adala.tasks import Task, read_task

WEIGHTS = "student.safetensors"
DESCRIPTION = "model.json"
HEAD_WEIGHTS = "head.safetensors"


@dataclasses.dataclass(frozen=True)
class StudentDescription:
    """What is needed to build a student anew.

    Attributes:
        backbone: timm model name.
        model_args: Further arguments of timm's constructor.
        image_size: Height and width in pixels that the position embedding fits.
        mechanism: Name of the attention mechanism.
        mechanism_options: Its options.
        keep: Blocks that kept their softmax attention.
        mean: Per-channel mean of the input, in [0, 1].
        std: Per-channel standard deviation of the input.
        task: What the head was trained for, see :func:`adala.tasks.describe_task`; None without a head.
    """

    backbone: str
    model_args: dict[str, Any]
    image_size: list[int]
    mechanism: str
    mechanism_options: dict[str, Any]
    keep: list[int]
    mean: list[float]
    std: list[float]
    task: dict[str, Any] | None = None


def save_student(
    folder: Path, state: Mapping[str, Tensor], description: StudentDescription, head: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a student, the description last: a folder without it holds no complete student."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    _save_tensors(state, folder / WEIGHTS)
    if head is not None:
        _save_tensors(head, folder / HEAD_WEIGHTS)
    write_json(folder / DESCRIPTION, dataclasses.asdict(description))


def has_student(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def read_description(folder: str | Path) -> StudentDescription:
    """The description of the student in ``folder``.

    Raises:
        ValueError: There is no exported student, or one of another format.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder} holds no exported student: there is no {DESCRIPTION}")
    try:
        return StudentDescription(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a student's description: {error}") from error


def load_student(folder: str | Path) -> LinearizedVisionTransformer:
    """The student in ``folder``, in eval mode on the CPU; ``student(images)`` gives (B, N, D) features of all tokens.

    Raises:
        ValueError: No student there, an unknown mechanism, or weights that do not fit the description.
    """
    description = read_description(folder)
    backbone = build_backbone(description.backbone, description.image_size, description.model_args)
    student = linearize(backbone, description.mechanism, description.keep, description.mechanism_options)
    _load_tensors(student, Path(folder) / WEIGHTS)
    return student.eval()


class TaskModel(nn.Module):
    """A student and its head: images (B, 3, height, width) to the task's predictions."""

    def __init__(self, student: LinearizedVisionTransformer, head: nn.Module, task: Task):
        super().__init__()
        self.student = student
        self.head = head
        self.task = task

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.student(images))


def load_classifier(folder: str | Path) -> TaskModel:
    """The student in ``folder`` with its fine-tuned head, in eval mode on the CPU; gives logits (B, classes).

    Raises:
        ValueError: See :func:`load_student`; also when the student has no head (only Stage 3 exports one).
    """
    description = read_description(folder)
    if description.task is None:
        raise ValueError(f"{folder} holds a student without a head: use load_student, or fine-tune it (--stage 3)")
    task, student = read_task(description.task), load_student(folder)
    head = task.build_head(student)
    _load_tensors(head, Path(folder) / HEAD_WEIGHTS)
    return TaskModel(student, head, task).eval()


def _save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}; is the disk full?") from error
    sync_file(partial)
    partial.replace(path)


def _load_tensors(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit its description: {' '.join(str(error).split())}") from error
