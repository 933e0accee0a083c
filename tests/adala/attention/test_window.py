"""Softmax within windows: against the dense matrix and a list of who sees whom, at every kind of border."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_families import build_tiny
from tiny_teacher import build_tiny_teacher
from torch import nn

from adala.attention import AttentionShape, TokenLayout, build_mixer
from adala.attention.window import WindowMixer
from adala.students import linearize, linearized_blocks

HEADS, HEAD_DIM = 2, 6


def mixer_of(
    layout: TokenLayout, window: int, block: int = 0, summary: int = 0, stripes: bool = False
) -> WindowMixer:  # fmt: skip
    options = {"window": window, "summary": summary, "stripes": stripes}
    return build_mixer("window", AttentionShape(HEADS, HEAD_DIM, layout, block), options)


def packed_qkv(layout: TokenLayout, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Strided views of one projection, in float64."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, layout.num_tokens, 3, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def windows_of(side: int, window: int, shift: int) -> list[int]:
    """The window of each place along a side, by counting: a new one begins at the shift, and every so many places."""
    if side <= window:
        return [0] * side
    number, found = 0, []
    for place in range(side):
        number += place > 0 and place % window == shift % window
        found.append(number)
    return found


def seen_by(layout: TokenLayout, window: int, shift: int) -> torch.Tensor:
    """(N, N): whether a query (row) sees a key (column)."""
    rows, columns = (windows_of(side, window, shift) for side in layout.grid_size)
    places = [None] * layout.num_prefix_tokens + [(row, column) for row in rows for column in columns]
    return torch.tensor([[a is None or b is None or a == b for b in places] for a in places])


def cells_of(layout: TokenLayout, summary: int) -> torch.Tensor:
    """(N, N): of which tokens each token has the mean: those of its cell, a prefix token its own."""
    numbers = [[place * min(summary, side) // side for place in range(side)] for side in layout.grid_size]
    cells = [(row, column) for row in numbers[0] for column in numbers[1]]
    cells = [*range(layout.num_prefix_tokens), *cells]
    together = torch.tensor([[a == b for b in cells] for a in cells], dtype=torch.float64)
    return together / together.sum(1, keepdim=True)


def by_reference(student: nn.Module) -> nn.Module:
    """A copy that mixes by way of the N x N matrix."""
    dense = copy.deepcopy(student)
    for shell in linearized_blocks(dense).values():
        shell.token_mixer.forward = shell.token_mixer.reference
    return dense


# One window, whole windows, rests on one side and on both, narrower than a window, wider than two, a single patch.
GRIDS = [(4, 4), (8, 8), (9, 7), (13, 5), (3, 17), (5, 1), (1, 1), (12, 11)]


@pytest.mark.parametrize("block", [0, 3], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_output_and_gradients_are_those_of_the_tokens_that_are_seen(grid, window, prefix, block) -> None:
    """Of the formula, and of the class's own reference."""
    layout = TokenLayout(grid, prefix)
    mixer, inputs = mixer_of(layout, window, block), [x.requires_grad_() for x in packed_qkv(layout)]
    sees = seen_by(layout, window, window // 2 if block else 0)
    q, k, v = inputs
    scores = (q @ k.mT / HEAD_DIM**0.5).masked_fill(~sees, -torch.inf)
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for out in (mixer(*inputs, layout), scores.softmax(-1) @ v, mixer.reference(*inputs, layout)):
        results.append((out, *torch.autograd.grad(out, inputs, direction)))
    for ours, expected in zip(results[0] + results[2], results[1] * 2, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("window, summary", [(3, 1), (4, 2), (4, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_what_is_far_counts_as_the_mean_of_its_cell(grid, window, summary, prefix, block) -> None:
    """Output and gradients, by keys and values that are written out for every pair of tokens; in no block shifted."""
    layout = TokenLayout(grid, prefix)
    mixer, inputs = mixer_of(layout, window, block, summary), [x.requires_grad_() for x in packed_qkv(layout)]
    sees, means = seen_by(layout, window, 0), cells_of(layout, summary)
    q, k, v = inputs
    keys, values = (torch.where(sees[..., None], x[:, :, None], (means @ x)[:, :, None]) for x in (k, v))
    weights = (torch.einsum("bhid,bhijd->bhij", q, keys) / HEAD_DIM**0.5).softmax(-1)
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for out in (mixer(*inputs, layout), torch.einsum("bhij,bhijd->bhid", weights, values)):
        results.append((out, *torch.autograd.grad(out, inputs, direction)))
    results.append((mixer.reference(*inputs, layout),))
    for ours, expected in zip((*results[0], *results[2]), (*results[1], results[1][0]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("summary", [0, 3])
@pytest.mark.parametrize("block", [0, 3], ids=["rows", "columns"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_stripes_are_rows_and_in_the_next_block_columns(grid, window, prefix, block, summary) -> None:
    """Output and gradients, by keys and values that are written out for every pair of tokens."""
    layout = TokenLayout(grid, prefix)
    mixer = mixer_of(layout, window, block, summary, stripes=True)
    inputs = [x.requires_grad_() for x in packed_qkv(layout)]
    across = [place // window for place in range(grid[1 if block else 0])]
    stripes = [across[column if block else row] for row in range(grid[0]) for column in range(grid[1])]
    places = [None] * prefix + stripes
    sees = torch.tensor([[a is None or b is None or a == b for b in places] for a in places])
    q, k, v = inputs
    if summary:
        means = cells_of(layout, summary)
        keys, values = (torch.where(sees[..., None], x[:, :, None], (means @ x)[:, :, None]) for x in (k, v))
        weights = (torch.einsum("bhid,bhijd->bhij", q, keys) / HEAD_DIM**0.5).softmax(-1)
        expected = torch.einsum("bhij,bhijd->bhid", weights, values)
    else:
        expected = (q @ k.mT / HEAD_DIM**0.5).masked_fill(~sees, -torch.inf).softmax(-1) @ v
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = (expected, *torch.autograd.grad(expected, inputs, direction))
    for out in (mixer(*inputs, layout), mixer.reference(*inputs, layout)):
        for ours, theirs in zip((out, *torch.autograd.grad(out, inputs, direction)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("grid", [(6, 6), (5, 9)], ids=str)
def test_as_many_cells_as_patches_are_softmax(grid, block) -> None:
    layout = TokenLayout(grid, 1)
    inputs = packed_qkv(layout)
    expected = F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(mixer_of(layout, 4, block, summary=9)(*inputs, layout), expected)
    assert not torch.allclose(mixer_of(layout, 4, block, summary=4)(*inputs, layout), expected)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("grid", [(8, 8), (5, 8), (1, 3)], ids=str)
def test_a_grid_that_fits_into_a_window_is_softmax_to_the_bit(grid, block) -> None:
    layout = TokenLayout(grid, 1)
    inputs = packed_qkv(layout)
    assert torch.equal(mixer_of(layout, 8, block)(*inputs, layout), F.scaled_dot_product_attention(*inputs))


def test_what_one_block_keeps_apart_the_next_one_sees_together() -> None:
    """Of 8 x 8 patches in windows of 4: neighbours on both sides of the middle."""
    layout = TokenLayout((8, 8), 1)
    left, right = 1 + 3 * 8 + 3, 1 + 3 * 8 + 4
    q, k, v = packed_qkv(layout, batch=1)
    changed = v.clone()
    changed[:, :, right] += 1
    for block, is_seen in ((0, False), (1, True), (2, False)):
        mix = partial(mixer_of(layout, 4, block), q, k, layout=layout)
        difference = (mix(changed) - mix(v)).abs().amax(dim=(0, 1, 3))
        assert (difference[left] > 0) == is_seen and difference[0] > 0


@pytest.mark.parametrize("block", [0, 1])
def test_every_pass_is_fused_and_without_a_mask(block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window size once, whatever the number of windows; and the prefix tokens."""
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **named: calls.append(named) or attention(*x))
    for grid in ((24, 24), (48, 48)):
        calls.clear()
        layout = TokenLayout(grid, 1)
        mixer_of(layout, 8, block)(*packed_qkv(layout), layout)
        assert calls == [{}] * (10 if block else 2)


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "8"], ids=repr)
def test_a_window_is_a_whole_number_of_patches(window) -> None:
    with pytest.raises(ValueError, match=r"option window is .*: it must be a whole number of patches, at least 1"):
        mixer_of(TokenLayout((2, 2), 0), window)


@pytest.mark.parametrize("summary", [-1, 1.5, True, "8"], ids=repr)
def test_a_summary_is_a_whole_number_of_cells(summary) -> None:
    with pytest.raises(ValueError, match=r"option summary is .*: it must be a whole number of cells, 0 for none"):
        mixer_of(TokenLayout((2, 2), 0), 2, summary=summary)


@pytest.mark.parametrize("stripes", [1, "true", None], ids=repr)
def test_stripes_are_true_or_false(stripes) -> None:
    with pytest.raises(ValueError, match=r"option stripes is .*: it must be true or false"):
        mixer_of(TokenLayout((2, 2), 0), 2, stripes=stripes)


@pytest.mark.parametrize("summary", [0, 2], ids=["alone", "summary"])
@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_one_student_takes_images_of_several_sizes(changes, summary: int) -> None:
    """Before one backward pass, recomputed or not; two sizes have as many tokens as each other."""
    teacher, gradients = build_tiny_teacher(**changes), []
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, *size, generator=generator) for size in ((8, 32), (32, 8), (20, 28), (16, 16))]
    student = linearize(teacher, "window", options={"window": 2, "summary": summary})
    for checkpointing in (False, True):
        student.set_grad_checkpointing(checkpointing)
        student.zero_grad(set_to_none=True)
        sum(student(images).square().mean() for images in batches).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert student.state_dict().keys() == teacher.state_dict().keys()
    dense = by_reference(student.eval())
    for images in batches:
        torch.testing.assert_close(student(images), dense(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(24, 20), (16, 16)], ids=str)
@pytest.mark.parametrize("kind", ["dinov3", "eva02_base", "rope_mixed", "sapiens2"])
@torch.no_grad()
def test_rotary_embeddings_come_before_the_windows(kind: str, size) -> None:
    """One window over the image is the teacher; smaller ones are the dense matrix on rotated queries and keys."""
    teacher, images = build_tiny(kind), torch.randn(2, 3, *size)
    torch.testing.assert_close(linearize(teacher, "window").eval()(images), teacher(images), rtol=1e-4, atol=1e-4)
    student = linearize(teacher, "window", options={"window": 2}).eval()
    torch.testing.assert_close(student(images), by_reference(student)(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(student(images), teacher(images), atol=1e-2)


@torch.no_grad()
def test_shifts_follow_the_number_of_the_block() -> None:
    student = linearize(build_tiny_teacher(), "linear", keep=[0], block_mechanisms={1: "window", 2: "window"})
    assert [shell.token_mixer.shape.block for shell in linearized_blocks(student).values()] == [1, 2]
    student.set_input_size((24, 24))
    assert [shell.token_mixer.shape.block for shell in linearized_blocks(student).values()] == [1, 2]


@pytest.mark.parametrize("summary", [0, 2], ids=["alone", "summary"])
def test_a_student_compiles_into_one_graph_and_trains_alike(summary: int) -> None:
    student = linearize(build_tiny_teacher((24, 20)), "window", options={"window": 4, "summary": summary})
    images = torch.randn(2, 3, 24, 20)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    found = []
    for model in (student, compiled):
        student.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        found.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(found[1], found[0])
