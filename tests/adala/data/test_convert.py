"""What becomes of folders of images: classes, keys, published layouts, and what is left out."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from adala.data.convert.command import build_parser, main
from adala.data.images import decode_image
from adala.data.index import load_index
from adala.data.index import main as index_main
from adala.data.loader import TrainLoader
from adala.data.preparation import prepare_images
from adala.data.samples import decode, read_shard
from adala.data.transforms import build_eval_transform
from adala.tasks import Classification

reader = Classification(num_classes=1000).reader


def raw_samples(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """The files of each sample by key, in the order of the shards."""
    shards = load_index([f"{folder}/{split}-*.tar"]).shards
    raws = [raw for shard in shards for raw in read_shard(shard, range(shard.samples))]
    assert len({raw.key for raw in raws}) == len(raws)
    return {raw.key: raw.fields for raw in raws}


def labels_of(folder: Path, split: str) -> dict[str, int]:
    """The class of each sample by key."""
    shards = load_index([f"{folder}/{split}-*.tar"]).shards
    return {raw.key: decode(raw, reader).target for shard in shards for raw in read_shard(shard, range(shard.samples))}


@pytest.fixture
def write_images(png: Callable[..., bytes]) -> Callable[..., None]:
    def write(folder: Path, *names: str) -> None:
        for number, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png(number))

    return write


def converted(kind: str, source: Path, shards: Path, *options: str) -> int:
    return main([kind, str(source), str(shards), "--workers", "1", *options])


def test_a_folder_of_classes_becomes_shards_with_sorted_classes(tmp_path, capsys, png, write_images):
    source, folder = tmp_path / "images", tmp_path / "shards"
    write_images(source, "dog/a.png", "cat/b.png", "cat/c.d.png", "cat/deep/e.PNG", "ape/f.png", "cat/g.jpg")
    (source / "cat/notes.txt").write_text("not an image")
    (source / "cat/broken.jpg").write_bytes(b"not an image either")
    (source / "cat/cut.png").write_bytes(png(9)[: len(png(9)) // 2])
    assert converted("imagefolder", source, folder, "--split", "val", "--samples-per-shard", "3") == 0
    said = capsys.readouterr()
    assert said.err.startswith("left out 3 files (2 x it cannot be decoded; 1 x its name is not that of an image):")
    assert all(name in said.err for name in ("broken.jpg", "cut.png", "notes.txt"))
    assert "val: 6 images in 3 shards, 3 classes" in said.out
    assert json.loads((folder / "classes.json").read_text()) == ["ape", "cat", "dog"]
    labels = labels_of(folder, "val")
    assert dict(sorted(labels.items())) == {"a": 2, "b": 1, "c%2Ed": 1, "e": 1, "f": 0, "g": 1}
    assert list(labels) != sorted(labels), "the samples of a class must not stand together"
    assert raw_samples(folder, "val")["f"]["png"] == (source / "ape/f.png").read_bytes()
    left_out = json.loads((folder / "val.conversion.json").read_text())["left_out"]
    assert sorted(Path(each["file"]).name for each in left_out) == ["broken.jpg", "cut.png", "notes.txt"]
    (source / "bee").mkdir()
    assert converted("imagefolder", source, folder) == 1
    assert "other classes" in capsys.readouterr().err
    assert converted("imagefolder", source / "bee", folder) == 1
    assert "bee holds no images" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("all/a.png", "all/deep/b.png")], ids=["flat", "one_folder"])
def test_one_folder_of_images_has_no_labels(tmp_path, capsys, write_images, names):
    write_images(tmp_path / "images", *names)
    assert converted("imagefolder", tmp_path / "images", tmp_path / "shards") == 0
    assert "train: 2 images in 1 shard, no labels" in capsys.readouterr().out
    assert [list(fields) for fields in raw_samples(tmp_path / "shards", "train").values()] == [["png"], ["png"]]
    assert not (tmp_path / "shards/classes.json").exists()


def test_a_plain_tree_has_no_labels_whatever_its_folders(tmp_path, write_images):
    write_images(tmp_path / "tree", "2019/1.png", "2020/1.png", "2020/trip/1.png", "2.png", "2.webp")
    assert converted("images", tmp_path / "tree", tmp_path / "shards") == 0
    samples = raw_samples(tmp_path / "shards", "train")
    assert sorted(samples) == ["2%2Epng", "2%2Ewebp", "2019%2F1%2Epng", "2020%2F1%2Epng", "2020%2Ftrip%2F1%2Epng"]
    assert {field for fields in samples.values() for field in fields} == {"png", "webp"}
    assert not (tmp_path / "shards/classes.json").exists()


def test_what_programs_leave_behind_shifts_no_label(tmp_path, capsys, write_images):
    names = ["ape/a.png", "cat/b.png", ".ipynb_checkpoints/c.png", "__MACOSX/ape/d.png", "cat/._b.png", "stray.png"]
    write_images(tmp_path / "images", *names)
    assert converted("imagefolder", tmp_path / "images", tmp_path / "shards") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("left out 1 file ") and len(said) == 2
    assert "stray.png: it lies beside the folders of the classes" in said[1]
    assert labels_of(tmp_path / "shards", "train") == {"a": 0, "b": 1}


def test_a_further_split_takes_its_numbers_from_the_first(tmp_path, capsys, write_images):
    write_images(tmp_path / "train", "ape/a.png", "bee/b.png", "cat/c.png")
    write_images(tmp_path / "val", "cat/d.png")
    (tmp_path / "val/bee").mkdir()
    assert converted("imagefolder", tmp_path / "train", tmp_path / "shards") == 0
    assert converted("imagefolder", tmp_path / "val", tmp_path / "shards", "--split", "val") == 0
    assert "classes without an image: bee" in capsys.readouterr().err
    assert labels_of(tmp_path / "shards", "val") == {"d": 2}
    assert len(load_index([str(tmp_path / "shards")]).shards) == 2


def test_links_are_read_through_once(tmp_path, capsys, write_images):
    write_images(tmp_path / "elsewhere", "a.png")
    write_images(tmp_path / "images", "cat/b.png")
    (tmp_path / "images/ape").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/cat/linked.png").symlink_to(tmp_path / "elsewhere/a.png")
    (tmp_path / "images/cat/nowhere.png").symlink_to(tmp_path / "gone")
    (tmp_path / "images/cat/itself.png").symlink_to("itself.png")
    os.mkfifo(tmp_path / "images/cat/pipe.png")
    assert converted("imagefolder", tmp_path / "images", tmp_path / "shards", "--max-bad-fraction", "0.6") == 0
    assert labels_of(tmp_path / "shards", "train") == {"a": 0, "b": 1, "linked": 1}
    said = capsys.readouterr().err
    assert "left out 3 files (3 x it is no file that can be read)" in said
    assert all(f"{name}.png: it is no file" in said for name in ("nowhere", "itself", "pipe"))


def test_odd_names_are_kept_readable_and_apart(tmp_path, write_images):
    names = ["a b.png", "größe.png", "1.2.3.png", "50%.png", "new\nline.png", "__x__.png", "-.png", "x" * 240 + ".png"]
    write_images(tmp_path / "images", *names)
    (tmp_path / "images/no\udcffutf8.png").write_bytes((tmp_path / "images/a b.png").read_bytes())
    assert converted("images", tmp_path / "images", tmp_path / "shards") == 0
    keys = ["a b", "größe", "1%2E2%2E3", "50%25", "new%0Aline", "__x__", "-", "x" * 240, "no%FFutf8"]
    assert sorted(raw_samples(tmp_path / "shards", "train")) == sorted(keys)
    assert index_main([str(tmp_path / "shards")]) == 0


def test_files_carry_the_permissions_of_the_umask(tmp_path, write_images):
    write_images(tmp_path / "images", "ape/a.png", "cat/b.png")
    before = os.umask(0o027)
    try:
        assert converted("imagefolder", tmp_path / "images", tmp_path / "shards") == 0
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "shards").iterdir()}
    names = ("classes.json", "index.json", "train-00000.tar", "train.conversion.json")
    assert modes == {name: "0o640" for name in names}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["imagefolder", "nowhere", "shards"], "nowhere is no folder"),
        (["images", "empty", "shards"], "empty holds no images"),
        (["images", ".", "shards"], "the shards would lie among the images"),
        (["images", "photos", "shards", "--split", "a/b"], "the split 'a/b' is no name"),
        (["images", "photos", "shards", "--samples-per-shard", "0"], "--samples-per-shard must be 1 or more"),
        (["images", "photos", "shards", "--shard-mib", "nan"], "--shard-mib must be above 0"),
        (["images", "photos", "shards", "--workers", "0"], "--workers must be 1 or more"),
        (["images", "photos", "shards", "--max-size", "0"], "--max-size is the largest shorter side"),
        (["images", "photos", "shards", "--quality", "101"], "--quality is that of JPEG"),
        (["images", "photos", "shards", "--max-bad-fraction", "2"], "--max-bad-fraction is a part"),
        (["imagenet", "photos", "shards"], "photos has another layout: name the folder with train/n*"),
        (["coco", "photos", "shards"], "photos has another layout: name the folder with train2017"),
        (["images", "photos", "file"], "file"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, monkeypatch, capsys, write_images, arguments, message):
    write_images(tmp_path / "photos", "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "shards").exists()


@pytest.fixture
def imagenet(tmp_path, write_images) -> Path:
    """ILSVRC2012 as its archives unpack, of four classes; ``val`` is flat."""
    root = tmp_path / "ILSVRC2012"
    classes = ("n01440764", "n01443537", "n02119789", "n03000134")
    write_images(root / "train", *(f"{name}/{name}_{number}.JPEG" for name in classes for number in (18, 10026)))
    write_images(root / "val", *(f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 6)))
    return root


OF_VAL = ("n02119789", "n01440764", "n03000134", "n03000134", "n01443537")
NUMBERS_OF_VAL = {f"ILSVRC2012_val_{place:08d}": label for place, label in enumerate((2, 0, 3, 3, 1), start=1)}


def write_devkit(folder: Path) -> None:
    """The devkit's list and table: its own numbers of the classes are not in the order of their names."""
    folder.mkdir(parents=True)
    own = {"n02119789": 1, "n03000134": 2, "n01443537": 3, "n01440764": 4}
    rows = [(number, name, 0) for name, number in own.items()] + [(5, "n00001740", 2)]
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    lines = "".join(f"{own[name]}\n" for name in OF_VAL)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)


