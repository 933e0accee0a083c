"""The operator's bench: what is compared is the same computation, and what is written can be read."""

import json
from pathlib import Path

import attention
import pytest
import torch
from torch import Tensor

from adala.attention.kernels import is_interpreted

QUICK = ["--tokens", "5", "19", "--heads", "2", "--head_dim", "16", "--dtype", "float32", "--rounds", "1"]


def projection() -> Tensor:
    return torch.randn(2, 19, 3, 2, 16, generator=torch.Generator().manual_seed(0))


def test_forms_of_linear_attention_agree_and_so_do_those_of_softmax() -> None:
    found = {name: mix for name, mix in attention.operators(projection()) if name != attention.COMPILED}
    linear = [found[attention.PLAIN](projection()), found[attention.FUSED](projection())]
    softmax = [found[name](projection()) for name in ("softmax, flash", "softmax, math")]
    for one, other in (linear, softmax):
        assert one.shape == (2, 19, 32)
        torch.testing.assert_close(one, other)
    assert (linear[0] - softmax[0]).abs().max() > 0.1


def test_a_map_that_would_not_fit_is_not_tried() -> None:
    large = torch.empty(1, 65537, 3, 16, 64, device="meta")
    assert "softmax, math" not in dict(attention.operators(large))


@pytest.mark.skipif(is_interpreted(), reason="Triton's interpreter is no machine to time")
def test_a_table_and_its_numbers_are_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert attention.main([*QUICK, "--without", attention.COMPILED, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "attention.json").read_text())
    rows = {(row["tokens"], row["what"], row["case"]): row for row in found["rows"]}
    cases = {case for _, _, case in rows}
    assert {attention.FUSED, attention.PLAIN, "softmax, flash"} <= cases and attention.COMPILED not in cases
    for tokens in (5, 19):
        for what in attention.CALLS:
            assert rows[tokens, what, attention.FUSED]["ms"] > 0
            assert 0 < rows[tokens, what, attention.FUSED]["bandwidth_share"] < 1
            softmax = [row for (n, w, case), row in rows.items() if (n, w) == (tokens, what) and "softmax" in case]
            assert max(row["against_softmax"] for row in softmax if row["ms"]) == 1.0
    # What a CPU has no kernel for says so and stops nobody.
    assert rows[5, "forward", "softmax, cudnn"]["error"]
    assert (tmp_path / "attention.md").read_text().count("| float32 |") == len(rows)
    assert found["machine"]["torch"] == torch.__version__.partition("+")[0]
