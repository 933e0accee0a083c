"""A run from its recipe to its table: stage after stage is trained and exported, then the whole run is scored."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from adala.attention import merge_lora
from adala.build import (
    FEATURE_POOLING,
    build_engine,
    build_evaluation_loader,
    build_stage,
    build_teacher,
    build_train_loader,
    conversion_of,
    data_index,
    describe_student,
    plan_stage,
    resume_conditions,
    run_folder,
    starting_student,
    unaligned_student,
)
from adala.config import Recipe, recipe_to_yaml
from adala.conversion import STAGE_NAMES
from adala.distributed import barrier, device, raise_together, rank
from adala.engine import Engine
from adala.evaluation.classification import classifier_top1
from adala.evaluation.features import FeatureCollector, collect_features, compare_features
from adala.evaluation.linear_probe import linear_probe_top1
from adala.export import (
    StudentDescription,
    has_student,
    load_classifier,
    load_student,
    save_student,
)
from adala.progress import MetricWriter, say
from adala.report import ReportRow, draw_report, print_report, write_report
from adala.trainer import Trainer


def run_stages(recipe: Recipe, stages: Sequence[int], overwrite: bool = False) -> None:
    """Runs stages in order, and scores the run when it has been asked for all of them; every rank calls it.

    Raises:
        ValueError: Something about recipe, data or an earlier run is wrong; the message says what to do.
    """
    run = run_folder(recipe)
    finished = [number for number in stages if run.is_finished(number)]
    if not overwrite and finished == list(stages):
        raise ValueError(
            f"stage {', '.join(map(str, finished))} of run {run.path} is finished already: "
            "add --overwrite to run it again, or choose another --run_name"
        )
    for number in stages:
        if number in finished and not overwrite:
            say(f"stage {number} of {run.path} is finished already: going on with the next")
        elif conversion_of(recipe).step(STAGE_NAMES[number]) is None and len(stages) > 1:
            say(f"stage {number} is no part of {recipe.mechanism}'s {recipe.conversion} conversion: left out")
        else:
            run_stage(recipe, number, overwrite)
    if len(stages) > 1:
        rows = score_run(recipe)
        if rank() == 0:
            write_report(run.report, rows)
            print_report(rows, title=str(run.path))
            draw_report(run, rows)
    elif rank() == 0:
        draw_report(run, [])
    barrier()


def run_stage(recipe: Recipe, number: int, overwrite: bool = False) -> None:
    """Trains one stage to its end, resuming where an earlier attempt stopped, and exports its student."""
    run = run_folder(recipe)
    plan = plan_stage(recipe, number)
    teacher = build_teacher(recipe)
    student, origin = starting_student(recipe, number, teacher)
    stage = build_stage(recipe, number, plan, student, teacher)
    training_index, held_out_index = data_index(recipe, plan.sources), data_index(recipe, recipe.data.val)
    if rank() == 0:
        if overwrite:
            run.remove_stage(number)
        run.stage(number).mkdir(parents=True, exist_ok=True)
        (run.stage(number) / "config.yaml").write_text(recipe_to_yaml(recipe))
    barrier()
    say(f"stage {number} ({plan.step.stage}) of {run.path}: starting from {origin}")

    engine = build_engine(recipe, plan, stage)
    writer = MetricWriter(run.stage(number), f"stage {number}", plan.config.steps, recipe.tensorboard)
    trainer = Trainer(
        engine,
        plan.config,
        partial(build_train_loader, recipe, number, plan, training_index, teacher),
        build_evaluation_loader(
            recipe, held_out_index, teacher, recipe.evaluation.monitor_samples, require_label=number == 3
        ),
        writer,
        run.checkpoints(number),
        resume_conditions(recipe, number, plan),
        seed=recipe.seed,
    )
    try:
        metrics = trainer.fit()
        export_stage(recipe, number, engine, describe_student(recipe, student, teacher))
    finally:
        writer.close()
    if rank() == 0:
        run.mark_finished(number, metrics)
    engine.close()
    barrier()


def export_stage(recipe: Recipe, number: int, engine: Engine, description: StudentDescription) -> None:
    """Writes the stage's student, gathered from whatever ZeRO stage, and reads it back; every rank calls it."""
    state = engine.full_state()
    error = None
    if rank() == 0:
        try:
            folder = run_folder(recipe).stage(number)
            student = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
            head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
            if head:
                config = recipe.stage3
                description = replace(description, head={"num_classes": config.num_classes, "pooling": config.pooling})
            save_student(folder, merge_lora(student), description, head or None)
            load_student(folder)
        except (ValueError, OSError) as raised:
            error = raised
    raise_together(error)


def score_run(recipe: Recipe) -> list[ReportRow]:
    """Scores teacher, unaligned student, and each stage's student on the held-out data; every rank calls it.

    Top-1 is that of a linear probe on frozen features, and of Stage 3's own head after it; None without labels.
    """
    run = run_folder(recipe)
    teacher = build_teacher(recipe)
    students = {"teacher": teacher, "linearized": unaligned_student(recipe, teacher).eval()}
    students |= {f"stage {n}": load_student(run.stage(n)).to(device()) for n in (1, 2, 3) if has_student(run.stage(n))}
    config = recipe.evaluation
    probe_index = data_index(recipe, config.probe_train or recipe.data.train)
    held_out_index = data_index(recipe, recipe.data.val)
    probe = partial(build_evaluation_loader, recipe, probe_index, teacher, config.probe_samples)
    held_out = partial(build_evaluation_loader, recipe, held_out_index, teacher)
    labelled = all("label" in next(iter(loader())) for loader in (probe, held_out))
    rows = []
    for name, student in students.items():
        probed = labelled and name != "stage 3"
        collector = FeatureCollector(student, FEATURE_POOLING) if probed else None
        cosine = compare_features(student, teacher, held_out(), collector)["feature_cosine"]
        top1 = None
        if name == "stage 3":
            classifier = load_classifier(run.stage(3)).to(device())
            top1 = classifier_top1(classifier, held_out(), recipe.stage3.num_classes)
        elif probed:
            fitted_on = collect_features(student, probe(), FEATURE_POOLING)
            top1 = linear_probe_top1(fitted_on, collector.gathered(), l2=config.probe_l2)
        rows.append(ReportRow(name, None if top1 is None else round(top1, 2), round(cosine, 5)))
        say(f"scored {name}: top-1 {'-' if top1 is None else f'{top1:.2f} %'}, feature cosine {cosine:.4f}")
    return rows
