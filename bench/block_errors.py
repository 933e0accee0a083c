"""Where a run's students depart from their teacher, block by block, on held-out images, as tables and a picture.

    python bench/block_errors.py --recipe R --run_name NAME [--sizes 112 224]

Takes what the training command takes (a recipe, dotted overrides) and compares the linearized teacher and the run's
exported students with the teacher, see :mod:`adala.evaluation.block_errors`. Errors are relative, over all images;
cosines are means over tokens. Writes ``block_errors.json`` and ``block_errors.png``.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from adala.build import build_evaluation_loader, build_teacher, unaligned_student
from adala.config import Recipe, parse_command
from adala.distributed import device
from adala.evaluation import BlockReport, measure_block_errors
from adala.evaluation_pictures import as_png, block_error_picture
from adala.export import has_student, load_student, read_description
from adala.failures import report_error
from adala.families import Backbone
from adala.files import write_whole
from adala.plan import resolve_run, run_folder

LINEARIZED = "linearized"
RESAMPLED = "teacher, resampled"
# Images whose activations of all blocks are held at a time.
BATCH_SIZE = 16

Size = tuple[int, int]


def load_students(recipe: Recipe, folders: Mapping[str, Path]) -> dict[str, Backbone]:
    """The run's exported students by stage, then those in ``folders`` by their names.

    Raises:
        ValueError: A folder holds no student, or one of another backbone than the recipe's teacher.
    """
    of_run = {f"stage {number}": run_folder(recipe).stage(number).path for number in (1, 2, 3)}
    of_run = {name: folder for name, folder in of_run.items() if has_student(folder)}
    ours = (recipe.teacher.name, recipe.teacher.model_args)
    for folder in (*of_run.values(), *folders.values()):
        found = read_description(folder)
        if (found.backbone, found.model_args) != ours:
            raise ValueError(
                f"the student in {folder} is a {found.backbone} {found.model_args}, this recipe's teacher a {ours[0]} "
                f"{ours[1]}: name the recipe it was made with"
            )
    return {name: load_student(folder).to(device()) for name, folder in {**of_run, **folders}.items()}


def measure_sizes(
    recipe: Recipe, sizes: Sequence[Size], num_images: int, folders: Mapping[str, Path]
) -> dict[Size, BlockReport]:
    """Block errors at each size (height, width), against the teacher built for that size.

    The students were built for the recipe's size and resample their position embedding to others. What that alone
    costs is told by one more row there: the recipe's teacher, resampled likewise.

    Raises:
        ValueError: Something about recipe, data, sizes or students is wrong; the message says what to do.
    """
    exported, reports = load_students(recipe, folders), {}
    for size in sizes:
        data = dataclasses.replace(recipe.data, image_size=list(size))
        plan = resolve_run(dataclasses.replace(recipe, data=data), ())
        teacher = build_teacher(plan.model.teacher)
        students = {LINEARIZED: unaligned_student(plan.model, teacher).eval(), **exported}
        if list(size) != list(recipe.data.image_size):
            of_recipe = dataclasses.replace(plan.model.teacher, image_size=tuple(recipe.data.image_size))
            students = {RESAMPLED: build_teacher(of_recipe), **students}
        small = dataclasses.replace(plan.data, evaluation_batch_size=min(plan.data.evaluation_batch_size, BATCH_SIZE))
        batches = build_evaluation_loader(small, plan.evaluation.held_out, num_images)
        reports[size] = measure_block_errors(teacher, students, batches)
    return reports


def print_tables(reports: Mapping[Size, BlockReport]) -> None:
    """Prints, for each size, the blocks' errors; and the final features of all sizes."""
    finals = {}
    for (height, width), report in reports.items():
        columns = {("teacher", name): [found[name] for found in report.outliers] for name in report.outliers[0]}
        for name, errors in report.students.items():
            finals[f"{height} x {width} px", name] = errors.features
            if name != RESAMPLED:
                columns[name, "attention"] = [found["relative_error"] for found in errors.attention]
                columns[name, "stream"] = [found["relative_error"] for found in errors.stream]
                columns[name, "patch cosine"] = [found["patch_cosine"] for found in errors.stream]
        print(f"\nerrors by block, {height} x {width} px, {report.images} images")
        print(pd.DataFrame(columns).to_string(float_format="{:.3f}".format))
    print("\nfinal features against the teacher")
    print(pd.DataFrame(finals).T.to_string(float_format="{:.4f}".format))


def draw(reports: Mapping[Size, BlockReport], path: Path) -> None:
    """Draws two panels for each size: errors of single attentions, and of the residual stream up to the features."""
    drawn = {}
    for (height, width), report in reports.items():
        students = {name: errors for name, errors in report.students.items() if name != RESAMPLED}
        drawn[f"{height} x {width} px"] = dataclasses.replace(report, students=students)
    write_whole(path, as_png(block_error_picture(drawn)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=256, help="held-out images: the first of data.val (256)")
    parser.add_argument("--sizes", type=int, nargs="+", help="image sides in pixels (the recipe's image size)")
    parser.add_argument("--student", action="append", default=[], metavar="NAME=FOLDER", help="another student")
    parser.add_argument("--out", type=Path, help="where the files go (the run's folder)")
    options, rest = parser.parse_known_args(arguments)
    try:
        recipe = parse_command(rest).recipe
        folders = {name: Path(folder) for name, _, folder in (text.partition("=") for text in options.student)}
        sizes = [(side, side) for side in options.sizes or ()] or [tuple(recipe.data.image_size)]
        reports = measure_sizes(recipe, sizes, options.images, folders)
    except ValueError as error:
        report_error(error)
        return 1
    run = run_folder(recipe).path
    out = options.out or run
    out.mkdir(parents=True, exist_ok=True)
    found = [{"size": list(size), **dataclasses.asdict(report)} for size, report in reports.items()]
    found = {"run": str(run), "mechanism": recipe.mechanism, "sizes": found}
    (out / "block_errors.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(reports, out / "block_errors.png")
    print_tables(reports)
    print(f"wrote {out / 'block_errors.json'} and {out / 'block_errors.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
