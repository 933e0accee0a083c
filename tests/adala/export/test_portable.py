"""Models in other programs' forms: what is written gives what PyTorch gives, or nothing is written."""

import importlib.util
import json
import re
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from tiny_teacher import build_tiny_teacher
from torch import Tensor, nn

import adala
from adala.attention import TokenLayout, TokenMixer, mechanism_names, set_kernel
from adala.attention.kernels import uses_kernel
from adala.export import TaskModel
from adala.export.agreement import sample_images
from adala.export.onnx_form import PACKAGES
from adala.students import linearize, linearized_blocks
from adala.tasks import Task, resolve_task

# Of another form than the model's own 16 x 16, so that what depends on the grid is resized.
SIZE = (24, 12)
TASKS = {
    "classification": ("classification", {"num_classes": 5}),
    "multilabel": ("multilabel", {"num_classes": 4}),
    "segmentation": ("segmentation", {"num_classes": 3}),
    "segmentation-pmt": ("segmentation", {"num_classes": 3, "head": "pmt"}),
}


# Fewer than the tokens of an image here: mechanisms that approximate do so.
OPTIONS = {"linformer": {"num_landmarks": 8}, "nystromformer": {"num_landmarks": 4}}


def student_of(mechanism: str, **changes) -> nn.Module:
    """Of one block: a graph grows with depth, and so does the time to write it."""
    return linearize(build_tiny_teacher(depth=1, **changes), mechanism, options=OPTIONS.get(mechanism)).eval()


