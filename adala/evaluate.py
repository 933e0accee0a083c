"""The evaluation command: from a command line to a table, a document and pictures.

Called, the module is :func:`adala.notebook.evaluate`, see :mod:`adala.verbs`.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adala.attention import set_kernel
from adala.backbones import check_image_size
from adala.build import build_evaluation_loader
from adala.comparison import BASELINES, Comparer, Comparison
from adala.config import val_key
from adala.contenders import (
    LINEARIZED,
    TEACHER,
    Contender,
    build_teacher_contender,
    linearize_contender,
    load_contender,
)
from adala.distributed import device, from_rank_0, say
from adala.evaluation import FeatureStore, raising_together
from adala.evaluation.token_rows import token_parts
from adala.evaluation_command import EvaluationCommand
from adala.evaluation_pictures import as_png, block_error_picture, mask_pictures, pca_pictures
from adala.evaluation_report import (
    EvaluationDocument,
    ModelRow,
    Picture,
    machine_description,
    to_markdown,
    write_document,
)
from adala.export import read_description
from adala.plan import RunPlan, index_digest, resolve_run, run_folder
from adala.protocol import describe
from adala.students import token_layout
from adala.tasks import describe_task
from adala.verbs import call_module

call_module(__name__, "adala.notebook:evaluate")

# Held-out images in each picture.
SHOWN = 4
# What a folder's row must not be called.
TAKEN = (TEACHER, LINEARIZED, *BASELINES)


def output_folder(command: EvaluationCommand) -> Path:
    """Where the results of an evaluation lie."""
    return command.out or run_folder(command.recipe).path / "evaluation"


def cache_folder(command: EvaluationCommand) -> Path:
    """Where features are kept, for evaluations of all runs of a folder."""
    return command.cache or Path(command.recipe.runs_dir).expanduser() / "features"


def run_evaluation(command: EvaluationCommand) -> None:
    """Compares the command's models; every rank calls it.

    Raises:
        ValueError: Something about recipe, data, models or protocol is wrong; the message says what to do.
    """
    set_kernel(command.recipe.kernel)
    plan, rows, cache = resolve_run(command.recipe, ()), name_rows(command.models), cache_folder(command)
    from_rank_0(partial(_check_folders, {"--out": output_folder(command), "--cache": cache}))
    from_rank_0(partial(_check_students, rows, plan))
    with raising_together():
        contenders = _build_contenders(rows, plan)
    store = FeatureStore(cache)
    say(f"comparing {', '.join(contenders)} under the protocol {command.protocol.name}")
    for note in plan.notes:
        say(note)
    if len(contenders) == 1:
        say("there is the teacher alone: name students after --models (linearized, runs/x/stage2)")
    comparison = Comparer(contenders, plan.data, plan.evaluation, command.protocol, store).compare()
    for measure, reason in comparison.left_out.items():
        say(f"{measure} is left out: {reason}")
    if comparison.unusable:
        say(f"{comparison.unusable} held-out samples could not be used, and are left out of all rows alike")
    pictures = from_rank_0(partial(_draw, plan, contenders, comparison)) if command.pictures else []
    from_rank_0(partial(_publish, command, plan, contenders, comparison, pictures))
    say(from_rank_0(store.summary))


def name_rows(models: Sequence[str]) -> dict[str, Path | None]:
    """What models are called, each once and in their order: students by the shortest ends of their folders' paths that
    tell them apart, beside those folders as they were written; the linearized teacher by its own name. The teacher is
    left out."""
    students = [Path(os.path.abspath(Path(name).expanduser())) for name in models if name not in (TEACHER, LINEARIZED)]
    folders = {os.path.realpath(folder): folder for folder in reversed(students)}
    rows: dict[str, Path | None] = {}
    for name in models:
        if name == LINEARIZED:
            rows[LINEARIZED] = None
        elif name != TEACHER:
            written = Path(name).expanduser()
            row = _shortest_end(folders[os.path.realpath(written)], folders.values())
            rows.setdefault(row, written)
    return rows


def _shortest_end(folder: Path, folders: Collection[Path]) -> str:
    for count in range(1, len(folder.parts)):
        end = folder.parts[-count:]
        if [each.parts[-count:] for each in folders].count(end) == 1 and "/".join(end) not in TAKEN:
            return "/".join(end)
    return str(folder)


def _check_folders(folders: Mapping[str, Path]) -> None:
    """By option: what cannot be written is told before hours of computing."""
    for option, folder in folders.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"{option} {folder}: {there} is no folder that can be written into")


def _check_students(rows: Mapping[str, Path | None], plan: RunPlan) -> None:
    """What can be told of students without building them."""
    for folder in filter(None, rows.values()):
        described, view = read_description(folder), plan.data.view
        for key in ("mean", "std"):
            theirs, ours = list(getattr(described, key)), list(getattr(view, key))
            if theirs != ours:
                raise ValueError(
                    f"the student in {folder} was made for images with {key} {theirs}, this recipe has {ours}: name "
                    f"the recipe of its run, or set data.{key}"
                )


def _build_contenders(rows: Mapping[str, Path | None], plan: RunPlan) -> dict[str, Contender]:
    """By the names of their rows, the teacher first whether it was named or not."""
    teacher = build_teacher_contender(plan.model)
    contenders = {TEACHER: teacher}
    for name, folder in rows.items():
        contenders[name] = linearize_contender(plan.model, teacher) if folder is None else load_contender(folder)
        try:
            check_image_size(contenders[name].model, plan.data.view.image_size)
        except ValueError as error:
            raise ValueError(f"the student in {folder}: {error}; set data.image_size") from error
    return contenders


def _publish(
    command: EvaluationCommand,
    plan: RunPlan,
    contenders: Mapping[str, Contender],
    comparison: Comparison,
    pictures: list[Picture],
) -> None:
    rows = [
        ModelRow(
            name,
            contenders[name].origin if name in contenders else "fitted on the training samples",
            contenders[name].mechanism if name in contenders else None,
            measures,
            comparison.notes[name],
        )
        for name, measures in comparison.measures.items()
    ]
    document = EvaluationDocument(
        title=f"{plan.model.teacher.name} and its students",
        command=command.text,
        machine=machine_description(),
        protocol=describe(command.protocol),
        data=_describe_data(command, plan, comparison),
        models=rows,
        details=comparison.details,
    )
    folder = output_folder(command)
    write_document(folder, document, pictures)
    print(to_markdown(document).split("\n## Command")[0], flush=True)
    say(f"wrote {folder}/evaluation.json, .md and .html")


def _describe_data(command: EvaluationCommand, plan: RunPlan, comparison: Comparison) -> dict[str, Any]:
    config, evaluation = command.recipe, plan.evaluation
    digests = {name: index_digest(held_out, True) for name, held_out in evaluation.held_out_sets.items()}
    train = (config.evaluation.probe_train or config.data.train) if evaluation.probe_train else None
    return {
        "task": describe_task(evaluation.task) if evaluation.task else None,
        "image_size": list(plan.data.view.image_size),
        "train": train,
        "held_out": config.data.val,
        "train_digest": index_digest(evaluation.probe_train, True) if evaluation.probe_train else None,
        "held_out_digest": digests if isinstance(config.data.val, dict) else digests[""],
        "samples": comparison.samples,
        "unusable_held_out_samples": comparison.unusable,
        "left_out": comparison.left_out,
        "notes": list(plan.notes) or None,
    }


@torch.no_grad()
def _draw(plan: RunPlan, contenders: Mapping[str, Contender], comparison: Comparison) -> list[Picture]:
    """Rank 0 alone: of the first images of each held-out set features as colours, masks over them; errors by block."""
    sets = plan.evaluation.held_out_sets
    pictures = [picture for name in sets for picture in _draw_set(plan, contenders, comparison, name)]
    if comparison.blocks is not None:
        caption = "Relative error by block: of each attention alone, and as it adds up along the residual stream."
        pictures.append(Picture("blocks", caption, as_png(block_error_picture(comparison.blocks))))
    return pictures


def _draw_set(plan: RunPlan, contenders: Mapping[str, Contender], comparison: Comparison, of_set: str) -> list[Picture]:
    held_out, task = plan.evaluation.held_out_sets[of_set], plan.evaluation.task
    ending, of_which = (f"_{of_set}", f" of {of_set}") if of_set else ("", "")
    batches = list(build_evaluation_loader(plan.data, held_out, SHOWN, task, alone=True))
    if not batches:
        raise ValueError(
            f"none of the first held-out samples can be drawn: leave --pictures out, or repair {val_key(of_set)}"
        )
    images = torch.cat([batch["image"] for batch in batches])[:SHOWN].to(device())
    view = plan.data.view
    mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))
    shown = (images.cpu() * std + mean).clamp(0, 1)
    features = {name: one.model(images) for name, one in contenders.items()}
    patches = {name: _patches(contenders[name], features[name], images) for name in contenders}
    same_width = {name: of for name, of in patches.items() if of.shape[-1] == patches[TEACHER].shape[-1]}
    caption = (
        f"Patch features as colours: one PCA, fitted on the teacher's patches of these held-out images{of_which}, for "
        "all models of its width."
    )
    pictures = [Picture(f"features{ending}", caption, as_png(pca_pictures(shown, same_width)))]
    if task is not None and task.probe == "dense" and comparison.heads:
        targets = torch.cat([batch["mask"] for batch in batches])[:SHOWN]
        predicted = {
            name: task.decision(
                head(features[name], token_layout(contenders[name].model, images)), tuple(images.shape[-2:])
            ).cpu()
            for name, head in comparison.heads.items()
        }
        listed = held_out.shards[0].classes
        names = listed if listed is not None and len(listed) == task.num_classes else None
        ignore_index = task.mask_format.ignore_index
        figure = mask_pictures(shown, targets, predicted, task.num_classes, ignore_index, names)
        caption = (
            f"Masks of held-out images{of_which}: the truth, then each model's, by its own head or a frozen linear one."
        )
        pictures.append(Picture(f"masks{ending}", caption, as_png(figure)))
    return pictures


def _patches(contender: Contender, features: Tensor, images: Tensor) -> Tensor:
    layout = token_layout(contender.model, images)
    return token_parts(features, layout, contender.model.has_class_token)["patches"].cpu()
