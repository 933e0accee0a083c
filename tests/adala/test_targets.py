"""Masks that are not what the recipe says: what the plan, the loaders and the trainer make of them."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from tiny_run import write_tiny_recipe
from tiny_stage import build_trainer, plan_stage

from adala.data import EvaluationLoader, ShardIndex, TrainLoader, View, write_shards
from adala.data.samples import BadDataError
from adala.distributed import SharedError
from adala.metrics import read_metrics
from adala.sources import Sources
from adala.tasks import Task, resolve_task

Segmentation = resolve_task("segmentation")
VIEW = View((16, 16), (0.5,) * 3, (0.5,) * 3, (4, 4))
COLORS = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
IGNORED = np.full((16, 16), 255, np.uint8)


def truth(number: int, classes: int = 3) -> np.ndarray:
    """The classes (16, 16) of a sample."""
    return np.random.default_rng(number).integers(0, classes, (16, 16))


def encoded(image: Image.Image | np.ndarray) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, "PNG")
    return stream.getvalue()


def grey(number: int) -> bytes:
    return encoded(truth(number).astype(np.uint8))


def palette(number: int) -> bytes:
    """Of which the colours say something else, as Pascal VOC's do."""
    image = Image.fromarray(truth(number).astype(np.uint8), "P")
    image.putpalette([channel for color in ([9, 9, 9], *COLORS[:2]) for channel in color])
    return encoded(image)


def of_16_bits(number: int) -> bytes:
    return encoded(truth(number, 400).astype(np.uint16))


def rgb(number: int) -> bytes:
    return encoded(np.array(COLORS, np.uint8)[truth(number)])


def ignored(number: int) -> bytes:
    return encoded(IGNORED)


def outside(number: int) -> bytes:
    """A class that the task does not have, in one sample of twelve."""
    mask = truth(number).astype(np.uint8)
    mask[3, 4] = 7 if number == 9 else 0
    return encoded(mask)


def of_another_size(number: int) -> bytes:
    return encoded(truth(number)[:, :15].astype(np.uint8)) if number == 9 else grey(number)


def missing(number: int) -> bytes | None:
    return None if number == 9 else grey(number)


def write(folder: Path, mask_of: Callable[[int], bytes | None], samples: int = 12) -> list[str]:
    """Shards of images whose masks are what ``mask_of`` makes of their number; None is none."""
    images = (np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8) for number in range(samples))
    written = [
        {"__key__": f"{number:04d}", "png": Image.fromarray(image)}
        | ({} if mask_of(number) is None else {"seg.png": mask_of(number)})
        for number, image in enumerate(images)
    ]
    write_shards(written, folder, "train", samples_per_shard=samples)
    return [str(folder / "train-*.tar")]


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "embedded")


RIGHT = [
    pytest.param(grey, Segmentation(num_classes=3), 3, id="grey"),
    pytest.param(palette, Segmentation(num_classes=3), 3, id="palette"),
    pytest.param(of_16_bits, Segmentation(num_classes=400, mask={"ignore_index": 1000}), 400, id="16 bits"),
    pytest.param(rgb, Segmentation(num_classes=3, mask={"encoding": "rgb", "colors": COLORS}), 3, id="rgb"),
]


@pytest.mark.parametrize(("mask_of", "task", "classes"), RIGHT)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_options_say_is_read_to_the_pixel(
    sources: Sources, tmp_path: Path, mask_of: Callable, task: Task, classes: int, workers: int
) -> None:
    names = write(tmp_path, mask_of)
    sources.check_targets(task, names, "data.train")
    index = sources.index(names)
    evaluation = EvaluationLoader(index, task.prepare(VIEW, None), batch_size=5, num_workers=workers)
    training = iter(train_loader(index, task, workers))
    batches = [*evaluation, *(next(training) for _ in range(3))]
    assert [len(batch["id"]) for batch in batches] == [5, 5, 2, 4, 4, 4]
    for batch in batches:
        assert batch["mask"].dtype == torch.int64
        for name, mask in zip(batch["id"], batch["mask"], strict=True):
            assert np.array_equal(mask, truth(int(name[-4:]), classes)), name
    assert evaluation.bad_samples == {}


def train_loader(index: ShardIndex, task: Task, workers: int = 0, batch: int = 4) -> TrainLoader:
    return TrainLoader(
        index, task.prepare(VIEW, "none"), global_batch_size=batch, micro_batch_size=batch, seed=0, num_workers=workers
    )


TASK = Segmentation(num_classes=3)


