"""docs/BACKBONES.md lists what is a backbone and what is refused, of all names of these modules of timm."""

import timm
from backbones_page import BEGIN, PAGE, all_names, describe, write_table

from adala.families import families


def test_the_page_says_what_becomes_of_every_name() -> None:
    """Written anew by `python tests/fixtures/backbones_page.py`."""
    entries = [describe(name) for name in all_names()]
    assert PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].strip() == write_table(entries).strip()
    taken = [entry for entry in entries if entry.refused is None]
    assert len(taken) >= 239
    assert {entry.family for entry in taken} == {family.name for family in families()}
    assert all(entry.refused for entry in entries if entry not in taken)


def test_no_class_of_a_family_is_missed() -> None:
    """Names of timm's other modules lead to none of the classes that have adapters, as far as their code says."""
    walked = set(all_names())
    named = {
        name
        for name in timm.list_models()
        if name not in walked and timm.models.model_entrypoint(name).__annotations__.get("return") in classes()
    }
    assert named == set()


def classes() -> set[object]:
    found = {family.model_class for family in families()}
    return found | {kind.__name__ for kind in found}
