"""What the configurations in ds_configs/ mean; what is refused stands in test_plan.py."""

from pathlib import Path

import pytest
import torch
from launch import PROJECT

from adala.ds_config import load_ds_config

PRECISIONS = {
    "": (torch.float32, None, "float32"),
    "_bf16": (torch.bfloat16, None, "bfloat16"),
    "_autocast": (torch.float32, torch.bfloat16, "autocast to bfloat16"),
}
NAMES = {f"zero{stage}{suffix}": (stage, suffix) for stage in (1, 2, 3) for suffix in PRECISIONS} | {"zero0": (0, "")}


def test_all_of_them_are_in_the_table_below() -> None:
    assert {path.stem for path in (PROJECT / "ds_configs").glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_means_what_its_name_says(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # found wherever the command is started
    stage, suffix = NAMES[name]
    config = load_ds_config(name)
    assert (config.name, config.zero_stage) == (name, stage)
    assert (config.dtype, config.autocast_dtype, config.precision) == PRECISIONS[suffix]


def test_an_own_file_goes_by_its_path_and_may_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    config = load_ds_config(str(tmp_path / "mine.json"))
    assert (config.zero_stage, config.precision) == (0, "float32")
    (tmp_path / "mine.json").write_text('{"torch_autocast": {"enabled": true}}')
    assert load_ds_config(str(tmp_path / "mine.json")).precision == "autocast to bfloat16"
    with pytest.raises(ValueError, match="ds_config zero4: there is no such configuration; known are zero0, zero1"):
        load_ds_config("zero4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gradient_clipping": 1.0}', "gradient_clipping belongs into the recipe, as stageN.gradient_clipping"),
        ('{"torch_autocast": {"enabled": true, "dtype": "float16"}}', "fp16 overflows"),
        ('{"zero_optimization": {"stage": -1}}', "zero_optimization.stage is -1: it must be 0, 1, 2 or 3"),
    ],
    ids=["recipe", "autocast_fp16", "stage"],
)
def test_what_would_go_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_ds_config(str(tmp_path / "mine.json"))