def write_kaggle(folder: Path) -> None:
    rows = [f"{key},{name} 85 1 499 272 {name} 1 2 3 4 " for key, name in zip(NUMBERS_OF_VAL, OF_VAL, strict=True)]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)))


def test_imagenet_with_the_devkits_list(tmp_path, capsys, imagenet):
    write_devkit(imagenet / "ILSVRC2012_devkit_t12/data")
    shards = tmp_path / "shards"
    assert converted("imagenet", imagenet, shards) == 0
    assert capsys.readouterr().out.startswith("train: 8 images in 1 shard, 4 classes\nval: 5 images in 1 shard, 4 ")
    assert json.loads((shards / "classes.json").read_text())[2] == "n02119789"
    assert labels_of(shards, "val") == NUMBERS_OF_VAL
    assert labels_of(shards, "train")["n03000134_10026"] == 3
    (imagenet / "ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    assert converted("imagenet", imagenet, tmp_path / "others") == 1
    assert "holds numbers alone, which count in the order of ILSVRC's devkit" in capsys.readouterr().err


def test_imagenet_as_kaggle_has_it(tmp_path, imagenet):
    root = tmp_path / "kaggle"
    (root / "ILSVRC/Data").mkdir(parents=True)
    imagenet.rename(root / "ILSVRC/Data/CLS-LOC")
    write_kaggle(root)
    assert converted("imagenet", root, tmp_path / "shards", "--splits", "val") == 0
    assert labels_of(tmp_path / "shards", "val") == NUMBERS_OF_VAL
    assert not list((tmp_path / "shards").glob("train-*.tar"))


@pytest.mark.parametrize(
    "lines", [OF_VAL, [f"{key}.JPEG {label}" for key, label in NUMBERS_OF_VAL.items()]], ids=["names", "numbers"]
)
def test_imagenet_with_a_list_of_lines(tmp_path, capsys, imagenet, lines):
    listed = tmp_path / "labels.txt"
    listed.write_text("\n".join(lines) + "\n")
    assert converted("imagenet", imagenet, tmp_path / "none") == 1
    assert "name the list of these with --val-labels" in capsys.readouterr().err
    assert converted("imagenet", imagenet, tmp_path / "shards", "--val-labels", str(listed)) == 0
    assert labels_of(tmp_path / "shards", "val") == NUMBERS_OF_VAL


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "lists no labels"),
        ("n01440764\n", "has 1 lines, and"),
        ("n9\n" * 5, "has the class 'n9', which is none of the 4 from 'n01440764' on"),
        ("a.JPEG 0\nb.JPEG 4\n", "has the class 4, and there are 4 classes"),
        ("a.JPEG 0\nb.JPEG 3\n", "has none of the images in"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, capsys, imagenet, text, message):
    (tmp_path / "labels.txt").write_text(text)
    shards = tmp_path / "shards"
    assert converted("imagenet", imagenet, shards, "--val-labels", str(tmp_path / "labels.txt")) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not shards.exists()


