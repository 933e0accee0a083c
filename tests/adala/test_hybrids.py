"""The greedy search: every hybrid as it is measured by itself, the choice as brute force makes it, on any ranks."""

import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch
from ranks import on_ranks
from tiny_families import ALL, build_tiny
from tiny_teacher import build_tiny_teacher
from torch import Tensor, nn

from adala.budget import SOFTMAX
from adala.hybrids import ERROR, Choice, HybridMeter, Option, Step, choose_greedily
from adala.similarity import comparison_metrics, comparison_sums
from adala.students import LinearizedModel, linearize, restore_softmax


def some_images(count: int = 11, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(7))


def aligned(teacher: nn.Module, mechanism: str = "linear") -> LinearizedModel:
    """A student whose blocks differ from the teacher's each in its own way, as after a short Stage 1."""
    student = linearize(teacher, mechanism)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in student.blocks:
            weight = block.attn.qkv.weight
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return student.eval()


@torch.no_grad()
def by_itself(student: LinearizedModel, teacher: nn.Module, images: Tensor) -> dict[str, float]:
    sums = comparison_sums(student(images), teacher(images), teacher.num_prefix_tokens)
    return {name: float(value) for name, value in comparison_metrics(sums, teacher.has_class_token).items()}


def hybrid_by_hand(student: LinearizedModel, teacher: nn.Module, blocks: Sequence[int]) -> LinearizedModel:
    """A whole model of its own, with the teacher's weights in some blocks' attention."""
    hybrid = linearize(teacher, "linear", keep=blocks).eval()
    kept = tuple(f"blocks.{block}.attn." for block in blocks)
    taken = {name: value for name, value in student.state_dict().items() if not name.startswith(kept)}
    hybrid.load_state_dict({**teacher.state_dict(), **taken})
    return hybrid


def choose(student: LinearizedModel, teacher: nn.Module, batches: Sequence[Tensor], count: int) -> Choice:
    meter = HybridMeter(student, teacher, batches)
    choice = Choice(meter.images, meter.image_size, meter.measure_one({}))
    return dataclasses.replace(choice, steps=list(choose_greedily(meter.options, count, meter.measure)))


def test_every_candidate_is_measured_as_the_whole_model_is_by_itself() -> None:
    teacher, images = build_tiny_teacher(depth=4), some_images()
    student = aligned(teacher)
    choice = choose(student, teacher, images.split(3), 3)
    assert (choice.images, choice.image_size) == (11, [16, 16])
    assert choice.before == pytest.approx(by_itself(student, teacher, images), rel=2e-5)
    chosen: list[int] = []
    for step in choice.steps:
        assert [candidate["block"] for candidate in step.candidates] == [n for n in range(4) if n not in chosen]
        expected = {}
        for candidate in step.candidates:
            metrics = {name: value for name, value in candidate.items() if name not in ("block", "mechanism")}
            whole = hybrid_by_hand(student, teacher, [*chosen, candidate["block"]])
            expected[candidate["block"]] = by_itself(whole, teacher, images)
            assert metrics == pytest.approx(expected[candidate["block"]], rel=2e-5)
        assert step.block == min(expected, key=lambda block: expected[block][ERROR])
        assert len({values[ERROR] for values in expected.values()}) == len(expected), "there is something to choose"
        chosen.append(step.block)
    assert choice.blocks == sorted(chosen) and choice.hybrid(2) == dict.fromkeys(chosen[:2], SOFTMAX)


def test_a_block_that_alone_is_wrong_is_chosen_first_and_heals_the_student() -> None:
    """Known beforehand: a softmax student but for one block is its teacher once that block has softmax again."""
    teacher, images = build_tiny_teacher(depth=4), some_images()
    student = aligned(teacher)
    restored = linearize(teacher, "softmax").eval()
    restored.blocks[2].attn = student.blocks[2].attn
    choice = choose(restored, teacher, images.split(4), 2)
    assert choice.steps[0].block == 2 and choice.steps[0].metrics[ERROR] < 1e-5 < choice.before[ERROR]
    # What is left are equals, as far as digits count, or as good as equal: nothing is gained by a second one.
    assert choice.steps[1].metrics[ERROR] < 1e-5


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_blocks_below_the_changed_one_are_passed_by_in_every_family(kind: str) -> None:
    teacher = build_tiny(kind)
    student = linearize(teacher, "linear").eval()
    images = some_images(3, tuple(student.patch_embed.img_size))
    depth = len(student.blocks)
    meter = HybridMeter(student, teacher, [images])
    found = meter.measure({0: SOFTMAX}, [Option(block) for block in range(1, depth)])
    for block, metrics in zip(range(1, depth), found, strict=True):
        whole = linearize(teacher, "linear", keep=[0, block]).eval()
        assert metrics == pytest.approx(by_itself(whole, teacher, images), rel=2e-5)


