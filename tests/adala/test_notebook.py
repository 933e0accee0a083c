"""Alignment and evaluation without a recipe: the stages' own mathematics on anybody's images."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator

import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from tiny_teacher import build_tiny_teacher
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adala
from adala import notebook
from adala.config import load_recipe
from adala.conversion import ADALA
from adala.hybrids import ERROR
from adala.optim import build_optimizer, freeze_except, rate_factor
from adala.similarity import comparison_metrics, comparison_sums
from adala.stages import AttentionAlignment, FeatureAlignment
from adala.students import LinearizedModel, linearize, linearized_blocks

SHORT = {"steps": (6, 4), "lr": (2e-3, 1e-3), "warmup_steps": (2, 1), "progress": False}


@pytest.fixture
def batches() -> list[Tensor]:
    """Three batches of four images (3, 16, 16)."""
    return list(torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(5)).split(4))


def student_of(teacher: VisionTransformer, mechanism: str = "linear") -> LinearizedModel:
    return linearize(teacher, mechanism)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def by_hand(student: LinearizedModel, teacher: VisionTransformer, batches: list[Tensor]) -> list[float]:
    """Every loss of the two stages under ``SHORT``, in plain PyTorch around the stage modules."""
    losses, stream = [], iter(batches * 4)
    for number, build in enumerate((AttentionAlignment, FeatureAlignment)):
        step_of = ADALA.step("attention_alignment" if number == 0 else "feature_alignment")
        freeze_except(student, step_of.trainable)
        stage = build(student, teacher, "normalized_mse")
        stage.calibrate([{"image": batch} for batch in batches])
        stage.train()
        optimizer = build_optimizer(stage, SHORT["lr"][number], 0.0, (0.9, 0.999))
        for step in range(SHORT["steps"][number]):
            factor = rate_factor(step, SHORT["steps"][number], SHORT["warmup_steps"][number], "cosine")
            for group in optimizer.param_groups:
                group["lr"] = factor * SHORT["lr"][number]
            loss = stage({"image": next(stream)})["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def test_both_stages_are_the_stage_modules_under_the_optimizer_of_the_trainer(teacher, batches: list[Tensor]) -> None:
    ours, theirs = student_of(teacher), student_of(teacher)
    found = adala.align(ours, teacher, batches, **SHORT)
    expected = by_hand(theirs, teacher, batches)
    assert [*found.losses["attention_alignment"], *found.losses["feature_alignment"]] == expected
    # The rate of the last step is not zero: the weights differ from those before it.
    assert all(torch.equal(value, weights(theirs)[name]) for name, value in weights(ours).items())


def test_a_student_comes_closer_and_what_is_said_of_it_is_so(teacher, batches: list[Tensor]) -> None:
    student = student_of(teacher)
    untrained = adala.evaluate(student, teacher, batches)
    # Of a network that knows nothing, noise teaches nothing about other noise: some of the same.
    held_out = [torch.cat(batches)[3:9]]
    longer = {"steps": (30, 60), "lr": (3e-3, 1e-3), "warmup_steps": (3, 3), "progress": False}
    found = adala.align(student, teacher, batches, held_out=held_out, **longer)
    assert found.measured_images == 6 and found.seconds > 0
    assert found.after["feature_cosine"] > found.before["feature_cosine"] + 0.05
    assert found.after["relative_error"] < found.before["relative_error"]
    assert found.after == {k: v for k, v in adala.evaluate(student, teacher, held_out).items() if k != "images"}
    for losses in found.losses.values():
        # Of the same three batches.
        assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert adala.evaluate(student, teacher, batches)["feature_cosine"] > untrained["feature_cosine"] + 0.05
    assert f"feature_cosine {found.before['feature_cosine']:.4f} -> {found.after['feature_cosine']:.4f}" in str(found)
    assert "on 6 images, after 30 + 60 steps" in str(found)


def test_defaults_are_those_of_the_recipe_that_was_measured() -> None:
    defaults, recipe = adala.align.__kwdefaults__, load_recipe("dinov2_small")
    stages = (recipe.stage1, recipe.stage2)
    for name in ("steps", "lr", "warmup_steps"):
        assert defaults[name] == tuple(getattr(stage, name) for stage in stages), name
    for stage in stages:
        assert (stage.loss, stage.global_batch_size) == (defaults["loss"], defaults["batch_size"])
        assert (stage.weight_decay, stage.min_lr, stage.schedule) == (0.0, 0.0, "cosine")
        assert list(stage.betas) == [0.9, 0.999]
        assert stage.gradient_clipping == notebook.GRADIENT_CLIPPING
        assert stage.max_skipped_steps == notebook.MAX_SKIPPED_STEPS


def test_stage_1_alone_trains_projections_and_mixers_alone(teacher, batches: list[Tensor]) -> None:
    student = student_of(teacher, "hedgehog")
    before = weights(student)
    found = adala.align(student, teacher, batches, **{**SHORT, "steps": (3, 0)})
    assert list(found.losses) == ["attention_alignment"]
    changed = {name for name, value in weights(student).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".attn.qkv." in name or ".token_mixer." in name}


def test_mixers_are_told_which_step_begins(teacher, batches: list[Tensor]) -> None:
    student = linearize(teacher, "performer", options={"redraw_interval": 2})
    before = [shell.token_mixer.projection.clone() for shell in linearized_blocks(student).values()]
    adala.align(student, teacher, batches, **{**SHORT, "steps": (3, 0)})
    after = [shell.token_mixer.projection for shell in linearized_blocks(student).values()]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


SHAPES: dict[str, Callable[[list[Tensor]], Iterable]] = {
    "batches": lambda batches: batches,
    "one tensor": torch.cat,
    "single images": lambda batches: list(torch.cat(batches)),
    "loader": lambda batches: DataLoader(TensorDataset(torch.cat(batches)), batch_size=4),
    "with labels": lambda batches: [(batch, torch.zeros(4)) for batch in batches],
    "mappings": lambda batches: [{"image": batch, "id": 3} for batch in batches],
    "generator": lambda batches: (batch for batch in batches * 4),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_images_come_in_any_form(kind: str, teacher, batches: list[Tensor]) -> None:
    expected = adala.align(student_of(teacher), teacher, batches, **SHORT)
    found = adala.align(student_of(teacher), teacher, SHAPES[kind](batches), batch_size=4, **SHORT)
    assert found.losses.keys() == expected.losses.keys()
    # A generator is calibrated on all that comes of it within 128 images, the same ones four times here.
    for name, losses in found.losses.items():
        assert losses == pytest.approx(expected.losses[name], rel=1e-4)


def test_the_first_images_are_measured_and_no_more(teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "MEASURED_IMAGES", 6)
    taken: list[int] = []

    def images() -> Iterator[Tensor]:
        for number in range(9):
            taken.append(number)
            yield torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(number))

    found = adala.align(student_of(teacher), teacher, images(), **{**SHORT, "steps": (0, 3)})
    assert found.measured_images == 8 and taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        ([Image.new("RGB", (16, 16))], "images are tensors, not Image: transform them first"),
        ([{"pixels": torch.zeros(1, 3, 16, 16)}], "images are tensors, not NoneType"),
        ([torch.zeros(2, 3, 16, 16, dtype=torch.uint8)], "floating and normalised, not torch.uint8"),
        ([torch.zeros(2, 1, 16, 16)], r"not torch.float32 \(2, 1, 16, 16\)"),
        ([torch.zeros(16, 16)], "images are"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 16, 20)], "cannot be one batch: resize them"),
        (iter([torch.zeros(2, 3, 16, 16)] * 5), "the images ended after 5 batches, before the last step"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_images_that_are_none_are_refused(images: Iterable, message: str, teacher) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        adala.align(student_of(teacher), teacher, images, **SHORT)
    assert "\n" not in str(raised.value)


def test_an_iterator_that_is_used_up_is_told(teacher, batches: list[Tensor]) -> None:
    used = iter(batches)
    list(used)
    with pytest.raises(ValueError, match="or was iterated to its end before"):
        adala.evaluate(student_of(teacher), teacher, used)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": (0, 0)}, "one of the two stages must have some"),
        ({"steps": (3,)}, r"steps is \(3,\): it must be two numbers"),
        ({"lr": (1e-3, -1)}, "lr is .*none below 0"),
        ({"loss": "l1"}, "unknown Stage 1 loss 'l1'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict, message: str, teacher, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        adala.align(student_of(teacher), teacher, batches, **{**SHORT, **options})


def test_models_that_do_not_belong_together_are_refused(teacher, batches: list[Tensor]) -> None:
    for other, message in (
        (build_tiny_teacher(depth=2), "the student has 3 blocks of width 32, the teacher 2 of width 32"),
        (nn.Linear(2, 2), "the teacher is a Linear: give a timm ViT"),
        (build_tiny_teacher().to("meta"), "the student is on cpu, the teacher on meta"),
    ):
        for verb in (adala.align, adala.evaluate):
            with pytest.raises(ValueError, match=message):
                verb(student_of(teacher), other, batches)


def test_gradients_that_are_not_finite_stop_it_and_leave_the_weights_alone(teacher) -> None:
    student = student_of(teacher)
    before = weights(student)
    images = [torch.full((2, 3, 16, 16), math.inf)]
    with pytest.raises(ValueError, match="Stage 2, step 5: the gradients of 5 steps in a row were not finite"):
        adala.align(student, teacher, images, **{**SHORT, "steps": (0, 9), "loss": "mse"})
    assert all(torch.equal(value, before[name]) for name, value in weights(student).items())


def test_models_with_classifiers_keep_them_and_everything_else(batches: list[Tensor]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    model.blocks[1].eval()
    model.norm.weight.requires_grad_(False)
    student = student_of(model)
    student.patch_embed.requires_grad_(False)
    flags = {m: {name: p.requires_grad for name, p in m.named_parameters()} for m in (model, student)}
    modes, heads = [module.training for module in model.modules()], weights(student.head)
    found = adala.align(student, model, batches, **SHORT)
    assert found.after["feature_cosine"] != found.before["feature_cosine"]
    assert [module.training for module in model.modules()] == modes and not student.training
    for of, before in flags.items():
        assert {name: p.requires_grad for name, p in of.named_parameters()} == before
        assert all(p.grad is None for p in of.parameters())
    assert all(torch.equal(value, heads[name]) for name, value in student.head.state_dict().items())
    assert model(batches[0]).shape == student(batches[0]).shape == (4, 1000)


def test_bfloat16_is_autocast(teacher, batches: list[Tensor]) -> None:
    exact = adala.align(student_of(teacher), teacher, batches, **SHORT)
    student = student_of(teacher)
    rounded = adala.align(student, teacher, batches, bf16=True, **SHORT)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    for name, losses in exact.losses.items():
        assert rounded.losses[name] != losses
        assert rounded.losses[name] == pytest.approx(losses, rel=0.1)


@torch.no_grad()
def test_evaluation_is_the_measure_of_all_features(teacher, batches: list[Tensor]) -> None:
    student = student_of(teacher).eval()
    images = torch.cat(batches)
    expected = comparison_metrics(comparison_sums(student(images), teacher(images), 1), True)
    found = adala.evaluate(student.train(), teacher, images, batch_size=5)
    assert found.pop("images") == 12
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)
    assert student.training and not teacher.training
    # Of whatever dtype the weights are.
    exact = adala.evaluate(copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), batches)
    assert exact == pytest.approx({**found, "images": 12}, rel=1e-4)
    for model in (linearize(teacher, "softmax"), teacher):
        same = adala.evaluate(model, teacher, batches)
        assert same["feature_cosine"] == pytest.approx(1, abs=1e-6) and same["relative_error"] == 0


def test_evaluation_times_both_models_side_by_side(teacher, batches: list[Tensor], monkeypatch) -> None:
    seen: dict[str, Tensor] = {}
    measure = notebook.measure_speed

    def watched(models: dict[str, nn.Module], images: Tensor):
        seen.update({name: model(images) for name, model in models.items()})
        return measure(models, images, rounds=2)

    monkeypatch.setattr(notebook, "measure_speed", watched)
    student = student_of(teacher)
    found = adala.evaluate(student, teacher, iter(batches), speed=True)
    assert found["images"] == 12 and found["images_per_s"] > 0 and found["speed_against_teacher"] > 0
    assert list(seen) == ["teacher", "student"] and torch.equal(seen["student"], student.eval()(batches[0]))


def test_blocks_are_chosen_by_the_first_images_and_the_hybrid_is_closer(teacher, batches: list[Tensor]) -> None:
    student = student_of(teacher)
    adala.align(student, teacher, batches, **SHORT | {"steps": (6, 0)})
    before = weights(student)
    choice = adala.choose_softmax_blocks(
        student, teacher.train(), torch.cat(batches), 2, measured_images=8, batch_size=4
    )
    assert (
        choice.images == 8 and teacher.training and all(torch.equal(weights(student)[n], v) for n, v in before.items())
    )
    teacher.eval()
    measured = batches[:2]
    assert choice.before[ERROR] == pytest.approx(adala.evaluate(student, teacher, measured)[ERROR], rel=1e-4)
    for step in choice.steps:
        adala.restore_softmax(student, teacher, [step.block])
        assert step.metrics[ERROR] == pytest.approx(adala.evaluate(student, teacher, measured)[ERROR], rel=1e-4)
    assert choice.steps[1].metrics[ERROR] < choice.before[ERROR]
    assert sorted(linearized_blocks(student)) == [n for n in range(3) if n not in choice.blocks]
    for count in (0, 3):
        with pytest.raises(ValueError, match=rf"count is {count}: it must be a whole number from 1 to 2"):
            adala.choose_softmax_blocks(student, teacher, batches, count)
    with pytest.raises(ValueError, match="has softmax attention already"):
        adala.choose_softmax_blocks(student, teacher, batches, 1)
