"""Where a student departs from its teacher, block by block: ``python bench/block_errors.py --recipe R --run_name NAME``

Takes what the training command takes (a recipe, dotted overrides) and reads the run's exported students. For the
linearized teacher and each of them, on held-out images:

- where error arises: each block's attention on the *teacher's* input to it, after the output projection, which is what
  Stage 1 minimises;
- how it accumulates: the residual stream after each block, of the model run as a whole;
- what is left: the final features, at every size of ``--sizes``.

Writes ``block_errors.json`` and ``block_errors.png`` and prints the tables. An error is ||student - teacher|| over
||teacher||, both over all images; cosines are means over tokens. What the columns of the table say: ``max/rms``, the
largest value of the teacher's stream over the rms of all; ``top channel``, the stream's strongest channel and its rms
over the median channel's.

Shapes: B batch, N tokens, D embed dim.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adala.build import build_evaluation_loader, build_teacher, data_index, run_folder, unaligned_student
from adala.config import Recipe, parse_command
from adala.distributed import device, report_error
from adala.export import has_student, load_student, read_description

LINEARIZED = "linearized"
RESAMPLED = "teacher, resampled"
# Images whose activations of all blocks are held at a time.
BATCH_SIZE = 16
COLOURS = {LINEARIZED: "#888888", "stage 1": "#d9822b", "stage 2": "#2b6cb0", "stage 3": "#3a8f5c"}


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one forward pass shows, each tensor (B, N, D).

    Attributes:
        attention_inputs: Input of each block's attention, after its norm.
        attention_outputs: Output of each block's attention, after the projection.
        streams: The residual stream after each block.
        features: Output of the final norm.
    """

    attention_inputs: list[Tensor]
    attention_outputs: list[Tensor]
    streams: list[Tensor]
    features: Tensor


@torch.no_grad()
def trace(model: VisionTransformer, images: Tensor) -> Trace:
    """Runs ``model`` on images (B, 3, height, width) and keeps what its blocks take and give."""
    inputs, outputs, streams = [], [], []

    def see_attention(attention: torch.nn.Module, arguments: tuple, output: Tensor) -> None:
        inputs.append(arguments[0])
        outputs.append(output)

    handles = [block.attn.register_forward_hook(see_attention) for block in model.blocks]
    handles += [block.register_forward_hook(lambda _, __, output: streams.append(output)) for block in model.blocks]
    try:
        features = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(inputs, outputs, streams, features)


class Closeness:
    """How close one (B, N, D) tensor is to another, summed over batches in float64."""

    def __init__(self, num_prefix_tokens: int, has_class_token: bool):
        self.num_prefix_tokens = num_prefix_tokens
        self.has_class_token = has_class_token
        self.squared_error = self.squared_target = 0.0
        self.patch_cosine = self.cls_cosine = 0.0
        self.patches = self.images = 0

    def add(self, prediction: Tensor, target: Tensor) -> None:
        prediction, target = prediction.double(), target.double()
        cosine = F.cosine_similarity(prediction, target, dim=-1)  # (B, N)
        patches = cosine[:, self.num_prefix_tokens :]
        self.squared_error += (prediction - target).square().sum().item()
        self.squared_target += target.square().sum().item()
        self.patch_cosine += patches.sum().item()
        self.cls_cosine += cosine[:, 0].sum().item()
        self.patches += patches.numel()
        self.images += len(cosine)

    def metrics(self) -> dict[str, float]:
        """``error``, ``patch_cosine`` and, for models with a class token, ``cls_cosine``."""
        metrics = {
            "error": (self.squared_error / max(self.squared_target, sys.float_info.min)) ** 0.5,
            "patch_cosine": self.patch_cosine / self.patches,
        }
        return metrics | ({"cls_cosine": self.cls_cosine / self.images} if self.has_class_token else {})


class Outliers:
    """How unevenly the values of a (B, N, D) tensor are spread over its channels, over all batches."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None  # (D,)
        self.tokens = 0
        self.largest = 0.0

    def add(self, x: Tensor) -> None:
        squares = x.double().square().sum((0, 1))
        self.squares = squares if self.squares is None else self.squares + squares
        self.tokens += x.shape[0] * x.shape[1]
        self.largest = max(self.largest, x.abs().max().item())

    def metrics(self) -> dict[str, float | int]:
        """``max_over_rms`` of all values; the ``channel`` of largest rms, and that over the median channel's."""
        rms = (self.squares / self.tokens).sqrt()
        tiny = sys.float_info.min
        return {
            "max_over_rms": self.largest / max(rms.square().mean().sqrt().item(), tiny),
            "channel": int(rms.argmax()),
            "channel_over_median": rms.max().item() / max(rms.median().item(), tiny),
        }


