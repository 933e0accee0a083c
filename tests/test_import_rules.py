"""Who may import whom: down only, see docs/ARCHITECTURE.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]

# From the top down. A module may import what stands in a lower layer; files of one package may import each other.
LAYERS: list[set[str]] = [
    {"launchers", "bench"},
    {"adala.pipeline", "adala.evaluate", "adala.memory"},
    {"adala.search"},
    {"adala.comparison"},
    {"adala.feature_rows"},
    {"adala.contenders"},
    {"adala.build"},
    {"adala.plan"},
    {
        "adala.trainer",
        "adala.report",
        "adala.evaluation_report",
        "adala.evaluation_pictures",
        "adala.lineage",
        "adala.sources",
        "adala.notebook",
    },
    {"adala.checkpoint", "adala.export", "adala.hybrids"},
    {"adala.engine", "adala.stages", "adala.evaluation", "adala.progress"},
    {"adala.backbones", "adala.tasks", "adala.runs", "adala.metrics"},
    {"adala.students", "adala.data", "adala.optim", "adala.heads", "adala.ds_config", "adala.similarity"},
    {"adala.families", "adala.losses", "adala.conversion"},
    {"adala.evaluation_command"},
    {"adala.attention", "adala.protocol", "adala.commands"},
    {"adala.config", "adala.failures", "adala.weights", "adala.weight_names", "adala.machine"},
    {"adala.preemption", "adala.watchdog"},
    {
        "adala.rules",
        "adala.distributed",
        "adala.files",
        "adala.plugins",
        "adala.compilation",
        "adala.macs",
        "adala.activations",
        "adala.nonfinite",
        "adala.slices",
        "adala.verbs",
    },
    {"adala.budget", "adala.resident"},
]
BASELINES_MAY = {"adala.attention", "adala.losses", "adala.conversion"}


def python_files() -> list[Path]:
    folders = ("adala", "baselines", "bench", "launchers")
    return sorted(path for folder in folders for path in (PROJECT / folder).rglob("*.py"))


def package_of(module: str) -> str:
    """``adala.data.order`` lies in ``adala.data``, ``bench.timing`` in ``bench``."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "adala" else parts[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            # `from adala import engine` names a module as well.
            if node.module in ("adala", "baselines", "bench", "launchers"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(package: str) -> int:
    return next((depth for depth, layer in enumerate(LAYERS) if package in layer), -1)


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PROJECT)))
def test_imports_go_down_only(path: Path) -> None:
    package = package_of(module_name(path))
    for module in imported_modules(path):
        target = package_of(module)
        if target == package or target.split(".")[0] not in ("adala", "baselines", "bench", "launchers", "tests"):
            continue
        if package == "adala":
            continue  # the package's front door resolves its public names lazily and imports nothing
        if package == "baselines":
            assert target in BASELINES_MAY, f"{path.name} imports {module}"
        elif target == "baselines":
            assert package == "bench", f"{path.name} imports {module}: a mechanism is reached by name"
        else:
            assert layer_of(target) >= 0, f"{target} has no layer: give it one here and in docs/ARCHITECTURE.md"
            assert layer_of(package) < layer_of(target), f"{path.name} in {package} imports {module}"


def test_every_package_has_a_layer() -> None:
    packages = {package_of(module_name(path)) for path in python_files()} - {"adala", "baselines"}
    assert {package for package in packages if layer_of(package) < 0} == set()


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {
        path.relative_to(PROJECT).as_posix()
        for path in python_files()
        if any(module.split(".")[0] == "deepspeed" for module in imported_modules(path))
    }
    assert importers == {"adala/engine.py"}


def test_nobody_imports_bench_launchers_or_tests() -> None:
    for path in python_files():
        own = path.relative_to(PROJECT).parts[0]
        for module in imported_modules(path):
            top = module.split(".")[0]
            assert top == own or top not in ("bench", "launchers", "tests"), f"{path} imports {module}"


def test_the_page_shows_these_layers() -> None:
    page = (PROJECT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    block = page.partition("files of one package may import each other:\n\n")[2].partition("\n\n")[0]
    shown = [{name.strip() for name in line.split(",")} for line in block.splitlines()]
    assert shown == [{name.removeprefix("adala.") for name in layer} for layer in LAYERS]
