"""A run from its recipe to its table: stage after stage is trained and exported, then the whole run is scored."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adala.attention import merge_lora, set_kernel
from adala.build import (
    Start,
    build_engine,
    build_evaluation_loader,
    build_monitor_loader,
    build_stage,
    build_teacher,
    build_train_loader,
    find_start,
    load_start,
    measure_on_data,
    prepare_student,
    rehearse,
    say_stream,
)
from adala.checkpoint import Checkpoints
from adala.comparison import Comparer, Comparison, of_held_out
from adala.config import Recipe, recipe_to_yaml, val_key
from adala.contenders import (
    LINEARIZED,
    TEACHER,
    Contender,
    build_teacher_contender,
    linearize_contender,
    load_contender,
)
from adala.data import StreamState, TrainLoader
from adala.distributed import Interrupted, any_rank, device, from_rank_0, raise_together, rank, say
from adala.engine import Engine
from adala.evaluation import Evaluator, FeatureStore, precision
from adala.export import WEIGHTS, load_student, load_task_model, save_student
from adala.files import file_digest, remove_tree, write_whole
from adala.lineage import START, Decision, decide, refuse_changed
from adala.plan import RunPlan, StagePlan, read_stage_task, resolve_run
from adala.preemption import Preempted, reason_to_end
from adala.progress import MetricWriter
from adala.protocol import ProbeConfig, Protocol, SegmentationConfig
from adala.report import Report, ReportRow, Scores, draw_report, print_report, read_report, write_report
from adala.runs import OverwriteOrder, StageFolder, StageRecord
from adala.search import search_run
from adala.similarity import relative_error
from adala.stages import Stage
from adala.students import LinearizedModel, linearized_blocks
from adala.tasks import Task, describe_task
from adala.trainer import Trainer
from adala.watchdog import Watchdog

# How far the features of an exported student may be from those of the one that was trained, both computed in the
# training's precision: in float32 the order of sums, in bfloat16 also the rounding of merged adapters.
EXPORT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
CHECKED_IMAGES = 8


def run_stages(recipe: Recipe, stages: Sequence[int], overwrite: bool = False) -> None:
    """Runs stages in order, and scores the run when it has been asked for several of them; every rank calls it.

    Nothing of the run is touched before all that was asked for has been checked, and no result is removed before the
    one that takes its place is complete.

    Raises:
        ValueError: Something about recipe, data or an earlier run is wrong; the message says what to do.
        Interrupted: The run was asked to end, and has saved what it had.
    """
    set_kernel(recipe.kernel)
    plan = resolve_run(recipe, stages)
    _rehearse_everywhere(plan)
    for note in plan.notes:
        say(note)
    with plan.run.held():
        try:
            did = _run_held(plan, stages, overwrite)
        except Interrupted:
            from_rank_0(plan.run.note_end)
            raise
        from_rank_0(plan.run.forget_ends)
    if not any(did):
        numbers = ", ".join(str(stage.number) for stage in plan.stages)
        say(
            f"stage {numbers} of run {plan.run.path} is finished already, and nothing was done: "
            "add --overwrite to run it again, or choose another --run_name"
        )


def _run_held(plan: RunPlan, stages: Sequence[int], overwrite: bool) -> list[bool]:
    """Which parts of what was asked for had to be done."""
    order = from_rank_0(partial(_open_run, plan, stages, overwrite))
    for number in plan.left_out:
        say(f"stage {number} is no part of {plan.recipe.mechanism}'s {plan.recipe.conversion} conversion: left out")
    did = [run_stage(plan, stage, order) for stage in plan.stages]
    if len(stages) > 1:
        if any_rank(reason_to_end() is not None):
            raise Preempted("all stages are finished, and not yet scored")
        did.append(report_run(plan))
    elif any(did):
        from_rank_0(partial(_draw_curves, plan))
    from_rank_0(plan.run.close_order)
    return did


def _rehearse_everywhere(plan: RunPlan) -> None:
    error = None
    try:
        rehearse(plan)
    except (ValueError, OSError) as raised:
        error = raised
    raise_together(error)


def _open_run(plan: RunPlan, stages: Sequence[int], overwrite: bool) -> OverwriteOrder | None:
    """Looks at what is there, refuses what cannot be, and notes an order to overwrite."""
    plan.run.complete_installations()
    if not overwrite:
        for stage in plan.stages:
            refuse_changed(plan.run, stage.number, stage.conditions)
    for index, stage in enumerate(plan.stages):
        # Of a later stage that goes on from an earlier one of this command, the start is not there yet.
        if index == 0 or stage.config.start_from != "auto":
            find_start(plan.run, stage)
    if not overwrite:
        return None
    order, is_old = plan.run.overwrite_order(stages)
    if is_old:
        say(
            f"going on with the --overwrite of {order.since}, which was not carried out to its end; to begin it again, "
            f"remove {plan.run.path / 'overwrite.json'} first"
        )
    return order


def run_stage(run_plan: RunPlan, plan: StagePlan, order: OverwriteOrder | None = None) -> bool:
    """Trains one stage to its end, resuming where an earlier attempt stopped, and exports its student.

    Returns:
        False where it was finished already and is left alone.
    """
    plan, start = _settle(run_plan, plan)
    decision = from_rank_0(partial(decide, run_plan.run, plan.number, plan.conditions, start.digest, order))
    say(f"stage {plan.number} ({plan.kind.title}) of {run_plan.run.path}: {decision.reason}")
    if decision.folder is None:
        return False
    say(f"stage {plan.number}: starting from {start.origin}")
    teacher = build_teacher(plan.model.teacher)
    student = load_start(start, plan.model, teacher)
    prepare_student(plan, student)
    stage = build_stage(plan, student, teacher)
    _say_kernel(plan, student)
    measure_on_data(plan, stage)
    conditions = {**plan.conditions, START: start.digest}
    from_rank_0(partial(_open_stage, run_plan, plan.number, decision, conditions))

    engine = build_engine(plan, stage)
    metrics = _train(run_plan, plan, engine, stage, decision.folder)
    digest = export_stage(plan, engine, stage, decision.folder)
    engine.close()
    record = StageRecord(conditions, digest, metrics, None if order is None else order.id)
    from_rank_0(partial(_finish_stage, run_plan, plan, decision, record))
    return True


def _say_kernel(plan: StagePlan, student: LinearizedModel) -> None:
    precision = plan.model.precision
    dtype = precision.autocast_dtype or precision.dtype
    mixers = [attention.token_mixer for attention in linearized_blocks(student).values()]
    for described in dict.fromkeys(mixer.describe_kernel(device(), dtype) for mixer in mixers):
        if described is not None:
            say(f"stage {plan.number}: linear attention by {described}")


def _settle(run_plan: RunPlan, plan: StagePlan) -> tuple[StagePlan, Start]:
    """The student that a stage starts from, and the stage of a student with just its blocks of softmax attention."""
    start = from_rank_0(partial(find_start, run_plan.run, plan))
    if plan.search is None:
        return plan, start
    if not start.keep:
        start = start.restoring(search_run(run_plan.run, plan, start).blocks)
    return plan.keeping(start.keep), start


def _open_stage(run_plan: RunPlan, number: int, decision: Decision, conditions: dict[str, Any]) -> None:
    folder = decision.folder
    if decision.is_new:
        remove_tree(folder.path)
    if decision.continues:
        folder.begin_as(run_plan.run.stage(number))
    folder.start_attempt(conditions)
    write_whole(folder.config, recipe_to_yaml(run_plan.recipe))


def _finish_stage(run_plan: RunPlan, plan: StagePlan, decision: Decision, record: StageRecord) -> None:
    decision.folder.finish(record)
    if decision.replaces:
        run_plan.run.install(plan.number)


def _train(
    run_plan: RunPlan, plan: StagePlan, engine: Engine, stage: Stage, folder: StageFolder
) -> dict[str, float]:  # fmt: skip
    def build_loader(state: StreamState, step: int) -> TrainLoader:
        loader = build_train_loader(plan, state, step)
        say_stream(plan.at(step), loader)
        return loader

    watchdog = Watchdog(run_plan.run.path, run_plan.recipe.hang_minutes)
    writer = MetricWriter(folder.path, f"stage {plan.number}", plan.config.steps, run_plan.recipe.tensorboard)
    trainer = Trainer(
        engine,
        plan.config,
        build_loader,
        {name: build_monitor_loader(plan, name) for name in plan.held_out_sets},
        lambda: Evaluator(stage.student, plan.task),
        writer,
        Checkpoints(folder.checkpoints, engine, plan.config.keep_last, plan.config.keep_every),
        seed=plan.model.seed,
        beat=watchdog.beat,
    )
    try:
        with watchdog.watching():
            return trainer.fit()
    finally:
        writer.close()


def export_stage(plan: StagePlan, engine: Engine, stage: Stage, folder: StageFolder) -> str:
    """Writes the stage's student, gathered from whatever ZeRO stage; every rank calls it.

    It is read back and must give the features and decisions that the trained one gives.

    Returns:
        The digest of its weights.

    Raises:
        ValueError: It does not.
    """
    state = engine.full_state()
    batch = next(iter(build_evaluation_loader(plan.data, plan.held_out, task=plan.task)), None)
    raise_together(
        None if batch else ValueError(f"rank {rank()} found no usable sample of {_first_key(plan)}: name other shards")
    )
    batch = {key: value[:CHECKED_IMAGES] if key != "epoch" else value for key, value in batch.items()}
    engine.eval()
    with torch.no_grad(), engine.averaged():
        trained = engine(batch)
    return from_rank_0(partial(_write_student, plan, stage, folder, state, batch, trained))


def _first_key(plan: StagePlan) -> str:
    return val_key(next(iter(plan.held_out_sets)))


def _write_student(
    plan: StagePlan,
    stage: Stage,
    folder: StageFolder,
    state: dict[str, torch.Tensor],
    batch: dict[str, Any],
    trained: dict[str, torch.Tensor],
) -> str:
    student = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
    description = replace(plan.model.student, task=describe_task(plan.task) if plan.task else None)
    save_student(folder.path, merge_lora(student), description, head or None)
    dtype = plan.model.precision.dtype
    with torch.no_grad(), precision(plan.model.precision.autocast_dtype):
        reloaded = load_student(folder.path).to(device(), dtype)
        found = {"features": reloaded(stage.images_for(reloaded, batch))}
        if head:
            whole = load_task_model(folder.path).to(device(), dtype)
            found["decision"] = whole.predict(stage.images_for(whole.student, batch))
    for name, value in found.items():
        tolerance = EXPORT_TOLERANCE[plan.model.precision.autocast_dtype or dtype]
        # A decision between scores that are nearly the same turns at once.
        tolerance *= 1 if value.is_floating_point() else 10
        error = _difference(value, trained[name])
        if not error <= tolerance:
            raise ValueError(
                f"the student written to {folder.path} does not give the {name} of the one that was trained (they "
                f"differ by {error:.2g}, at most {tolerance:g}): please report this; the checkpoints are intact"
            )
    return file_digest(folder.path / WEIGHTS)


def _difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of numbers, the share of decisions that are others."""
    if value.is_floating_point():
        return float(relative_error(value, expected))
    return float((value != expected).float().mean())


