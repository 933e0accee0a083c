"""Published data sets in miniature, laid out as they are, and folders of anybody's images and masks."""

import io
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adala.data.convert.command import main
from adala.data.convert.encoding import resized_mask
from adala.data.convert.published import ADE20K_NAMES, CITYSCAPES_NAMES
from adala.data.images import TURNED_BY, decode_image
from adala.data.index import load_index
from adala.data.labels import read_classes
from adala.data.masks import MaskFormat, check_fit, decode_mask, read_mask
from adala.data.samples import decode, read_shard

SIZE = (6, 8)


def save(path: Path, pixels: np.ndarray, **options) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path.read_bytes()


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3))


def numbers(*values: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.resize(values, size)


def fields_of(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    shards = load_index([f"{folder}/{split}-*.tar"]).shards
    raws = [raw for shard in shards for raw in read_shard(shard, range(shard.samples))]
    assert all(decode(raw).image.size == SIZE[::-1] for raw in raws)
    return {raw.key: raw.fields for raw in raws}


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for split, stem, count in (("training", "ADE_train", 5), ("validation", "ADE_val", 2)):
        for number in range(1, count + 1):
            save(root / f"images/{split}/{stem}_{number:08d}.jpg", picture(number))
            save(root / f"annotations/{split}/{stem}_{number:08d}.png", numbers(0, 1, 150, number))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\n")
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return root


def test_ade20k(ade20k: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards = tmp_path / "shards"
    assert main(["ade20k", str(ade20k), str(shards), "--samples-per-shard", "2"]) == 0
    said = capsys.readouterr()
    assert "train: 5 pairs of image and mask in 3 shards" in said.out and not said.err
    assert "val: 2 pairs of image and mask in 1 shard, masks of" in said.out
    assert [path.name for path in sorted(shards.glob("train*.tar"))] == [f"train-0000{n}.tar" for n in range(3)]
    train, val = fields_of(shards, "train"), fields_of(shards, "val")
    assert sorted(train) == [f"ADE_train_{n:08d}" for n in range(1, 6)] and len(val) == 2
    for key, fields in train.items():
        assert fields["jpg"] == (ade20k / f"images/training/{key}.jpg").read_bytes()
        assert fields["seg.png"] == (ade20k / f"annotations/training/{key}.png").read_bytes()
    mask = read_mask(train["ADE_train_00000003"], MaskFormat(label_map="ade20k"))
    np.testing.assert_array_equal(mask, numbers(255, 0, 149, 2))
    names = read_classes((shards / "classes.json").read_text(), "classes.json")
    assert len(names) == 150
    # Of the published list: the first, the last, and some whose neighbours are easily exchanged.
    published = {0: "wall", 12: "person", 15: "table", 56: "pool table", 89: "television receiver", 149: "flag"}
    assert {number: names[number] for number in published} == published


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    root = tmp_path / "cityscapes"
    for split, city, count in (("train", "aachen", 3), ("train", "bochum", 1), ("val", "frankfurt", 2)):
        for number in range(count):
            stem = f"{city}_{number:06d}_000019"
            save(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", picture(number))
            mask = root / f"gtFine/{split}/{city}/{stem}_gtFine"
            save(Path(f"{mask}_labelIds.png"), numbers(3, 7, 33, 26))
            save(Path(f"{mask}_instanceIds.png"), numbers(99))
            save(Path(f"{mask}_color.png"), picture(7))
            Path(f"{mask}_polygons.json").write_text("{}")
    save(root / "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png", picture(0))
    return root


def test_cityscapes(cityscapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards = tmp_path / "shards"
    assert main(["cityscapes", str(cityscapes), str(shards)]) == 0
    said = capsys.readouterr()
    assert "train: 4 pairs" in said.out and "val: 2 pairs" in said.out and not said.err
    train = fields_of(shards, "train")
    key = "bochum_000000_000019"
    assert sorted(train)[-1] == key and set(train[key]) == {"png", "seg.png"}
    image = cityscapes / "leftImg8bit/train/bochum/bochum_000000_000019_leftImg8bit.png"
    assert train[key]["png"] == image.read_bytes()
    mask = read_mask(train[key], MaskFormat(label_map="cityscapes"))
    np.testing.assert_array_equal(mask, numbers(255, 0, 18, 13))
    names = json.loads((shards / "classes.json").read_text())
    assert len(names) == 19 and (names[0], names[13], names[18]) == ("road", "car", "bicycle")


def test_the_lists_of_names_hold_each_name_once() -> None:
    assert (len(set(ADE20K_NAMES)), len(set(CITYSCAPES_NAMES))) == (150, 19)


def test_what_is_missing_or_does_not_fit_is_named_and_left_out(
    ade20k: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images, masks = ade20k / "images/training", ade20k / "annotations/training"
    (masks / "ADE_train_00000001.png").unlink()
    save(masks / "ADE_train_00000002.png", numbers(1, size=(8, 6)))
    (masks / "ADE_train_00000003.png").write_bytes(b"damaged")
    save(masks / "ADE_train_00000006.png", numbers(1))
    save(images / "ADE_train_00000007.jpg", picture(7))
    save(masks / "ADE_train_00000007.png", picture(7))
    save(images / "ADE_train_00000008.jpg", picture(8))
    save(masks / "ADE_train_00000008.png", numbers(151))
    (images / "ADE_train_00000009.jpg").write_bytes(b"damaged")
    save(masks / "ADE_train_00000009.png", numbers(1))
    (images / "notes.txt").write_text("")
    shards = tmp_path / "shards"
    assert main(["ade20k", str(ade20k), str(shards), "--max-bad-fraction", "0.8"]) == 0
    said = capsys.readouterr()
    assert "train: 2 pairs" in said.out and sorted(fields_of(shards, "train")) == [
        "ADE_train_00000004", "ADE_train_00000005",
    ]  # fmt: skip
    assert said.err.startswith("left out 8 files (")
    for name, fault in {
        "images/training/ADE_train_00000001.jpg": "it has no mask",
        "annotations/training/ADE_train_00000002.png": "image has 8 x 6 pixels and its mask 6 x 8 pixels",
        "annotations/training/ADE_train_00000003.png": "these bytes are no image",
        "annotations/training/ADE_train_00000006.png": "it has no image",
        "annotations/training/ADE_train_00000007.png": "it is coded in colours",
        "annotations/training/ADE_train_00000008.png": "it holds 151, which the label map ade20k does not list",
        "images/training/ADE_train_00000009.jpg": "these bytes are no image",
        "images/training/notes.txt": "its extension is none of .jpg",
    }.items():
        assert any(name in line and fault in line for line in said.err.splitlines()), (name, said.err)


def test_one_split_is_enough_unless_another_is_asked_for(ade20k: Path, tmp_path: Path, capsys) -> None:
    for folder in ("images", "annotations"):
        (ade20k / folder / "training").rename(tmp_path / f"{folder}-elsewhere")
    command = ["ade20k", str(ade20k), str(tmp_path / "shards")]
    assert main([*command, "--splits", "train"]) == 1
    assert "does not have the split train: name the folder ADEChallengeData2016" in capsys.readouterr().err
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "shards").glob("*.tar")] == ["val-00000.tar"]


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_another_folder_is_refused_by_the_layout(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "train").mkdir()
    for source in (tmp_path, tmp_path / "nowhere"):
        assert main([name, str(source), str(tmp_path / "shards")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        expected = {
            "ade20k": "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png",
            "cityscapes": "gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
        }[name]
        assert f"{source} has another layout: name the folder" in line and expected in line
    assert not (tmp_path / "shards").exists()


def test_images_without_their_folder_of_masks_are_refused(cityscapes: Path, tmp_path: Path, capsys) -> None:
    (cityscapes / "gtFine").rename(cityscapes / "gtCoarse")
    assert main(["cityscapes", str(cityscapes), str(tmp_path / "shards")]) == 1
    assert "gtFine/train is no folder: name the folder with leftImg8bit" in capsys.readouterr().err


def test_shards_of_other_classes_are_left_alone(ade20k: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/classes.txt").write_text("cat\ndog\n")
    assert main(["ade20k", str(ade20k), str(tmp_path / "shards")]) == 1
    assert "shards has a list of other classes than this data set" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["classes.txt"]


def packed(tmp_path: Path, *options: str) -> int:
    folders = [str(tmp_path / name) for name in ("images", "masks", "shards")]
    return main(["segmentation", *folders, *options])


def test_any_images_and_masks_go_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, name in enumerate(("a/b.1", "a/b.2", "c")):
        save(tmp_path / f"images/{name}.JPG", picture(number), format="JPEG")
        save(tmp_path / f"masks/{name}_gt.png", numbers(0, number, 20, 255))
    assert packed(tmp_path, "--split", "val", "--mask-ending", "_gt") == 0
    assert "val: 3 pairs of image and mask in 1 shard, masks of 5 values from 0 to 255" in capsys.readouterr().out
    fields = fields_of(tmp_path / "shards", "val")
    assert sorted(fields) == ["b%2E1", "b%2E2", "c"], "a dot would end the key"
    assert fields["b%2E1"]["seg.png"] == (tmp_path / "masks/a/b.1_gt.png").read_bytes()
    assert not (tmp_path / "shards/classes.json").exists()


def test_files_of_one_name_in_several_folders_keep_these(tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        save(tmp_path / f"images/{folder}/1.png", picture(number))
        save(tmp_path / f"masks/{folder}/1.png", numbers(number))
    assert packed(tmp_path) == 0
    fields = fields_of(tmp_path / "shards", "train")
    assert sorted(fields) == ["a%2F1", "b%2F1"]
    assert read_mask(fields["b%2F1"], MaskFormat()).max() == 1


def test_masks_in_colours_are_packed_with_a_word_about_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    colours = np.array([[0, 0, 0], [128, 0, 0]])
    for number in range(2):
        save(tmp_path / f"images/{number}.png", picture(number))
        save(tmp_path / f"masks/{number}.png", colours[numbers(number, 1)])
    assert packed(tmp_path) == 0
    assert "mask in 1 shard, 2 masks coded in colours (mask.encoding: rgb)" in capsys.readouterr().out
    fields = fields_of(tmp_path / "shards", "train")
    mask = read_mask(fields["0"], MaskFormat(encoding="rgb", colors=colours.tolist()))
    np.testing.assert_array_equal(mask, numbers(0, 1))


def test_a_second_image_of_a_name_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "images/1.jpg", picture(0))
    save(tmp_path / "images/1.png", picture(1))
    save(tmp_path / "masks/1.png", numbers(0))
    assert packed(tmp_path) == 0
    assert "1.png: 1.jpg has the same name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "images, masks, sentence",
    [
        ({}, {"1.png": numbers(0)}, "images is no folder"),
        ({"1.jpg": picture(0)}, {}, "masks is no folder"),
        ({"1.jpg": picture(0)}, {"1_mask.png": numbers(0)}, "of 1 images and 1 masks none have the same name"),
        (
            {"1.jpg": picture(0)},
            {"1.png": numbers(0, size=(3, 3))},
            "1 of 1 samples are bad, where 0 may be, .*same size",
        ),
    ],
    ids=["no images", "no masks", "other names", "other size"],
)
def test_what_gives_no_pair_is_one_sentence(images, masks, sentence: str, tmp_path: Path, capsys) -> None:
    for folder, files in (("images", images), ("masks", masks)):
        for name, pixels in files.items():
            save(tmp_path / folder / name, pixels)
    assert packed(tmp_path) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and re.search(sentence, said), said
    assert not list(tmp_path.glob("shards/[!.]*"))


def test_the_order_is_shuffled_and_the_same_each_time(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / f"images/{number:02}.png", picture(number))
        save(tmp_path / f"masks/{number:02}.png", numbers(number))
    orders = []
    for seed in ("0", "0", "1"):
        assert packed(tmp_path, "--seed", seed) == 0
        orders.append(list(fields_of(tmp_path / "shards", "train")))
        shutil.rmtree(tmp_path / "shards")
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) != orders[0]


def test_masks_of_tiff_keep_their_extension(tmp_path: Path) -> None:
    save(tmp_path / "images/1.png", picture(0))
    stream = io.BytesIO()
    Image.fromarray(numbers(0, 300).astype(np.uint16)).save(stream, "TIFF")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/1.tif").write_bytes(stream.getvalue())
    assert packed(tmp_path) == 0
    (fields,) = fields_of(tmp_path / "shards", "train").values()
    np.testing.assert_array_equal(read_mask(fields, MaskFormat()), numbers(0, 300))


def smooth(size: tuple[int, int]) -> np.ndarray:
    """A picture whose columns and rows can be told from its colours, whatever it is resized to."""
    rows, columns = np.indices(size) / np.reshape(size, (2, 1, 1))
    return np.stack([255 * rows, 255 * columns, np.full(size, 128)], axis=-1)


def quadrants(size: tuple[int, int], *values: int) -> np.ndarray:
    mask = np.empty(size, dtype=np.uint16)
    for number, value in enumerate(values):
        rows, columns = (
            slice(half * side // 2, (half + 1) * side // 2) for half, side in zip(divmod(number, 2), size, strict=True)
        )
        mask[rows, columns] = value
    return mask


def test_image_and_mask_are_resized_together(tmp_path: Path) -> None:
    save(tmp_path / "images/large.png", smooth((60, 80)))
    save(tmp_path / "masks/large.png", quadrants((60, 80), 0, 7, 99, 255))
    save(tmp_path / "images/small.jpg", smooth((20, 30)))
    save(tmp_path / "masks/small.png", quadrants((20, 30), 1, 2, 3, 4))
    assert packed(tmp_path, "--max-size", "24", "--quality", "95") == 0
    (shard,) = load_index([str(tmp_path / "shards")]).shards
    fields = {raw.key: raw.fields for raw in read_shard(shard, range(2))}
    assert fields["small"]["jpg"] == (tmp_path / "images/small.jpg").read_bytes()
    assert fields["small"]["seg.png"] == (tmp_path / "masks/small.png").read_bytes()
    image = np.asarray(decode_image(fields["large"]["jpg"]), dtype=float)
    assert image.shape == (24, 32, 3) and np.abs(image - smooth((24, 32)) - 255 / 64).max() < 12
    np.testing.assert_array_equal(read_mask(fields["large"], MaskFormat()), quadrants((24, 32), 0, 7, 99, 255))


def test_image_and_mask_are_turned_upright_together(tmp_path: Path) -> None:
    for name, size, values in (("a", (60, 80), (0, 7, 99, 255)), ("b", (40, 90), (1, 2, 3, 4))):
        # As a camera stores what was shot on its side, and an editor the mask over it.
        exif = Image.Exif()
        exif[0x0112] = 6
        back = Image.Transpose.ROTATE_90
        assert TURNED_BY[6] == Image.Transpose.ROTATE_270
        for folder, pixels, suffix in (("images", smooth(size), "jpg"), ("masks", quadrants(size, *values), "png")):
            path = tmp_path / f"{folder}/{name}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).transpose(back).save(path, exif=exif, quality=95)
    assert packed(tmp_path, "--max-size", "20") == 0
    (shard,) = load_index([str(tmp_path / "shards")]).shards
    fields = {raw.key: raw.fields for raw in read_shard(shard, range(2))}
    for name, size, values in (("a", (20, 27), (0, 7, 99, 255)), ("b", (20, 45), (1, 2, 3, 4))):
        image = np.asarray(decode_image(fields[name]["jpg"]), dtype=float)
        assert image.shape[:2] == size and image[0, -1, 1] > 230 > 30 > image[0, 0, 1] and image[-1, 0, 0] > 230
        assert read_mask(fields[name], MaskFormat())[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == list(values)
        assert set(np.unique(read_mask(fields[name], MaskFormat())).tolist()) == set(values)


def mask_bytes(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def with_palette(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image = Image.frombytes("P", image.size, values.astype(np.uint8).tobytes())
    image.putpalette([channel for number in range(256) for channel in (number, 255 - number, 7)])
    return image


@pytest.mark.parametrize(
    "content, values",
    [
        (mask_bytes(Image.fromarray(quadrants((40, 60), 0, 300, 65535, 7))), (0, 300, 65535, 7)),
        (mask_bytes(Image.fromarray(quadrants((40, 60), 0, 300, 65535, 7)), "TIFF"), (0, 300, 65535, 7)),
        (mask_bytes(Image.fromarray(quadrants((40, 60), 0, 1, 1, 0) > 0)), (0, 1, 1, 0)),
        (mask_bytes(with_palette(quadrants((40, 60), 0, 9, 255, 3))), (0, 9, 255, 3)),
        (mask_bytes(with_palette(quadrants((40, 60), 0, 1, 2, 3)), bits=2), (0, 1, 2, 3)),
    ],
    ids=["16 bits", "16 bits tiff", "1 bit", "palette", "palette of 2 bits"],
)
def test_resized_masks_hold_the_same_numbers(content: bytes, values: tuple[int, ...]) -> None:
    expected = quadrants((20, 30), *values)
    resized = resized_mask(content, (30, 20))
    np.testing.assert_array_equal(decode_mask(resized, MaskFormat()), expected)
    check_fit(mask_bytes(Image.new("RGB", (30, 20)), "JPEG"), resized)


def test_resized_masks_hold_the_same_grey_of_few_bits() -> None:
    # Pillow writes no grey of 4 bits: two pixels a byte, each row behind the byte of its filter.
    rows = b"".join(b"\0" + bytes([0x01, 0x01, 0xEF, 0xEF]) for _ in range(8))
    content = mask_bytes(Image.new("L", (8, 8)))
    content = content[:16] + png_chunks((8, 8), 4, rows)
    np.testing.assert_array_equal(decode_mask(content, MaskFormat())[0], [0, 1, 0, 1, 14, 15, 14, 15])
    np.testing.assert_array_equal(decode_mask(resized_mask(content, (4, 4)), MaskFormat())[0], [1, 1, 15, 15])


def png_chunks(size: tuple[int, int], depth: int, rows: bytes) -> bytes:
    """What follows the length and the name of a PNG's first chunk, of a grey image."""
    head = struct.pack(">IIBBBBB", *size, depth, 0, 0, 0, 0)
    data, end = b"IDAT" + zlib.compress(rows), b"IEND"
    chunks = struct.pack(">I", zlib.crc32(b"IHDR" + head))
    for chunk in (data, end):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + chunks


def test_colours_of_resized_masks_are_none_but_the_old_ones() -> None:
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [7, 8, 9]])
    places = quadrants((40, 60), 0, 1, 2, 3)
    for image in (Image.fromarray(colours[places].astype(np.uint8)), with_palette(places)):
        if image.mode == "P":
            image.putpalette(colours.astype(np.uint8).tobytes())
        resized = resized_mask(mask_bytes(image), (30, 20))
        form = MaskFormat(encoding="rgb", colors=colours.tolist())
        np.testing.assert_array_equal(decode_mask(resized, form), quadrants((20, 30), 0, 1, 2, 3))
