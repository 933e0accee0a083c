"""The three stages as modules: losses, gradients, what trains and what never does."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_teacher import build_tiny_teacher
from torch import nn

from adala.activations import SavedActivations
from adala.attention import TokenLayout
from adala.compilation import CompiledModules, compiled_call
from adala.conversion import QKV_PATTERNS
from adala.losses import ALIGNMENT_LOSSES, mse
from adala.optim import freeze_except
from adala.stages import AttentionAlignment, FeatureAlignment, Finetuning, Stage
from adala.students import linearize
from adala.tasks import Classification

ALIGNED = ("blocks.0.attn.", "blocks.2.attn.")
ALL_LOSSES = ["mse", "normalized_mse", "head_output_mse_1000"]
FEATURE_LOSSES = ["normalized_mse", "standardized_mse", "cosine_smooth_l1"]


def calibrated(stage: Stage, images: torch.Tensor) -> Stage:
    stage.calibrate([{"image": images}])
    return stage


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_a_student_equal_to_its_teacher_has_zero_stage_1_loss(teacher, images, loss: str, dtype, mode: bool) -> None:
    teacher = teacher.to(dtype)
    stage = calibrated(AttentionAlignment(linearize(teacher, "softmax"), teacher, loss), images).train(mode)
    losses = stage({"image": images})
    assert {name: value.item() for name, value in losses.items() if name.endswith("loss")} == {
        "loss": 0.0, "block00_loss": 0.0, "block01_loss": 0.0, "block02_loss": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["mse", "normalized_mse"])
def test_a_student_equal_to_its_teacher_has_zero_stage_2_loss(teacher, images, loss: str, dtype) -> None:
    teacher = teacher.to(dtype)
    losses = calibrated(FeatureAlignment(linearize(teacher, "softmax"), teacher, loss), images)({"image": images})
    assert losses["loss"].item() == 0.0
    assert losses["feature_cosine"].item() == pytest.approx(1.0, abs=1e-5)
    assert losses["relative_error"].item() == 0.0


def test_stage_2_logs_how_close_the_features_are(teacher, images) -> None:
    # Otherwise the final norm gives teacher and student features of one length, and either could be the target.
    nn.init.normal_(teacher.norm.weight, generator=torch.Generator().manual_seed(4))
    student = linearize(teacher, "linear")
    losses = FeatureAlignment(student, teacher, "mse")({"image": images})
    ours, theirs = student(images), teacher(images)
    cosine = nn.functional.cosine_similarity(ours, theirs, dim=-1)
    expected = {
        "loss": (ours - theirs).square().mean(),
        "feature_cosine": cosine.mean(),
        "patch_cosine": cosine[:, 1:].mean(),
        "cls_cosine": cosine[:, 0].mean(),
        "relative_error": (ours - theirs).norm() / theirs.norm(),
    }
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )


def stage_1_gradients(teacher, images, release: bool, factor: float) -> dict[str, torch.Tensor]:
    student = linearize(teacher, "linear", keep=[1])
    freeze_except(student, QKV_PATTERNS)
    stage = calibrated(AttentionAlignment(student, teacher, release_activations=release), images)
    (factor * stage({"image": images})["loss"]).backward()
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def test_released_activations_give_the_gradients_of_the_whole_graph(teacher, images) -> None:
    released, graph = (stage_1_gradients(teacher, images, release, 0.25) for release in (True, False))
    assert set(released) == {f"student.blocks.{i}.attn.qkv.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(graph) == set(released)
    for name, gradient in graph.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(released[name], gradient, rtol=1e-5, atol=0)


def test_stage_1_keeps_one_blocks_activations_at_a_time(teacher, images) -> None:
    """The graph that is alive when the stage's forward pass returns: none of a block's, with released activations."""

    def graph_after_forward(release: bool) -> int:
        student = linearize(teacher, "linear")
        freeze_except(student, QKV_PATTERNS)
        stage = AttentionAlignment(student, teacher, "mse", release_activations=release)
        loss = stage({"image": images})["loss"]
        functions, seen = [loss.grad_fn], set()
        while functions:
            function = functions.pop()
            if function is not None and function not in seen:
                seen.add(function)
                functions += [following for following, _ in function.next_functions]
        return len(seen)

    assert graph_after_forward(release=True) < 20 < graph_after_forward(release=False)


def stage_of(stage_class: type[Stage], teacher, images, depth: int | None = None, mechanism: str = "linear") -> Stage:
    teacher = build_tiny_teacher(depth=depth) if depth else teacher
    student = linearize(teacher, mechanism)
    if stage_class is Finetuning:
        task = Classification(num_classes=4)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Finetuning(student, teacher, task, task.build_head(student))
    return calibrated(stage_class(student, teacher), images)


def train_once(stage: Stage, images) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    stage.train().begin_step(0)
    loss = stage({"image": images, "label": torch.zeros(len(images), dtype=torch.long)})["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mechanism", ["linear", "performer", "monarch"])
@pytest.mark.parametrize("stage_class", [AttentionAlignment, FeatureAlignment, Finetuning])
def test_checkpointed_activations_change_no_bit(teacher, images, stage_class, mechanism: str) -> None:
    found = []
    for checkpoints in (False, True):
        stage = stage_of(stage_class, teacher, images, mechanism=mechanism)
        if stage_class is AttentionAlignment:
            stage.release_activations = False
        if checkpoints:
            stage.checkpoint_activations()
        with SavedActivations([*stage.parameters(), *stage.teacher.parameters()]) as saved:
            found.append((*train_once(stage, images), saved.peak_bytes))
    (loss, gradients, memory), (same_loss, same_gradients, less_memory) = found
    assert torch.equal(loss, same_loss) and gradients.keys() == same_gradients.keys()
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, same_gradients[name])] == []
    assert less_memory < 0.7 * memory


def peak_activations(stage: Stage, images) -> int:
    with SavedActivations([*stage.parameters(), *stage.teacher.parameters()]) as saved:
        train_once(stage, images)
    assert saved.bytes == 0
    return saved.peak_bytes


def test_checkpointed_activations_of_stage_2_are_a_fifth(teacher, images) -> None:
    plain, checkpointed = (stage_of(FeatureAlignment, teacher, images, depth=12) for _ in range(2))
    checkpointed.checkpoint_activations()
    assert peak_activations(checkpointed, images) < peak_activations(plain, images) / 5


def test_activations_of_stage_1_do_not_grow_with_depth(teacher, images) -> None:
    peaks = {depth: peak_activations(stage_of(AttentionAlignment, None, images, depth), images) for depth in (12, 24)}
    assert 0 < peaks[24] < 1.02 * peaks[12]


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("stage_class", [AttentionAlignment, FeatureAlignment, Finetuning])
def test_compiled_blocks_train_alike_and_rest_in_evaluations(
    teacher, images, stage_class, checkpoints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compiled.append(graph)
        return graph

    monkeypatch.setattr("adala.compilation.compiled_call", lambda backend: compiled_call(count))
    expected, stage = (stage_of(stage_class, teacher, images) for _ in range(2))
    if checkpoints:
        stage.checkpoint_activations()
    stage.compile_blocks()
    batch = {"image": images, "label": torch.zeros(len(images), dtype=torch.long)}
    stage.eval()(batch)
    assert compiled == []
    (loss, gradients), (same, found) = train_once(expected, images), train_once(stage, images)
    assert len(compiled) == (2 if stage_class is FeatureAlignment else 1)  # three blocks, and the teacher's, share one
    torch.testing.assert_close(same, loss)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert [name for name, _ in stage.named_parameters()] == [name for name, _ in expected.named_parameters()]


def test_stage_1_sees_the_teachers_input_at_every_block(teacher, images) -> None:
    """A block's loss must not depend on what the student's earlier blocks do."""
    student = linearize(teacher, "linear")
    stage = AttentionAlignment(student, teacher, "mse")
    before = stage({"image": images})
    with torch.no_grad():
        student.blocks[0].attn.qkv.weight.mul_(-1)
    after = stage({"image": images})
    assert after["block00_loss"] != before["block00_loss"]
    assert after["block01_loss"] == before["block01_loss"]
    assert after["block02_loss"] == before["block02_loss"]


@pytest.mark.parametrize("size", [(8, 32), (32, 8)], ids=str)
def test_stage_1_aligns_under_the_layout_of_the_images(teacher, size: tuple[int, int]) -> None:
    """Two grids of as many tokens as the model's own; Monarch's blocks are image rows."""
    stage = AttentionAlignment(linearize(teacher, "monarch"), teacher, "mse").eval()
    seen = []
    handle = teacher.blocks[0].attn.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    losses = stage({"image": torch.randn(2, 3, *size)})
    handle.remove()
    (x, target), *_ = seen
    own = stage.student.blocks[0].attn(x, attn_mask=TokenLayout((size[0] // 4, size[1] // 4), 1))
    torch.testing.assert_close(losses["block00_loss"], mse(own, target))


@pytest.mark.parametrize("mechanism", ["hedgehog", "lolcats"])
def test_attention_maps_can_be_compared_where_there_are_feature_maps(teacher, images, mechanism: str) -> None:
    student = linearize(teacher, mechanism)
    freeze_except(student, ["blocks.*.attn.token_mixer.*"])
    stage = AttentionAlignment(student, teacher, "attention_map_cross_entropy")
    stage({"image": images})["loss"].backward()
    assert all(p.grad.abs().max() > 0 for n, p in student.named_parameters() if "token_mixer" in n)
    with pytest.raises(ValueError, match="has no feature maps"):
        AttentionAlignment(linearize(teacher, "linear"), teacher, "attention_map_cross_entropy")


@pytest.mark.parametrize("release", [True, False])
def test_stage_1_aligns_the_blocks_of_every_mechanism(teacher, images, release: bool) -> None:
    student = linearize(teacher, "linear", [1], None, 0, {2: "window"}, {"window": {"window": 2}})
    stage = AttentionAlignment(student, teacher, "mse", release)
    losses = stage({"image": images})
    losses["loss"].backward()
    assert [name for name in losses if name.startswith("block")] == ["block00_loss", "block02_loss"]
    assert all(losses[name] > 0 for name in ("block00_loss", "block02_loss"))
    moved = {name.split(".")[1] for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max()}
    assert moved == {"0", "2"}
    mixed = linearize(teacher, "hedgehog", block_mechanisms={1: "window"})
    with pytest.raises(ValueError, match="WindowMixer has no feature maps to compare"):
        AttentionAlignment(mixed, teacher, "attention_map_cross_entropy")


@pytest.mark.parametrize("stage_class", [AttentionAlignment, FeatureAlignment])
def test_training_moves_the_student_and_never_the_teacher(teacher, images, stage_class) -> None:
    before = copy.deepcopy(teacher.state_dict())
    stage = stage_class(linearize(teacher, "linear"), teacher, "mse").train()
    assert not teacher.training and stage.student.training
    assert not any("teacher" in name for name in [*stage.state_dict(), *dict(stage.named_modules())])
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = stage({"image": images})["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def finetuning(teacher, **arguments) -> Finetuning:
    student = linearize(teacher, "linear")
    task = Classification(num_classes=3)
    return Finetuning(student, teacher, task, task.build_head(student), **arguments)


def test_finetuning_learns_and_counts(teacher, images) -> None:
    stage = finetuning(teacher).train()
    batch = {"image": images, "label": torch.tensor([0, 1, 2, 1])}
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        losses = stage(batch)
        losses["loss"].backward()
        optimizer.step()
    assert losses["top1"].item() == 100.0
    outputs = stage.eval()(batch)
    assert outputs["decision"].argmax(-1).tolist() == [0, 1, 2, 1] and outputs["target"].tolist() == [0, 1, 2, 1]
    assert torch.equal(outputs["teacher_features"], teacher(images)) and outputs["features"].shape == (4, 17, 32)


def test_unless_it_is_frozen_the_backbone_trains_too(teacher, images) -> None:
    stage = finetuning(teacher).train()
    assert stage.student.training
    stage({"image": images, "label": torch.tensor([0, 1, 2, 1])})["loss"].backward()
    assert {name for name, p in stage.named_parameters() if p.grad is not None} == dict(stage.named_parameters()).keys()


def test_stage_1_trains_nothing_outside_the_attention_that_it_aligns(teacher) -> None:
    stage = AttentionAlignment(linearize(teacher, "linear", keep=[1]), teacher)
    trains = {name for name, p in stage.student.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in stage.student.named_parameters() if name.startswith(ALIGNED)}


@pytest.mark.parametrize("block", [0, 1], ids=["linear", "kept"])
def test_a_block_under_a_mask_is_refused(teacher, block: int) -> None:
    student = linearize(teacher, "linear", keep=[1])
    with pytest.raises(ValueError, match="masked or causal attention is not supported"):
        student.blocks[block](torch.randn(2, 17, 32), is_causal=True)


def test_a_frozen_backbone_trains_the_head_only(teacher, images) -> None:
    stage = finetuning(teacher, freeze_backbone=True).train()
    assert not stage.student.training
    stage({"image": images, "label": torch.tensor([0, 1, 2, 1])})["loss"].backward()
    assert {name for name, p in stage.named_parameters() if p.grad is not None} == {
        "head.linear.weight", "head.linear.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "classification needs labels"),
        ({"label": torch.tensor([0, 1, 2, 3])}, "has the label 3, but .* is 3"),
        ({"label": torch.tensor([0, -1, 2, 2])}, "has the label -1, but .* is 3"),
    ],
    ids=["none", "above", "below"],
)
def test_finetuning_needs_fitting_labels(teacher, images, batch: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finetuning(teacher)({"image": images, **batch})


@pytest.mark.parametrize("stage_class", [AttentionAlignment, FeatureAlignment])
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_the_gradient_of_the_default_loss_does_not_depend_on_the_cut(teacher, stage_class, pieces: int) -> None:
    """A global batch whose images differ much, whole and in micro-batches."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(8, 3, 16, 16, generator=generator) * torch.logspace(-1, 1, 8)[:, None, None, None]

    def gradient(cut: int) -> torch.Tensor:
        stage = calibrated(stage_class(linearize(teacher, "linear"), teacher), images).train()
        for part in images.chunk(cut):
            (stage({"image": part})["loss"] / cut).backward()
        return torch.cat([p.grad.flatten() for p in stage.parameters() if p.grad is not None])

    whole, cut = gradient(1), gradient(pieces)
    assert (cut - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("loss", FEATURE_LOSSES)
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_every_loss_of_stage_2_does_not_depend_on_the_cut(loss: str, pooling: str) -> None:
    """With a term of the global feature, whose target is a class token or the mean of the patches."""
    teacher = build_tiny_teacher(**({} if pooling == "token" else {"class_token": False, "global_pool": "avg"}))
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    images = images * torch.logspace(-1, 1, 8)[:, None, None, None]
    stage = FeatureAlignment(linearize(teacher, "linear"), teacher, loss, global_weight=0.5)
    stage.calibrate([{"image": images}])
    whole = stage({"image": images})
    parts = [stage({"image": part}) for part in images.chunk(4)]
    for name in ("loss", "feature_loss", "global_loss"):
        assert torch.stack([part[name] for part in parts]).mean().item() == pytest.approx(whole[name].item(), rel=1e-5)
    assert whole["loss"].item() == pytest.approx((whole["feature_loss"] + 0.5 * whole["global_loss"]).item())
    target, features = teacher(images), stage.student(images)
    pick = (lambda x: x[:, :1]) if pooling == "token" else (lambda x: x.mean(1, keepdim=True))
    axes = (0, 1) if loss == "standardized_mse" else (0, 1, 2)
    variance = pick(target).var(axes, correction=0)
    expected = ALIGNMENT_LOSSES[loss](pick(features), pick(target), variance if variance.ndim else variance.item())
    assert whole["global_loss"].item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("loss", FEATURE_LOSSES)
def test_every_loss_of_stage_2_is_zero_for_the_teacher_and_falls(teacher, images, loss: str) -> None:
    stage = calibrated(FeatureAlignment(linearize(teacher, "softmax"), teacher, loss), images)
    assert stage({"image": images})["loss"].item() == pytest.approx(0.0, abs=1e-6)
    stage = calibrated(FeatureAlignment(linearize(teacher, "linear"), teacher, loss), images).train()
    optimizer, losses = torch.optim.AdamW(stage.parameters(), lr=3e-3), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(stage({"image": images})["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.7 * losses[0].item()


def blocks_by_hand(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    return model.forward_intermediates(
        images, indices=[0, 2], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True, norm=False
    )


@pytest.mark.parametrize("mode", ["plain", "checkpointing", "compiled"])
def test_what_blocks_give_can_be_compared_too(teacher, images, mode: str) -> None:
    """Against timm's own intermediates, and the gradient with what is compiled or computed again."""

    def build() -> FeatureAlignment:
        student = linearize(teacher, "linear", keep=[1])
        stage = FeatureAlignment(
            student, teacher, "standardized_mse", intermediate_weight=0.3, intermediate_blocks=[2, 0]
        )
        return calibrated(stage, images)

    def gradient(stage: FeatureAlignment) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses = stage.train()({"image": images})
        losses["loss"].backward()
        return losses, torch.cat([p.grad.flatten() for p in stage.parameters()])

    _, expected = gradient(build())  # before the teacher is compiled, of which students are copies
    stage = build()
    assert stage.calibrated_targets == ("features", "block00", "block02")
    if mode == "checkpointing":
        stage.checkpoint_activations()
    if mode == "compiled":
        stage._compiled += [CompiledModules(stage.student.blocks, "compute", "aot_eager"),
                            CompiledModules(stage.teacher.blocks, backend="aot_eager")]  # fmt: skip
    losses, found = gradient(stage)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        ours, theirs = (
            [patches_and_prefix(each) for each in blocks_by_hand(model, images)] for model in (stage.student, teacher)
        )
    for name, of_student, of_teacher in zip(("block00", "block02"), ours, theirs, strict=True):
        variance = of_teacher.var(correction=0).item()
        assert stage.target_variance[name] == pytest.approx(variance, rel=1e-4)
        assert losses[f"{name}_loss"].item() == pytest.approx(mse(of_student, of_teacher).item() / variance, rel=1e-3)
    mean = (losses["block00_loss"] + losses["block02_loss"]).item() / 2
    assert losses["intermediate_loss"].item() == pytest.approx(mean)
    assert losses["loss"].item() == pytest.approx(losses["feature_loss"].item() + 0.3 * mean)


def patches_and_prefix(intermediate: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    patches, prefix = intermediate
    return torch.cat([prefix, patches], dim=1)


def test_every_kth_block_is_the_last_of_each_k(teacher) -> None:
    deep = build_tiny_teacher(depth=7)
    stage = FeatureAlignment(linearize(deep, "linear"), deep, intermediate_weight=1.0, intermediate_blocks=3)
    assert stage.blocks == (2, 5)
    assert FeatureAlignment(linearize(deep, "linear"), deep).calibrated_targets == ("features",)


def test_calibration_measures_every_channel_where_the_loss_wants_it(teacher, images) -> None:
    stage = FeatureAlignment(linearize(teacher, "linear"), teacher, "standardized_mse")
    stage.calibrate([{"image": images[:1]}, {"image": images[1:]}])
    expected = teacher(images).var((0, 1), correction=0)
    torch.testing.assert_close(stage.target_variance["features"], expected, rtol=1e-5, atol=1e-6)


def test_calibration_measures_the_variance_of_every_target(teacher, images) -> None:
    stage = FeatureAlignment(linearize(teacher, "linear"), teacher)
    with pytest.raises(ValueError, match="needs the variance of its targets"):
        stage({"image": images})
    stage.calibrate([{"image": images[:1]}, {"image": images[1:]}])
    assert stage.target_variance["features"] == pytest.approx(teacher(images).var(correction=0).item(), rel=1e-5)
    stage = calibrated(AttentionAlignment(linearize(teacher, "linear", keep=[1]), teacher), images)
    assert list(stage.target_variance) == ["block00", "block02"]
    plain = AttentionAlignment(stage.student, teacher, "mse")({"image": images})
    expected = plain["block00_loss"].item() / stage.target_variance["block00"]
    assert stage({"image": images})["block00_loss"].item() == pytest.approx(expected, rel=1e-4)


def test_a_target_without_variance_is_no_division_by_zero(teacher, images) -> None:
    nn.init.zeros_(teacher.norm.weight)
    stage = calibrated(FeatureAlignment(linearize(teacher, "softmax"), teacher), images)
    assert stage({"image": images})["loss"].item() == 0.0


def test_mistakes_are_named(teacher) -> None:
    with pytest.raises(ValueError, match="unknown Stage 1 loss 'l1': known are mse"):
        AttentionAlignment(linearize(teacher, "linear"), teacher, "l1")
    with pytest.raises(ValueError, match="unknown Stage 2 loss 'l1': known are mse"):
        FeatureAlignment(linearize(teacher, "linear"), teacher, "l1")
    with pytest.raises(ValueError, match="nothing to align"):
        AttentionAlignment(linearize(teacher, "linear", keep=[0, 1, 2]), teacher)
    with pytest.raises(ValueError, match="no parameter matches"):
        freeze_except(nn.Linear(2, 2), ["nothing.*"])


@pytest.mark.parametrize("stage_class", [AttentionAlignment, FeatureAlignment])
def test_uint8_images_are_normalised_once_and_held_once(teacher, stage_class) -> None:
    """On a GPU they are 2.3 MiB each at 448 pixels, as float32."""
    seen = []

    def normalise(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.float() / 255

    stage = stage_of(stage_class, teacher, torch.rand(2, 3, 16, 16))
    stage.normalise = normalise
    batch = {"image": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}
    loss = stage(batch)["loss"]
    ours, theirs = stage.images_for_both(batch)
    assert len(seen) == 2 and ours is theirs
    assert torch.equal(loss, stage({"image": batch["image"].float() / 255})["loss"])
