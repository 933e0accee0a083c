"""How the tokens of a sequence lie: prefix tokens (class token, registers) first, then the patches in raster order."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TokenLayout:
    """The arrangement of one sequence's tokens.

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


class LayoutTracker:
    """Keeps the layout of the images that a model is looking at, for all attention shells of that model.

    timm's blocks pass tokens only, so a hook on the patch embedding reads each batch's image size. The tracker is a
    plain object and the hook one of its methods, so that a deep copy of a model gets a tracker of its own.
    """

    def __init__(self, layout: TokenLayout, patch_size: tuple[int, int]):
        self.current = layout
        self._patch_size = patch_size

    def attach(self, patch_embed: nn.Module) -> None:
        patch_embed.register_forward_pre_hook(self.observe)

    def observe(self, patch_embed: nn.Module, inputs: tuple) -> None:
        height, width = inputs[0].shape[-2:]
        # Rounded up: timm's `dynamic_img_pad` pads, and refuses what does not divide when it is off.
        grid_size = (-(-height // self._patch_size[0]), -(-width // self._patch_size[1]))
        if grid_size != self.current.grid_size:
            self.current = TokenLayout(grid_size, self.current.num_prefix_tokens)
