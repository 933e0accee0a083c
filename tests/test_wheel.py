"""What is installed works without the repository: recipes, configurations and launchers come along."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launch import PATIENCE_S
from tiny_run import write_tiny_recipe

PROJECT = Path(__file__).resolve().parents[1]
INSTALLED = ("adala", "baselines", "ds_configs", "launchers", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the project's wheel is unpacked."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in INSTALLED:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", source, source]
    subprocess.run(command, check=True, timeout=PATIENCE_S)
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_every_module_and_every_file_of_ours_is_in_the_wheel(site: Path) -> None:
    ours = [path for name in ("adala", "baselines") for path in (PROJECT / name).rglob("*")]
    ours += [*(PROJECT / "ds_configs").rglob("*"), *(PROJECT / "launchers").rglob("*")]
    files = [path.relative_to(PROJECT) for path in ours if path.is_file() and "__pycache__" not in path.parts]
    inside = [Path("adala") / file if file.parts[0] in ("ds_configs", "launchers") else file for file in files]
    missing = [str(file) for file in inside if not (site / file).exists()]
    # Their READMEs alone are for the repository.
    assert missing == ["baselines/README.md"]


def test_the_installed_command_trains_from_another_folder_and_writes_nothing_into_the_package(
    site: Path, tmp_path: Path
) -> None:
    def contents() -> dict[Path, str]:
        files = [path for path in site.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = contents()
    recipe = write_tiny_recipe(tmp_path, runs_dir="my runs")
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "adala.launchers.train", "--recipe", str(recipe), "--stage", "1"]
    arguments = ["--mechanism", "linformer", "--ds_config", "zero2"]
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env=environment, timeout=PATIENCE_S, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my runs/tiny-run/stage1/student.safetensors").is_file()
    where = [sys.executable, "-c", "import adala, baselines; print(adala.__file__, baselines.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, text=True, capture_output=True, check=True)
    assert all(path.startswith(str(site)) for path in found.stdout.split()), found.stdout
    assert contents() == before