def report_run(plan: RunPlan) -> bool:
    """Scores the run and writes its report, unless one of these very students is there; every rank calls it."""
    wanted = from_rank_0(partial(_identify_students, plan))
    if wanted is None:
        return False
    from_rank_0(partial(_publish, plan, score_run(plan, wanted)))
    return True


def _draw_curves(plan: RunPlan) -> None:
    """After a single stage, which no table is made of: one that is there is of other students now."""
    if read_report(plan.run) is not None and _identify_students(plan) is not None:
        say(f"{plan.run.report} is of earlier students: --stage all makes it anew")
    draw_report(plan.run, None)


def _publish(plan: RunPlan, report: Report) -> None:
    write_report(plan.run, report)
    print_report(report, title=str(plan.run.path))
    draw_report(plan.run, report)


def _identify_students(plan: RunPlan) -> dict[str, Any] | None:
    """What a report of the run as it lies there is of; None where its report is of just that."""
    records = {n: plan.run.stage(n).record() for n in (1, 2, 3)}
    students = {f"stage {number}": record.student for number, record in records.items() if record is not None}
    identity = {"teacher": plan.model.teacher.digest, **students, **plan.evaluation.conditions}
    earlier = read_report(plan.run)
    return None if earlier is not None and earlier.identity == identity else identity


