"""ViT-AdaLA's and the authors' own conversion of every mechanism, trained on two ranks and found again by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import PATIENCE_S, launch

from adala.attention import mechanism_names, resolve_mechanism
from adala.conversion import ADALA, STAGE_NAMES
from adala.metrics import read_metrics

STAGES_OF = {
    (name, conversion): [number for number, stage in STAGE_NAMES.items() if steps.step(stage)]
    for name in mechanism_names()
    for conversion, steps in (("adala", ADALA), ("native", getattr(resolve_mechanism(name), "native_conversion", None)))
    if steps is not None
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversions")
    done = launch(Path(__file__).with_name("conversions_worker.py"), str(folder))
    assert done.returncode == 0, done.stdout
    return folder


def test_every_baseline_has_a_native_conversion() -> None:
    native = {name for name, conversion in STAGES_OF if conversion == "native"}
    assert native == set(mechanism_names()) - {"softmax", "linear", "window"}


@pytest.mark.parametrize(("mechanism", "conversion"), STAGES_OF, ids=["-".join(key) for key in STAGES_OF])
def test_the_conversion_ran_its_stages(runs: Path, mechanism: str, conversion: str) -> None:
    run = runs / f"{mechanism}-{conversion}"
    for number in (1, 2, 3):
        expected = number in STAGES_OF[mechanism, conversion]
        assert (run / f"stage{number}" / "student.safetensors").is_file() == expected
        assert [row["step"] for row in read_metrics(run / f"stage{number}", "train")] == ([2] if expected else [])


def test_exported_students_are_found_in_a_fresh_process(runs: Path) -> None:
    """By name alone: the process imports nothing of baselines itself."""
    code = (
        "import json, sys, adala, torch\n"
        "for folder in sys.argv[1:]:\n"
        "    student = adala.load_student(folder).eval()\n"
        "    mixer = type(student.blocks[0].attn.token_mixer).__name__\n"
        "    print(json.dumps([folder, mixer, list(student(torch.randn(1, 3, 28, 28)).shape)]))\n"
    )
    folders = [str(runs / f"{m}-{c}" / f"stage{max(numbers)}") for (m, c), numbers in STAGES_OF.items()]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [row[0] for row in found] == folders
    assert [row[1] for row in found] == [resolve_mechanism(name).__name__ for name, _ in STAGES_OF]
    assert all(row[2] == [1, 197, 64] for row in found)
