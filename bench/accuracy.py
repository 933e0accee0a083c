"""What each mechanism keeps of its teacher: every one adapted with the same data, budget and seed, and scored."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from command import TrainingFailed, resolved_recipe, run_training
from results import AccuracyRow

from adala.attention import resolve_mechanism
from adala.build import build_scorer, build_teacher
from adala.config import Recipe, load_recipe
from adala.conversion import ADALA, STAGE_NAMES, Conversion
from adala.distributed import device
from adala.evaluation import Scorer
from adala.export import load_classifier, load_student
from adala.files import remove_tree
from adala.plan import resolve_run, run_folder


def conversions_of(mechanism: str) -> dict[str, Conversion]:
    """ViT-AdaLA's stages, and the authors' own conversion where the mechanism has one."""
    native = getattr(resolve_mechanism(mechanism), "native_conversion", None)
    return {"adala": ADALA} | ({"native": native} if native is not None else {})


def divide_images(recipe: Recipe, conversion: Conversion, total: int) -> dict[int, int]:
    """Optimizer steps by stage number such that all stages together see ``total`` images, to within half a batch each.

    The stages of the conversion share them in the proportions that they have in the recipe.

    Raises:
        ValueError: Not even one batch for each stage.
    """
    numbers = [number for number, name in STAGE_NAMES.items() if conversion.step(name) is not None]
    batches = {number: recipe.stage(number).global_batch_size for number in numbers}
    if total < sum(batches.values()):
        raise ValueError(f"{total} images are fewer than one batch for each of {len(numbers)} stages")
    weights = {number: recipe.stage(number).steps * batches[number] for number in numbers}
    return {
        number: max(1, round(total * weights[number] / sum(weights.values()) / batches[number])) for number in numbers
    }


@dataclass(frozen=True)
class Bench:
    """What all adaptations share.

    Attributes:
        recipe_name: Name or path of the recipe.
        overrides: Of the recipe, as on the training command's line.
        folder: Where the runs lie.
        total_images: Training images of one adaptation.
    """

    recipe_name: str
    overrides: tuple[str, ...]
    folder: Path
    total_images: int

    def arguments(self, mechanism: str, name: str) -> list[str]:
        """Overrides of one adaptation."""
        own = ["--mechanism", mechanism, "--conversion", name, "--run_name", f"{mechanism}-{name}"]
        return [*own, "--runs_dir", str(self.folder), "--tensorboard", "false", *self.overrides]

    def recipe(self, mechanism: str = "linear", name: str = "adala") -> Recipe:
        return load_recipe(self.recipe_name, self.arguments(mechanism, name))


def train_stage(bench: Bench, mechanism: str, name: str, number: int, steps: int) -> None:
    """Runs the training command for one stage.

    Raises:
        TrainingFailed: The message is its own.
    """
    arguments = ["--recipe", bench.recipe_name, "--stage", str(number), *bench.arguments(mechanism, name)]
    try:
        run_training([*arguments, f"--stage{number}.steps", str(steps)])
    except TrainingFailed as error:
        raise TrainingFailed(f"stage {number}: {error}") from error


def adapt(bench: Bench, scorer: Scorer, row: AccuracyRow, conversion: Conversion) -> None:
    """Trains all stages of a row and fills in its scores.

    Raises:
        TrainingFailed: A stage did.
    """
    recipe = bench.recipe(row.mechanism, row.conversion)
    steps = divide_images(recipe, conversion, bench.total_images)
    row.steps = {str(number): count for number, count in steps.items()}
    row.images_seen = sum(count * recipe.stage(number).global_batch_size for number, count in steps.items())
    run = run_folder(recipe)
    remove_tree(run.path)  # an earlier bench's, which this one would go on with
    for number, count in steps.items():
        train_stage(bench, row.mechanism, row.conversion, number, count)
    if 2 in steps:
        aligned = scorer.frozen(load_student(run.stage(2).path).to(device()))
        row.aligned_top1, row.aligned_cosine = aligned.value, aligned.metrics["feature_cosine"]
    model = load_classifier(run.stage(3).path).to(device())
    tuned = scorer.tuned(model.student, model.head, model.task)
    row.top1, row.feature_cosine = tuned.value, tuned.metrics["feature_cosine"]
    row.kept = row.top1 / row.teacher_top1 if row.teacher_top1 else None


def measure_accuracy(
    recipe_name: str,
    mechanisms: Sequence[str],
    total_images: int,
    folder: Path,
    overrides: Sequence[str] = (),
    keep: Callable[[list[AccuracyRow]], None] = lambda rows: None,
) -> list[AccuracyRow]:
    """Adapts every mechanism under AdaLA's stages and natively; a run that fails is a row with its error.

    Softmax goes through AdaLA's stages too: what it loses or gains there is not the attention's doing.

    Args:
        recipe_name: Name or path of the recipe; it must have labels.
        mechanisms: Their names.
        total_images: Training images of one adaptation, over all its stages.
        folder: Where the runs lie.
        overrides: Of the recipe, as ``key=value``.
        keep: Called with all rows so far after each one: the whole takes an hour, and an interruption is to cost one.

    Raises:
        ValueError: The recipe cannot be read, or its teacher or data are not there.
    """
    arguments = tuple(part for text in overrides for part in (f"--{text.partition('=')[0]}", text.partition("=")[2]))
    bench = Bench(resolved_recipe(recipe_name), arguments, folder.resolve(), total_images)
    plan = resolve_run(bench.recipe(), (3,))
    teacher = build_teacher(plan.model.teacher)
    scorer = build_scorer(plan.data, plan.evaluation, teacher)
    teacher_top1 = scorer.frozen(teacher).value
    print(f"accuracy: the teacher's linear probe is at {teacher_top1:.2f} %", flush=True)
    rows = []
    for mechanism in mechanisms:
        for name, conversion in conversions_of(mechanism).items():
            row = AccuracyRow(mechanism, name, teacher_top1=teacher_top1)
            rows.append(row)
            started = time.monotonic()
            try:
                adapt(bench, scorer, row, conversion)
            except (ValueError, RuntimeError, OSError) as error:
                row.error = " ".join(str(error).split())
            row.seconds = round(time.monotonic() - started, 1)
            said = row.error or f"top-1 {row.top1:.2f} %, cosine {row.feature_cosine:.4f}"
            print(f"accuracy: {mechanism:>14} {name:>6}  {said}  [{row.seconds:.0f} s]", flush=True)
            keep(rows)
    return rows
