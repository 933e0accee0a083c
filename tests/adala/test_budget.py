"""What ``keep: auto`` may say, and how many blocks it pays for, to the last multiply-accumulate."""

from fractions import Fraction

import pytest
from tiny_teacher import build_tiny_teacher

from adala.budget import SOFTMAX, Budget, HybridMacs, budget_of, count_blocks
from adala.hybrids import count_hybrid_macs
from adala.students import linearize

MACS = HybridMacs((448, 448), teacher=1000, student=700, added={SOFTMAX: (25, 25, 25, 25)})


@pytest.mark.parametrize(
    ("keep", "budget"),
    [
        ("auto:1", Budget("1", blocks=1)),
        ("auto:12", Budget("12", blocks=12)),
        ("auto:75%@448", Budget("75%@448", share=Fraction(3, 4), image_size=(448, 448))),
        ("auto:72.5%@448x672", Budget("72.5%@448x672", share=Fraction(29, 40), image_size=(448, 672))),
        ([3, 5], None),
        ([], None),
    ],
)
def test_a_budget_is_read(keep: str | list[int], budget: Budget | None) -> None:
    assert budget_of(keep) == budget


@pytest.mark.parametrize(
    "keep",
    ["auto", "auto:", "auto:0", "auto:-1", "auto:1.5", "auto: 2", "2", "auto:75%", "auto:75@448", "auto:75%@0",
     "auto:75%@448x", "auto:75%@448x0", "auto:1e3%@448", "auto:٣"],
)  # fmt: skip
def test_what_is_no_budget_is_none(keep: str) -> None:
    assert budget_of(keep) is None


@pytest.mark.parametrize(
    ("percent", "count"), [("72.5", 1), ("74.999999", 1), ("75", 2), ("77.499999", 2), ("77.5", 3), ("79.9", 3)]
)
def test_a_share_pays_for_as_many_blocks_as_fit_and_not_for_one_more(percent: str, count: int) -> None:
    assert count_blocks(budget_of(f"auto:{percent}%@448"), MACS) == count


def test_blocks_that_differ_in_cost_fit_whichever_they_are() -> None:
    macs = HybridMacs((448, 448), teacher=1000, student=700, added={SOFTMAX: (10, 60, 20, 50)})
    assert count_blocks(budget_of("auto:80.9%@448"), macs) == 1, "60 and 50 would not fit, though 10 and 20 would"
    assert count_blocks(budget_of("auto:81%@448"), macs) == 2


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("auto:4", "keep is auto:4: the model has 4 blocks, .* choose auto:3 at most"),
        ("auto:70%@448", r"at 448 x 448 pixels the student has 70.00 % .* and 72.50 % with softmax attention in one"),
        ("auto:69%@448", r"the student has 70.00 % .* allow that much"),
        ("auto:80%@448", r"that pays for softmax attention in all 4 blocks, .* allow less than 80.00 %"),
    ],
)
def test_a_budget_that_leaves_nothing_to_choose_is_refused(keep: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_blocks(budget_of(keep), MACS)


@pytest.mark.parametrize("size", [(16, 16), (64, 32)], ids=str)
def test_multiply_accumulates_of_a_hybrid_are_those_counted_on_it_and_those_of_the_formula(size) -> None:
    from adala.macs import count_macs

    teacher = build_tiny_teacher()
    macs = count_hybrid_macs(linearize(teacher, "linear"), teacher, size)
    for blocks in ({}, {1: SOFTMAX}, {0: SOFTMAX, 2: SOFTMAX}):
        whole = linearize(teacher, "linear", keep=list(blocks)).to("meta").eval()
        assert macs.of(blocks) == count_macs(whole, size)
        assert macs.share(blocks) == Fraction(macs.of(blocks), macs.teacher)
    # D = 32 in two heads of 16: N x N twice against two sums of d x d, and the normaliser's sum over keys.
    tokens = 1 + size[0] * size[1] // 16
    softmax = 2 * tokens**2 * 32
    assert macs.teacher - macs.student == sum(macs.added[SOFTMAX]) == 3 * macs.added[SOFTMAX][0]
    assert softmax - 3 * tokens * 32 * 17 <= macs.added[SOFTMAX][0] <= softmax - 2 * tokens * 32 * 16