def test_imagenet_with_val_in_folders_of_classes(tmp_path, imagenet, write_images):
    for path in (imagenet / "val").iterdir():
        path.unlink()
    # Fewer classes than train has, which give the numbers all the same.
    write_images(imagenet / "val", "n02119789/ILSVRC2012_val_1.JPEG", "n03000134/ILSVRC2012_val_2.JPEG")
    assert converted("imagenet", imagenet, tmp_path / "shards") == 0
    assert labels_of(tmp_path / "shards", "val") == {"ILSVRC2012_val_1": 2, "ILSVRC2012_val_2": 3}


def test_coco(tmp_path, capsys, write_images):
    root = tmp_path / "coco"
    for split, count in (("train2017", 5), ("val2017", 2), ("unlabeled2017", 3)):
        write_images(root / split, *(f"{number:012d}.jpg" for number in range(9, 9 + count)))
    (root / "annotations").mkdir()
    (root / "annotations/captions_train2017.json").write_text("{}")
    assert converted("coco", root, tmp_path / "shards") == 0
    assert "train: 5 images in 1 shard, no labels\nval: 2 images" in capsys.readouterr().out
    assert sorted(raw_samples(tmp_path / "shards", "val")) == ["000000000009", "000000000010"]
    assert converted("coco", root, tmp_path / "shards", "--splits", "unlabeled") == 0
    assert load_index([str(tmp_path / "shards")]).num_samples == 10


