"""Students as folders: ``student.safetensors`` under timm's keys, and ``model.json`` that says how to build them."""

import dataclasses
import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from adala.backbones import CONFIG, build_backbone
from adala.families import Backbone
from adala.files import sync_file, write_json
from adala.runs import ATTEMPT, CHECKPOINT_MARKER
from adala.students import LinearizedModel, linearize
from adala.tasks import Prediction, Task, read_task
from adala.weights import find_difference, in_float32, read_weights

WEIGHTS = "student.safetensors"
DESCRIPTION = "model.json"
HEAD_WEIGHTS = "head.safetensors"


def _is_list(value: Any, kinds: type | tuple[type, ...], length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
        and (length is None or len(value) == length)
    )


def _is_named_block(item: tuple[str, Any]) -> bool:
    number, name = item
    return number.isascii() and number.isdigit() and isinstance(name, str)


# Of each key of a description: whether a value read from JSON is of its kind.
FITS: dict[str, Callable[[Any], bool]] = {
    "backbone": lambda value: isinstance(value, str),
    "model_args": lambda value: isinstance(value, dict),
    "image_size": lambda value: _is_list(value, int, 2) and min(value) > 0,
    "mechanism": lambda value: isinstance(value, str),
    "mechanism_options": lambda value: isinstance(value, dict),
    "keep": lambda value: _is_list(value, int),
    "mean": lambda value: _is_list(value, (int, float), 3),
    "std": lambda value: _is_list(value, (int, float), 3),
    "task": lambda value: value is None or isinstance(value, dict),
    "block_mechanisms": lambda value: isinstance(value, dict) and all(map(_is_named_block, value.items())),
    "block_mechanism_options": lambda value: (
        isinstance(value, dict) and all(isinstance(options, dict) for options in value.values())
    ),
}


