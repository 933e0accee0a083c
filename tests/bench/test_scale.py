"""docs/SCALE.md shows what the command writes, and the command computes what it says."""

import pytest
import scale


@pytest.fixture(scope="module")
def loads() -> list[scale.Load]:
    return scale.loads()


def test_the_page_has_the_tables_of_the_command(loads, monkeypatch) -> None:
    """Written anew by `python bench/scale.py --write`."""
    monkeypatch.setattr(scale, "loads", lambda: loads)
    shown = scale.PAGE.read_text(encoding="utf-8").partition(scale.BEGIN)[2]
    assert shown.strip() == scale.tables(scale.parse([])).strip()


def test_flops_are_those_of_the_formula(loads) -> None:
    """Of ViT-L: 24 blocks of 12 D^2 weights, and softmax attention in the teacher alone; D = 1024, N = 1370."""
    stage_2 = loads[1]
    assert (stage_2.model, stage_2.plan.number, stage_2.counts.frozen) == ("ViT-L/14", 2, 0)
    weights, softmax = 2 * 1370 * 24 * 12 * 1024**2, 24 * 4 * 1370**2 * 1024
    # A backward pass is twice its forward pass; the patch embedding and linear attention come on top.
    assert 1 < stage_2.flops / (4 * weights + softmax) < 1.03


def test_a_step_is_arithmetic_and_traffic(loads) -> None:
    of = scale.parse(["--utilization", "0.5", "--network_gb_per_s", "100"])
    one, many = (scale.Scale(loads[1], gpus, of) for gpus in (8, 64))
    assert (one.images, many.images, many.accumulation) == (16, 2, 1)
    assert one.compute_s == pytest.approx(16 * loads[1].flops / 494.5e12)
    trained = loads[1].counts.trained
    assert one.sent_gb(1) == pytest.approx((8 + 2) * trained * 7 / 8 / 1e9, rel=1e-6)
    assert (one.sending_s, many.sending_s) == pytest.approx((one.sent_gb(1) / 450, many.sent_gb(1) / 100))
    assert many.images_per_s == pytest.approx(128 / (many.compute_s + many.sending_s))
    assert many.hours(3_840_000) == pytest.approx(30_000 * (many.compute_s + many.sending_s) / 3600)
    assert (one.pause_s, many.writing_s) == pytest.approx((12 * trained / 8 / 25e9, 12 * trained / 8 / 2e9))
    assert one.skipped == pytest.approx(8 * 6 * 50 / 1_306_400)


def test_a_batch_grows_with_the_gpus(loads) -> None:
    large = scale.Scale(loads[0], 512, scale.parse([]))
    assert (loads[0].plan.config.global_batch_size, large.global_batch_size, large.images) == (64, 512, 1)


def test_assumptions_are_above_zero(capsys) -> None:
    with pytest.raises(SystemExit):
        scale.parse(["--utilization", "0"])
    assert "--utilization is 0.0: it must be above 0" in capsys.readouterr().err


def test_what_is_measured_is_of_the_size_that_is_assumed() -> None:
    assert len(scale.photo_like_jpeg(92_000)) == pytest.approx(92_000, rel=0.15)