@dataclasses.dataclass
class ModelErrors:
    """One student against its teacher."""

    attention: list[Closeness]
    stream: list[Closeness]
    features: Closeness

    def metrics(self) -> dict[str, Any]:
        blocks = [
            {"block": number, "attention": attention.metrics(), "stream": stream.metrics()}
            for number, (attention, stream) in enumerate(zip(self.attention, self.stream, strict=True))
        ]
        return {"blocks": blocks, "features": self.features.metrics()}


def measure(
    teacher: VisionTransformer, students: Mapping[str, VisionTransformer], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compares students with their teacher on all batches.

    Args:
        teacher: In eval mode, as the students are, with as many blocks.
        students: By name.
        batches: Each with ``image`` (B, 3, height, width), normalised.

    Returns:
        ``images`` (how many), ``teacher`` (for each block, outliers of its ``attention`` output and of the ``stream``)
        and ``models``: by name ``blocks`` (for each, ``attention`` on the teacher's input and ``stream``) and
        ``features``; leaves are those of :class:`Closeness` and :class:`Outliers`.
    """
    depth = len(teacher.blocks)

    def closeness() -> Closeness:
        return Closeness(teacher.num_prefix_tokens, teacher.has_class_token)

    errors = {
        name: ModelErrors([closeness() for _ in range(depth)], [closeness() for _ in range(depth)], closeness())
        for name in students
    }
    outliers = [(Outliers(), Outliers()) for _ in range(depth)]
    num_images = 0
    for batch in batches:
        images = batch["image"].to(device())
        num_images += len(images)
        expected = trace(teacher, images)
        for block, (attention, stream) in enumerate(outliers):
            attention.add(expected.attention_outputs[block])
            stream.add(expected.streams[block])
        for name, student in students.items():
            # First the student as a whole: it tells the student's attention layers how these images' tokens lie.
            found = trace(student, images)
            errors[name].features.add(found.features, expected.features)
            for block in range(depth):
                with torch.no_grad():
                    alone = student.blocks[block].attn(expected.attention_inputs[block])
                errors[name].attention[block].add(alone, expected.attention_outputs[block])
                errors[name].stream[block].add(found.streams[block], expected.streams[block])
    return {
        "images": num_images,
        "teacher": [
            {"block": number, "attention": attention.metrics(), "stream": stream.metrics()}
            for number, (attention, stream) in enumerate(outliers)
        ],
        "models": {name: found.metrics() for name, found in errors.items()},
    }


def load_students(recipe: Recipe, folders: Mapping[str, Path]) -> dict[str, VisionTransformer]:
    """The run's exported students by stage, then those in ``folders`` by their names.

    Raises:
        ValueError: A folder holds no student, or one of another backbone than the recipe's teacher.
    """
    run = run_folder(recipe)
    of_run = {f"stage {number}": run.stage(number) for number in (1, 2, 3) if has_student(run.stage(number))}
    students = {}
    for name, folder in {**of_run, **folders}.items():
        found = read_description(folder)
        if (found.backbone, found.model_args) != (recipe.teacher.name, dict(recipe.teacher.model_args)):
            raise ValueError(
                f"the student in {folder} is a {found.backbone} {found.model_args}, this recipe's teacher a "
                f"{recipe.teacher.name} {dict(recipe.teacher.model_args)}: name the recipe it was made with"
            )
        students[name] = load_student(folder).to(device())
    return students


def measure_sizes(
    recipe: Recipe, sizes: Sequence[tuple[int, int]], num_images: int, folders: Mapping[str, Path]
) -> dict[str, Any]:
    """:func:`measure` at each size (height, width), against the teacher built for that size.

    The students were built for the recipe's size and resample their position embedding to others. What that alone
    costs is told by one more row there: the recipe's teacher, resampled likewise.

    Raises:
        ValueError: Something about recipe, data, sizes or students is wrong; the message says what to do.
    """
    exported = load_students(recipe, folders)
    index = data_index(recipe, recipe.data.val)
    results = []
    for size in sizes:
        at_size = dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, image_size=list(size)),
            evaluation=dataclasses.replace(recipe.evaluation, batch_size=min(recipe.evaluation.batch_size, BATCH_SIZE)),
        )
        teacher = build_teacher(at_size)
        students = {LINEARIZED: unaligned_student(at_size, teacher).eval(), **exported}
        if list(size) != list(recipe.data.image_size):
            students = {RESAMPLED: build_teacher(recipe), **students}
        loader = build_evaluation_loader(at_size, index, teacher, limit=num_images)
        results.append({"size": list(size), **measure(teacher, students, loader)})
    return {"run": str(run_folder(recipe).path), "mechanism": recipe.mechanism, "sizes": results}


def print_tables(report: Mapping[str, Any]) -> None:
    """Prints, for each size, the blocks' errors; and the final features of all sizes."""
    console = Console(width=120)
    for result in report["sizes"]:
        models = {name: found for name, found in result["models"].items() if name != RESAMPLED}
        title = f"errors by block, {_size_name(result)}, {result['images']} images"
        table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True)
        for heading in ("block", "max/rms", "top channel"):
            table.add_column(heading, justify="right")
        for name in models:
            for heading in (f"{name}\nattention", "\nstream", "patch\ncosine"):
                table.add_column(heading, justify="right")
        for number, outliers in enumerate(result["teacher"]):
            stream = outliers["stream"]
            row = [str(number), f"{stream['max_over_rms']:.0f}"]
            row.append(f"{stream['channel']} x{stream['channel_over_median']:.0f}")
            for found in models.values():
                block = found["blocks"][number]
                row += [f"{block['attention']['error']:.3f}", f"{block['stream']['error']:.3f}"]
                row.append(f"{block['stream']['patch_cosine']:.3f}")
            table.add_row(*row)
        console.print(table)
    table = Table(title="final features against the teacher", box=SIMPLE_HEAD)
    for heading in ("size", "model", "patch cosine", "CLS cosine", "relative error"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for result in report["sizes"]:
        for name, found in result["models"].items():
            features = found["features"]
            cls_cosine = f"{features['cls_cosine']:.4f}" if "cls_cosine" in features else "-"
            values = (f"{features['patch_cosine']:.4f}", cls_cosine, f"{features['error']:.4f}")
            table.add_row(_size_name(result), name, *values)
    console.print(table)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws two panels for each size: errors of single attentions, and of the residual stream up to the features."""
    results = report["sizes"]
    figure = Figure(figsize=(11, 3.8 * len(results)), layout="constrained")
    for result, (left, right) in zip(results, figure.subplots(len(results), 2, squeeze=False), strict=True):
        for name, found in result["models"].items():
            if name == RESAMPLED:
                continue
            style = {"marker": "o", "markersize": 4, "label": name, "color": COLOURS.get(name)}
            left.plot([block["attention"]["error"] for block in found["blocks"]], **style)
            accumulated = [block["stream"]["error"] for block in found["blocks"]]
            right.plot([*accumulated, found["features"]["error"]], **style)
        depth = len(result["teacher"])
        left.set(title=f"where it arises: attention on the teacher's input ({_size_name(result)})")
        right.set(title=f"what accumulates: residual stream ({_size_name(result)})")
        right.set_xticks([*range(depth), depth], [*map(str, range(depth)), "final\nnorm"])
        left.set_xticks(range(depth))
        for axis in (left, right):
            axis.set(xlabel="block", ylabel="relative error", ylim=(0, None))
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(path, dpi=110)


def _size_name(result: Mapping[str, Any]) -> str:
    return "{} x {} px".format(*result["size"])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Errors of a run's students against their teacher, block by block.",
        epilog="Everything else is read as by launchers/train.py: --recipe NAME, --run_name NAME, dotted overrides.",
        allow_abbrev=False,
    )
    parser.add_argument("--images", type=_positive, default=256, help="held-out images: the first of data.val (256)")
    parser.add_argument("--sizes", type=_positive, nargs="+", help="image sides in pixels (the recipe's image size)")
    parser.add_argument("--student", type=_named_folder, action="append", default=[], metavar="NAME=FOLDER",
                        help="another exported student, from elsewhere than the run; may be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, help="where the files go (the run's folder)")
    options, rest = parser.parse_known_args(arguments)
    try:
        recipe = parse_command(rest).recipe
        sizes = [(side, side) for side in options.sizes or ()] or [tuple(recipe.data.image_size)]
        report = measure_sizes(recipe, sizes, options.images, dict(options.student))
    except ValueError as error:
        report_error(error)
        return 1
    out = options.out or run_folder(recipe).path
    out.mkdir(parents=True, exist_ok=True)
    (out / "block_errors.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, out / "block_errors.png")
    print_tables(report)
    print(f"wrote {out / 'block_errors.json'} and {out / 'block_errors.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