@dataclasses.dataclass(frozen=True)
class StudentDescription:
    """What is needed to build a student anew.

    Attributes:
        backbone: timm model name.
        model_args: Further arguments of timm's constructor.
        image_size: Height and width in pixels that the position embedding fits.
        mechanism: Name of the attention mechanism of all blocks that are not named below.
        mechanism_options: Its options.
        keep: Blocks that kept their softmax attention.
        mean: Per-channel mean of the input, in [0, 1].
        std: Per-channel standard deviation of the input.
        task: What the head was trained for, see :func:`adala.tasks.describe_task`; None without a head.
        block_mechanisms: Blocks with another mechanism, by number, which JSON has as text.
        block_mechanism_options: Options of these other mechanisms by name.
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
    block_mechanisms: dict[int, str] = dataclasses.field(default_factory=dict)
    block_mechanism_options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        by_number = {int(number): name for number, name in self.block_mechanisms.items()}
        object.__setattr__(self, "block_mechanisms", by_number)

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The names of all that blocks have in place of timm's softmax, each once."""
        return tuple(dict.fromkeys((self.mechanism, *self.block_mechanisms.values())))

    def linearize(self, backbone: Backbone, seed: int = 0) -> LinearizedModel:
        """A student of this make, of a softmax model's weights; see :func:`adala.students.linearize`.

        Args:
            backbone: Of the described name and arguments; it is left as it is.
            seed: Of the mechanisms' own random parameters.

        Raises:
            ValueError: See :func:`adala.students.linearize`.
        """
        return linearize(
            backbone,
            self.mechanism,
            self.keep,
            self.mechanism_options,
            seed,
            self.block_mechanisms,
            self.block_mechanism_options,
        )


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
    folder = Path(folder).expanduser()
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder} holds no exported student: {_what_lies_in(folder)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        _check_description(values)
        return StudentDescription(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a student's description: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _what_lies_in(folder: Path) -> str:
    """Of a folder without a student, in words."""
    if not folder.exists():
        return "there is no such folder"
    if folder.is_file():
        return "it is a file; name the folder that it lies in"
    students = sorted(path.parent.name for path in folder.glob(f"*/{DESCRIPTION}"))
    if students:
        return f"its folders {', '.join(students)} do; name one of them"
    if (folder / CHECKPOINT_MARKER).exists():
        return (
            "it is a checkpoint of training; the student is written beside the checkpoints when its stage is finished"
        )
    if (folder / ATTEMPT).exists():
        return f"its stage is not finished (there is no {DESCRIPTION}); start the same command again to go on"
    if (folder / CONFIG).exists():
        return f"a folder with {CONFIG} is a model of timm's or transformers'; timm's is a teacher (local-dir:{folder})"
    return f"there is no {DESCRIPTION}"


def _check_description(values: Any) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object with keys")
    fields = dataclasses.fields(StudentDescription)
    names = [field.name for field in fields]
    unknown = [key for key in values if key not in names]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(names)}")
    for field in fields:
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{field.name} is missing")
        if field.name in values and not FITS[field.name](values[field.name]):
            raise ValueError(f"{field.name} cannot be {values[field.name]!r}")


def load_student(folder: str | Path) -> LinearizedModel:
    """The student in ``folder``, in eval mode on the CPU; ``student(images)`` gives (B, N, D) features of all tokens.

    Raises:
        ValueError: No student there, an unknown mechanism, or weights that do not fit the description.
    """
    description = read_description(folder)
    try:
        backbone = build_backbone(description.backbone, description.image_size, description.model_args)
        student = description.linearize(backbone)
    except ValueError as error:
        raise ValueError(f"{Path(folder).expanduser() / DESCRIPTION}: {error}") from error
    _load_tensors(student, Path(folder).expanduser() / WEIGHTS)
    return student.eval()


class TaskModel(nn.Module):
    """A student and its head, from images (B, 3, height, width) to what the task says of them.

    Called, it gives scores, (B, classes) for classification and (B, classes, height, width) for segmentation, say;
    :meth:`predict` gives decisions.
    """

    def __init__(self, student: LinearizedModel, head: nn.Module, task: Task):
        super().__init__()
        self.student = student
        self.head = head
        self.task = task

    def forward(self, images: Tensor) -> Tensor:
        return self.task.scores(self._prediction(images), tuple(images.shape[-2:]))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The task's decisions: classes (B, height, width) for segmentation, say."""
        return self.task.decision(self._prediction(images), tuple(images.shape[-2:]))

    def _prediction(self, images: Tensor) -> Prediction:
        return self.head(self.student(images), self.student.token_layout(images))


def load_task_model(folder: str | Path) -> TaskModel:
    """The student in ``folder`` with its fine-tuned head, in eval mode on the CPU.

    Raises:
        ValueError: See :func:`load_student`; also when the student has no head (only Stage 3 exports one).
    """
    description = read_description(folder)
    if description.task is None:
        raise ValueError(f"{folder} holds a student without a head: use load_student, or fine-tune it (--stage 3)")
    try:
        task = read_task(description.task)
    except ValueError as error:
        raise ValueError(f"{Path(folder).expanduser() / DESCRIPTION}: {error}") from error
    student = load_student(folder)
    head = task.build_head(student)
    _load_tensors(head, Path(folder).expanduser() / HEAD_WEIGHTS)
    return TaskModel(student, head, task).eval()


def load_classifier(folder: str | Path) -> TaskModel:
    """:func:`load_task_model` of a student that was fine-tuned on labels; gives logits (B, classes).

    Raises:
        ValueError: See :func:`load_task_model`; also when its task is another one.
    """
    model = load_task_model(folder)
    if model.task.name != "classification":
        raise ValueError(f"the student in {folder} was fine-tuned for {model.task.name}: use load_task_model")
    return model


def _save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    # safetensors writes files that only their owner may read: what another file would get is taken from one.
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = stat.S_IMODE(partial.stat().st_mode)
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}; is the disk full?") from error
    partial.chmod(mode)
    sync_file(partial)
    partial.replace(path)


def _load_tensors(module: nn.Module, path: Path) -> None:
    state = read_weights(path)
    difference = find_difference(module, state)
    if difference:
        raise ValueError(f"{path} does not fit its description: {difference}")
    module.load_state_dict(in_float32(path, state, module))
