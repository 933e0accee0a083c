"""The evaluation command: what it is asked, and what it leaves behind."""

import dataclasses
import io
import json
import multiprocessing
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import read_tiny_val, write_tiny_recipe, write_tiny_shards
from tiny_scenes import write_scene_recipe

import adala.evaluate as evaluation
from adala import load_task_model
from adala.config import load_recipe
from adala.contenders import build_teacher_contender, linearize_contender
from adala.data import write_shards
from adala.evaluate import name_rows, output_folder, run_evaluation
from adala.evaluation_command import parse_evaluation, split_protocol_keys
from adala.evaluation_pictures import mask_pictures, pca_pictures
from adala.export import save_student
from adala.plan import resolve_run
from adala.tasks import describe_task, read_task

CLASSES, SCENES = {"name": "classification", "num_classes": 3}, {"name": "segmentation", "num_classes": 11}
# Whatever takes time in itself.
QUICK = ("--protocol.speed.rounds=1", "--protocol.speed.warmup=1", "--protocol.speed.batch_size=2")
QUICK += ("--protocol.segmentation.epochs=1",)


class TestTheCommandLine:
    def test_what_is_asked(self) -> None:
        models, protocol = ["--models", "linearized", "runs/x/stage2"], ["--protocol", "dinov2_linear"]
        changes = ["--protocol.knn.k", "[10]", "--protocol.probe.epochs=3", "--evaluation.batch_size", "7"]
        places = ["--out", "~/results", "--cache=/somewhere", "--pictures"]
        command = parse_evaluation(["--recipe", "tiny", *models, *protocol, *changes, *places])
        assert command.models == ("linearized", "runs/x/stage2") and command.pictures
        assert command.protocol.name == "dinov2_linear" and command.protocol.knn.k == [10]
        assert command.protocol.probe.epochs == 3 and command.recipe.evaluation.batch_size == 7
        assert (command.out, command.cache) == (Path.home() / "results", Path("/somewhere"))

    def test_what_is_not_asked(self) -> None:
        command = parse_evaluation(["--run_name", "x", "--runs_dir", "there"])
        assert (command.models, command.pictures, command.out, command.cache) == ((), False, None, None)
        assert command.protocol.name == "tiny" and command.protocol.knn.k == [10, 20]
        assert output_folder(command) == Path("there/x/evaluation")
        assert output_folder(dataclasses.replace(command, out=Path("here"))) == Path("here")

    @pytest.mark.parametrize("form", [["--protocol.knn.k", "[10]"], ["--protocol.knn.k=[10]"]])
    def test_a_protocols_keys_are_parted_from_the_others(self, form: list[str]) -> None:
        own, of_protocol = split_protocol_keys(["--models", "a", *form, "--seed", "3"])
        assert own == ["--models", "a", "--seed", "3"] and of_protocol == [form[0].replace("protocol.", ""), *form[1:]]
        assert split_protocol_keys(["--protocol", "tiny"]) == (["--protocol", "tiny"], [])

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ("--protocol nope", "--protocol nope: there is no such protocol; known are dinov2_linear, ironvit, tiny"),
            ("--protocol.knn.kk 3", "protocol tiny: unrecognized arguments: --protocol.knn.kk 3"),
            ("--protocol.knn.k", "protocol tiny: argument --protocol.knn.k"),
            ("--protocol.knn.k 0", "protocol tiny: knn.k is 0: it must be a list of whole numbers"),
            ("--protocol.measures [fish]", "measures is ['fish']: it must be one or more of features, blocks"),
            ("--stage2.lrr 1", "unrecognized arguments: --stage2.lrr 1"),
            ("--stage 2", "unrecognized arguments: --stage 2"),
            ("--models", "argument --models: expected at least one argument"),
            ("--models a --models b", "--models stands there twice: name all models behind one"),
            ("--models a --models=b", "--models stands there twice"),
            ("--evaluation.batch_size 0", "evaluation.batch_size is 0: it must be"),
            ("--recipe nope", "--recipe nope: there is no such recipe"),
        ],
    )
    def test_mistakes_are_named_as_they_were_typed(self, arguments: str, sentence: str) -> None:
        with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
            parse_evaluation(arguments.split())
        assert "\n" not in str(caught.value)

    def test_the_command_is_kept_as_it_was_typed(self, monkeypatch) -> None:
        typed = ["--models", "a folder", "--protocol.knn.k=[1, 2]", "--recipe=tiny"]
        text = "python launchers/evaluate.py --models 'a folder' '--protocol.knn.k=[1, 2]' --recipe=tiny"
        assert parse_evaluation(typed).text == text
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert parse_evaluation(["--local_rank=0", *typed]).text == text
        monkeypatch.setenv("WORLD_SIZE", "2")
        for added in (["--local_rank=1"], ["--local_rank", "1"]):
            assert parse_evaluation([*added, *typed]).text == text.replace("python", "deepspeed")


