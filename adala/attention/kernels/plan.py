"""How the fused kernels cut their work: tiles by dtype and head dim, programs by number of tokens. Pure functions.

Shapes: B batch, H heads, N tokens, d head dim. A pair is one head of one image, B H of them.
"""

from dataclasses import dataclass

import torch

MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 128, 8
# Two programs of four warps share a multiprocessor in most of the kernels; twice that evens out who finishes last.
PROGRAMS_PER_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class Tile:
    """The form of one Triton program.

    Attributes:
        block_tokens: Tokens a step.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight at once.
    """

    block_tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of both passes, and what they need.

    Attributes:
        forward: Of the two programs over tokens in the forward pass.
        backward: Of those in the backward pass.
        shared_bytes: Upper bound of a program's shared memory, in bytes: on compute capabilities 8.0 and 9.0, with q
            and k in the values' dtype or in float32.
    """

    forward: Tile
    backward: Tile
    shared_bytes: int


# By scheme (see elu_programs.py) and padded head dim. Reasoned, not timed: no GPU was at hand. Compiled for compute
# capability 9.0 by Triton 3.8, with q, k and v of one dtype, none of the programs spills a register, and for padded
# head dims up to 64 two fit on a multiprocessor. Without tensor cores (float32), products over more tokens at a time or
# with loads in flight spill hundreds of registers. No tuning at run time: it costs the first step seconds, and its
# choice changes the result.
TILES: dict[tuple[str, int], Tiles] = {
    ("bf16", 16): Tiles(Tile(64, 4, 2), Tile(64, 4, 2), 11776),
    ("bf16", 32): Tiles(Tile(64, 4, 2), Tile(64, 4, 2), 26624),
    ("bf16", 64): Tiles(Tile(64, 4, 2), Tile(64, 4, 2), 81920),
    ("bf16", 128): Tiles(Tile(64, 8, 2), Tile(32, 8, 2), 188416),
    ("tf32", 16): Tiles(Tile(64, 4, 2), Tile(64, 4, 2), 18432),
    ("tf32", 32): Tiles(Tile(64, 4, 2), Tile(64, 4, 2), 40960),
    ("tf32", 64): Tiles(Tile(64, 4, 2), Tile(64, 4, 2), 106496),
    ("tf32", 128): Tiles(Tile(64, 8, 2), Tile(32, 8, 2), 229376),
    ("float32", 16): Tiles(Tile(32, 4, 1), Tile(32, 4, 1), 5120),
    ("float32", 32): Tiles(Tile(32, 4, 1), Tile(32, 4, 1), 12288),
    ("float32", 64): Tiles(Tile(32, 8, 1), Tile(32, 8, 1), 32768),
    ("float32", 128): Tiles(Tile(16, 16, 1), Tile(16, 16, 1), 81920),
}
SCHEMES: dict[torch.dtype, str] = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "float32"}


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile's width is."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """The tiles for values of this dtype.

    Args:
        dtype: bfloat16, float16 or float32.
        head_dim: d, from 16 to 128.
    """
    return TILES[SCHEMES[dtype], padded_head_dim(head_dim)]


@dataclass(frozen=True)
class Split:
    """How the tokens of each pair are divided among programs.

    Attributes:
        splits: Programs for a pair, each with at least one token.
        span: Tokens of a program, a multiple of the block; the last program has what is left.
    """

    splits: int
    span: int


def choose_split(num_pairs: int, num_tokens: int, block_tokens: int, num_multiprocessors: int) -> Split:
    """As many programs a pair as fill the chip, and no more: each has partial sums of its own to write.

    The order of additions, and with it the last bits of the result, follows from these four numbers alone.

    Args:
        num_pairs: B H.
        num_tokens: N, at least 1.
        block_tokens: Tokens that a program takes in one step.
        num_multiprocessors: Of the device.
    """
    blocks = _divide_up(num_tokens, block_tokens)
    wanted = _divide_up(PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors, max(num_pairs, 1))
    blocks_each = _divide_up(blocks, min(wanted, blocks))
    return Split(_divide_up(blocks, blocks_each), blocks_each * block_tokens)


def _divide_up(amount: int, size: int) -> int:
    return -(-amount // size)
