"""The command line of a search: a run whose Stage 1 is finished, and how many blocks may keep softmax attention."""

import dataclasses
import functools
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from adala.budget import AUTO, HybridMacs
from adala.build import find_start
from adala.config import DEFAULT_RECIPE, Recipe, parse_recipe_command
from adala.distributed import from_rank_0, say
from adala.hybrids import ERROR, Choice
from adala.plan import STAGES, conversion_of, outline_macs, resolve_run
from adala.search.run import search_run

COLUMNS = ("softmax in blocks", "added", "relative error", "patch cosine", "GMACs", "of the teacher's (%)", "budget")


@dataclasses.dataclass(frozen=True)
class SearchCommand:
    """What one command line asks for.

    Attributes:
        recipe: With its overrides; the largest budget is its ``keep``.
        budgets: How many blocks may keep softmax attention, in order.
        size: Height and width in pixels at which hybrids' multiply-accumulates are told.
    """

    recipe: Recipe
    budgets: tuple[int, ...]
    size: tuple[int, int]


@functools.cache
def build_search_parser() -> ArgumentParser:
    """Options of the command, and a recipe's fields as dotted ones."""
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Says in which order blocks of a run's student, once Stage 1 has aligned it, should get softmax "
        "attention back, and what each gains and costs. Writes search.json into the run, which training under keep "
        "auto:N reads.",
    )
    parser.add_argument("--recipe", type=str, default=DEFAULT_RECIPE, help="name in adala/recipes, or a .yaml path")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4], help="how many blocks, one number or several")
    parser.add_argument(
        "--macs_size", type=int, nargs="+", default=[], help="height and width to count MACs at (data.image_size)"
    )
    parser.add_argument(
        "--local_rank", type=int, default=0, help="set by the DeepSpeed launcher; read from RANK anyway"
    )
    parser.add_class_arguments(Recipe, nested_key=None)
    return parser


def parse_search_command(arguments: Sequence[str]) -> SearchCommand:
    """Reads a command line.

    Raises:
        ValueError: Unknown recipe or key, or a value of the wrong type or out of range; the message names the key.
    """
    recipe, parsed = parse_recipe_command(build_search_parser(), arguments)
    budgets, size = sorted(set(parsed.budgets)), parsed.macs_size or list(recipe.data.image_size)
    if budgets[0] < 1:
        raise ValueError(f"command line: --budgets is {budgets[0]}: it must be whole numbers, 1 or more")
    if len(size) > 2 or min(size) < 1:
        raise ValueError(f"command line: --macs_size is {size}: it must be one or two whole numbers, 1 or more")
    recipe = dataclasses.replace(recipe, keep=f"{AUTO}{budgets[-1]}")
    return SearchCommand(recipe, tuple(budgets), (size[0], size[-1]))


def run_search_command(command: SearchCommand) -> None:
    """Searches, as far as that has not been done before, and prints the order; every rank calls it.

    Raises:
        ValueError: Something about recipe, data or the run is wrong; the message says what to do.
    """
    # The student that is searched is the one that the stage after Stage 1 starts from.
    number = 2 if conversion_of(command.recipe).step(STAGES[2].name) else 3
    plan = resolve_run(command.recipe, (number,))
    macs = from_rank_0(functools.partial(outline_macs, plan.model, "command line: --macs_size", command.size))
    # Before the run's folder would be made, where there is none.
    start = from_rank_0(functools.partial(find_start, plan.run, dataclasses.replace(plan.stages[0], number=2)))
    with plan.run.held():
        search = search_run(plan.run, plan.stages[0], start)
    say(order_table(search.choice, macs, command.budgets))
    say(f"wrote {plan.run.search}" if search.is_new else f"read {plan.run.search}")


def order_table(choice: Choice, macs: HybridMacs, budgets: Sequence[int]) -> str:
    """The order in which blocks are chosen, in Markdown: a row for the student itself, and one for each step."""
    title = f"On {choice.images} images of {_size(choice.image_size)} pixels; MACs of one of {_size(macs.image_size)}:"
    lines = [title, "", f"| {' | '.join(COLUMNS)} |", f"| {'--- | ' * 2}{'---: | ' * 4}--- |"]
    for count in range(len(choice.steps) + 1):
        hybrid = choice.hybrid(count)
        metrics = choice.steps[count - 1].metrics if count else choice.before
        cells = (
            ", ".join(map(str, sorted(hybrid))) or "none",
            f"{choice.steps[count - 1].block}" if count else "",
            f"{metrics[ERROR]:.4f}",
            f"{metrics['patch_cosine']:.4f}",
            f"{macs.of(hybrid) / 1e9:.3f}",
            f"{float(100 * macs.share(hybrid)):.2f}",
            f"{AUTO}{count}" if count in budgets else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _size(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