class TestNames:
    """Rows are called by the shortest ends of paths that tell them apart."""

    @pytest.mark.parametrize(
        ("models", "names"),
        [
            (["runs/x/stage2"], ["stage2"]),
            (["runs/x/stage1", "runs/x/stage2"], ["stage1", "stage2"]),
            (["runs/x/stage2", "runs/y/stage2"], ["x/stage2", "y/stage2"]),
            (["runs/x/stage3", "runs/x/stage2", "runs/y/stage2"], ["stage3", "x/stage2", "y/stage2"]),
            (["runs/x/stage2", "runs/x/stage2/", "./runs/x/../x/stage2"], ["stage2"]),
            (["runs/b", "linearized", "runs/a", "teacher", "linearized"], ["b", "linearized", "a"]),
            (["runs/teacher", "other/majority class"], ["runs/teacher", "other/majority class"]),
            (["a/b", "b"], ["a/b", "{here}/b"]),
            ([], []),
        ],
        ids=str,
    )
    def test_names(self, tmp_path: Path, monkeypatch, models: list[str], names: list[str]) -> None:
        monkeypatch.chdir(tmp_path)
        assert list(name_rows(models)) == [name.format(here=tmp_path.name) for name in names]

    def test_each_stands_beside_its_folder(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (tmp_path / "x" / "stage2").mkdir(parents=True)
        (tmp_path / "newest").symlink_to(tmp_path / "x" / "stage2")
        assert name_rows(["x/stage2", "linearized", "~/y/stage2", "newest"]) == {
            "x/stage2": Path("x/stage2"),
            "linearized": None,
            "y/stage2": tmp_path / "home" / "y" / "stage2",
        }


def export(recipe: Path, folder: Path, task: Mapping[str, Any] | None = None, *overrides: str, **changes: Any) -> Path:
    """The linearized teacher with biases of its own, and with a random head for ``task`` where there is one."""
    plan = resolve_run(load_recipe(str(recipe), list(overrides)), ())
    student = linearize_contender(plan.model, build_teacher_contender(plan.model)).model
    generator, head = torch.Generator().manual_seed(0), None
    with torch.no_grad():
        student.norm.bias += 0.3 * torch.randn(student.norm.bias.shape, generator=generator)
    if task is not None:
        head, task = read_task(dict(task)).build_head(student), describe_task(read_task(dict(task)))
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    description = dataclasses.replace(plan.model.student, **{"task": task, **changes})
    save_student(folder, student.state_dict(), description, None if head is None else head.state_dict())
    return folder


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Of files, and when they were written."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def evaluate(recipe: Path, *arguments: str | Path) -> dict[str, Any]:
    """Runs the command in this process: what it wrote."""
    command = parse_evaluation(["--recipe", str(recipe), *map(str, arguments), *QUICK])
    run_evaluation(command)
    return json.loads((output_folder(command) / "evaluation.json").read_text())


def rows_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["models"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two students, of which one has a head."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = write_tiny_recipe(folder)
    write_tiny_shards(folder / "shards", contrast=12)
    export(recipe, folder / "runs" / "tiny-run" / "stage2")
    export(recipe, folder / "runs" / "tiny-run" / "stage3", CLASSES)
    return folder


@torch.no_grad()
def test_what_an_evaluation_leaves_behind(tiny: Path, tmp_path: Path, capfd) -> None:
    run = tiny / "runs" / "tiny-run"
    before = contents(run)
    recipe, models = tiny / "recipe.yaml", [run / "stage2", "linearized", run / "stage3"]
    found = evaluate(recipe, "--models", *models, "--pictures", "--protocol.knn.k", "[3]", "--protocol.blocks.images=9")
    rows, said = rows_of(found), capfd.readouterr()
    assert list(rows) == ["teacher", "stage2", "linearized", "stage3"], "the teacher, and then as they were named"
    assert {name: row["mechanism"] for name, row in rows.items()} == dict.fromkeys(rows, "linear") | {
        "teacher": "softmax"
    }
    of_all = {"feature_cosine", "patch_cosine", "cls_cosine", "relative_error", "knn3_top1", "probe_top1"}
    of_all |= {"images_per_s", "images_per_s_p20", "images_per_s_p80", "speed_ratio", "peak_memory_mib"}
    assert {name: set(row["measures"]) - of_all for name, row in rows.items()} == {
        "teacher": set(), "stage2": set(), "linearized": set(), "stage3": {"head_top1"}
    }  # fmt: skip
    assert all(of_all <= set(row["measures"]) for row in rows.values())
    images, labels = read_tiny_val(tiny / "shards")
    right = load_task_model(run / "stage3")(images).argmax(-1) == labels
    assert rows["stage3"]["measures"]["head_top1"] == pytest.approx(100 * right.float().mean().item())
    assert set(found["kept"]["teacher"].values()) == {1.0, None}
    assert all(row["measures"]["images_per_s"] > 0 for row in rows.values())
    assert found["command"].startswith(
        f"python launchers/evaluate.py --recipe {recipe} --models {models[0]} linearized"
    )
    assert found["protocol"]["name"] == "tiny" and "knn.k" in found["protocol"]["changed"]
    assert found["data"]["left_out"] == {"segmentation": "the samples are for classification"}
    assert found["data"]["samples"] == {"held-out": 14, "training": 40}
    errors = found["details"]["blocks"]
    assert errors["images"] == 9 and set(errors["students"]) == {"stage2", "linearized", "stage3"}
    assert not any(row["notes"] for row in rows.values()) and str(run / "stage2") in rows["stage2"]["origin"]
    # The same numbers in the other forms, and on the terminal.
    folder = run / "evaluation"
    texts = [(folder / "evaluation.md").read_text(), (folder / "evaluation.html").read_text(), said.out]
    for row in rows.values():
        for name in ("probe_top1", "knn3_top1", "feature_cosine"):
            number = f"{row['measures'][name]:.{4 if name.endswith('cosine') else 2}f}"
            assert all(number in text for text in texts), (row["name"], name)
    assert said.err == "" and "## Command" not in said.out
    assert "segmentation is left out: the samples are for classification" in said.out and "not be used" not in said.out
    pictures = {"features", "blocks"}
    assert {path.stem for path in folder.glob("*.png")} == pictures and texts[1].count("data:image/png") == 2
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in pictures} | {
        "evaluation.json", "evaluation.md", "evaluation.html"
    }  # fmt: skip
    after = contents(run)
    assert {path for path in after if "evaluation" not in path} == set(before)
    assert {path: after[path] for path in before} == before, "stages are as they were"
    assert (tiny / "runs" / "features").is_dir()


def test_results_and_features_go_where_they_are_told_to(tiny: Path, tmp_path: Path, capfd) -> None:
    run = tiny / "runs" / "tiny-run"
    before = contents(tiny)
    asked = ["--protocol.measures=[knn]", "--cache", tmp_path / "store", "--out"]
    rows = rows_of(evaluate(tiny / "recipe.yaml", *asked, tmp_path / "a" / "b"))
    assert list(rows) == ["teacher"] and list(rows["teacher"]["measures"]) == ["knn10_top1", "knn20_top1"]
    said = capfd.readouterr().out
    assert "there is the teacher alone: name students after --models" in said
    assert f"4 sets of features take 0 MiB in {tmp_path / 'store'}, which may be removed" in said
    assert contents(tiny) == before and (tmp_path / "store").is_dir()
    evaluate(tiny / "recipe.yaml", *asked, tmp_path / "a", "--models", run / "stage2")
    said = capfd.readouterr().out
    assert "computing features of stage2 on 14 held-out samples" in said and "of teacher" not in said


def test_a_head_for_another_target_is_left_out(tiny: Path, tmp_path: Path) -> None:
    recipe = tiny / "recipe.yaml"
    other = export(recipe, tmp_path / "other", {**CLASSES, "num_classes": 7})
    masks = export(recipe, tmp_path / "masks", {**SCENES, "num_classes": 3})
    own = tiny / "runs" / "tiny-run" / "stage3"
    asked = ["--protocol.measures=[head,features]", "--out", tmp_path / "out"]
    rows = rows_of(evaluate(recipe, "--models", other, masks, own, *asked))
    assert [name for name, row in rows.items() if "head_top1" in row["measures"]] == ["stage3"]
    assert rows["other"]["notes"] == [
        "its head is for classification of 7 classes, and these samples are for classification of 3 classes: it is "
        "left out"
    ]
    assert "for segmentation of 3 classes" in rows["masks"]["notes"][0] and rows["stage3"]["notes"] == []
    found = evaluate(recipe, "--models", other, *asked)
    assert found["data"]["left_out"] == {"head": "no model has one that was fine-tuned for these targets"}


def test_another_backbone_is_compared_by_what_can_be_compared(tiny: Path, tmp_path: Path) -> None:
    """Of another width, with other patches, with registers, without a class token, and with fewer blocks."""
    changes = {
        "wide": {"embed_dim": 48},
        "coarse": {"patch_size": 8},
        "registers": {"reg_tokens": 2},
        "patches alone": {"class_token": "false", "global_pool": "avg"},
        "flat": {"depth": 2},
    }
    recipe, students = tiny / "recipe.yaml", []
    for name, change in changes.items():
        arguments = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, **change}
        override = [f"--teacher.model_args.{key}={value}" for key, value in arguments.items()]
        students.append(export(recipe, tmp_path / name, None, "--teacher.checkpoint=random", *override))
    asked = ["--protocol.measures=[features,blocks,probe,speed]", "--pictures", "--out", tmp_path / "out"]
    rows = rows_of(evaluate(recipe, "--models", *students, *asked))
    assert all("probe_top1" in row["measures"] and "speed_ratio" in row["measures"] for row in rows.values())
    compared = [name for name, row in rows.items() if "feature_cosine" in row["measures"]]
    assert compared == ["teacher", "flat"]
    shape = "its features have another shape than the teacher's, and are not compared with them"
    blocks = "it has other blocks or tokens than the teacher: no errors by block"
    assert [rows[name]["notes"] for name in changes] == [[shape, blocks]] * 4 + [[blocks]]
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "blocks" in found["data"]["left_out"] and (tmp_path / "out" / "features.png").is_file()
    assert not (tmp_path / "out" / "blocks.png").exists()


