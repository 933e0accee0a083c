"""What ``import adala`` gives, whatever else has been imported before."""

import subprocess
import sys

CHECK = """
import importlib, pkgutil
import adala

def callables():
    return {name: getattr(adala, name) for name in adala.__all__}

first = callables()
for module in pkgutil.walk_packages(adala.__path__, "adala."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
again = callables()
assert first == again and all(callable(value) for value in again.values()), again
"""


def test_public_names_are_functions_before_and_after_every_module_is_imported() -> None:
    """A module of the same name would take the function's place the moment it is imported."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
