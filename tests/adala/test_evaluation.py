"""The Evaluator: every sample counts once, whatever the batches; and what a Scorer makes of it."""

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from tiny_teacher import build_tiny_teacher

from adala.distributed import rank
from adala.evaluation import Candidate, Evaluator, FeatureCollector, Scorer, evaluate, evaluate_all
from adala.students import linearize
from adala.tasks import Classification

TASK = Classification(3)
CUTS = [[6], [1, 5], [2, 2, 2]]


def outputs_of(count: int) -> tuple[dict[str, torch.Tensor], dict]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 17, 32, generator=generator)
    return {
        "features": features,
        "teacher_features": features + torch.randn(count, 17, 32, generator=generator),
        "decision": torch.randn(count, 3, generator=generator),
        "target": torch.randint(3, (count,), generator=generator),
    }, {"id": [str(number) for number in range(count)]}


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_metrics_do_not_depend_on_batches(teacher, cut: list[int]) -> None:
    outputs, batch = outputs_of(6)
    evaluator, whole = (Evaluator(teacher, TASK) for _ in range(2))
    whole.update(outputs | {"loss": torch.tensor(1.0)}, batch)
    parts = {name: value.split(cut) for name, value in outputs.items()}
    for index, size in enumerate(cut):
        part = {name: pieces[index] for name, pieces in parts.items()}
        # A mean over the batch's images, as stages give it: weighted by their number.
        evaluator.update(part | {"loss": torch.tensor(1.0)}, {"id": ["x"] * size})
    for each in (evaluator, whole):
        each.reduce()
    expected = 100 * (outputs["decision"].argmax(-1) == outputs["target"]).float().mean().item()
    assert whole.compute()["top1"] == pytest.approx(expected)
    assert evaluator.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_scalars_are_means_over_images(teacher) -> None:
    evaluator = Evaluator(teacher)
    for loss, size in ((1.0, 1), (4.0, 5)):
        evaluator.update({"loss": torch.tensor(loss)}, {"id": ["x"] * size})
    evaluator.reduce()
    assert evaluator.compute() == {"loss": pytest.approx(3.5)}


def labelled_batches(cut: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(6, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    images = images + 3 * torch.nn.functional.one_hot(labels, 3)[..., None, None]
    pieces = zip(images.split(cut), labels.split(cut), strict=True)
    return [{"image": image, "label": label, "id": ["x"] * len(label)} for image, label in pieces]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_model_against_its_teacher(teacher, cut: list[int]) -> None:
    student = linearize(teacher, "linear").eval()
    found = evaluate(student, teacher, labelled_batches(cut))
    assert found == pytest.approx(evaluate(student, teacher, labelled_batches([6])), rel=1e-5)
    (whole,) = labelled_batches([6])
    ours, theirs = student(whole["image"]), teacher(whole["image"])
    cosine = F.cosine_similarity(ours, theirs, dim=-1)
    expected = {"feature_cosine": cosine, "patch_cosine": cosine[:, 1:], "cls_cosine": cosine[:, 0]}
    expected = {name: values.mean().item() for name, values in expected.items()}
    expected["relative_error"] = ((ours - theirs).norm() / theirs.norm()).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert evaluate(teacher, teacher, labelled_batches(cut))["relative_error"] == 0.0


def test_scores_by_a_probe_and_by_a_head() -> None:
    teacher = build_tiny_teacher()
    student, task = linearize(teacher, "linear").eval(), TASK
    scorer = Scorer(teacher, TASK, labelled_batches([2, 4]), labelled_batches([6]), 1e-3)
    probed = scorer.score(Candidate(student))
    assert probed.value == pytest.approx(100.0) and probed.metrics["feature_cosine"] < 1
    head = task.build_head(student)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(5))
    tuned = scorer.score(Candidate(student, head, task))
    (whole,) = labelled_batches([6])
    right = head(student(whole["image"])).argmax(-1) == whole["label"]
    assert right.tolist().count(True) in range(1, 6), "a share that a mistake would change"
    assert tuned.value == tuned.metrics["top1"] == pytest.approx(100 * right.float().mean().item())
    assert Scorer(teacher, TASK, labelled_batches([6]), None, 1e-3).score(Candidate(student)).value is None


def test_all_models_are_scored_in_one_pass_as_each_alone(teacher, monkeypatch) -> None:
    student, task = linearize(teacher, "linear").eval(), TASK
    head = task.build_head(student)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(5))
    scorer = Scorer(teacher, TASK, labelled_batches([2, 4]), labelled_batches([6]), 1e-3)
    candidates = {"t": Candidate(teacher), "s": Candidate(student), "tuned": Candidate(student, head, task)}
    alone = {name: scorer.score(candidate) for name, candidate in candidates.items()}
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    assert scorer.scores(candidates) == alone
    # Two held-out batches for all candidates together, and one that its own probe is fitted on.
    assert len(calls) == 3


def test_all_labels_alike_give_no_score(teacher) -> None:
    alike = [{**batch, "label": torch.zeros_like(batch["label"])} for batch in labelled_batches([6])]
    for held_out, train in ((alike, alike), (labelled_batches([6]), alike), (alike, labelled_batches([6]))):
        assert Scorer(teacher, TASK, held_out, train, 1e-3).score(Candidate(teacher)).value is None


def score_unevenly(batches_of_ranks: list[list[dict]]) -> tuple[dict[str, float], int]:
    """As a rank of several, of which some have no batch: bad samples may have left it none."""
    teacher = build_tiny_teacher()
    collector = FeatureCollector(teacher, "cls", TASK)
    candidate = Candidate(linearize(teacher, "linear").eval(), collectors=[collector])
    metrics = evaluate_all({"student": candidate}, teacher, batches_of_ranks[rank()])["student"]
    evaluator = Evaluator(teacher)
    for loss in range(2 * rank()):
        evaluator.update({"loss": torch.tensor(float(loss))}, {"id": ["x"]})
    evaluator.reduce()
    return {**metrics, **evaluator.compute()}, len(collector.gathered().labels)


def test_a_rank_without_a_batch_is_waited_for_and_waits(teacher) -> None:
    alone = evaluate(linearize(teacher, "linear").eval(), teacher, labelled_batches([2, 4]))
    for metrics, labels in on_ranks(2, score_unevenly, [[], labelled_batches([2, 4])]):
        assert metrics == pytest.approx({**alone, "loss": 0.5}) and labels == 6


def collect_nothing() -> str:
    with pytest.raises(ValueError) as caught:
        FeatureCollector(build_tiny_teacher(), "cls", TASK).gathered()
    return str(caught.value)


def test_no_sample_at_all_is_said_on_every_rank() -> None:
    assert all("no labelled sample can be used" in said for said in on_ranks(2, collect_nothing))
