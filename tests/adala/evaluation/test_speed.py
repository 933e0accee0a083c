"""Speeds of models whose cost is known: by a clock of their own, and by the tensors they hold."""

import pytest
import torch
from torch import Tensor, nn

from adala.evaluation import measure_speed, speed

IMAGES = torch.zeros(4, 3, 8, 8)
MIB = 2**20


class Clocked(nn.Module):
    """Takes so many seconds a pass on a clock that nothing else moves."""

    now = 0.0

    def __init__(self, seconds: list[float], name: str = "", log: list | None = None):
        super().__init__()
        self.seconds, self.name, self.log, self.passes = seconds, name, log, 0

    def forward(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        Clocked.now += self.seconds[min(self.passes, len(self.seconds) - 1)]
        self.passes += 1
        if self.log is not None:
            self.log.append(self.name)
        return images


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "perf_counter", lambda: Clocked.now)


@pytest.mark.usefixtures("clock")
def test_speed_is_images_by_time_and_ratios_are_taken_round_by_round() -> None:
    # Warm-up, the pass that is timed to size a sample, the pass whose memory is measured; then five rounds.
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    slow, fast = Clocked([1.0] * 3 + drift), Clocked([1.0] * 3 + [second / 2 for second in drift])
    found = measure_speed({"slow": slow, "fast": fast}, IMAGES, rounds=5, warmup=1)
    assert found["slow"].images_per_s == pytest.approx(4 / 4.0) and found["slow"].against_first == 1.0
    assert found["fast"].images_per_s == pytest.approx(4 / 2.0) and found["fast"].against_first == pytest.approx(2.0)
    assert found["slow"].images_per_s_p20 < found["slow"].images_per_s < found["slow"].images_per_s_p80
    assert (found["slow"].images_per_s_p20, found["slow"].images_per_s_p80) == pytest.approx((0.45, 2.4))


@pytest.mark.usefixtures("clock")
def test_a_sample_is_long_enough_for_the_clock() -> None:
    model = Clocked([0.02])
    found = measure_speed({"one": model}, IMAGES, rounds=2, warmup=4)
    assert found["one"].images_per_s == pytest.approx(4 / 0.02)
    assert model.passes == 4 + 1 + 1 + 2 * 3


@pytest.mark.usefixtures("clock")
def test_each_round_begins_with_another_model() -> None:
    log = []
    measure_speed({name: Clocked([1.0], name, log) for name in "abc"}, IMAGES, rounds=4, warmup=1)
    assert log[9:] == list("abcbcacababc")


class Holding(nn.Module):
    """4 MiB of weights; holds tensors of 8 and 16 MiB at once, then one of 2 MiB."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(MIB))
        self.register_buffer("same", self.weight.data)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.zeros(2 * MIB)
        second = torch.zeros(4 * MIB)
        del first, second
        return torch.zeros(MIB // 2)


def test_peak_memory_is_weights_images_and_what_is_held_at_once() -> None:
    images = torch.zeros(1, 3, 512, 512)
    found = measure_speed({"one": Holding(), "two": nn.Identity()}, images, rounds=1)
    assert found["one"].peak_memory_mib == pytest.approx(4 + 3 + 24, abs=0.01)


def test_one_of_each_is_needed() -> None:
    with pytest.raises(ValueError, match="0 models, 4 images and 1 rounds"):
        measure_speed({}, IMAGES, rounds=1)
    with pytest.raises(ValueError, match="speed needs one of each"):
        measure_speed({"one": Clocked([1.0])}, IMAGES, rounds=0)
