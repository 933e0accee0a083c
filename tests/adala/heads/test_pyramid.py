"""Scales and places of the simple feature pyramid."""

import torch

from adala.heads.pyramid import SimpleFeaturePyramid


def test_four_scales_of_any_grid() -> None:
    pyramid = SimpleFeaturePyramid(16)
    assert pyramid.channels == (4, 8, 16, 16)
    x = torch.randn(2, 16, 3, 6)
    maps = pyramid(x)
    assert [tuple(level.shape) for level in maps] == [(2, 4, 12, 24), (2, 8, 6, 12), (2, 16, 3, 6), (2, 16, 2, 3)]
    assert maps[2] is x
    assert [tuple(level.shape[2:]) for level in pyramid(x[..., :1, :1])] == [(4, 4), (2, 2), (1, 1), (1, 1)]


def test_a_patch_stays_in_its_place_at_every_scale() -> None:
    """Above the patch grid a patch moves its own cells alone, all of them; below, those that its stride covers."""
    pyramid = SimpleFeaturePyramid(16)
    x = torch.randn(1, 16, 4, 4)
    changed = x.clone()
    changed[..., 1, 2] += 1
    moved = [(after - before).abs().sum((0, 1)) > 0 for before, after in zip(pyramid(x), pyramid(changed), strict=True)]
    for level, cells in ((0, 4), (1, 2), (2, 1)):
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[1, 2] = True
        assert torch.equal(moved[level], expected.repeat_interleave(cells, 0).repeat_interleave(cells, 1))
    # Outputs lie at even rows and columns, and see one to either side: row 1 is seen from 0 and 2, column 2 from 2.
    assert moved[3].tolist() == [[False, True], [False, True]]


def test_nothing_but_the_scales_is_learnt() -> None:
    assert {name.split(".")[0] for name, _ in SimpleFeaturePyramid(16).named_parameters()} == {
        "to_quarter_stride",
        "to_half_stride",
        "to_double_stride",
    }
