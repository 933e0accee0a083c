"""What each mechanism keeps of its teacher: every one adapted with the same data, budget and seed, and scored."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from command import TrainingFailed, resolved_recipe, run_training
from results import AccuracyRow

from adala.attention import resolve_mechanism
from adala.comparison import Comparer, Measures
from adala.config import Recipe, load_recipe
from adala.contenders import TEACHER, Contender, build_teacher_contender, load_contender
from adala.conversion import STAGE_NAMES
from adala.distributed import say
from adala.evaluation import FeatureStore
from adala.files import remove_tree
from adala.pipeline import table_protocol
from adala.plan import RunPlan, conversion_of, resolve_run, run_folder

# Measures of models by name, the teacher first.
Compare = Callable[[Mapping[str, Contender]], dict[str, Measures]]


def conversion_names(mechanism: str) -> list[str]:
    """ViT-AdaLA's stages, and the authors' own conversion where the mechanism has one."""
    native = getattr(resolve_mechanism(mechanism), "native_conversion", None)
    return ["adala"] if native is None else ["adala", "native"]


def divide_images(recipe: Recipe, total: int) -> dict[int, int]:
    """Optimizer steps by stage number such that all stages together see ``total`` images, to within half a batch each.

    The stages of the recipe's conversion share them in the proportions that they have in the recipe.

    Raises:
        ValueError: Not even one batch for each stage.
    """
    conversion = conversion_of(recipe)
    numbers = [number for number, name in STAGE_NAMES.items() if conversion.step(name) is not None]
    batches = {number: recipe.stage(number).global_batch_size for number in numbers}
    if total < sum(batches.values()):
        raise ValueError(f"{total} images are fewer than one batch for each of {len(numbers)} stages")
    weights = {number: recipe.stage(number).steps * batches[number] for number in numbers}
    return {
        number: max(1, round(total * weights[number] / sum(weights.values()) / batches[number])) for number in numbers
    }


def train_stage(arguments: Sequence[str], number: int, steps: int) -> None:
    """Runs the training command for one stage.

    Raises:
        TrainingFailed: The message is its own.
    """
    try:
        run_training([*arguments, "--stage", str(number), f"--stage{number}.steps", str(steps)])
    except TrainingFailed as error:
        raise TrainingFailed(f"stage {number}: {error}") from error


def compare(plan: RunPlan, store: FeatureStore, contenders: Mapping[str, Contender]) -> dict[str, Measures]:
    """Measures by model, as the training command's own table has them."""
    protocol = table_protocol(plan.recipe)
    return Comparer(contenders, plan.data, plan.evaluation, protocol, store, probes_tuned=False).compare().measures


def adapt(
    row: AccuracyRow, arguments: Sequence[str], total_images: int, teacher: Contender, measure: Compare
) -> None:  # fmt: skip
    """Trains all stages of a row and fills in its scores.

    Args:
        row: Mechanism and conversion are those of ``arguments``.
        arguments: Of the training command.
        total_images: Training images over all stages.
        teacher: Of the recipe.
        measure: Scores models on the recipe's held-out data.

    Raises:
        TrainingFailed: A stage did.
        ValueError: See :func:`divide_images`.
    """
    recipe = load_recipe(arguments[1], arguments[2:])
    steps, run = divide_images(recipe, total_images), run_folder(recipe)
    row.steps = {str(number): count for number, count in steps.items()}
    row.images_seen = sum(count * recipe.stage(number).global_batch_size for number, count in steps.items())
    # A stage would start from what an earlier bench left behind.
    remove_tree(run.path)
    for number, count in steps.items():
        train_stage(arguments, number, count)
    students = {number: load_contender(run.stage(number).path) for number in (2, 3) if number in steps}
    found = measure({TEACHER: teacher, **{f"stage {number}": student for number, student in students.items()}})
    if 2 in steps:
        row.aligned_top1, row.aligned_cosine = found["stage 2"]["probe_top1"], found["stage 2"]["feature_cosine"]
    row.top1, row.feature_cosine = found["stage 3"]["head_top1"], found["stage 3"]["feature_cosine"]
    if row.teacher_top1:
        row.kept = row.top1 / row.teacher_top1


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
        folder: Where the runs lie; those of an earlier bench are removed.
        overrides: Of the recipe, as ``key=value``.
        keep: Called with all rows so far after each one: the whole takes an hour, and an interruption is to cost one.

    Raises:
        ValueError: The recipe cannot be read, or its teacher, data or labels are not there.
    """
    shared = ["--recipe", resolved_recipe(recipe_name), *(f"--{text}" for text in overrides)]
    shared += ["--runs_dir", str(folder.resolve()), "--tensorboard", "false"]
    plan = resolve_run(load_recipe(shared[1], shared[2:]), ())
    teacher, rows = build_teacher_contender(plan.model), []
    # One store for all adaptations: the teacher's features are computed once.
    with tempfile.TemporaryDirectory() as features:
        measure = partial(compare, plan, FeatureStore(Path(features)))
        teacher_top1 = measure({TEACHER: teacher})[TEACHER].get("probe_top1")
        if teacher_top1 is None:
            raise ValueError("accuracy needs labels, and the samples of data.val or data.train have none")
        say(f"accuracy: the teacher's linear probe is at {teacher_top1:.2f} %")
        for mechanism, name in [(each, name) for each in mechanisms for name in conversion_names(each)]:
            row = AccuracyRow(mechanism, name, teacher_top1=teacher_top1)
            rows.append(row)
            own = ["--mechanism", mechanism, "--conversion", name, "--run_name", f"{mechanism}-{name}"]
            _adapt_timed(row, [*shared, *own], total_images, teacher, measure)
            keep(rows)
    return rows


def _adapt_timed(
    row: AccuracyRow, arguments: Sequence[str], total_images: int, teacher: Contender, measure: Compare
) -> None:
    """:func:`adapt`, of which a failure goes into the row."""
    started = time.monotonic()
    try:
        adapt(row, arguments, total_images, teacher, measure)
    except (ValueError, RuntimeError, OSError) as error:
        row.error = " ".join(str(error).split())
    row.seconds = round(time.monotonic() - started, 1)
    said = row.error or f"top-1 {row.top1:.2f} %, cosine {row.feature_cosine:.4f}"
    say(f"accuracy: {row.mechanism:>14} {row.conversion:>6}  {said}  [{row.seconds:.0f} s]")