def saved(path: Path, image: Image.Image, **options) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path.read_bytes()


def test_images_are_bounded_and_read_as_their_files_are(tmp_path):
    """Whatever the reader makes of a file is what gets encoded: turned, on white, 16 bits scaled, CMYK as RGB."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
        (100, 80), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    transparent = smooth.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(smooth.size))
    contents = {
        "turned": saved(folder / "turned.jpg", smooth, exif=exif, quality=95),
        "cmyk": saved(folder / "cmyk.jpg", smooth.convert("CMYK"), quality=95),
        "grey": saved(folder / "grey.png", grey),
        "palette": saved(folder / "palette.png", smooth.quantize(64), transparency=3),
        "transparent": saved(folder / "transparent.png", transparent),
    }
    small = saved(folder / "small.jpeg", smooth.resize((50, 40)), exif=exif)
    tiny = saved(folder / "tiny.png", smooth.resize((20, 16)))
    assert converted("images", folder, tmp_path / "shards", "--max-size", "40", "--quality", "95") == 0
    samples = raw_samples(tmp_path / "shards", "train")
    assert samples["small"] == {"jpeg": small}
    assert {key for key, fields in samples.items() if list(fields) == ["jpg"]} == {*contents, "tiny"}
    for key, content in {**contents, "tiny": tiny}.items():
        expected = decode_image(content)
        image = Image.open(io.BytesIO(samples[key]["jpg"]))
        assert image.mode == "RGB" and image.format == "JPEG" and not image.getexif()
        wanted = {"turned": (40, 50), "tiny": (20, 16)}.get(key, (50, 40))
        assert image.size == wanted
        difference = np.asarray(image, float) - np.asarray(expected.resize(wanted, Image.Resampling.LANCZOS), float)
        assert np.sqrt((difference**2).mean()) < 8, key


def test_a_shard_holds_at_most_so_many_mib(tmp_path):
    folder = tmp_path / "images"
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    sizes = [len(saved(folder / f"{number}.bmp", Image.fromarray(noise))) for number in range(10)]
    assert converted("images", folder, tmp_path / "shards", "--shard-mib", str(3.5 * sizes[0] / 2**20)) == 0
    assert [shard.samples for shard in load_index([str(tmp_path / "shards")]).shards] == [3, 3, 3, 1]
    # What is larger than a shard alone is a shard all the same.
    assert converted("images", folder, tmp_path / "more", "--shard-mib", str(sizes[0] / 2**21)) == 0
    assert [shard.samples for shard in load_index([str(tmp_path / "more")]).shards] == [1] * 10


def test_a_shard_without_a_usable_image_stays_in_its_place(tmp_path, write_images):
    write_images(tmp_path / "images", *(f"{number}.png" for number in range(6)))
    assert converted("images", tmp_path / "images", tmp_path / "whole") == 0
    first = next(iter(raw_samples(tmp_path / "whole", "train")))
    (tmp_path / f"images/{first}.png").write_bytes(b"damaged")
    assert converted("images", tmp_path / "images", tmp_path / "shards", "--samples-per-shard", "1") == 0
    index = load_index([f"{tmp_path}/shards/train-{{00000..00005}}.tar"])
    assert [shard.samples for shard in index.shards] == [0, 1, 1, 1, 1, 1]
    preparation = prepare_images(build_eval_transform((8, 8), (0.5,) * 3, (0.5,) * 3))
    loader = TrainLoader(index, preparation, global_batch_size=5, micro_batch_size=5, seed=0, num_workers=1)
    batch = next(iter(loader))
    assert len(set(batch["id"])) == 5 and not loader.bad_samples


def test_the_page_has_every_command_and_option():
    page = (Path(__file__).parents[3] / "docs/DATA.md").read_text(encoding="utf-8")
    (commands,) = [action for action in build_parser()._actions if action.choices]
    assert all(f"`{name}" in page for name in commands.choices)
    options = {option for command in commands.choices.values() for option in command._option_string_actions}
    assert all(f"`{option}" in page or f" {option} " in page for option in options - {"-h", "--help"})
