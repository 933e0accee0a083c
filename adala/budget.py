"""How much softmax attention a hybrid may have, as ``keep: auto:...`` says it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

AUTO, SOFTMAX = "auto:", "softmax"
BUDGET_WORDS = (
    f"{AUTO}N, so many blocks; or {AUTO}P%@SIZE (75%@448, 75%@448x672), as many as leave the hybrid at most P % of its "
    "teacher's multiply-accumulates for images of that height and width in pixels"
)
_BLOCKS = re.compile(r"[1-9]\d{0,5}", re.ASCII)
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)%@([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", re.ASCII)


@dataclass(frozen=True)
class Budget:
    """What a search for blocks that keep softmax attention may spend.

    Attributes:
        text: As it was written, without ``auto:``.
        blocks: How many blocks; None where a share is given.
        share: Of the teacher's multiply-accumulates, those of the hybrid at most; None where blocks are counted.
        image_size: Height and width in pixels that ``share`` holds at; None without it.
    """

    text: str
    blocks: int | None = None
    share: Fraction | None = None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class HybridMacs:
    """Multiply-accumulates of one image through a teacher and its hybrids.

    Attributes:
        image_size: Height and width of the image in pixels.
        teacher: Of the teacher.
        student: Of the student whose blocks are all as they were aligned.
        added: By mechanism, what each block takes more with it; below 0 where it is cheaper, as softmax is for small
            images.
    """

    image_size: tuple[int, int]
    teacher: int
    student: int
    added: Mapping[str, Sequence[int]]

    def of(self, blocks: Mapping[int, str]) -> int:
        """Of the hybrid whose ``blocks`` have other mechanisms, by number."""
        return self.student + sum(self.added[mechanism][block] for block, mechanism in blocks.items())

    def share(self, blocks: Mapping[int, str]) -> Fraction:
        """The same as a share of the teacher's."""
        return Fraction(self.of(blocks), self.teacher)


def read_budget(text: str) -> Budget | None:
    """The budget that a text without ``auto:`` states; None where it states none."""
    if _BLOCKS.fullmatch(text):
        return Budget(text, blocks=int(text))
    found = _SHARE.fullmatch(text)
    if found is None:
        return None
    height = int(found[2])
    # Of decimal digits: a share on the edge of what fits is not decided by rounding.
    return Budget(text, share=Fraction(found[1]) / 100, image_size=(height, int(found[3] or height)))


def budget_of(keep: Sequence[int] | str) -> Budget | None:
    """The budget of a recipe's ``keep``; None where it lists blocks, or is no budget."""
    return read_budget(keep.removeprefix(AUTO)) if isinstance(keep, str) and keep.startswith(AUTO) else None


def count_blocks(budget: Budget, macs: HybridMacs) -> int:
    """How many blocks a budget pays for, whichever they are.

    Args:
        budget: The budget.
        macs: Of the model; at the budget's image size, where it has one.

    Raises:
        ValueError: It pays for none, or for all of them.
    """
    said, depth = f"keep is {AUTO}{budget.text}", len(macs.added[SOFTMAX])
    if budget.blocks is not None:
        if budget.blocks >= depth:
            raise ValueError(
                f"{said}: the model has {depth} blocks, of which one at least must be linearized: "
                f"choose {AUTO}{depth - 1} at most"
            )
        return budget.blocks
    dearest = sorted(range(depth), key=lambda block: -macs.added[SOFTMAX][block])
    shares = [macs.share(dict.fromkeys(dearest[:count], SOFTMAX)) for count in range(depth + 1)]
    fitting = [count for count, share in enumerate(shares) if share <= budget.share]
    if fitting in ([], [0]):
        raise ValueError(
            f"{said}: at {_size(macs)} pixels the student has {_percent(shares[0])} of the teacher's "
            f"multiply-accumulates, and {_percent(shares[1])} with softmax attention in one block: allow that much"
        )
    if depth in fitting:
        raise ValueError(
            f"{said}: at {_size(macs)} pixels that pays for softmax attention in all {depth} blocks, of which one at "
            f"least must be linearized: allow less than {_percent(shares[depth])}, or name a larger size"
        )
    return max(fitting)


def _percent(share: Fraction) -> str:
    return f"{float(100 * share):.2f} %"


def _size(macs: HybridMacs) -> str:
    return " x ".join(map(str, macs.image_size))
