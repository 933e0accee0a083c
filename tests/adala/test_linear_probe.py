"""The probe that a head may start from."""

import pytest
import torch

from adala.evaluation import Features, fit_probe


@pytest.mark.parametrize(("labels", "found"), [([0, 1, 4], 4), ([0, -1, 1], -1)], ids=["beyond", "negative"])
def test_labels_that_are_no_classes_are_named(labels: list[int], found: int) -> None:
    features = Features(torch.randn(3, 4), torch.tensor(labels))
    with pytest.raises(ValueError, match=f"the label {found} is among .* num_classes 3 .* raise stage3.num_classes"):
        fit_probe(features, num_classes=3)
