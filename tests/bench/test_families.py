"""The bench measures every family: its networks are stirred, and pass the gate."""

import pytest
from cases import Case, build_model, build_outline, make_images, num_tokens, randomize, run_gate, share_weights
from tiny_families import ALL, TINY

KINDS = ["dinov3", "eva", "eva02_small", "rope_mixed", "sapiens2", "distilled", "naflex"]


@pytest.mark.parametrize("mechanism", ["softmax", "linear", "monarch"])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_every_family_pass_the_gate(kind: str, mechanism: str) -> None:
    name, arguments = ALL[kind]
    case = Case(name, {**TINY, **arguments}, mechanism, image_size=(16, 24))
    backbone = case.build_backbone().eval()
    randomize(backbone)
    assert num_tokens(build_outline(case), case.image_size) == 24 + backbone.num_prefix_tokens
    model = build_model(case, backbone)
    share_weights(model, backbone)
    images = make_images(case, "cpu")
    gate = run_gate(model, lambda: model(images))
    assert gate.green, gate
    # Attention says something in a stirred network.
    assert not model(images).allclose(
        build_model(Case(**{**vars(case), "mechanism": "none"}), backbone)(images), atol=1e-2
    )
