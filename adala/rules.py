"""What the values of recipes, protocols and tasks may be, by key: checked as a section is made, with a sentence that
says what is right."""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

# Where the embedded data set is written below runs_dir.
EMBEDDED_FOLDER = "embedded-fashion-mnist"
# What a conversion may state about a stage in place of the recipe.
CONVERSION_KEYS = tuple(f"stage{number}.{key}" for number in (1, 2, 3) for key in ("loss", "lr", "weight_decay"))
# What an evaluation may measure, in the order of a report.
MEASURES = ("features", "blocks", "knn", "probe", "head", "segmentation", "speed")
# More samples or steps than anybody has; what is above it is a slip of the keyboard.
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        words: What ends the sentence "it must be ...".
        holds: Whether a value, of whatever type, is that.
    """

    words: str
    holds: Callable[[Any], bool]


def _whole(low: int, high: int = LARGEST) -> Rule:
    words = f"a whole number, {low} or more" if high == LARGEST else f"a whole number from {low} to {high}"
    return Rule(words, lambda value: type(value) is int and low <= value <= high)


def _number(words: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(words, lambda value: type(value) in (int, float) and math.isfinite(value) and holds(value))


def _numbers(words: str, count: int, rule: Rule) -> Rule:
    return Rule(words, lambda value: _is_list(value) and len(value) == count and all(map(rule.holds, value)))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and "\0" not in value


def _is_path(value: Any) -> bool:
    """A path, whose ``~`` or ``~user`` is somebody's home."""
    return _is_text(value) and not os.path.expanduser(value).startswith("~")


def _is_folder_name(value: Any) -> bool:
    if not _is_text(value) or value in (".", "..", EMBEDDED_FOLDER) or value != value.strip():
        return False
    # What the locale cannot print comes as a lone surrogate, and is a name nevertheless.
    printable = all(letter.isprintable() or "\udc80" <= letter <= "\udcff" for letter in value)
    return "/" not in value and printable and len(value.encode(errors="surrogatepass")) <= 200


def _are_texts(value: Any) -> bool:
    return _is_list(value) and all(map(_is_text, value))


def with_text_keys(value: Any) -> Any:
    """A value whose mappings have texts for whole numbers as keys, as JSON has them."""
    if isinstance(value, dict):
        return {str(key) if type(key) is int else key: with_text_keys(below) for key, below in value.items()}
    return [with_text_keys(each) for each in value] if _is_list(value) else value


def _is_json(value: Any) -> bool:
    """A mapping that the record of a run can hold."""
    try:
        return isinstance(value, dict) and json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


SHARDS = Rule(
    "at least one shard: a pattern, a path or a URL, or a list of them",
    lambda value: _are_texts(value) and len(value) > 0,
)
PATH = Rule("a path (one that begins with ~ needs a home folder of that name)", _is_path)
RATE = _number("a number above 0, 10 at most", lambda value: 0 < value <= 10)


def _list_of(words: str, rule: Rule) -> Rule:
    """A list that is not empty, of different values."""
    return Rule(words, lambda v: _is_list(v) and len(v) > 0 and all(map(rule.holds, v)) and len(set(v)) == len(v))


