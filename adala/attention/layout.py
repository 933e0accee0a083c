"""How the tokens of a sequence lie: prefix tokens (class token, registers) first, then the patches in raster order."""

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """The arrangement of one sequence's tokens.

    It travels beside the tokens, as an argument; what a model saw before never decides what it computes now.

    Attributes:
        grid_size: Rows and columns of the patch grid.
        num_prefix_tokens: Tokens before the patches: 0, 1 (class token) or 5 (class token and four registers), say.
    """

    grid_size: tuple[int, int]
    num_prefix_tokens: int

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches


@functools.cache
def layout_of_image(height: int, width: int, patch_size: tuple[int, int], num_prefix_tokens: int) -> TokenLayout:
    """The layout of an image of ``height`` x ``width`` pixels; always the same object for the same arguments."""
    # Rounded up: timm's `dynamic_img_pad` pads, and refuses what does not divide when it is off.
    return TokenLayout((-(-height // patch_size[0]), -(-width // patch_size[1])), num_prefix_tokens)


def layout_of_tokens(num_tokens: int, usual: TokenLayout) -> TokenLayout:
    """The layout of a bare sequence, for which nobody said how it lies: the usual one, else a square grid.

    Args:
        num_tokens: N.
        usual: The layout that the model was built for.

    Raises:
        ValueError: The tokens are neither.
    """
    if num_tokens == usual.num_tokens:
        return usual
    side = math.isqrt(max(0, num_tokens - usual.num_prefix_tokens))
    if side == 0 or side**2 + usual.num_prefix_tokens != num_tokens:
        raise ValueError(
            f"{num_tokens} tokens reached an attention layer, but the model's {usual.grid_size[0]} x "
            f"{usual.grid_size[1]} patch grid with {usual.num_prefix_tokens} prefix tokens has {usual.num_tokens}, and "
            "no square grid has so many: call the whole model, or pass attn_mask=TokenLayout(grid_size, "
            f"{usual.num_prefix_tokens})"
        )
    return TokenLayout((side, side), usual.num_prefix_tokens)
