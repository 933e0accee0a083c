"""What the head makes of transformers' Mask2Former, and what is said without transformers."""

import sys
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adala.attention import TokenLayout
from adala.heads import build_segmentation_head


def test_without_transformers_one_sentence_says_how_to_get_it(monkeypatch, student: VisionTransformer) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the package transformers .*: pip install 'adala\[mask2former\]'"):
        build_segmentation_head("mask2former", student, 3)


def test_options_size_the_decoders(build_head: Callable[..., nn.Module], student: VisionTransformer) -> None:
    sizes = {"width": 64, "num_heads": 4, "pixel_decoder_layers": 3, "decoder_layers": 5, "num_queries": 7}
    widths = {"pixel_decoder_mlp_width": 40, "decoder_mlp_width": 48}
    head = build_head("mask2former", student, num_classes=9, **sizes, **widths)
    encoder, decoder = head.pixel_decoder.encoder, head.decoder.decoder
    assert len(encoder.layers) == 3 and len(decoder.layers) == 5
    assert encoder.layers[0].fc1.weight.shape == (40, 64) and decoder.layers[0].fc1.weight.shape == (48, 64)
    assert encoder.layers[0].self_attn.n_heads == decoder.layers[0].cross_attn.num_heads == 4
    assert head.decoder.queries_features.weight.shape == (7, 64) and head.classifier.weight.shape == (10, 64)
    prediction = head(torch.randn(1, 17, 32), TokenLayout((4, 4), 1))
    assert len(prediction["auxiliary"]) == 5 and prediction["mask_logits"].shape == (1, 7, 16, 16)


def test_weights_start_as_transformers_starts_them(build_head: Callable[..., nn.Module], student) -> None:
    """The level embedding is uninitialised memory otherwise, and every sampling point of a head would lie on one."""
    head = build_head("mask2former", student, width=64)
    assert 0.8 < head.pixel_decoder.level_embed.std() < 1.2
    attention = head.pixel_decoder.encoder.layers[0].self_attn
    offsets = attention.sampling_offsets.bias.reshape(attention.n_heads, 3, 4, 2)
    assert attention.sampling_offsets.weight.eq(0).all()
    # Heads look in different directions, each with points at 1, 2, 3 and 4 cells.
    torch.testing.assert_close(offsets.abs().amax(3)[:, 0], torch.tensor([1.0, 2, 3, 4]).expand(2, 4))
    assert not torch.allclose(offsets[0], offsets[1])


def test_the_prediction_is_that_of_the_last_layer(build_head: Callable[..., nn.Module], student) -> None:
    """The auxiliary ones go from the queries as they are learnt to those before the last layer."""
    head = build_head("mask2former", student)
    found = {}
    head.decoder.register_forward_hook(lambda module, arguments, output: found.update(output))
    prediction = head(torch.randn(2, 17, 32), TokenLayout((4, 4), 1))
    assert torch.equal(prediction["mask_logits"], found["masks_queries_logits"][-1])
    last = head.decoder.decoder.layernorm(found["last_hidden_state"])
    torch.testing.assert_close(prediction["class_logits"], head.classifier(last))
    first = head.decoder.decoder.layernorm(head.decoder.queries_features.weight)
    torch.testing.assert_close(prediction["auxiliary"][0]["class_logits"][1], head.classifier(first))


def test_training_goes_on_after_an_evaluation_in_inference_mode(build_head: Callable[..., nn.Module], student) -> None:
    """transformers keeps the position embedding it made last, which may be an inference tensor."""
    head, features, layout = build_head("mask2former", student), torch.randn(2, 17, 32), TokenLayout((4, 4), 1)
    with torch.inference_mode():
        expected = head.eval()(features, layout)["mask_logits"].clone()
    prediction = head.train()(features, layout)
    torch.testing.assert_close(prediction["mask_logits"], expected)
    prediction["mask_logits"].sum().backward()
