"""The ELU + 1 feature map: values, gradients at and around zero, and small values in bf16."""

import torch

from adala.attention.linear import elu_plus_one


def test_it_is_elu_plus_one_with_its_gradient() -> None:
    x = torch.tensor([-30.0, -2.0, -1e-3, 0.0, 1e-3, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    expected = torch.where(x >= 0, x + 1, x.clamp(max=0).exp())
    torch.testing.assert_close(elu_plus_one(x), expected, rtol=1e-15, atol=0)
    (gradient,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    torch.testing.assert_close(gradient, torch.where(x >= 0, 1.0, x.exp()).detach())


def test_small_values_survive_bf16() -> None:
    x = torch.tensor([-6.0, -20.0, -80.0], dtype=torch.bfloat16, requires_grad=True)
    features = elu_plus_one(x)
    assert features.dtype == torch.float32 and (features > 0).all()
    assert ((torch.nn.functional.elu(x) + 1) == 0).any(), "which the textbook form loses"
    features.log().sum().backward()
    torch.testing.assert_close(x.grad.float(), torch.ones(3))
