"""DeepSpeed configurations: what may stand in them, and that every mistake is one sentence before anything is built."""

import json
from pathlib import Path

import pytest
import torch

from adala.ds_config import REDUCE_BUCKET, load_ds_config
from adala.engine import check_ds_config

PROJECT = Path(__file__).resolve().parents[2]


PRECISIONS = {
    "": (torch.float32, None, "float32"),
    "_bf16": (torch.bfloat16, None, "bfloat16"),
    "_autocast": (torch.float32, torch.bfloat16, "autocast to bfloat16"),
}
NAMES = {f"zero{stage}{suffix}": (stage, suffix) for stage in (1, 2, 3) for suffix in PRECISIONS} | {"zero0": (0, "")}


def test_all_of_them_are_in_the_table_above() -> None:
    assert {path.stem for path in (PROJECT / "ds_configs").glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_means_what_its_name_says(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # found wherever the command is started
    stage, suffix = NAMES[name]
    for given in (name, str(PROJECT / "ds_configs" / f"{name}.json")):
        config = load_ds_config(given)
        check_ds_config(config)
        assert (config.name, config.zero_stage) == (given, stage)
        assert (config.dtype, config.autocast_dtype, config.precision) == PRECISIONS[suffix]


def test_an_own_file_may_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    config = load_ds_config(str(tmp_path / "mine.json"))
    assert (config.zero_stage, config.precision) == (0, "float32")
    (tmp_path / "mine.json").write_text('{"torch_autocast": {"enabled": true}}')
    assert load_ds_config(str(tmp_path / "mine.json")).precision == "autocast to bfloat16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{'bf16': {}}", "not valid JSON"),
        ("[]", "it must be a JSON object"),
        ("null", "it must be a JSON object"),
        ('"zero1"', "it must be a JSON object"),
        ('{"zero_optimization": null}', "zero_optimization must be an object, not null"),
        ('{"zero_optimization": []}', r"zero_optimization must be an object, not \[\]"),
        ('{"zero_optimization": 1}', "zero_optimization must be an object, not 1"),
        ('{"comms_logger": 3}', "comms_logger must be an object, not 3"),
        ('{"bf16": true}', "bf16 must be an object, not true"),
        ('{"torch_autocast": "bfloat16"}', "torch_autocast must be an object"),
        ('{"zero_optimization": {"stage": "2"}}', 'zero_optimization.stage is "2": it must be 0, 1, 2 or 3'),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage is true: it must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": null}}', "zero_optimization.stage is null: it must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4: it must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": [1]}}', "zero_optimization.stage is .*: it must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": NaN}}', "NaN is no number"),
        ('{"zero_optimization": {"stage": "auto"}}', 'zero_optimization.stage is "auto", which only Hugging Face'),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', 'zero_optimization.reduce_bucket_size is "auto"'),
        ('{"zero_optimization": {"offload_param": {"device": "auto"}}}', 'offload_param.device is "auto"'),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "checkpoints and exports do not"),
        ('{"bf16": {"enabled": "auto"}}', 'bf16.enabled is "auto"'),
        ('{"bf16": {"enabled": "true"}}', 'bf16.enabled is "true": it must be true or false'),
        ('{"fp16": {"enabled": 1}}', "fp16.enabled is 1: it must be true or false"),
        ('{"torch_autocast": {"enabled": true, "dtype": "bf16"}}', 'torch_autocast.dtype is "bf16": it must be'),
        ('{"torch_autocast": {"enabled": true, "dtype": 16}}', "torch_autocast.dtype is 16: it must be"),
        ('{"torch_autocast": {"enabled": true, "type": 1}}', "torch_autocast.type is not a key"),
        ('{"torch_autocast": {"enabled": true, "dtype": "float16"}}', "fp16 overflows"),
        ('{"fp16": {"enabled": true}}', "fp16 overflows"),
        ('{"bf16": {"enabled": true}}', "bf16 without ZeRO"),
        ('{"zero_optimization": {"stage": 1, "compute_grad_norm": false}}', "nothing but its norm tells"),
        ('{"data_types": {"grad_accum_dtype": "fp16"}}', 'data_types.grad_accum_dtype is "fp16": it must be "fp32"'),
        ('{"data_types": {"param_dtype": "bf16"}}', "data_types.param_dtype is not a key"),
        ('{"data_types": {"grad_accum_dtype": "fp32"}}', "is of bf16 weights"),
        ('{"torch_autocast": {"lower_precision_safe_modules": "torch.nn.Linear"}}', "it must be a list of class names"),
        ('{"zero_optimisation": {"stage": 1}}', "zero_optimisation is not a key that it can have: zero_optimization"),
        ('{"bfloat16": {"enabled": true}}', "bfloat16 is not a key"),
        ('{"train_batch_size": "auto"}', "train_batch_size belongs into the recipe"),
        ('{"gradient_clipping": 1.0}', "gradient_clipping belongs into the recipe"),
        ('{"bf16": {}, "bf16": {}}', "bf16 stands twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage stands twice"),
        ('{"zero_optimization": ' + 100_000 * "[", "recursion"),
    ],
    ids=lambda value: value[:50],
)
def test_a_mistake_is_one_sentence_that_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_ds_config(str(path))
    assert str(raised.value).startswith(f"ds_config {path}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_optimization": {"stage": 1, "buckets": 3}}, "buckets"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": "perhaps"}}, "overlap_comm 'perhaps'"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": -1}}, "reduce_bucket_size -1"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": []}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "moon"}}}, "device 'moon'"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False, "speed": 3}}, "speed"),
        ({"communication_data_type": "int3"}, "int3"),
    ],
    ids=str,
)
def test_what_deepspeed_refuses_is_one_sentence(tmp_path: Path, values: dict, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as raised:
        check_ds_config(load_ds_config(str(path)))
    assert str(raised.value).startswith(f"ds_config {path}: DeepSpeed refuses ") and "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, message in (
        (str(tmp_path), "it is a folder"),
        ("/proc/self/mem", "it cannot be read"),
        (str(tmp_path / "none.json"), "there is no such configuration"),
    ):
        with pytest.raises(ValueError, match=f"ds_config {name}: {message}"):
            load_ds_config(name)
    path = tmp_path / "mine.json"
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"mine\.json: it is not UTF-8 text"):
        load_ds_config(str(path))


def test_a_byte_order_mark_and_a_home_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "à moi.json").write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8-sig")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_ds_config("~/à moi.json").zero_stage == 2


def test_what_a_file_says_holds(tmp_path: Path) -> None:
    """What it leaves out is completed: gradients in float32, and buckets no larger than the gradients."""
    own = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "communication_data_type": "bf16",
    }
    (tmp_path / "mine.json").write_text(json.dumps(own))
    assert load_ds_config(str(tmp_path / "mine.json")).completed(1000) == own
    completed = load_ds_config("zero2_bf16").completed(1000)
    assert completed["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert (completed["data_types"], completed["communication_data_type"]) == ({"grad_accum_dtype": "fp32"}, "fp32")
    assert load_ds_config("zero2").completed(10**9)["zero_optimization"]["reduce_bucket_size"] == REDUCE_BUCKET
    assert load_ds_config("zero0").completed(10) == load_ds_config("zero0").values
    autocast = load_ds_config("zero1_autocast")
    assert autocast.completed(10)["torch_autocast"]["lower_precision_safe_modules"] == []
    assert not autocast.rounds_weights and load_ds_config("zero3_bf16").rounds_weights
