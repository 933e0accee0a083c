"""Task heads: from the features of all tokens (B, N, D), and how these lie, to predictions."""

from adala.heads.pooled import ClassificationHead, Pooling, pool_tokens
from adala.heads.segmentation import SEGMENTATION_HEADS, build_segmentation_head, semantic_logits

__all__ = [
    "SEGMENTATION_HEADS",
    "ClassificationHead",
    "Pooling",
    "build_segmentation_head",
    "pool_tokens",
    "semantic_logits",
]
