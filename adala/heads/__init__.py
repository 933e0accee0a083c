"""Task heads: from the features of all tokens (B, N, D), and how these lie, to predictions."""

from adala.heads.pooled import ClassificationHead, Pooling, pool_tokens

__all__ = ["ClassificationHead", "Pooling", "pool_tokens"]
