"""A whole run of two ranks on a mixture of two folders whose shards have the same names."""

import json
from pathlib import Path

from tiny_run import write_tiny_recipe, write_tiny_shards
from warm import train

from adala.metrics import read_metrics


def mixture_of(*sources: tuple[Path, float]) -> str:
    return json.dumps([{"source": f"{folder}/train-*.tar", "weight": weight} for folder, weight in sources])


def test_a_run_on_a_mixture_and_what_becomes_of_its_weights(tmp_path: Path) -> None:
    recipe, run = write_tiny_recipe(tmp_path), tmp_path / "runs" / "tiny-run"
    own, other = tmp_path / "shards", write_tiny_shards(tmp_path / "other", contrast=100)
    arguments = ["--recipe", str(recipe), "--stage1.train_data", mixture_of((other, 1))]
    asked = [*arguments, "--data.train", mixture_of((own, 3), (other, 1))]
    done = train(*asked)
    assert done.returncode == 0, done.stdout
    assert (
        "80 training samples in 6 shards: 10 steps an epoch, none dropped; a mixture of source 0, 75.000% (40 samples, "
        "1.5 times an epoch); source 1, 25.000% (40 samples, 0.5 times an epoch)"
    ) in done.stdout
    assert "a mixture of source 0, 100.000% (40 samples, 1 times an epoch)" in done.stdout
    conditions = json.loads((run / "stage2" / "finished.json").read_text())["conditions"]
    assert conditions["stage2.train_data or data.train (its weights)"] == [3, 1]
    assert (run / "report.json").exists()

    same = train(*arguments, "--data.train", mixture_of((own, 1.5), (other, 0.5)))
    assert same.stdout.count("finished already, from the same student, teacher, recipe and data") == 3, same.stdout
    refused = train(*arguments, "--data.train", mixture_of((own, 2), (other, 1)))
    assert refused.returncode != 0
    assert (
        "was finished with stage2.train_data or data.train (its weights) [3, 1], this run has [2, 1]: set it back"
        in refused.stdout
    )
    plain = train(*arguments, "--data.train", json.dumps([str(own), str(other)]))
    assert plain.returncode != 0
    assert "was finished with stage2.train_data or data.train (its" in plain.stdout


def test_a_run_that_stopped_in_the_midst_of_a_mixture_draws_the_same_curve(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    mixture = mixture_of((tmp_path / "shards", 3), (write_tiny_shards(tmp_path / "other", contrast=100), 1))
    asked = ["--recipe", str(recipe), "--stage", "2", "--data.train", mixture]
    curves = []
    for name, steps in (("whole", (12,)), ("parts", (5, 12))):
        for count in steps:
            options = ["--run_name", name, "--stage2.steps", str(count), "--stage2.schedule", "constant"]
            done = train(*asked, *options)
            assert done.returncode == 0, done.stdout
        curves.append([line["loss"] for line in read_metrics(tmp_path / "runs" / name / "stage2", "train")])
    assert len(curves[0]) == 12 and curves[0] == curves[1]
