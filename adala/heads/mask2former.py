"""Mask2Former's pixel decoder and transformer decoder on a plain ViT, through a simple feature pyramid.

Shapes: B batch, N tokens, D embed dim, Q queries, K classes, h x w patch grid.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adala.attention import TokenLayout
from adala.families import Backbone
from adala.heads.dense import patch_map
from adala.heads.pyramid import SimpleFeaturePyramid

# transformers normalises the pixel decoder's maps in so many groups.
GROUPS = 32


@dataclass(frozen=True)
class Mask2FormerOptions:
    """Options of the head ``mask2former``; the defaults are the paper's.

    Attributes:
        num_queries: Q.
        width: Channels of pixel decoder, transformer decoder and mask features.
        num_heads: Attention heads of both decoders.
        pixel_decoder_layers: Layers of deformable attention over three scales.
        pixel_decoder_mlp_width: Hidden width of their MLPs.
        decoder_layers: Layers of masked attention of the queries.
        decoder_mlp_width: Hidden width of their MLPs.
    """

    num_queries: int = 100
    width: int = 256
    num_heads: int = 8
    pixel_decoder_layers: int = 6
    pixel_decoder_mlp_width: int = 1024
    decoder_layers: int = 9
    decoder_mlp_width: int = 2048


class Mask2FormerHead(nn.Module):
    """transformers' Mask2Former without its backbone; nothing is downloaded, all weights start at random.

    Paper: arXiv 2112.01527.
    Differs: reads a simple feature pyramid instead of a hierarchical backbone. With weights in bf16, positions at which
        the deformable attention samples are bf16 too: exact to 128 cells along an edge that is a power of two, else
        up to a seventh of a cell off at 74 (518 px in patches of 14).
    """

    Options = Mask2FormerOptions

    def __init__(self, student: Backbone, num_classes: int, options: Mask2FormerOptions):
        """Builds the head for the features of ``student``.

        Raises:
            ValueError: transformers is not installed, or a width does not divide into groups and heads.
        """
        super().__init__()
        if options.width % GROUPS or options.width % options.num_heads:
            raise ValueError(
                f"head mask2former: width {options.width} must be a multiple of {GROUPS} and of num_heads "
                f"({options.num_heads})"
            )
        self.pyramid = SimpleFeaturePyramid(student.embed_dim)
        self.pixel_decoder, self.decoder = _build_decoders(options, list(self.pyramid.channels))
        self.classifier = nn.Linear(options.width, num_classes + 1)

    def forward(self, features: Tensor, layout: TokenLayout) -> dict[str, Any]:
        """Classes and masks of the queries.

        Args:
            features: Of all tokens, (B, N, D).
            layout: How they lie.

        Returns:
            ``class_logits`` (B, Q, K + 1), whose last class is "no object", and ``mask_logits`` (B, Q, 4 h, 4 w);
            ``auxiliary``, the same of the queries before each layer, in training mode, else empty.
        """
        pixels = self.pixel_decoder(self.pyramid(patch_map(features, layout)))
        decoded = self.decoder(pixels.multi_scale_features, pixels.mask_features)
        states, masks = decoded.intermediate_hidden_states, decoded.masks_queries_logits
        if not self.training:
            states, masks = states[-1:], masks[-1:]
        *auxiliary, last = (
            {"class_logits": self.classifier(state.transpose(0, 1)), "mask_logits": mask}
            for state, mask in zip(states, masks, strict=True)
        )
        return {**last, "auxiliary": auxiliary}


def _build_decoders(options: Mask2FormerOptions, channels: list[int]) -> tuple[nn.Module, nn.Module]:
    """Pixel decoder and transformer decoder, initialised as transformers initialises them.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        # Imported here: an extra, which takes seconds to import.
        from transformers import Mask2FormerConfig, Mask2FormerPreTrainedModel
        from transformers.models.mask2former.modeling_mask2former import (
            Mask2FormerPixelDecoder,
            Mask2FormerTransformerModule,
        )
    except ImportError as error:
        raise ValueError(
            f"head mask2former needs the package transformers ({error}): pip install 'adala[mask2former]'"
        ) from error
    config = Mask2FormerConfig(
        feature_size=options.width,
        mask_feature_size=options.width,
        hidden_dim=options.width,
        num_attention_heads=options.num_heads,
        encoder_layers=options.pixel_decoder_layers,
        encoder_feedforward_dim=options.pixel_decoder_mlp_width,
        # transformers counts the prediction before the first layer as one.
        decoder_layers=options.decoder_layers + 1,
        dim_feedforward=options.decoder_mlp_width,
        num_queries=options.num_queries,
    )
    pixel_decoder = Mask2FormerPixelDecoder(config, channels)
    decoder = Mask2FormerTransformerModule(options.width, config)
    # Without it the level embedding is uninitialised memory, and the sampling offsets do not spread.
    initialise = Mask2FormerPreTrainedModel(config)._init_weights
    return pixel_decoder.apply(initialise), decoder.apply(initialise)