def test_work_below_the_changed_block_is_not_done_again() -> None:
    teacher, images = build_tiny_teacher(depth=4), some_images(3)
    student = aligned(teacher)
    meter, calls = HybridMeter(student, teacher, [images]), []
    for number, block in enumerate(student.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    meter.measure({}, [Option(block) for block in range(4)])
    assert calls == [*range(4), *range(4), *range(1, 4), *range(2, 4), 3]


def test_a_student_is_left_as_it_was() -> None:
    teacher = build_tiny_teacher()
    student = aligned(teacher)
    attentions = [block.attn for block in student.blocks]
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    choose(student, teacher, some_images().split(4), 2)
    assert [block.attn for block in student.blocks] == attentions
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert not any(block._forward_pre_hooks or "forward" in vars(block) for block in student.blocks)


def test_other_mechanisms_with_weights_of_their_own_compete_with_softmax() -> None:
    teacher, images = build_tiny_teacher(), some_images()
    student, other = aligned(teacher), aligned(teacher, "hedgehog")
    # As good as softmax there can be no other: this one is, in one block.
    other.blocks[1].attn = linearize(teacher, "softmax").eval().blocks[1].attn
    meter = HybridMeter(student, teacher, images.split(4), {"hedgehog": other})
    assert [dataclasses.astuple(option) for option in meter.options] == [
        (block, name) for block in range(3) for name in (SOFTMAX, "hedgehog")
    ]
    found = meter.measure({}, [Option(1), Option(1, "hedgehog"), Option(2, "hedgehog")])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[2] != found[1]
    steps = list(choose_greedily(meter.options, 3, meter.measure))
    assert sorted(step.block for step in steps) == [0, 1, 2], "a block is chosen once"


def test_of_equals_the_first_is_chosen_and_steps_made_before_count() -> None:
    asked = []

    def measure(hybrid, options):
        asked.append(dict(hybrid))
        return [{ERROR: 0.5} for _ in options]

    options = [Option(block, name) for block in range(3) for name in (SOFTMAX, "window")]
    steps = list(choose_greedily(options, 2, measure))
    assert [(step.block, step.mechanism) for step in steps] == [(0, SOFTMAX), (1, SOFTMAX)]
    asked.clear()
    known = [Step(2, "window", {ERROR: 0.6}, [])]
    assert [step.block for step in choose_greedily(options, 2, measure, known)] == [0]
    assert asked == [{2: "window"}] and not list(choose_greedily(options, 1, measure, known))


def test_a_student_that_keeps_blocks_or_images_that_are_none_are_refused() -> None:
    teacher = build_tiny_teacher()
    with pytest.raises(ValueError, match="block 1 of the student has softmax attention already"):
        HybridMeter(linearize(teacher, "linear", keep=[1]), teacher, [some_images()])
    with pytest.raises(ValueError, match="there is no image to measure hybrids on"):
        HybridMeter(linearize(teacher, "linear"), teacher, [])


def chosen_as_text(count: int) -> str:
    teacher = build_tiny_teacher(depth=4)
    return json.dumps(dataclasses.asdict(choose(aligned(teacher), teacher, some_images().split(3), count)))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_any_number_of_ranks_finds_the_same_to_the_last_digit(ranks: int) -> None:
    """Of four batches, five ranks leave one without."""
    assert on_ranks(ranks, chosen_as_text, 2) == [chosen_as_text(2)] * ranks


def test_restored_attention_is_the_teachers_own() -> None:
    teacher, images = build_tiny_teacher(), some_images()
    student = aligned(teacher).train()
    restore_softmax(student, teacher, [0, 2])
    assert student.blocks[0].attn.training and all(p.requires_grad for p in student.blocks[0].attn.parameters())
    assert student.blocks[0].attn.qkv.weight is not teacher.blocks[0].attn.qkv.weight
    expected = hybrid_by_hand(aligned(teacher), teacher, [0, 2])
    assert torch.equal(student.eval()(images), expected(images))
    with pytest.raises(ValueError, match=r"blocks=\[3\]: the student has the blocks 0 to 2, not 3"):
        restore_softmax(student, teacher, [3])
