"""Parameters that each mechanism adds to ViT-L/16 at 512 px: 24 layers of 16 heads, 32 x 32 patches, a class token."""

import pytest
import torch

from adala.attention import AttentionShape, TokenLayout, build_mixer, mechanism_names

ADDED = {"hedgehog": 1_572_864, "lolcats": 1_572_864, "linformer": 1_574_400}


@pytest.mark.parametrize("name", mechanism_names())
def test_parameters_added_to_vit_large(name):
    shape = AttentionShape(num_heads=16, head_dim=64, layout=TokenLayout((32, 32), 1))
    with torch.device("meta"):
        mixers = [build_mixer(name, shape) for _ in range(24)]
    parameters = [parameter for mixer in mixers for parameter in mixer.parameters()]
    assert all(parameter.is_meta for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) == ADDED.get(name, 0)
