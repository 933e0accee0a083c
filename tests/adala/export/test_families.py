"""Students of every family in other programs' forms, at another size than they were built for."""

from pathlib import Path

import pytest
import torch
from tiny_families import ALL, TINY, build_tiny

import adala
from adala.export import StudentDescription, load_student, save_student
from adala.students import linearize

KINDS = ["dinov3", "eva02_base", "perception_encoder", "rope_mixed", "sapiens2", "distilled", "naflex"]


@pytest.mark.parametrize("form", ["torch", "onnx", "hf"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_gives_the_students_features(kind: str, form: str, tmp_path: Path) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    if form == "hf":
        pytest.importorskip("transformers")
    name, arguments = ALL[kind]
    student = linearize(build_tiny(kind), "linear", keep=[1])
    description = StudentDescription(
        name, {**TINY, **arguments}, [16, 16], "linear", {}, [1], [0.5] * 3, [0.5] * 3
    )  # fmt: skip
    save_student(tmp_path / "student", student.state_dict(), description)
    path = tmp_path / f"out{'' if form == 'hf' else {'torch': '.pt2', 'onnx': '.onnx'}[form]}"
    done = adala.export(tmp_path / "student", path, to=form, size=(24, 16))
    assert done.agreement.worst_cosine > 0.9999 and done.agreement.largest_value > 0.1
    images = torch.randn(2, 3, 24, 16)
    with torch.no_grad():
        expected = load_student(tmp_path / "student")(images)
        if form == "torch":
            torch.testing.assert_close(torch.export.load(path).module()(images), expected, rtol=1e-3, atol=1e-4)
        elif form == "hf":
            from transformers import AutoModel

            found = AutoModel.from_pretrained(str(path))(images).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