def score_run(plan: RunPlan, identity: dict[str, Any]) -> Report:
    """Scores teacher, unaligned student, and each stage's student on the held-out data; every rank calls it.

    The score is that of a probe on frozen features, of a student with a head that of its head; None without targets.
    """
    numbers = [number for number in (1, 2, 3) if f"stage {number}" in identity]
    teacher = build_teacher_contender(plan.model)
    contenders = {
        TEACHER: teacher,
        LINEARIZED: linearize_contender(plan.model, teacher),
        **{f"stage {number}": load_contender(plan.run.stage(number).path) for number in numbers},
    }
    say(f"scoring {', '.join(contenders)}")
    store = FeatureStore(plan.run.features)
    protocol = table_protocol(plan.recipe)
    comparison = Comparer(contenders, plan.data, plan.evaluation, protocol, store, probes_tuned=False).compare()
    from_rank_0(partial(remove_tree, store.folder))
    for note in dict.fromkeys(note for notes in comparison.notes.values() for note in notes):
        say(note)
    if comparison.unusable:
        say(f"{comparison.unusable} held-out samples could not be used, and are left out of all rows alike")
    task = read_stage_task(plan.recipe)
    rows = []
    sets = plan.evaluation.held_out_sets
    for name, contender in contenders.items():
        scores = {of_set: _scores(comparison, name, contender, of_set, task) for of_set in sets}
        first = next(iter(scores.values()))
        rows.append(ReportRow(name, first.score, first.feature_cosine, {} if "" in sets else scores))
    return Report(rows, task.score, task.score_title, identity, comparison.unusable)


def _scores(comparison: Comparison, name: str, contender: Contender, of_set: str, task: Task) -> Scores:
    """A model's line of the table on one held-out set."""
    kind = "head" if contender.head is not None else "probe"
    # What tells the teacher from nobody tells nothing of its students.
    is_scored = task.probe is None or of_held_out(of_set, f"probe_{task.score}") in comparison.measures[TEACHER]
    score = comparison.measures[name].get(of_held_out(of_set, f"{kind}_{task.score}")) if is_scored else None
    return Scores(score, comparison.measures[name][of_held_out(of_set, "feature_cosine")])


def table_protocol(recipe: Recipe) -> Protocol:
    """How a run's own table is made: probes to convergence, on as many samples as the recipe says."""
    config = recipe.evaluation
    return Protocol(
        name="table",
        description="the training command's own table",
        measures=["features", "probe", "segmentation", "head"],
        probe=ProbeConfig(solver="lbfgs", l2=config.probe_l2, train_samples=config.probe_samples),
        segmentation=SegmentationConfig(train_samples=config.probe_samples),
    )
