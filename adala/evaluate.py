"""The evaluation command: from a command line to a table, a document and pictures."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adala.build import build_evaluation_loader
from adala.comparison import Comparer, Comparison
from adala.contenders import (
    LINEARIZED,
    TEACHER,
    Contender,
    build_teacher_contender,
    linearize_contender,
    load_contender,
)
from adala.distributed import device, from_rank_0, say
from adala.evaluation import FeatureStore
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

# Held-out images in each picture.
SHOWN = 4


def output_folder(command: EvaluationCommand) -> Path:
    """Where the results of an evaluation lie."""
    return command.out or run_folder(command.recipe).path / "evaluation"


def run_evaluation(command: EvaluationCommand) -> None:
    """Compares the command's models; every rank calls it.

    Raises:
        ValueError: Something about recipe, data, models or protocol is wrong; the message says what to do.
    """
    plan = resolve_run(command.recipe, ())
    from_rank_0(partial(_check_models, command, plan))
    contenders = _build_contenders(command, plan)
    store = FeatureStore(command.cache or Path(command.recipe.runs_dir).expanduser() / "features")
    say(f"comparing {', '.join(contenders)} under the protocol {command.protocol.name}")
    for note in plan.notes:
        say(note)
    evaluation, notes = plan.evaluation, _unfitting_heads(contenders, plan)
    contenders = {name: _without_head(one) if name in notes else one for name, one in contenders.items()}
    comparer = Comparer(contenders, plan.data, evaluation, command.protocol, store)
    comparison = comparer.compare()
    for name, note in notes.items():
        comparison.notes[name].append(note)
    pictures = from_rank_0(partial(_draw, plan, contenders, comparison)) if command.pictures else []
    from_rank_0(partial(_publish, command, plan, contenders, comparison, pictures))
    say(from_rank_0(store.summary))


def _check_models(command: EvaluationCommand, plan: RunPlan) -> None:
    """What can be told of students without building them."""
    for name in command.models:
        if name in (TEACHER, LINEARIZED):
            continue
        described, view = read_description(name), plan.data.view
        for key in ("mean", "std"):
            if list(getattr(described, key)) != list(getattr(view, key)):
                raise ValueError(
                    f"the student in {name} was made for images with {key} {getattr(described, key)}, this recipe has "
                    f"{list(getattr(view, key))}: name the recipe of its run, or set data.{key}"
                )


def _build_contenders(command: EvaluationCommand, plan: RunPlan) -> dict[str, Contender]:
    """By the names they were given, the teacher first whether it was named or not."""
    teacher = build_teacher_contender(plan.model)
    contenders = {TEACHER: teacher}
    for name in command.models:
        if name == LINEARIZED:
            contenders[name] = linearize_contender(plan.model, teacher)
        elif name != TEACHER:
            contenders[name] = load_contender(Path(name).expanduser(), with_head=True)
    return contenders


def _unfitting_heads(contenders: Mapping[str, Contender], plan: RunPlan) -> dict[str, str]:
    """Of contenders whose heads are for another target than these samples have, why they are left out."""
    task, found = plan.evaluation.task, {}
    for name, one in contenders.items():
        if one.head is not None and task is not None and not _same_target(one.task, task):
            found[name] = (
                f"its head is for {one.task.name} of {one.task.num_classes} classes, and these samples are for "
                f"{task.name} of {task.num_classes}: it is left out"
            )
    return found


def _same_target(ours: Any, theirs: Any) -> bool:
    return ours.name == theirs.name and getattr(ours, "num_classes", None) == getattr(theirs, "num_classes", None)


def _without_head(contender: Contender) -> Contender:
    return dataclasses.replace(contender, head=None, task=None)


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
    return {
        "task": describe_task(evaluation.task) if evaluation.task else None,
        "image_size": list(plan.data.view.image_size),
        "train": config.evaluation.probe_train or config.data.train,
        "held_out": config.data.val,
        "train_digest": index_digest(evaluation.probe_train, True) if evaluation.probe_train else None,
        "held_out_digest": index_digest(evaluation.held_out, True),
        "samples": comparison.samples,
        "unusable_held_out_samples": comparison.unusable,
    }


@torch.no_grad()
def _draw(plan: RunPlan, contenders: Mapping[str, Contender], comparison: Comparison) -> list[Picture]:
    """Rank 0 alone: features of the first held-out images as colours, masks over them, errors by block."""
    loader = build_evaluation_loader(plan.data, plan.evaluation.held_out, SHOWN, plan.evaluation.task, alone=True)
    batches = list(loader)
    images = torch.cat([batch["image"] for batch in batches])[:SHOWN].to(device())
    view = plan.data.view
    mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))
    shown = (images.cpu() * std + mean).clamp(0, 1)
    features = {name: one.model(images) for name, one in contenders.items()}
    patches = {name: _patches(contenders[name], features[name], images) for name in contenders}
    same_width = {name: of for name, of in patches.items() if of.shape[-1] == patches[TEACHER].shape[-1]}
    caption = (
        "Patch features as colours: one PCA, fitted on the teacher's patches of these held-out images, for all models."
    )
    pictures = [Picture("features", caption, as_png(pca_pictures(shown, same_width)))]
    if comparison.blocks is not None:
        caption = "Relative error by block: of each attention alone, and as it adds up along the residual stream."
        pictures.append(Picture("blocks", caption, as_png(block_error_picture(comparison.blocks))))
    heads = {name: (comparison.heads[name], plan.evaluation.task) for name in comparison.heads}
    heads |= {name: (one.head, one.task) for name, one in contenders.items() if one.head is not None}
    if batches and "mask" in batches[0] and heads:
        targets = torch.cat([batch["mask"] for batch in batches])[:SHOWN]
        predicted = {
            name: task.decision(
                head(features[name], token_layout(contenders[name].model, images)), tuple(images.shape[-2:])
            ).cpu()
            for name, (head, task) in heads.items()
        }
        task = plan.evaluation.task
        figure = mask_pictures(shown, targets, predicted, task.num_classes, task.mask_format.ignore_index)
        caption = "Masks of held-out images: the truth, then each model's, by its own head or a frozen linear one."
        pictures.append(Picture("masks", caption, as_png(figure)))
    return pictures


def _patches(contender: Contender, features: Tensor, images: Tensor) -> Tensor:
    layout = token_layout(contender.model, images)
    return token_parts(features, layout, contender.model.has_class_token)["patches"].cpu()