@pytest.mark.parametrize(
    ("mask_of", "task", "message"),
    [
        (
            rgb,
            TASK,
            r"Stage 3 needs targets for segmentation, and data.train has none: most samples of .*train-00000.tar are "
            r"of no use for segmentation: its seg.png cannot be read as a mask: it is coded in colours \(RGB\): "
            r"mask.encoding: rgb reads it where mask.colors lists the classes' colours",
        ),
        (
            rgb,
            Segmentation(num_classes=2, mask={"encoding": "rgb", "colors": COLORS[:2]}),
            r"data.train: the sample train-00000.tar/0000: its seg.png does not fit the recipe: it holds the colours "
            r"\[0, 128, 0\], which mask.colors does not list",
        ),
        (
            grey,
            Segmentation(num_classes=3, mask={"encoding": "rgb", "colors": COLORS}),
            r"data.train has none: .*it is not coded in colours \(it is L\): mask.encoding: index reads it",
        ),
        (
            outside,
            TASK,
            r"data.train: the sample train-00000.tar/0009: its mask holds 7, no class from 0 to 2 and not "
            r"mask.ignore_index \(255\): correct num_classes, map numbers to classes with mask.label_map",
        ),
        (
            grey,
            Segmentation(num_classes=2),
            r"data.train: the sample train-00000.tar/0000: its mask holds 2, no class from 0 to 1",
        ),
        (
            grey,
            Segmentation(num_classes=150, mask={"label_map": {"0": 0, "1": 1}}),
            r"data.train: the sample train-00000.tar/0000: its seg.png does not fit the recipe: it holds 2, which the "
            r"label map does not list: choose mask.label_map",
        ),
        (
            grey,
            Segmentation(num_classes=3, mask_field="mask.png"),
            r"data.train has none: most samples of .*: it has no mask: none of its files png, seg.png is mask.png; the "
            r"recipe's mask_field may name another",
        ),
        (
            lambda number: encoded(truth(number)[:15].astype(np.uint8)),
            TASK,
            r"data.train has none: .*its image has 16 x 16 pixels and its mask 16 x 15 pixels: they must have",
        ),
        (lambda number: None, TASK, r"data.train has none: most samples of .*: it has no mask: none of its files png"),
        (
            ignored,
            TASK,
            "data.train: of the first samples' targets for segmentation nothing is known, all is ignored$",
        ),
        (lambda number: ignored(0) if number < 5 else None, TASK, r"data.train has none: .*it has no mask"),
    ],
    ids=[
        "colours",
        "a colour not listed",
        "no colours",
        "a class outside",
        "too few classes",
        "not in the label map",
        "another file",
        "all of another size",
        "no masks",
        "all ignored",
        "few masks, all ignored",
    ],
)
def test_masks_that_cannot_be_trained_on_are_refused_at_the_start(
    sources: Sources, tmp_path: Path, mask_of: Callable, task: Task, message: str
) -> None:
    names = write(tmp_path, mask_of)
    with pytest.raises(ValueError, match=message) as raised:
        sources.check_targets(task, names, "data.train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mask_of", [missing, of_another_size, lambda number: grey(0) if number == 5 else ignored(0)])
def test_one_mask_that_is_no_use_does_not_stop_the_plan(sources: Sources, tmp_path: Path, mask_of: Callable) -> None:
    """Nor that nothing is known of most of them."""
    sources.check_targets(TASK, write(tmp_path, mask_of), "data.train")


