"""The adaptation stages by name; each is an nn.Module from a batch to named scalar losses."""

from adala.stages.attention_alignment import AttentionAlignment
from adala.stages.base import Stage
from adala.stages.feature_alignment import FeatureAlignment
from adala.stages.finetuning import Finetuning

__all__ = ["AttentionAlignment", "FeatureAlignment", "Finetuning", "Stage"]
