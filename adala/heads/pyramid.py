"""Maps at four scales out of the last feature map of a plain ViT.

Shapes: B batch, D embed dim, h x w patch grid.
"""

from timm.layers import LayerNorm2d
from torch import Tensor, nn


class SimpleFeaturePyramid(nn.Module):
    """Four times, twice, once and half the resolution of the patch grid: strides 4, 8, 16, 32 where a patch is 16.

    Paper: arXiv 2203.16527 (ViTDet), section 3, "Simple feature pyramid".
    Differs: no projection of every scale to one width, because the pixel decoder that reads them begins with its own;
        the coarsest map comes from a 3 x 3 convolution of stride 2, which halves odd grids too, rounding up.

    Attributes:
        channels: Of the maps, finest first.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4
        self.channels = (quarter, half, embed_dim, embed_dim)
        self.to_quarter_stride = nn.Sequential(
            nn.ConvTranspose2d(embed_dim, half, kernel_size=2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2),
        )
        self.to_half_stride = nn.ConvTranspose2d(embed_dim, half, kernel_size=2, stride=2)
        self.to_double_stride = nn.Conv2d(embed_dim, embed_dim, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, D / 4, 4 h, 4 w), (B, D / 2, 2 h, 2 w), (B, D, h, w), (B, D, h / 2, w / 2) of ``x`` (B, D, h, w)."""
        return [self.to_quarter_stride(x), self.to_half_stride(x), x, self.to_double_stride(x)]
