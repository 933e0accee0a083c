"""What can be compared: a run's teacher, its linearization as it stands, and exported students with their heads."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from adala.attention import resolve_mechanism
from adala.build import build_teacher, unaligned_student
from adala.distributed import device
from adala.export import WEIGHTS, load_student, load_task_model, read_description
from adala.families import Backbone
from adala.files import file_digest
from adala.plan import ModelPlan
from adala.rules import with_text_keys
from adala.tasks import Task

TEACHER, LINEARIZED = "teacher", "linearized"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model that is compared.

    Attributes:
        model: Gives features (B, N, D); in eval mode, on the device.
        identity: What its features depend on: ``weights``, a digest, ``model``, how it is built, and ``code``, a digest
            of what computes its attention, which somebody may be at work on.
        origin: In words.
        mechanism: Of its attention; of a student with several, all of them.
        head: Of a fine-tuned student, for ``task``.
        task: See ``head``.
    """

    model: Backbone
    identity: dict[str, Any]
    origin: str
    mechanism: str
    head: nn.Module | None = None
    task: Task | None = None


def build_teacher_contender(plan: ModelPlan) -> Contender:
    """The frozen softmax model."""
    teacher = plan.teacher
    described = {"name": teacher.name, "model_args": teacher.model_args, "image_size": list(teacher.image_size)}
    identity = {"weights": teacher.digest, "model": described, "code": _code_digest("softmax")}
    return Contender(build_teacher(teacher).eval(), identity, f"{teacher.name}, weights {teacher.digest}", "softmax")


def linearize_contender(plan: ModelPlan, teacher: Contender) -> Contender:
    """The teacher with its attention replaced, before anything is trained."""
    student = plan.student
    replaced = {
        "mechanism": student.mechanism,
        "mechanism_options": student.mechanism_options,
        "keep": student.keep,
        "block_mechanisms": with_text_keys(student.block_mechanisms),
        "block_mechanism_options": student.block_mechanism_options,
        "seed": plan.seed,
    }
    code = _code_digest(*student.mechanisms)
    identity = {**teacher.identity, "model": {**teacher.identity["model"], **replaced}, "code": code}
    model = unaligned_student(plan, teacher.model).eval()
    return Contender(model, identity, "the teacher, linearized and not trained", " + ".join(student.mechanisms))


def load_contender(folder: Path, with_head: bool = True) -> Contender:
    """An exported student, with its fine-tuned head where it has one.

    Raises:
        ValueError: There is no student in ``folder``, or one that cannot be read.
    """
    described = read_description(folder)
    digest = file_digest(folder / WEIGHTS)
    parts: tuple[nn.Module | None, Task | None] = (None, None)
    if with_head and described.task is not None:
        tuned = load_task_model(folder).to(device())
        model, parts = tuned.student, (tuned.head, tuned.task)
    else:
        model = load_student(folder).to(device())
    # Two heads on one backbone have the same features.
    backbone = {key: value for key, value in dataclasses.asdict(described).items() if key != "task"}
    identity = {"weights": digest, "model": with_text_keys(backbone), "code": _code_digest(*described.mechanisms)}
    return Contender(model, identity, f"{folder}, weights {digest}", " + ".join(described.mechanisms), *parts)


def _code_digest(*mechanisms: str) -> str:
    """Of the files that the mechanisms' classes are written in; the name of one where there is none."""
    digests = []
    for mixer in map(resolve_mechanism, mechanisms):
        path = inspect.getsourcefile(mixer)
        has_file = path is not None and Path(path).is_file()
        digests.append(file_digest(Path(path)) if has_file else mixer.__qualname__)
    return " ".join(digests)