def test_a_sample_that_cannot_be_used_is_told(tiny: Path, tmp_path: Path, capfd) -> None:
    samples = [{"png": b"no image", "cls": 0}, *({"png": Image.new("RGB", (16, 16)), "cls": n} for n in (0, 1, 2))]
    write_shards(samples, tmp_path / "val", "val", samples_per_shard=4)
    asked = ["--protocol.measures=[features]", "--out", tmp_path / "out", f"--data.val=[{tmp_path}/val/val-*.tar]"]
    data = evaluate(tiny / "recipe.yaml", *asked)["data"]
    assert data["unusable_held_out_samples"] == 1 and data["samples"] == {"held-out": 3}
    assert "1 held-out samples could not be used, and are left out of all rows alike" in capfd.readouterr().out


def test_a_random_teacher_is_told_in_the_document(tiny: Path, tmp_path: Path) -> None:
    asked = ["--teacher.checkpoint=random", "--protocol.measures=[features]", "--out", tmp_path]
    (note,) = evaluate(tiny / "recipe.yaml", *asked)["data"]["notes"]
    assert "the teacher is a RANDOM network" in note and note in (tmp_path / "evaluation.md").read_text()


@torch.no_grad()
def test_masks_are_measured_and_drawn(tmp_path: Path, capfd, monkeypatch) -> None:
    recipe = write_scene_recipe(tmp_path)
    names = ["nothing", *(f"garment {number}" for number in range(10))]
    (tmp_path / "scenes" / "classes.json").write_text(json.dumps(names))
    tuned, drawn = export(recipe, tmp_path / "tuned", SCENES), {}
    for draw in (pca_pictures, mask_pictures):
        name = draw.__name__
        monkeypatch.setattr(
            evaluation, name, lambda *given, draw=draw: drawn.update({draw.__name__: given}) or draw(*given)
        )
    found = evaluate(recipe, "--models", "linearized", tuned, "--pictures")
    rows, folder = rows_of(found), tmp_path / "runs" / "tiny-run" / "evaluation"
    assert list(rows) == ["teacher", "linearized", "tuned", "majority class", "colour table"]
    assert all("probe_miou" in row["measures"] for row in rows.values())
    assert [name for name, row in rows.items() if "head_miou" in row["measures"]] == ["tuned"]
    assert rows["colour table"]["mechanism"] is None and rows["colour table"]["measures"]["probe_miou"] > 0
    assert set(found["details"]["iou_by_class"]) == set(rows)
    for name in ("features", "masks", "blocks"):
        with Image.open(io.BytesIO((folder / f"{name}.png").read_bytes())) as picture:
            assert picture.width > 300
    assert (folder / "evaluation.html").read_text().count("data:image/png") == 3
    assert capfd.readouterr().err == ""
    with tarfile.open(tmp_path / "scenes" / "val-00000.tar") as tar:
        files = [np.array(Image.open(io.BytesIO(tar.extractfile(name).read()))) for name in sorted(tar.getnames())[:8]]
    pixels, truth = torch.from_numpy(np.stack(files[::2])), torch.from_numpy(np.stack(files[1::2]))
    (shown, patches), (under, targets, predicted, *coding) = drawn["pca_pictures"], drawn["mask_pictures"]
    assert shown.equal(under) and targets.equal(truth.long()) and coding == [11, 255, tuple(names)]
    torch.testing.assert_close(shown, pixels.permute(0, 3, 1, 2) / 255, atol=1e-6, rtol=0)
    assert list(patches) == list(predicted) == ["teacher", "linearized", "tuned"]
    whole, images = load_task_model(tuned), (shown - 0.5) / 0.5
    torch.testing.assert_close(
        patches["tuned"], whole.student(images)[:, 1:].unflatten(1, (7, 7)), atol=1e-4, rtol=1e-4
    )
    assert (predicted["tuned"] == whole.predict(images)).float().mean() > 0.99


