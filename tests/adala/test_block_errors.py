"""Errors by block: none for a softmax student, as by hand for a linear one, the same on every rank."""

from dataclasses import asdict

import pytest
import torch
from ranks import on_ranks
from timm.models.vision_transformer import VisionTransformer
from tiny_teacher import build_tiny_teacher
from torch import Tensor

from adala.distributed import rank
from adala.evaluation import BlockErrors, Candidate, evaluate_all, measure_block_errors
from adala.similarity import relative_error
from adala.students import linearize


def in_batches(images: Tensor) -> list[dict]:
    """Batches of different sizes, so that averages over batches would not be those over images."""
    return [{"image": part, "id": ["x"] * len(part)} for part in (images[:3], images[3:])]


def measure_one(teacher: VisionTransformer, student: VisionTransformer, images: Tensor) -> BlockErrors:
    return measure_block_errors(teacher, {"student": student.eval()}, in_batches(images)).students["student"]


def test_a_softmax_student_has_no_error_anywhere(teacher: VisionTransformer, images: Tensor) -> None:
    found = measure_one(teacher, linearize(teacher, "softmax"), images)
    places = [*found.attention, *found.stream, found.features]
    assert len(places) == 7
    for place in places:
        assert place["relative_error"] < 1e-6
        assert place["patch_cosine"] == pytest.approx(1, abs=1e-6)
        assert place["cls_cosine"] == pytest.approx(1, abs=1e-6)


def test_one_block_agrees_with_a_computation_by_hand(teacher: VisionTransformer, images: Tensor) -> None:
    student = linearize(teacher, "linear").eval()
    report = measure_block_errors(teacher, {"student": student}, in_batches(images))
    with torch.no_grad():
        streams = {}
        for name, model in (("teacher", teacher), ("student", student)):
            x = model.patch_embed(images)
            x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
            streams[name] = [x := block(x) for block in model.blocks]
        x = teacher.blocks[2].norm1(streams["teacher"][1])
        target, alone = teacher.blocks[2].attn(x), student.blocks[2].attn(x)

    found = report.students["student"]
    ours, theirs = streams["student"][2], streams["teacher"][2]
    cosines = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert report.images == 4
    assert found.attention[2]["relative_error"] == pytest.approx(relative_error(alone, target).item(), rel=1e-5)
    assert found.stream[2]["relative_error"] == pytest.approx(relative_error(ours, theirs).item(), rel=1e-5)
    assert found.stream[2]["patch_cosine"] == pytest.approx(cosines[:, 1:].mean().item(), rel=1e-5)
    assert found.stream[2]["cls_cosine"] == pytest.approx(cosines[:, 0].mean().item(), rel=1e-5)
    assert found.stream[2]["relative_error"] > 0.01

    outliers = report.outliers[2]
    rms = theirs.double().square().mean((0, 1)).sqrt()
    overall = theirs.double().square().mean().sqrt()
    assert outliers["channel"] == rms.argmax().item()
    assert outliers["channel_over_median"] == pytest.approx((rms.max() / rms.median()).item())
    assert outliers["max_over_rms"] == pytest.approx((theirs.abs().max() / overall).item(), rel=1e-6)


def test_final_features_agree_with_the_evaluation(teacher: VisionTransformer, images: Tensor) -> None:
    student = linearize(teacher, "linear").eval()
    expected = evaluate_all({"": Candidate(student)}, teacher, in_batches(images))[""]
    assert measure_one(teacher, student, images).features == pytest.approx(expected, rel=1e-6)


def test_a_single_linear_block_errs_where_it_stands_and_from_there_on(
    teacher: VisionTransformer, images: Tensor
) -> None:
    found = measure_one(teacher, linearize(teacher, "linear", keep=[0, 2]), images)
    alone, accumulated = ([place["relative_error"] for place in at] for at in (found.attention, found.stream))
    assert alone[0] < 1e-6 and alone[1] > 0.01 and alone[2] < 1e-6
    assert accumulated[0] < 1e-6 and min(accumulated[1:]) > 0.001


def test_attention_alone_gets_the_layout_of_the_images(teacher: VisionTransformer) -> None:
    """A wide image: without its layout, an attention would take its 32 patches for an impossible square."""
    wide = torch.randn(4, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    found = measure_one(teacher, linearize(teacher, "linear"), wide)
    assert all(0 < place["relative_error"] < 10 for place in found.attention)


def test_nothing_to_measure_is_refused(teacher: VisionTransformer) -> None:
    with pytest.raises(ValueError, match="no image"):
        measure_block_errors(teacher, {}, [])


def measure_own_part(images: Tensor) -> dict:
    # Unequal parts: what counts is images, not ranks.
    own = (images[:-1], images[-1:])[rank()]
    teacher = build_tiny_teacher()
    student = linearize(teacher, "linear").eval()
    return asdict(measure_block_errors(teacher, {"student": student}, [{"image": own}]))


def test_two_ranks_measure_what_one_does(teacher: VisionTransformer, images: Tensor) -> None:
    student = linearize(teacher, "linear").eval()
    expected = asdict(measure_block_errors(teacher, {"student": student}, in_batches(images)))
    for found in on_ranks(2, measure_own_part, images):
        assert found["images"] == 4
        for ours, theirs in zip(found["outliers"], expected["outliers"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        ours, theirs = found["students"]["student"], expected["students"]["student"]
        for place in ("attention", "stream"):
            for block, same in zip(ours[place], theirs[place], strict=True):
                assert block == pytest.approx(same, rel=1e-5)
        assert ours["features"] == pytest.approx(theirs["features"], rel=1e-5)
