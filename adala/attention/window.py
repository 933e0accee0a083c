"""Softmax within windows of the patch grid: linear in N, and a token's weights on its surroundings stay softmax's.

Shapes: B batch, H heads, N tokens, P prefix tokens, d head dim, w side of a window in patches, R, C rows and columns of
the patch grid, s cells along a side of it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adala.attention.base import TokenMixer
from adala.attention.layout import TokenLayout
from adala.attention.precision import accumulation_dtype, full_precision


@dataclass(frozen=True)
class WindowOptions:
    """Options of softmax within windows.

    Attributes:
        window: w, side of a window in patches.
        summary: s; the grid is divided into s x s cells, and of each a query sees the mean key and value of the patches
            in place of those that lie outside its window. 0 leaves them out.
        stripes: Whether windows are w rows as wide as the grid, and in blocks of odd number w columns as high as the
            grid, in place of squares.
    """

    window: int = 8
    summary: int = 0
    stripes: bool = False

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise ValueError(f"option window is {self.window!r}: it must be a whole number of patches, at least 1")
        if type(self.summary) is not int or self.summary < 0:
            raise ValueError(f"option summary is {self.summary!r}: it must be a whole number of cells, 0 for none")
        if type(self.stripes) is not bool:
            raise ValueError(f"option stripes is {self.stripes!r}: it must be true or false")


class WindowMixer(TokenMixer):
    """softmax(d^-1/2 q k^T) v among the patches of a w x w window and the prefix tokens. 2 N (w^2 + 2 P + s^2) D MACs.

    In blocks of odd number windows begin half a window further up and left, so that what one block keeps apart the
    next one sees together; with a summary they do not. Prefix tokens are global: every query sees their keys, and
    theirs see all tokens. A side of the grid that is no longer than w is one window; where both are, this is softmax
    itself. No parameters.

    With ``stripes`` a window is w whole rows of the grid, in blocks of odd number w whole columns, of L patches each:
    2 N (w L + 2 P + s^2) D MACs. Where squares begin and end, features may differ from window to window; what ends in
    one block is crossed in the next here.

    With a ``summary``, the patches outside the window count as if each had the mean key and value of its cell: n of
    them together weigh n exp(d^-1/2 q mean(k)). As many cells as patches along both sides are softmax, too.

    Paper: arXiv 2103.14030 (Swin), section 3.2; arXiv 2004.05150 (Longformer), section 3.1, for the global tokens;
        arXiv 2107.00641 (Focal Transformer), section 3.2, for pooled keys and values of what is far; arXiv 2107.00652
        (CSWin), section 3.1, for stripes.
    Differs: windows at the border are cut off, where Swin moves the grid around and masks what was not adjacent; there
        is no table of relative positions, since pretrained weights know none; cells are means, weighted by how many
        patches they stand for, where the Focal Transformer learns their pooling; stripes of one direction are of all
        heads of a block, where CSWin gives half of them to each.
    """

    Options = WindowOptions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        with full_precision(v):
            return window_attention(q, k, v, layout, *self._division(layout), self.options.summary)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        return window_attention_reference(q, k, v, layout, *self._division(layout), self.options.summary)

    def _division(self, layout: TokenLayout) -> tuple[list["Run"], list["Run"]]:
        """How rows and columns of the grid are cut."""
        window, is_odd = self.options.window, self.shape.block % 2 == 1
        rows, columns = layout.grid_size
        if self.options.stripes:
            whole = [Run(0, rows if is_odd else columns, 1)]
            return (whole, _runs(columns, window, 0)) if is_odd else (_runs(rows, window, 0), whole)
        # Cells tell windows of each other already; nine sizes of windows in the place of one take longer.
        shift = window // 2 if is_odd and not self.options.summary else 0
        return _runs(rows, window, shift), _runs(columns, window, shift)


class Run(NamedTuple):
    """Windows of one size beside each other, along one side of the grid: ``size`` in patches."""

    start: int
    size: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.size * self.count


def _runs(side: int, window: int, shift: int) -> list[Run]:
    """How a side of the grid is cut: what the shift leaves before the first whole window, these, and the rest."""
    if side <= window:
        return [Run(0, side, 1)]
    whole = Run(shift, window, (side - shift) // window)
    return [run for run in (Run(0, shift, 1), whole, Run(whole.end, side - whole.end, 1)) if run.end > run.start]


@dataclass(frozen=True)
class _Cells:
    """The division of the grid into cells, for all windows.

    Attributes:
        keys: Mean keys, (B, H, cells, d).
        values: Mean values, (B, H, cells, d).
        summary: s.
    """

    keys: Tensor
    values: Tensor
    summary: int


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    rows: Sequence[Run],
    columns: Sequence[Run],
    summary: int = 0,
) -> Tensor:
    """Softmax within windows: those of one size, of which there are nine at most, go together.

    Args:
        q: Queries, (B, H, N, d), possibly strided.
        k: Keys, (B, H, N, d).
        v: Values, (B, H, N, d).
        layout: Of the N tokens.
        rows: How the rows of the grid are cut; where they meet the ``columns`` are the windows.
        columns: How its columns are.
        summary: s; 0 is without cells, and without a mask.

    Returns:
        (B, H, N, d) in the dtype of ``v``.
    """
    if [run.count for run in (*rows, *columns)] == [1, 1]:
        return F.scaled_dot_product_attention(q, k, v)
    cells = _Cells(_cell_means(k, layout, summary), _cell_means(v, layout, summary), summary) if summary else None
    strips = [
        torch.cat([_mix_windows(q, k, v, layout, row, column, cells) for column in columns], dim=3)
        for row in rows  # each (B, H, rows, C, d)
    ]
    patches = torch.cat(strips, dim=2).flatten(2, 3)
    prefix = layout.num_prefix_tokens
    if prefix == 0:
        return patches
    return torch.cat((F.scaled_dot_product_attention(q[:, :, :prefix], k, v), patches), dim=2)


def _mix_windows(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, row: Run, column: Run, cells: _Cells | None
) -> Tensor:
    """The output of the patches where two runs of windows meet, (B, H, their rows, their columns, d)."""
    prefix, num_windows = layout.num_prefix_tokens, row.count * column.count

    def windows_of(x: Tensor, *shared: Tensor) -> Tensor:
        grid = x[:, :, prefix:].unflatten(2, layout.grid_size)[:, :, row.start : row.end, column.start : column.end]
        apart = grid.unflatten(3, (column.count, column.size)).unflatten(2, (row.count, row.size))
        patches = apart.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)  # (B, windows, H, patches, d)
        expanded = [tokens[:, None].expand(-1, num_windows, -1, -1, -1) for tokens in shared]
        return torch.cat((*expanded, patches), dim=3).flatten(0, 1) if shared else patches.flatten(0, 1)

    seen = [(k[:, :, :prefix], v[:, :, :prefix])] if prefix else []
    named = {}
    if cells is not None:
        seen.append((cells.keys, cells.values))
        bias = _cell_bias(layout, row, column, cells.summary, q.dtype, q.device)
        bias = F.pad(bias, (prefix, row.size * column.size))
        named["attn_mask"] = bias.repeat(q.shape[0], 1)[:, None, None]
    keys, values = zip(*seen, strict=True) if seen else ((), ())
    mixed = F.scaled_dot_product_attention(windows_of(q), windows_of(k, *keys), windows_of(v, *values), **named)
    apart = mixed.unflatten(0, (-1, row.count, column.count)).unflatten(4, (row.size, column.size))
    return apart.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


def _members(side: int, summary: int) -> Tensor:
    """Which places along a side are of which cell, (cells, places) of 0 and 1 in float64 on the CPU.

    There are as many cells as places at most, and their sizes differ by one at most.
    """
    cells = min(summary, side)
    place = torch.arange(side, device="cpu")
    return (place * cells // side == torch.arange(cells, device="cpu")[:, None]).double()


def _cell_means(x: Tensor, layout: TokenLayout, summary: int) -> Tensor:
    """Means of the patches of each cell, (B, H, cells, d) of (B, H, N, d)."""
    grid = x[:, :, layout.num_prefix_tokens :].unflatten(2, layout.grid_size)
    if all(side % min(summary, side) == 0 for side in layout.grid_size):
        rows, columns = (min(summary, side) for side in layout.grid_size)
        # What the product below is, in a hundredth of its operations.
        return grid.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).mean((3, 5)).flatten(2, 3)
    members = [_members(side, summary) for side in layout.grid_size]
    means = [(each / each.sum(1, keepdim=True)).to(x) for each in members]
    return torch.einsum("ar,bc,zhrcd->zhabd", *means, grid).flatten(2, 3)


@functools.lru_cache(maxsize=256)
def _cell_bias(
    layout: TokenLayout, row: Run, column: Run, summary: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The logarithm of how many patches of each cell lie outside of each window, (windows, cells)."""
    inside, sizes = [], []
    # A cache filled during an evaluation under inference mode must still serve a training step.
    with torch.inference_mode(False):
        for side, run in zip(layout.grid_size, (row, column), strict=True):
            members = _members(side, summary)
            inside.append(members[:, run.start : run.end].unflatten(1, (run.count, run.size)).sum(2))
            sizes.append(members.sum(1))
        within = torch.einsum("ai,bj->ijab", *inside).flatten(2, 3).flatten(0, 1)
        outside = torch.outer(*sizes).flatten() - within
        return outside.log().to(device=device, dtype=dtype)


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    rows: Sequence[Run],
    columns: Sequence[Run],
    summary: int = 0,
) -> Tensor:
    """The same by way of an N x N matrix of scores, (B, H, N, d) in and out.

    A patch outside the window has the score, and the value, of the mean of its cell.
    """
    sizes = [torch.tensor([run.size for run in runs for _ in range(run.count)]) for runs in (rows, columns)]
    numbers = [torch.arange(len(each)).repeat_interleave(each).to(q.device) for each in sizes]
    window_of = torch.cartesian_prod(*numbers)  # (R C, 2)
    sees = (window_of[:, None] == window_of).all(-1)
    prefix = layout.num_prefix_tokens
    sees = F.pad(sees, (prefix, 0, prefix, 0), value=True)
    dtype = accumulation_dtype(q)
    q, keys, values = (q.shape[-1] ** -0.5 * q).to(dtype), k.to(dtype), v.to(dtype)
    scores = q @ keys.transpose(-2, -1)
    if not summary:
        return (scores.masked_fill(~sees, float("-inf")).softmax(-1) @ values).to(v.dtype)
    # (N, N): each patch to the mean of its cell, prefix tokens to themselves.
    rows, columns = ((each := _members(side, summary)).T @ each for side in layout.grid_size)
    together = F.pad(torch.kron(rows, columns).to(q), (prefix, 0, prefix, 0))
    together[range(prefix), range(prefix)] = 1
    mean = together / together.sum(1, keepdim=True)
    weights = torch.where(sees, scores, q @ (mean @ keys).transpose(-2, -1)).softmax(-1)
    return (weights * sees @ values + weights * ~sees @ (mean @ values)).to(v.dtype)
