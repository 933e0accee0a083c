"""What is said of a training command that fails."""

import command
import pytest
from command import TrainingFailed, run_training


@pytest.mark.parametrize(
    "output, said",
    [
        ("loading\nerror: stage1.steps must be positive\n[ERROR] rank 0 exits with 2\n", "error: stage1.steps"),
        ("[rank1]: ValueError: first\n[rank1]: torch.OutOfMemoryError: last\nmain exits with 1", "torch.OutOfMemory"),
        ("a warning about an error\nkilled", "killed"),
        ("", "no output"),
    ],
)
def test_the_telling_line(output, said):
    assert said in command.telling_line(output)


def test_a_failed_command_is_an_exception_with_its_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # else it would wait for a second rank
    with pytest.raises(TrainingFailed, match=r"error: .*no_such_recipe.* \(exit code [12]\)"):
        run_training(["--recipe", "no_such_recipe", "--stage", "1"])
