"""Recipes, plans, descriptions and options are values: nobody changes one behind another's back."""

import dataclasses
import inspect
import pickle

import pytest

import adala.attention.base
import adala.attention.layout
import adala.attention.linear
import adala.attention.softmax
import adala.config
import adala.conversion
import adala.evaluation
import adala.export
import adala.lineage
import adala.plan
import adala.report
import adala.runs
import adala.tasks

MODULES = [
    adala.attention.base, adala.attention.layout, adala.attention.linear, adala.attention.softmax, adala.config,
    adala.conversion, adala.evaluation, adala.export, adala.lineage, adala.plan, adala.report, adala.runs, adala.tasks,
]  # fmt: skip
CLASSES = sorted(
    {c for module in MODULES for _, c in inspect.getmembers(module, inspect.isclass) if dataclasses.is_dataclass(c)},
    key=lambda of: of.__qualname__,
)


@pytest.mark.parametrize("of", CLASSES, ids=lambda of: of.__qualname__)
def test_it_is_frozen(of: type) -> None:
    assert of.__dataclass_params__.frozen, f"{of.__module__}.{of.__qualname__}"


def test_a_recipe_travels_between_ranks_unchanged() -> None:
    recipe = adala.config.load_recipe()
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.stage1.lr = 1.0
