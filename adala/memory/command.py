"""The command line of the memory planner: a recipe with its overrides, and GPUs."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from jsonargparse import ArgumentParser

from adala.config import DEFAULT_RECIPE, Recipe, parse_recipe_command


@dataclass(frozen=True)
class MemoryCommand:
    """What one command line asks for.

    Attributes:
        recipe: With its overrides.
        gpus: How many.
        gpu_gib: Memory of each in GiB.
        as_json: Whether JSON is printed in place of tables.
    """

    recipe: Recipe
    gpus: int
    gpu_gib: float
    as_json: bool


@functools.cache
def build_memory_parser() -> ArgumentParser:
    """Options of the command, and a recipe's fields as dotted ones."""
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Says what each stage of a recipe needs of a GPU's memory, and which micro-batch, ZeRO stage and "
        "activation checkpointing fit. Needs neither a GPU, nor weights, nor data.",
    )
    parser.add_argument("--recipe", type=str, default=DEFAULT_RECIPE, help="name in adala/recipes, or a .yaml path")
    parser.add_argument("--gpus", type=int, default=8, help="how many")
    parser.add_argument("--gpu_gib", type=float, default=80.0, help="memory of each in GiB")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_class_arguments(Recipe, nested_key=None)
    return parser


def parse_memory_command(arguments: Sequence[str]) -> MemoryCommand:
    """Reads a command line.

    Raises:
        ValueError: Unknown recipe or key, or a value of the wrong type or out of range; the message names the key.
    """
    recipe, parsed = parse_recipe_command(build_memory_parser(), arguments)
    if not 1 <= parsed.gpus <= 2**20:
        raise ValueError(f"command line: --gpus is {parsed.gpus}: it must be a whole number, 1 or more")
    if not 0 < parsed.gpu_gib < 2**20:
        raise ValueError(f"command line: --gpu_gib is {parsed.gpu_gib:g}: it must be a number above 0")
    return MemoryCommand(recipe, parsed.gpus, parsed.gpu_gib, parsed.json)