def random_images(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    """Not those that the export was compared on."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def at_size(model: nn.Module, images: Tensor) -> Tensor:
    model.set_input_size(tuple(images.shape[-2:]))
    return model(images)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("mechanism", mechanism_names())
def test_a_student_of_every_mechanism_becomes_onnx(mechanism: str, tmp_path: Path) -> None:
    student = student_of(mechanism)
    done = adala.export(student, tmp_path / "student.onnx", size=SIZE)
    assert done.agreement.worst_cosine > 0.999999 and done.agreement.batch_sizes == (2, 1, 3)
    assert (done.form, done.image_size, done.output) == ("onnx", SIZE, "features")
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]
    for batch in (1, 5):
        images = random_images(batch)
        assert_close(run_onnx(done.path, images), at_size(student, images))


@pytest.mark.parametrize("mechanism", mechanism_names())
def test_a_student_of_every_mechanism_becomes_a_program_of_torch(mechanism: str, tmp_path: Path) -> None:
    student = student_of(mechanism)
    done = adala.export(student, tmp_path / "student.pt2", size=SIZE)
    program = torch.export.load(done.path)
    # Neither a kernel of ours nor, for an image size that is fixed, an interpolation of the position embedding.
    assert not [node for node in program.graph.nodes if re.search("adala|upsample|interpolate", str(node.target))]
    for batch in (1, 5):
        images = random_images(batch)
        assert_close(program.module()(images), at_size(student, images))
    with pytest.raises(Exception, match=r"24|12|16"):
        program.module()(torch.zeros(1, 3, 16, 16))


def test_a_program_is_compiled_ahead_of_time(tmp_path: Path) -> None:
    student = student_of("linear")
    done = adala.export(student, tmp_path / "student.pt2", size=SIZE, compiled=True)
    compiled = torch._inductor.aoti_load_package(str(done.path))
    for batch in (1, 5):
        assert_close(compiled(random_images(batch)), at_size(student, random_images(batch)))


@pytest.mark.parametrize("name", TASKS)
def test_a_head_comes_along(name: str, tmp_path: Path) -> None:
    student = student_of("linear", reg_tokens=4, no_embed_class=True)
    kind, options = TASKS[name]
    task: Task = resolve_task(kind)(**options)
    model = TaskModel(student, task.build_head(student), task).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(6))
    done = adala.export(model, tmp_path / "model.onnx", size=SIZE)
    assert done.output == "scores"
    student.set_input_size(SIZE)
    with torch.no_grad():
        assert_close(run_onnx(done.path, random_images(3)), model(random_images(3)))


def test_a_teacher_with_its_classifier_becomes_onnx(tmp_path: Path) -> None:
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=6).eval()
    done = adala.export(teacher, tmp_path / "teacher.onnx")
    assert (done.image_size, done.output) == ((32, 32), "scores")
    with torch.no_grad():
        assert_close(run_onnx(done.path, random_images(3, (32, 32))), teacher(random_images(3, (32, 32))))


def test_a_fixed_batch_is_the_only_one_taken(tmp_path: Path) -> None:
    done = adala.export(student_of("linear"), tmp_path / "student.onnx", batch=4)
    assert done.agreement.batch_sizes == (4,)
    (images,) = onnx.load(done.path).graph.input
    assert [side.dim_value for side in images.type.tensor_type.shape.dim] == [4, 3, 16, 16]
    with pytest.raises(Exception, match="Got: 2 Expected: 4"):
        run_onnx(done.path, random_images(2, (16, 16)))


def test_a_file_says_what_images_it_takes(tmp_path: Path) -> None:
    done = adala.export(student_of("performer"), tmp_path / "x.onnx", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    model = onnx.load(done.path)
    notes = {each.key: json.loads(each.value) for each in model.metadata_props}
    expected = {"image_size": [16, 16], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "mechanism": "performer"}
    assert notes.items() >= expected.items()
    assert [each.name for each in (*model.graph.input, *model.graph.output)] == ["images", "features"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_blocks_of_several_mechanisms_become_one_program(ending: str, tmp_path: Path) -> None:
    """6 x 3 patches in windows of 2, shifted in the second block."""
    others = ({1: "window", 2: "window"}, {"window": {"window": 2}})
    student = linearize(build_tiny_teacher(), "linear", (), None, 0, *others).eval()
    done = adala.export(student, tmp_path / f"student.{ending}", size=SIZE)
    assert done.agreement.worst_cosine > 0.999999
    if ending == "onnx":
        notes = {each.key: json.loads(each.value) for each in onnx.load(done.path).metadata_props}
        assert notes["mechanism"] == "linear + window"
        images = random_images(5)
        assert_close(run_onnx(done.path, images), at_size(student, images))


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    student = student_of("linear")
    for _ in range(2):  # again over the first
        done = adala.export(student, tmp_path / "x.onnx")
        assert {path.name for path in tmp_path.iterdir()} == {"x.onnx", "x.onnx.data"}
    with torch.no_grad():
        assert_close(run_onnx(done.path, random_images(2, (16, 16))), student(random_images(2, (16, 16))))


def test_the_model_and_the_chosen_kernel_are_left_as_they_were(tmp_path: Path) -> None:
    student = student_of("linear").train()
    before, images = {name: value.clone() for name, value in student.state_dict().items()}, random_images(2)
    kind = (torch.device("cpu"), torch.float32, 16)
    assert uses_kernel(*kind)
    adala.export(student, tmp_path / "student.pt2", size=SIZE)
    assert student.training and uses_kernel(*kind)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    set_kernel("reference")
    try:
        adala.export(student, tmp_path / "student.pt2", size=SIZE)
        assert not uses_kernel(*kind)
    finally:
        set_kernel("auto")
    assert student(images).shape == (2, 19, 32)


class Undecided(TokenMixer):
    """Gives something else where it is traced."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return v if torch.compiler.is_exporting() else q


class Eigenvectors(TokenMixer):
    """Through an operator that ONNX does not have."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return v @ torch.linalg.eigh(k.transpose(-2, -1) @ k).eigenvectors


class Deciding(TokenMixer):
    """Asks a value what to do, which a graph cannot."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return v if float(q.sum()) > 0 else k


def with_mixer(mixer: type[TokenMixer]) -> nn.Module:
    student = student_of("linear")
    for shell in linearized_blocks(student).values():
        shell.token_mixer = mixer(shell.token_mixer.shape)
    return student


@pytest.mark.parametrize(
    ("mixer", "name", "message"),
    [
        (Undecided, "x.onnx", r"refused, its cosine is below 0.9999 \(.*worst cosine -?0\.[0-8]"),
        (Undecided, "x.pt2", "refused, its cosine is below 0.9999"),
        (Eigenvectors, "x.onnx", "mechanism Eigenvectors cannot become ONNX: its operator aten.*eigh has no ONNX form"),
        (Deciding, "x.onnx", "a model with mechanism Deciding cannot be traced by torch.export"),
        (Deciding, "x.pt2", "a model with mechanism Deciding cannot be traced by torch.export"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    mixer: type[TokenMixer], name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        adala.export(with_mixer(mixer), tmp_path / "new" / name)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_when_its_successor_is_refused(tmp_path: Path) -> None:
    adala.export(student_of("linear"), tmp_path / "x.pt2")
    before = (tmp_path / "x.pt2").read_bytes()
    with pytest.raises(ValueError, match="refused"):
        adala.export(with_mixer(Undecided), tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").read_bytes() == before
    adala.export(student_of("cosformer"), tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 4, "no_embed_class": True}], ids=["class-token", "registers"])
@pytest.mark.parametrize("size", [None, SIZE])
def test_a_softmax_student_becomes_a_folder_of_timms(
    changes: dict, size: tuple[int, int] | None, tmp_path: Path
) -> None:
    student = linearize(build_tiny_teacher(**changes), "softmax").eval()
    done = adala.export(student, tmp_path / "plain", size=size, mean=[0.1, 0.2, 0.3])
    assert done.agreement.worst_cosine > 1 - 1e-9
    plain = timm.create_model(f"local-dir:{done.path}", pretrained=True).eval()
    assert type(plain) is timm.models.VisionTransformer
    assert list(timm.data.resolve_model_data_config(plain)["mean"]) == [0.1, 0.2, 0.3]
    images = random_images(2, size or (16, 16))
    with torch.no_grad():
        assert torch.allclose(plain(images), at_size(student, images), atol=1e-6)
    assert adala.load_teacher(f"local-dir:{done.path}", size or (16, 16), pretrained=True)(images).shape[-1] == 32
    modes = {path.stat().st_mode for path in done.path.iterdir()}
    assert len(modes) == 1
    with pytest.raises(ValueError, match="exists already"):
        adala.export(student, done.path)


@pytest.mark.parametrize(
    ("mechanism", "options", "keep"), [("linear", {}, [1]), ("performer", {}, []), ("softmax", {"scale": 0.5}, [])]
)
def test_what_timm_does_not_have_is_not_exported_to_it(
    mechanism: str, options: dict, keep: list[int], tmp_path: Path
) -> None:
    student = linearize(build_tiny_teacher(), mechanism, keep, options)
    with pytest.raises(ValueError, match=f"blocks.0.attn is {mechanism} attention.*--to onnx or --to torch"):
        adala.export(student, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("x.onnx", {"size": 18}, "image size 18 x 18 is not divisible by the patch size 4 x 4: 16 x 16 would be"),
        ("x.onnx", {"size": (16, 16, 16)}, "it must be one whole number of pixels, or height and width"),
        ("x.onnx", {"size": 0}, "it must be one whole number"),
        ("x.onnx", {"batch": 0}, "batch is 0: it must be a whole number of at least 1, or 'dynamic'"),
        ("x.onnx", {"batch": "many"}, "batch is 'many'"),
        ("x.onnx", {"compiled": True}, "only a program of torch can be compiled ahead of time, not onnx"),
        ("x.tflite", {}, "does not say what it is to be: end it in .onnx or .pt2, or give a folder"),
        ("x.onnx", {"to": "tflite"}, "unknown form 'tflite': known are onnx, torch, timm"),
        ("x.onnx", {"to": "torch"}, "must end in .pt2"),
        ("here.onnx", {}, "is a folder: name a file in it"),
        ("x.onnx", {"images": []}, "there is no image in"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(path: str, options: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "here.onnx").mkdir()
    with pytest.raises(ValueError, match=message):
        adala.export(student_of("linear"), tmp_path / path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["here.onnx"]


def test_what_is_no_model_of_timms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Linear cannot be exported: give a student"):
        adala.export(nn.Linear(2, 2), tmp_path / "x.onnx")


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ValueError, match=rf"ONNX needs {missing}: pip install 'adala\[onnx\]'"):
        adala.export(student_of("linear"), tmp_path / "x.onnx")


def test_flags_of_torchs_libraries_stay_as_they_were(tmp_path: Path) -> None:
    """And where these differ among themselves, as the bench leaves them, an export goes on."""
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = conv.fp32_precision, rnn.fp32_precision
    try:
        conv.fp32_precision, rnn.fp32_precision = "ieee", "tf32"
        adala.export(student_of("linear"), tmp_path / "x.pt2")
        assert (conv.fp32_precision, rnn.fp32_precision) == ("ieee", "tf32")
        assert torch.backends.mkldnn.enabled
    finally:
        conv.fp32_precision, rnn.fp32_precision = before


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    import torch._inductor.config

    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    try:
        # Not by monkeypatch, which deletes a setting in the place of putting it back.
        with (
            torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler")),
            pytest.raises(ValueError, match="needs a C\\+\\+ compiler, and there is none: install g"),
        ):
            adala.export(student_of("linear"), tmp_path / "x.pt2", compiled=True)
    finally:
        torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()


def test_images_to_compare_on_are_real_ones_and_the_users_own(tmp_path: Path) -> None:
    embedded = sample_images(3, (28, 28), [0.5] * 3, [0.25] * 3)
    pixels = embedded * 0.25 + 0.5
    assert embedded.shape == (3, 3, 28, 28) and pixels.min() >= 0 and pixels.max() <= 1
    assert len({float(image.mean()) for image in embedded}) == 3 and pixels.std() > 0.2
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30), (51, 102, 204)).save(tmp_path / "photos/a.png")
    (tmp_path / "photos/notes.txt").write_text("no image")
    own = sample_images(2, SIZE, [0.0] * 3, [1.0] * 3, [tmp_path / "photos"])
    assert torch.allclose(own, torch.tensor([0.2, 0.4, 0.8])[:, None, None].expand(2, 3, *SIZE), atol=1e-6)
    (tmp_path / "photos/b.png").write_text("no image either")
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image .*name another one"):
        sample_images(2, SIZE, [0.0] * 3, [1.0] * 3, [tmp_path / "photos"])
