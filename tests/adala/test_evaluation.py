"""The Evaluator: every sample counts once, whatever the batches, the ranks, and the models beside."""

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from sklearn.metrics import average_precision_score
from tiny_teacher import build_tiny_teacher

from adala.data import View
from adala.distributed import SharedError, rank
from adala.evaluation import (
    Candidate,
    Evaluator,
    FeatureCollector,
    evaluate_all,
    evaluate_apart,
    measure_block_errors,
)
from adala.students import linearize
from adala.tasks import Classification
from adala.tasks.multilabel import Multilabel

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


def evaluate(model: torch.nn.Module, teacher: torch.nn.Module, batches: list[dict]) -> dict[str, float]:
    return evaluate_all({"": Candidate(model)}, teacher, batches)[""]


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


def with_head(model: torch.nn.Module) -> Candidate:
    head = TASK.build_head(model)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(5))
    return Candidate(model, head, TASK)


def test_all_models_are_scored_in_one_pass_as_each_alone(teacher) -> None:
    student = linearize(teacher, "linear").eval()
    candidates = {"t": Candidate(teacher), "s": Candidate(student), "tuned": with_head(student)}
    alone = {name: evaluate_all({"": one}, teacher, labelled_batches([2, 4]))[""] for name, one in candidates.items()}
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    assert evaluate_all(candidates, teacher, labelled_batches([2, 4])) == alone
    assert len(calls) == 2, "one for each batch"
    (whole,) = labelled_batches([6])
    right = candidates["tuned"].head(student(whole["image"])).argmax(-1) == whole["label"]
    assert right.tolist().count(True) in range(1, 6), "a share that a mistake would change"
    assert alone["tuned"]["top1"] == pytest.approx(100 * right.float().mean().item())
    assert {name: "top1" in metrics for name, metrics in alone.items()} == {"t": False, "s": False, "tuned": True}


def test_without_a_teacher_none_runs_and_nothing_is_compared(teacher) -> None:
    student = linearize(teacher, "linear").eval()
    teacher.register_forward_hook(lambda *_: pytest.fail("it need not run"))
    found = evaluate_all({"tuned": with_head(student), "s": Candidate(student)}, None, labelled_batches([6]))
    assert list(found["tuned"]) == ["top1"] and found["s"] == {}


def test_features_of_another_shape_are_not_compared(teacher) -> None:
    wide = build_tiny_teacher(embed_dim=48)
    found = evaluate_all({"wide": with_head(wide), "t": Candidate(teacher)}, teacher, labelled_batches([6]))
    assert list(found["wide"]) == ["top1"] and found["t"]["feature_cosine"] == pytest.approx(1)


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


def labels_of_a_rank(outputs_of_ranks: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    evaluator = Evaluator(build_tiny_teacher(), Multilabel(3))
    outputs = outputs_of_ranks[rank()]
    for decision, target in zip(outputs["decision"].split(2), outputs["target"].split(2), strict=True):
        if len(decision):
            evaluator.update({"decision": decision, "target": target}, {"id": ["x"] * len(decision)})
    return evaluator.total()


@pytest.mark.parametrize("cut", [[0, 7], [7, 0], [3, 4]], ids=str)
def test_metrics_that_keep_every_sample_are_those_of_all_ranks(cut: list[int], recwarn) -> None:
    """Average precision, also where one rank saw none."""
    generator = torch.Generator().manual_seed(0)
    decision, target = torch.rand(7, 3, generator=generator), torch.randint(2, (7, 3), generator=generator).float()
    parts = zip(decision.split(cut), target.split(cut), strict=True)
    found = on_ranks(2, labels_of_a_rank, [{"decision": ours, "target": theirs} for ours, theirs in parts])
    expected = 100 * average_precision_score(target, decision, average="macro")
    assert [metrics["map"] for metrics in found] == pytest.approx([expected, expected])
    assert found[0] == found[1]


def fail_on_the_second_rank(where: str) -> str:
    teacher, batches = build_tiny_teacher(), labelled_batches([2, 4])

    def broken():
        yield batches[0]
        if rank() == 1:
            raise OSError("the disk of rank 1 is gone")
        yield batches[1]

    student = with_head(linearize(teacher, "linear").eval())
    with pytest.raises(SharedError) as caught:
        if where == "all":
            evaluate_all({"student": student}, teacher, broken())
        elif where == "apart":
            evaluate_apart({"student": student}, broken(), View((16, 16), (0.5,) * 3, (0.5,) * 3, (4, 4)))
        else:
            measure_block_errors(teacher, {"student": student.model}, broken())
    return str(caught.value)


@pytest.mark.parametrize("where", ["all", "apart", "blocks"])
def test_what_one_rank_cannot_read_is_raised_by_all(where: str) -> None:
    assert on_ranks(2, fail_on_the_second_rank, where, timeout_s=60) == ["the disk of rank 1 is gone"] * 2