# By the name of a field, which means the same in every section. Fields without a line here are checked by their type.
RULES: dict[str, Rule] = {
    "run_name": Rule(
        "the name of one folder below runs_dir: printable characters without /, not . or .., not "
        f"{EMBEDDED_FOLDER} (the embedded data lie there); say in runs_dir where runs lie",
        _is_folder_name,
    ),
    "runs_dir": PATH,
    "seed": _whole(0, 2**63 - 1),
    "keep": Rule(
        "a list of block numbers, counted from 0, each of them once",
        lambda v: _is_list(v) and all(type(n) is int and 0 <= n <= LARGEST for n in v) and len(set(v)) == len(v),
    ),
    "over_conversion": Rule(
        f"a list of keys among {', '.join(CONVERSION_KEYS)}", lambda v: _are_texts(v) and set(v) <= set(CONVERSION_KEYS)
    ),
    "ds_config": PATH,
    "checkpoint": PATH,
    "classes": PATH,
    "train": SHARDS,
    "val": SHARDS,
    "train_data": SHARDS,
    "probe_train": SHARDS,
    "image_size": _numbers("[height, width] in pixels, two whole numbers from 1 to 16384", 2, _whole(1, 16384)),
    "mean": _numbers(
        "three numbers from 0 to 1, for red, green and blue (divide those of 0 to 255 by 255)",
        3,
        _number("", lambda value: 0 <= value <= 1),
    ),
    "std": _numbers(
        "three numbers above 0, 1 at most, for red, green and blue (divide those of 0 to 255 by 255)",
        3,
        _number("", lambda value: 1e-6 <= value <= 1),
    ),
    "num_workers": _whole(0, 256),
    "shuffle_buffer": _whole(0),
    "steps": _whole(1),
    "global_batch_size": _whole(1),
    "micro_batch_size": _whole(1),
    "lr": RATE,
    "head_lr": RATE,
    "min_lr": _number("a number from 0 to lr", lambda value: value >= 0),
    "warmup_steps": _whole(0),
    "weight_decay": _number("a number from 0 to 100", lambda value: 0 <= value <= 100),
    "betas": _numbers("two numbers from 0 to below 1", 2, _number("", lambda value: 0 <= value < 1)),
    "gradient_clipping": _number("a finite number, 0 (no clipping) or more", lambda value: value >= 0),
    "start_from": PATH,
    "log_every": _whole(1),
    "save_every": _whole(0),
    "evaluate_every": _whole(0),
    "max_skipped_steps": _whole(1),
    "freeze": Rule("a list of patterns of parameter names", _are_texts),
    # With a single class the loss is 0 whatever the model says: nothing would train.
    "num_classes": _whole(2),
    "window_overlap": _number("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "label_smoothing": _number("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "head_init_samples": _whole(1),
    "batch_size": _whole(1),
    "monitor_samples": _whole(1),
    "probe_samples": _whole(1),
    "probe_l2": _number("a finite number, 0 or more", lambda value: value >= 0),
    "measures": _list_of(
        f"one or more of {', '.join(MEASURES)}, each of them once",
        Rule("", lambda v: isinstance(v, str) and v in MEASURES),
    ),
    "k": _list_of("a list of whole numbers, 1 or more, each of them once", _whole(1)),
    "temperature": _number("a number above 0, 100 at most", lambda value: 0 < value <= 100),
    "rates": _list_of("a list of numbers above 0, 10 at most, each of them once", RATE),
    "epochs": _whole(1),
    "momentum": _number("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "l2": _number("a finite number, 0 or more", lambda value: value >= 0),
    "selection_fraction": _number("a number above 0 and below 1", lambda value: 0 < value < 1),
    "train_samples": _whole(1),
    "fit_scale": _whole(1, 64),
    "colour_bins": _whole(2, 64),
    "rounds": _whole(1),
    "warmup": _whole(0),
    "images": _whole(1),
}


RULES_OF_TYPES: dict[type, Rule] = {
    bool: Rule("true or false", lambda value: isinstance(value, bool)),
    int: Rule("a whole number", lambda value: type(value) is int),
    float: _number("a finite number", lambda value: True),
    str: Rule("a text that is not empty", _is_text),
}


def rule_of(field: dataclasses.Field) -> Rule:
    """What a field must be: by its name, else by its type."""
    return RULES[field.name] if field.name in RULES else _rule_of_type(field.type)


def _rule_of_type(kind: Any) -> Rule:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, str):  # as it stands in a module with `from __future__ import annotations`
        return Rule("a value", lambda value: True)
    if origin in (types.UnionType, typing.Union):
        # None itself is never asked about.
        rules = [_rule_of_type(one) for one in arguments if one is not type(None)]
        return Rule(" or ".join(rule.words for rule in rules), lambda value: any(rule.holds(value) for rule in rules))
    if origin is Literal:
        return Rule(f"one of {', '.join(map(str, arguments))}", lambda value: value in arguments)
    if origin in (list, tuple):
        return Rule("a list", _is_list)
    if origin is dict:
        return Rule("a mapping of finite numbers, texts, true, false, null, and lists and mappings of them", _is_json)
    if kind in RULES_OF_TYPES:
        return RULES_OF_TYPES[kind]
    return Rule(f"a section with keys of its own ({kind.__name__})", lambda value: isinstance(value, kind))


def shown(value: Any) -> str:
    """A value in an error message, as YAML has it, and not longer than a line."""
    text = (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True)
class Checked:
    """A section whose values are checked as it is made, and whose lists of names may be given as a single one."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and list[str] in typing.get_args(field.type):
                value = [value]
                object.__setattr__(self, field.name, value)
            if value is None and type(None) in typing.get_args(field.type):
                continue
            rule = rule_of(field)
            if not rule.holds(value):
                raise ValueError(f"{field.name} is {shown(value)}: it must be {rule.words}")
