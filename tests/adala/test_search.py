"""A run whose recipe leaves it to a search which blocks keep softmax attention: what is trained, kept, done again."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from tiny_run import write_tiny_recipe
from tiny_stage import plan_stage, run

from adala.build import build_teacher, find_start, load_start
from adala.config import load_recipe
from adala.distributed import Interrupted
from adala.files import file_digest
from adala.hybrids import ERROR
from adala.plan import outline_run, resolve_run, run_folder
from adala.search.command import parse_search_command, run_search_command

SEARCH = {"images": 20}


def run_of(folder: Path) -> Path:
    return folder / "runs" / "tiny-run"


def search_of(folder: Path) -> dict:
    return json.loads((run_of(folder) / "search.json").read_text())


def record_of(folder: Path, number: int) -> dict:
    return json.loads((run_of(folder) / f"stage{number}" / "finished.json").read_text())


def keep_of(folder: Path, number: int) -> list[int]:
    return json.loads((run_of(folder) / f"stage{number}" / "model.json").read_text())["keep"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder around a run of all stages under ``keep: auto:1``; Stage 2 hardly moves."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_tiny_recipe(folder, keep="auto:1", search=SEARCH)
    on_ranks(1, run, recipe, (1, 2, 3), "--stage2.lr=1e-9", "--stage1.lr=0.01")
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    shutil.copytree(finished, tmp_path / "copy")
    recipe = json.loads((finished / "recipe.yaml").read_text().replace(str(finished), str(tmp_path / "copy")))
    (tmp_path / "copy" / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path / "copy"


def rerun(folder: Path, capfd: pytest.CaptureFixture, *overrides: str, stages=(1, 2, 3), ranks=1, **options) -> str:
    capfd.readouterr()
    rates = ("--stage2.lr=1e-9", "--stage1.lr=0.01")
    on_ranks(ranks, partial(run, **options), folder / "recipe.yaml", stages, *rates, *overrides)
    return capfd.readouterr().out


def refused(folder: Path, capfd: pytest.CaptureFixture, *overrides: str, stages=(1, 2, 3), **options) -> str:
    with pytest.raises(AssertionError, match="Error: ") as raised:
        rerun(folder, capfd, *overrides, stages=stages, **options)
    return str(raised.value).strip().splitlines()[-1]


def test_stage_1_aligns_all_blocks_and_stage_2_starts_with_the_teachers_softmax_in_one(finished: Path) -> None:
    found = search_of(finished)
    (step,) = found["choice"]["steps"]
    block = step["block"]
    assert [candidate["block"] for candidate in step["candidates"]] == [0, 1, 2]
    assert block == min(step["candidates"], key=lambda candidate: candidate[ERROR])["block"]
    assert step["metrics"][ERROR] < found["choice"]["before"][ERROR]
    assert (found["order"], found["choice"]["images"], found["choice"]["image_size"]) == ([block], 20, [16, 16])
    assert found["conditions"]["the student that is searched"] == record_of(finished, 1)["student"]
    assert [keep_of(finished, number) for number in (1, 2, 3)] == [[], [block], [block]]
    # At this rate four steps of AdamW move a weight by 4e-9.
    students = {n: load_file(run_of(finished) / f"stage{n}" / "student.safetensors") for n in (1, 2)}
    teacher = load_file(finished / "teacher.safetensors")
    moved = []
    for name, value in students[2].items():
        source = teacher if name.startswith(f"blocks.{block}.attn.") else students[1]
        torch.testing.assert_close(value, source[name], atol=1e-7, rtol=1e-6)
        moved.append(name.endswith("qkv.weight") and not torch.allclose(value, teacher[name], atol=1e-3))
    assert sum(moved) == 2, "of the other two blocks, Stage 1 has changed the projections"


def test_records_say_what_was_asked_for_and_what_it_came_from(finished: Path) -> None:
    conditions = {number: record_of(finished, number)["conditions"] for number in (1, 2, 3)}
    assert [conditions[number]["keep"] for number in (1, 2, 3)] == [[], "auto:1", "auto:1"]
    assert not any(key.startswith("search.") for key in conditions[1])
    assert (conditions[2]["search.images"], conditions[2]["search.image_size"]) == (20, [16, 16])
    starts = [conditions[number]["the student it starts from"] for number in (2, 3)]
    assert starts[0] not in ("linearized", record_of(finished, 1)["student"])
    assert starts[1] == record_of(finished, 2)["student"]
    rows = json.loads((run_of(finished) / "report.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "linearized", "stage 1", "stage 2", "stage 3"]


def test_a_run_that_is_finished_is_not_searched_again(again: Path, capfd) -> None:
    path = run_of(again) / "search.json"
    before, students = path.read_bytes(), {number: record_of(again, number) for number in (2, 3)}
    assert "searching" not in rerun(again, capfd) and path.read_bytes() == before
    (run_of(again) / "stage2" / "finished.json").unlink()
    said = rerun(again, capfd, stages=(2,))
    assert "going on with it" in said and "searching" not in said
    assert record_of(again, 2)["student"] == students[2]["student"]
    # Without its file the search is made again, and comes to the same.
    path.unlink()
    said = rerun(again, capfd, stages=(2, 3))
    assert "searching 1 blocks" in said and path.read_bytes() == before
    assert said.count("finished already, from the same student") == 2


def test_a_student_of_another_stage_1_is_searched_again(again: Path, capfd) -> None:
    before = search_of(again)
    assert "searching" not in rerun(again, capfd, "--stage1.steps=5", stages=(1,))
    said = rerun(again, capfd, "--stage1.steps=5", stages=(2,))
    assert "is stale, since the student that is searched has changed: searching again" in said
    after = search_of(again)
    assert after["conditions"]["the student that is searched"] == record_of(again, 1)["student"]
    assert after["choice"]["before"] != before["choice"]["before"]
    assert "stale, since the student it starts from has changed: run again" in said


def test_another_budget_is_refused_by_its_key_and_goes_on_with_the_search(again: Path, capfd) -> None:
    before = search_of(again)
    said = refused(again, capfd, "--keep=auto:2", stages=(2,))
    assert "was finished with keep 'auto:1', this run has 'auto:2'" in said
    assert "with search.images 20, this run has 30" in refused(again, capfd, "--search.images=30", stages=(2,))
    assert search_of(again) == before
    said = rerun(again, capfd, "--keep=auto:2", stages=(2,), overwrite=True)
    assert "searching 2 blocks" in said and said.count("keeps softmax") == 1, "the first was known"
    after = search_of(again)
    assert after["choice"]["steps"][:1] == before["choice"]["steps"] and len(after["order"]) == 2
    assert keep_of(again, 2) == sorted(after["order"])
    # A smaller budget is a beginning of the same order.
    said = rerun(again, capfd, "--keep=auto:1", stages=(2,), overwrite=True)
    assert "searching" not in said and keep_of(again, 2) == before["order"] and search_of(again) == after


def test_several_ranks_write_the_file_of_one(again: Path, capfd) -> None:
    path = run_of(again) / "search.json"
    before = path.read_bytes()
    path.unlink()
    said = rerun(again, capfd, stages=(2,), ranks=2)
    assert "searching 1 blocks" in said and path.read_bytes() == before


def end_in_search(recipe: Path, place: int) -> str:
    """Stage 2 on the ranks of a test, where rank 1 is asked to end when it has measured ``place`` hybrids."""
    from adala import preemption
    from adala.distributed import rank
    from adala.hybrids import HybridMeter

    measured, own = [], HybridMeter._with

    def asked(meter, *arguments):
        measured.append(arguments)
        if rank() == 1 and len(measured) == place:
            preemption._told = "SIGTERM"
        return own(meter, *arguments)

    HybridMeter._with = asked
    try:
        run(recipe, (2,), "--keep=auto:2", "--stage2.lr=1e-9", "--stage1.lr=0.01", overwrite=True)
    except Interrupted as ended:
        return str(ended)
    return "finished"


def test_a_search_that_is_asked_to_end_leaves_whole_steps_and_goes_on(again: Path, capfd) -> None:
    path = run_of(again) / "search.json"
    path.unlink()
    # Two batches, of which rank 1 has one: it sees what it was told before the next measurement, of the second step.
    assert on_ranks(2, end_in_search, again / "recipe.yaml", 3) == ["SIGTERM: while hybrids were measured"] * 2
    (first,) = search_of(again)["choice"]["steps"]
    assert record_of(again, 2)["conditions"]["keep"] == "auto:1", "what is there is left alone"
    capfd.readouterr()
    assert on_ranks(2, end_in_search, again / "recipe.yaml", 0) == ["finished"] * 2
    assert capfd.readouterr().out.count("keeps softmax") == 1
    found = search_of(again)
    assert found["choice"]["steps"][0] == first and keep_of(again, 2) == sorted(found["order"])
    assert [path.name for path in run_of(again).iterdir() if "partial" in path.name] == []


def test_the_command_prints_the_order_and_training_reads_it(again: Path, capfd) -> None:
    recipe = str(again / "recipe.yaml")
    arguments = ["--recipe", recipe, "--budgets", "1", "2", "--macs_size", "32", "--stage1.lr", "0.01"]
    on_ranks(1, run_search_command, parse_search_command(arguments))
    said = capfd.readouterr().out
    found = search_of(again)
    rows = [line for line in said.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    first, second = found["choice"]["steps"]
    assert [row[0] for row in cells] == [
        "none", str(first["block"]), ", ".join(map(str, sorted((first["block"], second["block"]))))
    ]  # fmt: skip
    assert [row[2] for row in cells] == [
        f"{metrics[ERROR]:.4f}" for metrics in (found["choice"]["before"], first["metrics"], second["metrics"])
    ]
    shares = [float(row[5]) for row in cells]
    assert shares[0] < shares[1] < shares[2] < 100
    assert shares[2] - shares[1] == pytest.approx(shares[1] - shares[0], abs=0.011), "of two digits"
    assert [row[6] if len(row) > 6 else "" for row in cells] == ["", "auto:1", "auto:2"]
    assert "searching" not in rerun(again, capfd, "--keep=auto:2", stages=(2,), overwrite=True)
    with pytest.raises(AssertionError, match=r"which is chosen after Stage 1, and the run .* has no finished stage 1"):
        on_ranks(1, run_search_command, parse_search_command([*arguments, "--run_name", "other"]))
    assert not (again / "runs" / "other").exists()


def test_the_student_of_another_run_can_be_searched(again: Path, capfd) -> None:
    stage1 = run_of(again) / "stage1"
    start = f"--stage2.start_from={stage1}"
    said = rerun(again, capfd, "--run_name=second", start, stages=(2,))
    second = again / "runs" / "second"
    assert "searching 1 blocks" in said and not (second / "stage1").exists()
    assert json.loads((second / "search.json").read_text()) == search_of(again)
    assert json.loads((second / "stage2" / "model.json").read_text())["keep"] == keep_of(again, 2)
    hybrid = f"--stage2.start_from={run_of(again) / 'stage2'}"
    said = refused(again, capfd, "--run_name=third", hybrid, stages=(2,))
    assert f"has softmax attention in block {keep_of(again, 2)[0]} already, and keep is auto:1: list the blocks" in said


@pytest.mark.parametrize(
    ("overrides", "stages", "message"),
    [
        (["--keep=auto:3"], (1, 2), r"the model has 3 blocks, .* choose auto:2 at most"),
        (["--keep=auto:100%@64"], (1, 2), r"at 64 x 64 pixels that pays for softmax attention in all 3 blocks"),
        (["--keep=auto:10%@64"], (1,), r"at 64 x 64 pixels the student has \d+\.\d\d % .* allow that much"),
        (["--keep=auto:50%@66"], (1,), r"keep: image size 66 x 66 is not divisible by the patch size 4 x 4"),
        (["--search.image_size=[18, 16]"], (1,), r"search.image_size: image size 18 x 16 is not divisible"),
        (["--stage2.start_from=linearized"], (1, 2), "and stage2.start_from is linearized: list the blocks"),
        (["--stage3.start_from=linearized"], (3,), "and stage3.start_from is linearized, not auto: list the blocks"),
        (["--mechanism=softmax"], (1, 2), "and mechanism is softmax: all blocks have softmax"),
        (["--mechanism=performer", "--conversion=native"], (3,), "performer's native conversion has none: list the"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_where_there_is_nothing_to_choose_from_one_sentence_says_so(tmp_path: Path, overrides, stages, message) -> None:
    recipe = write_tiny_recipe(tmp_path, keep="auto:1", search=SEARCH)
    with pytest.raises(ValueError, match=message):
        resolve_run(load_recipe(str(recipe), overrides), stages)


def test_without_stage_1_there_is_no_search(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, keep="auto:1", search=SEARCH)
    for number in (2, 3):
        with pytest.raises(ValueError, match=r"keep is auto:1, .* has no finished stage 1: run --stage 1 first"):
            find_start(run_folder(load_recipe(str(recipe))), plan_stage(recipe, number))


def test_a_stage_1_that_kept_blocks_is_no_start(finished: Path) -> None:
    """Its block 1 was never aligned: a list of blocks is another Stage 1."""
    plan = plan_stage(finished / "recipe.yaml", 2, ["--keep=[1]"])
    with pytest.raises(ValueError, match=r"stage 1 of .* was made with keep \[\], this recipe has \[1\]"):
        find_start(run_folder(load_recipe(str(finished / "recipe.yaml"))), plan)


def test_a_start_restores_softmax_and_tells_itself_from_others(finished: Path) -> None:
    plan = plan_stage(finished / "recipe.yaml", 2, ["--stage1.lr=0.01"])
    start = find_start(run_folder(load_recipe(str(finished / "recipe.yaml"))), plan)
    assert start.digest == file_digest(run_of(finished) / "stage1" / "student.safetensors") and not start.keep
    digests = {start.restoring(blocks).digest for blocks in ((0,), (1,), (0, 1))}
    assert len(digests | {start.digest}) == 4
    teacher = build_teacher(plan.model.teacher)
    student = load_start(start.restoring((0, 2)), plan.model, teacher)
    assert torch.equal(student.blocks[2].attn.qkv.weight, teacher.blocks[2].attn.qkv.weight)
    assert not torch.equal(student.blocks[1].attn.qkv.weight, teacher.blocks[1].attn.qkv.weight)
    assert student.training and all(parameter.requires_grad for parameter in student.parameters())


def test_memory_is_planned_for_as_many_blocks_as_the_budget_pays_for(tmp_path: Path) -> None:
    """Before there are data or weights; which blocks they will be is not known then."""
    from adala.build import outline_stage
    from adala.students import linearized_blocks

    recipe = load_recipe(str(write_tiny_recipe(tmp_path, keep="auto:2", search=SEARCH)))
    counts = [len(linearized_blocks(outline_stage(plan).student)) for plan in outline_run(recipe)]
    assert counts == [3, 1, 1]
