"""The command line of an evaluation: a recipe with its overrides, models, and a protocol with its own."""

import functools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from adala.config import DEFAULT_RECIPE, Recipe, parse_recipe_command
from adala.protocol import DEFAULT_PROTOCOL, Protocol, load_protocol

OPTION = "protocol"
PROTOCOL_PREFIX = f"--{OPTION}."
LOCAL_RANK = "--local_rank"


@dataclass(frozen=True)
class EvaluationCommand:
    """What one command line asks for.

    Attributes:
        recipe: Teacher, data and task.
        models: ``teacher``, ``linearized``, or folders of exported students.
        protocol: What is measured, and how.
        out: Folder of the results; None is one in the run's.
        cache: Folder where features are kept; None is one beside the runs.
        pictures: Whether pictures are drawn.
        text: The command as it was typed.
    """

    recipe: Recipe
    models: tuple[str, ...]
    protocol: Protocol
    out: Path | None
    cache: Path | None
    pictures: bool
    text: str


@functools.cache
def build_evaluation_parser() -> ArgumentParser:
    """Options of the command, and a recipe's fields as dotted ones."""
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Compares models under one protocol, each beside the recipe's teacher. A protocol's keys are given "
        "as --protocol.probe.epochs 20, say; adala/protocols/ holds the named ones.",
    )
    parser.add_argument("--recipe", type=str, default=DEFAULT_RECIPE, help="name in adala/recipes, or a .yaml path")
    parser.add_argument(
        "--models", type=str, nargs="+", default=[], help="linearized, or folders of exported students (runs/x/stage2)"
    )
    parser.add_argument(
        "--protocol", type=str, default=DEFAULT_PROTOCOL, help="name in adala/protocols, or a .yaml path"
    )
    parser.add_argument("--out", type=str, default="", help="folder of the results (RUN/evaluation)")
    parser.add_argument("--cache", type=str, default="", help="folder where features are kept (RUNS_DIR/features)")
    parser.add_argument("--pictures", action="store_true", help="draw features, masks and errors by block")
    parser.add_argument(LOCAL_RANK, type=int, default=0, help="set by the DeepSpeed launcher; read from RANK anyway")
    parser.add_class_arguments(Recipe, nested_key=None)
    return parser


def parse_evaluation(arguments: Sequence[str]) -> EvaluationCommand:
    """Reads a command line.

    Raises:
        ValueError: Unknown recipe, protocol or key, or a value of the wrong type or out of range; the message names the
            key.
    """
    own, of_protocol = split_protocol_keys(arguments)
    if sum(argument.partition("=")[0] == "--models" for argument in own) > 1:
        raise ValueError("command line: --models stands there twice: name all models behind one")
    recipe, parsed = parse_recipe_command(build_evaluation_parser(), own)
    out, cache = (Path(given).expanduser() if given else None for given in (parsed.out, parsed.cache))
    return EvaluationCommand(
        recipe=recipe,
        models=tuple(parsed.models),
        protocol=_load_protocol(parsed.protocol, of_protocol),
        out=out,
        cache=cache,
        pictures=parsed.pictures,
        text=shlex.join([_program(), "launchers/evaluate.py", *_without_rank(arguments)]),
    )


def _load_protocol(name: str, overrides: Sequence[str]) -> Protocol:
    try:
        return load_protocol(name, overrides)
    except ValueError as error:
        # Options as they were typed.
        raise ValueError(re.sub(rf"(?<![^\s/])--(?!{OPTION})", PROTOCOL_PREFIX, str(error))) from error


def _program() -> str:
    """What starts one process, or several."""
    return "deepspeed" if os.environ.get("WORLD_SIZE", "1") != "1" else "python"


def split_protocol_keys(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of the recipe and the command, and the protocol's as it wants them (``--knn.k``, value)."""
    own, of_protocol = [], []
    target = own
    for argument in arguments:
        if argument.startswith("--"):
            target = of_protocol if argument.startswith(PROTOCOL_PREFIX) else own
            if target is of_protocol:
                argument = f"--{argument.removeprefix(PROTOCOL_PREFIX)}"
        target.append(argument)
    return own, of_protocol


def _without_rank(arguments: Sequence[str]) -> list[str]:
    """Without what the launcher added."""
    kept, is_rank = [], False
    for argument in arguments:
        if not is_rank and not argument.startswith(LOCAL_RANK):
            kept.append(argument)
        is_rank = argument == LOCAL_RANK
    return kept
