"""From the files of a sample to its class, or classes: numbers, or names that a list of classes gives numbers."""

import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from adala.data.images import DecodeError

# Files that may hold a label, in the order in which they are asked.
LABEL_FIELDS = ("cls", "label", "json", "txt")
# Under which names a JSON object may hold it.
JSON_KEYS = ("cls", "label", "class", "class_id", "class_name")
# Files that may hold several, and under which names a JSON object may.
LABELS_FIELDS = ("labels", "cls", "label", "json", "txt")
LABELS_JSON_KEYS = ("labels", "classes", *JSON_KEYS)
# Above any number of classes; what is larger is no label.
LARGEST_LABEL = 2**31 - 1
# Of a file that holds labels. What is larger is something else, as a caption or all that is known of a photograph.
MAX_LABEL_BYTES = 2**20
# Spaces that may stand about a label, and a number as people write classes: no sign, exponent, underscore or digits of
# other scripts, all of which Python's own float takes.
_SPACES = " \t\r\n"
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?", re.ASCII)

Classes = tuple[str, ...]


class MissingLabelError(DecodeError):
    """A sample without a label."""


def read_label(fields: Mapping[str, bytes], classes: Classes | None = None) -> int:
    """The class of a sample.

    Numbers are of digits alone, with spaces about them and a fraction of zeros at most. A name counts where ``classes``
    has it, at whose place its number stands. A ``.txt`` that is neither is a caption, and no label.

    Args:
        fields: Contents of the sample's files by extension.
        classes: Names of the classes.

    Raises:
        MissingLabelError: The sample has no label.
        DecodeError: It has one that is no class.
    """
    for field in LABEL_FIELDS:
        value = _value(field, fields[field], JSON_KEYS) if field in fields else None
        if value is None or (field == "txt" and not _is_class(value, classes)):
            continue
        try:
            return _class_of(value, classes)
        except ValueError as error:
            raise DecodeError(f"its .{field} is no label: {error}") from error
    raise MissingLabelError(f"it has no label: none of its files {', '.join(sorted(fields))} holds one")


def read_labels(fields: Mapping[str, bytes], classes: Classes | None = None) -> tuple[int, ...]:
    """The classes of a sample that may have any number of them, ascending, each once.

    A ``.json`` holds a list of numbers or names, or an object with one under ``labels``, say; the other files hold them
    separated by commas, lines or, where all are numbers, spaces. An empty file or list says that the sample has none.

    Args:
        fields: Contents of the sample's files by extension.
        classes: Names of the classes.

    Raises:
        MissingLabelError: The sample has no file that holds labels.
        DecodeError: It has one with something that is no class.
    """
    for field in LABELS_FIELDS:
        value = _value(field, fields[field], LABELS_JSON_KEYS) if field in fields else None
        if value is None:
            continue
        try:
            return tuple(sorted({_class_of(each, classes) for each in _separated(value)}))
        except ValueError as error:
            if field == "txt":  # a caption
                continue
            raise DecodeError(f"its .{field} holds no labels: {error}") from error
    raise MissingLabelError(f"it has no labels: none of its files {', '.join(sorted(fields))} holds any")


def _separated(value: Any) -> list[Any]:
    """The entries of a list, or of a text; a single one else."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        return [value]
    entries = [entry.strip(_SPACES) for entry in re.split(r"[,\n]", value)]
    numbers = re.split(rf"[,{_SPACES}]+", value.strip("," + _SPACES))
    return numbers if all(_number(each) is not None for each in numbers) else [entry for entry in entries if entry]


def _value(field: str, content: bytes, json_keys: tuple[str, ...]) -> Any:
    """What a file says of the label; None where it says nothing of it."""
    if len(content) > MAX_LABEL_BYTES:
        if field == "txt":
            return None
        raise DecodeError(f"its .{field} of {len(content)} bytes holds no label: {MAX_LABEL_BYTES} are the most")
    try:
        text = content.decode("utf-8-sig").strip(_SPACES)
        if field != "json":
            return text
        value = json.loads(text)
    except ValueError as error:
        if field == "txt":  # a caption in another coding
            return None
        raise DecodeError(f"its .{field} cannot be read: {error}") from error
    except RecursionError as error:
        raise DecodeError(f"its .{field} cannot be read: it is nested too deeply") from error
    if isinstance(value, dict):
        return next((value[key] for key in json_keys if value.get(key) is not None), None)
    return value


def _is_class(value: Any, classes: Classes | None) -> bool:
    try:
        _class_of(value, classes)
    except ValueError:
        return False
    return True


def _class_of(value: Any, classes: Classes | None) -> int:
    number = _number(value)
    if number is not None and number <= LARGEST_LABEL and number == int(number):
        return int(number)
    if value == "":
        raise ValueError("it is empty")
    shown = reprlib.repr(value)  # of any length and depth
    if number is None and isinstance(value, str) and classes is not None and value in classes:
        return classes.index(value)
    if number is not None or _is_like_a_number(value):
        raise ValueError(f"{shown} is not one of 0, 1, 2, ...")
    if not isinstance(value, str):
        raise ValueError(f"{shown} is neither a number nor a name")
    if classes is None:
        raise ValueError(
            f"{shown} is a name: list the names of all classes in a classes.json or classes.txt beside the shards, or "
            "in the file that data.classes names"
        )
    raise ValueError(f"{shown} is not among the {len(classes)} names of classes")


def _number(value: Any) -> float | None:
    """What is written as the number of a class may be, in a text or in JSON; None where it is not."""
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # JSON's NaN is no class either, and its infinity is above all of them.
    return value if is_number and value >= 0 else None


def _is_like_a_number(value: Any) -> bool:
    """Whether Python takes it for a finite number."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return True
    except (TypeError, ValueError):
        return False


def read_classes(text: str, address: str) -> Classes:
    """Names of classes in the order of their numbers.

    Args:
        text: JSON, a list of names or an object from name to number or from number to name, or else a name a line.
        address: Where it comes from, for messages.

    Raises:
        ValueError: It is none of these, or a name or a number is there twice, or a number is missing.
    """
    names = _names_by_number(text, address) if address.endswith(".json") else text.splitlines()
    names = [name.strip() if isinstance(name, str) else "" for name in names]
    while names and not address.endswith(".json") and not names[-1]:
        names.pop()
    if not names or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{address} must hold the names of all classes, each once: it holds {len(names)} entries")
    return tuple(names)


def _names_by_number(text: str, address: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{address} is not JSON ({error}): it must be a list of names of classes") from error
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and all(isinstance(number, int) for number in value.values()):
        value = {str(number): name for name, number in value.items()}
    if not isinstance(value, dict) or sorted(value) != sorted(str(number) for number in range(len(value))):
        raise ValueError(f"{address} must be a list of names of classes, or an object from name to number from 0 on")
    # ImageNet's class index has a pair for each number, an identifier and a name.
    ordered = [value[str(number)] for number in range(len(value))]
    return [entry[0] if isinstance(entry, list) and entry else entry for entry in ordered]