MISTAKES = {
    "no folder": ("{folder}/nowhere", "nowhere holds no exported student: there is no such folder"),
    "a run": ("{folder}/runs/tiny-run", "its folders stage2, stage3 do; name one of them"),
    "no student": ("{folder}/shards", "shards holds no exported student"),
    "other mean": (
        "{folder}/bright",
        r"bright was made for images with mean \[0.1, 0.5, 0.5\], this recipe has \[0.5, 0.5",
    ),
    "damaged": ("{folder}/damaged", "student.safetensors"),
    "other patches": (
        "{folder}/coarse",
        "coarse: image size 16 x 16 is not divisible by the patch size 5 x 5: 15 x 15",
    ),
}


@pytest.mark.parametrize(("model", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_models_that_cannot_be_compared(tiny: Path, tmp_path: Path, model: str, sentence: str) -> None:
    recipe = tiny / "recipe.yaml"
    if "bright" in model:
        export(recipe, tiny / "bright", mean=[0.1, 0.5, 0.5])
    if "damaged" in model:
        export(recipe, tiny / "damaged")
        (tiny / "damaged" / "student.safetensors").write_bytes(b"nothing")
    if "coarse" in model:
        size = ["--data.image_size=[15,15]", "--teacher.checkpoint=random", "--teacher.model_args.patch_size=5"]
        export(recipe, tiny / "coarse", None, *size)
    with pytest.raises(ValueError, match=sentence):
        evaluate(recipe, "--models", model.format(folder=tiny), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def evaluate_apart(recipe: Path, out: Path, arguments: list[str]) -> None:
    evaluate(recipe, *arguments, "--out", out)


def test_two_commands_at_once_share_a_cache_and_do_not_disturb_each_other(tiny: Path, tmp_path: Path, capfd) -> None:
    recipe, cache = tiny / "recipe.yaml", tmp_path / "store"
    students = [str(tiny / "runs" / "tiny-run" / f"stage{number}") for number in (2, 3)]
    arguments = ["--models", *students, "--cache", str(cache), "--protocol.measures=[features,knn,probe]"]
    context = multiprocessing.get_context("fork")
    for number in range(3):
        outs = [tmp_path / f"{number}-{each}" for each in "ab"]
        processes = [context.Process(target=evaluate_apart, args=(recipe, out, arguments)) for out in outs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        first, second = (json.loads((out / "evaluation.json").read_text())["models"] for out in outs)
        assert first == second
        entries = [path for path in cache.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]
        assert len(entries) == 6 and [path for path in cache.iterdir() if path not in entries] == [cache / ".lock"]
        said = capfd.readouterr()
        assert said.err == "" and ("computing" in said.out) == (number == 0)