@pytest.mark.parametrize("mask_of", [missing, of_another_size], ids=["missing", "another size"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_mask_is_a_bad_sample_that_is_counted(
    sources: Sources, tmp_path: Path, mask_of: Callable, workers: int
) -> None:
    """In training another one takes its place, in an evaluation it is left out."""
    index = sources.index(write(tmp_path, mask_of))
    training = train_loader(index, TASK, workers)
    batches = iter(training)
    seen = [name[-4:] for _ in range(3) for name in next(batches)["id"]]
    assert len(seen) == 12 and set(seen) == {f"{number:04d}" for number in range(12)} - {"0009"}
    assert training.bad_samples == {"train-00000.tar": 1}
    evaluation = EvaluationLoader(index, TASK.prepare(VIEW, None), batch_size=5, num_workers=workers)
    assert [name[-4:] for batch in evaluation for name in batch["id"]] == sorted(set(seen))
    assert evaluation.bad_samples == {"train-00000.tar": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_outside_stops_the_run_and_names_sample_and_option(
    sources: Sources, tmp_path: Path, workers: int
) -> None:
    index = sources.index(write(tmp_path, outside))
    message = r"the sample train-00000.tar/0009: its mask holds 7, no class from 0 to 2 .*correct num_classes"
    batches = iter(train_loader(index, TASK, workers))
    with pytest.raises(BadDataError, match=message):
        for _ in range(3):
            next(batches)
    with pytest.raises(BadDataError, match=message):
        list(EvaluationLoader(index, TASK.prepare(VIEW, None), batch_size=5, num_workers=workers))


# The trainer, on data that pass the plan.

ASIDE, MIDDLE = slice(0, 8), slice(20, 28)


def write_recipe(folder: Path, known: Sequence[slice], steps: int, **stage) -> Path:
    """A recipe of which images are 16 x 48 pixels, and masks are known in these columns alone; training and evaluation
    see the 16 columns in the middle. Batches of one image."""
    for split, columns in (("train", known), ("val", [MIDDLE] * 2)):
        samples = []
        for number, part in enumerate(columns):
            mask = np.full((16, 48), 255, np.uint8)
            mask[:, part] = number % 3
            image = np.random.default_rng(number).integers(0, 255, (16, 48, 3), dtype=np.uint8)
            samples.append({"__key__": f"{number:04d}", "png": Image.fromarray(image), "seg.png": encoded(mask)})
        write_shards(samples, folder / "masked", split, samples_per_shard=100)
    masked = folder / "masked"
    data = {
        "train": [str(masked / "train-*.tar")],
        "val": [str(masked / "val-*.tar")],
        "image_size": [16, 16],
        "shuffle_buffer": 0,
    }
    stage = {"steps": steps, "global_batch_size": 1, "log_every": 1, "warmup_steps": 0, "augmentation": "none", **stage}
    task = {"name": "segmentation", "num_classes": 3}
    return write_tiny_recipe(folder, data=data, stage3={**stage, "task": task})


def fit(recipe: Path) -> str:
    try:
        build_trainer(recipe, 3).fit()
    except SharedError as error:
        return str(error)
    return "finished"


def labelled(recipe: Path) -> list[float]:
    return [row["labelled"] for row in read_metrics(recipe.parent, "train")]


def test_an_epoch_of_which_nothing_is_known_stops_the_run(tmp_path: Path) -> None:
    """Although of whole masks, as the plan looks at them, something is: the crop leaves nothing of it."""
    recipe = write_recipe(tmp_path, [ASIDE] * 3, steps=9)
    (said,) = on_ranks(1, fit, recipe)
    assert said.startswith("step 3: of the targets of 3 steps, an epoch, nothing was known, all was ignored: look at")
    assert labelled(recipe) == [0.0, 0.0] and "stage3.task" in said


def test_a_run_shorter_than_an_epoch_is_stopped_too(tmp_path: Path) -> None:
    (said,) = on_ranks(1, fit, write_recipe(tmp_path, [ASIDE] * 9, steps=2))
    assert said.startswith("step 2: of the targets of 2 steps")


def test_what_was_not_known_before_an_interruption_counts(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [ASIDE] * 3, steps=9, save_every=2)
    for _ in range(2):  # from the start, then from step 2
        (said,) = on_ranks(1, fit, recipe)
        assert said.startswith("step 3: of the targets of 3 steps")
    assert [row["step"] for row in read_metrics(recipe.parent, "train")] == [1, 2]


def test_single_batches_of_which_nothing_is_known_do_not_stop_the_run(tmp_path: Path, capfd) -> None:
    """Although there are more of them in all than steps in an epoch; they say so, cost nothing, and move nothing."""
    recipe = write_recipe(tmp_path, [MIDDLE, ASIDE, MIDDLE, ASIDE, MIDDLE], steps=15)
    assert on_ranks(1, fit, recipe) == ["finished"]
    rows = read_metrics(recipe.parent, "train")
    assert sorted(labelled(recipe)) == [0.0] * 6 + [0.5] * 9
    for row in rows:
        assert (row["loss"] == 0.0) == (row["gradient_norm"] == 0.0) == (row["labelled"] == 0.0)
    assert capfd.readouterr().out.count("nothing of its targets is known, all is ignored") == 6


def test_what_one_rank_knows_is_enough(tmp_path: Path) -> None:
    """A global batch of two images, of which one says something."""
    recipe = write_recipe(tmp_path, [MIDDLE, ASIDE], steps=3, global_batch_size=2)
    assert on_ranks(2, fit, recipe) == ["finished"] * 2
    assert labelled(recipe) == [0.25] * 3


def test_the_plan_names_the_key_of_what_it_refuses(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [MIDDLE] * 2, steps=2)
    assert plan_stage(recipe, 3).task == Segmentation(num_classes=3)
    bad = write(tmp_path / "bad", ignored)
    for key, message in (
        ("data.val", "^data.val: of the first samples' targets for segmentation nothing is known"),
        ("stage3.train_data", "^stage3.train_data: of the first samples' targets for segmentation nothing is known"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_stage(recipe, 3, [f"--{key}={bad}"])
