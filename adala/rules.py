"""What the values of recipes, protocols and tasks may be, by key: checked as a section is made, with a sentence that
says what is right."""

import dataclasses
import itertools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from adala.budget import BUDGET_WORDS, budget_of

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


def _is_block(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


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


def _are_blocks(value: Any) -> bool:
    return (
        _is_list(value)
        and all(type(number) is int and 0 <= number <= LARGEST for number in value)
        and len(set(value)) == len(value)
    )


def _is_set(named: tuple[Any, Any]) -> bool:
    name, shards = named
    return isinstance(name, str) and name.isascii() and name.isidentifier() and SHARDS.holds(shards)


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
SETS = Rule(
    f"{SHARDS.words}; or several sets of them by name, a word of letters, digits and _ that begins with no digit",
    lambda value: value != {} and all(map(_is_set, value.items())) if isinstance(value, dict) else SHARDS.holds(value),
)
MIXTURE_KEYS = ("source", "weight")
WEIGHT = _number("a number above 0", lambda value: value > 0)


def _is_mixture(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and all(map(_is_weighted_source, value))


def _is_weighted_source(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != set(MIXTURE_KEYS):
        return False
    source = value["source"]
    return WEIGHT.holds(value["weight"]) and SHARDS.holds([source] if isinstance(source, str) else source)


def _are_shards(value: Any) -> bool:
    """Without those texts that the command line makes of a mixture that is not quite one."""
    return SHARDS.holds(value) and not any(all(f"{key}:" in text for key in MIXTURE_KEYS) for text in value)


TRAINING_SHARDS = Rule(
    f"{SHARDS.words}; or a mixture, a list of nothing but {{source: SHARDS, weight: NUMBER}} with numbers above 0",
    lambda value: _are_shards(value) or _is_mixture(value),
)
PATH = Rule("a path (one that begins with ~ needs a home folder of that name)", _is_path)
SECONDS = _number("a number of seconds above 0, 86400 at most", lambda value: 0 < value <= 86400)
MINUTES = _number("a finite number of minutes, 0 (never) or more", lambda value: value >= 0)
WEIGHT_OF_TERM = _number("a number from 0 (which leaves it out) to 1000", lambda value: 0 <= value <= 1000)
RATE = _number("a number above 0, 10 at most", lambda value: 0 < value <= 10)


def _list_of(words: str, rule: Rule) -> Rule:
    """A list that is not empty, of different values."""
    return Rule(words, lambda v: _is_list(v) and len(v) > 0 and all(map(rule.holds, v)) and len(set(v)) == len(v))


SIZE_KEYS = ("from_step", "image_size", "micro_batch_size")
IMAGE_SIZE = _numbers("[height, width] in pixels, two whole numbers from 1 to 16384", 2, _whole(1, 16384))


def _are_size_changes(value: Any) -> bool:
    return _is_list(value) and all(map(_is_size_change, value)) and _rise([each["from_step"] for each in value])


def _is_size_change(value: Any) -> bool:
    if not isinstance(value, dict) or not {"from_step", "image_size"} <= set(value) <= set(SIZE_KEYS):
        return False
    micro = value.get("micro_batch_size")
    counts = [value["from_step"], *([] if micro is None else [micro])]
    return IMAGE_SIZE.holds(value["image_size"]) and all(map(_whole(1).holds, counts))


def _rise(numbers: list[int]) -> bool:
    return all(before < after for before, after in itertools.pairwise(numbers))


def _are_blocks(value: Any) -> bool:
    return _is_list(value) and all(map(_whole(0).holds, value)) and len(set(value)) == len(value)


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
        f"a list of block numbers, counted from 0, each of them once; or {BUDGET_WORDS}",
        lambda v: budget_of(v) is not None if isinstance(v, str) else _are_blocks(v),
    ),
    "block_mechanisms": Rule(
        "a mapping from block numbers, counted from 0, to names of mechanisms, as {4: window, 7: window}",
        lambda v: isinstance(v, dict) and all(map(_is_block, v)) and all(map(_is_text, v.values())),
    ),
    "block_mechanism_options": Rule(
        "a mapping from names of mechanisms to their options by field name, as {window: {window: 4}}",
        lambda v: isinstance(v, dict) and all(map(_is_text, v)) and all(map(_is_json, v.values())),
    ),
    "over_conversion": Rule(
        f"a list of keys among {', '.join(CONVERSION_KEYS)}", lambda v: _are_texts(v) and set(v) <= set(CONVERSION_KEYS)
    ),
    "ds_config": PATH,
    "checkpoint": PATH,
    "classes": PATH,
    "train": TRAINING_SHARDS,
    "val": SETS,
    "train_data": TRAINING_SHARDS,
    "probe_train": SHARDS,
    "image_size": IMAGE_SIZE,
    "image_sizes": Rule(
        "a list of {from_step: STEP, image_size: [HEIGHT, WIDTH], micro_batch_size: NUMBER}, without the last where it "
        "stays as it is, by steps that rise, from 1 on",
        _are_size_changes,
    ),
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
    "hang_minutes": MINUTES,
    "num_workers": _whole(0, 256),
    "shuffle_buffer": _whole(0),
    "remote_attempts": _whole(1, 1000),
    "stall_timeout_s": SECONDS,
    "total_timeout_s": SECONDS,
    "min_mib_per_s": _number("a number above 0, 100000 at most", lambda value: 0 < value <= 1e5),
    "cache_dir": PATH,
    "cache_gib": _number("a number above 0, 1000000 at most", lambda value: 0 < value <= 1e6),
    "max_bad_fraction": _number(
        "a number from 0 to 0.5, as 0.01 for one sample in a hundred", lambda value: 0 <= value <= 0.5
    ),
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
    "ema": _number("a number from 0 (no average) to below 1", lambda value: 0 <= value < 1),
    "start_from": PATH,
    "log_every": _whole(1),
    "save_every": _whole(0),
    "save_every_minutes": MINUTES,
    "keep_last": _whole(1),
    "keep_every": _whole(0),
    "evaluate_every": _whole(0),
    "max_skipped_steps": _whole(1),
    "global_weight": WEIGHT_OF_TERM,
    "intermediate_weight": WEIGHT_OF_TERM,
    "intermediate_blocks": Rule(
        "a number k, 1 or more, for every k-th block, or a list of block numbers, counted from 0, each of them once",
        lambda v: _whole(1).holds(v) or (_are_blocks(v) and len(v) > 0),
    ),
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
    "held_out_samples": _whole(1),
    "fit_scale": _whole(1, 64),
    "colour_bins": _whole(2, 64),
    "rounds": _whole(1),
    "warmup": _whole(0),
    "images": _whole(1),
}


def check_block_mechanisms(
    mechanism: str,
    keep: Collection[int],
    block_mechanisms: Mapping[int, str],
    block_mechanism_options: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuses blocks that are to have two mechanisms, and options that no block has a use for.

    Args:
        mechanism: Of all blocks that are not named.
        keep: Blocks that stay softmax.
        block_mechanisms: Other mechanisms by block.
        block_mechanism_options: Their options by mechanism.

    Raises:
        ValueError: Says which block, or whose options.
    """
    twice = sorted(set(keep) & set(block_mechanisms))
    if twice:
        raise ValueError(f"block {twice[0]} stands in keep and in block_mechanisms: leave it out of one of them")
    if mechanism in block_mechanism_options:
        raise ValueError(
            f"block_mechanism_options has options of {mechanism}, which is the mechanism of all blocks that are not "
            "named: give them as mechanism_options"
        )
    unused = [name for name in block_mechanism_options if name not in block_mechanisms.values()]
    if unused:
        raise ValueError(
            f"block_mechanism_options has options of {unused[0]}, which no block has: name it in block_mechanisms"
        )


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
