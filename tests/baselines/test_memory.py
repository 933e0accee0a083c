"""No mechanism but softmax builds anything that grows with N squared, forwards or backwards."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adala.attention import TokenLayout, mechanism_names

NAMES = [name for name in mechanism_names() if name != "softmax"]

# The power of N that the largest tensor grows with. A Monarch factor is N sqrt(N) for blocks of one image row.
GROWTH = {"monarch": 1.5}

SMALL, LARGE = TokenLayout((16, 16), 1), TokenLayout((32, 32), 1)
HEAD_DIM = 16


class LargestAllocation(TorchDispatchMode):
    """Records the storage, in elements of float64, of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.num_elements = max(self.num_elements, leaf.untyped_storage().nbytes() // 8)
        return out


def measure(name, layout, packed_qkv, small_mixer) -> tuple[int, int, int]:
    """Elements of the largest tensor of the forward and of the backward pass, and of all that is saved between."""
    mixer = small_mixer(name, layout, num_heads=1, head_dim=HEAD_DIM)
    inputs = [x.contiguous().requires_grad_() for x in packed_qkv(layout, batch=1, num_heads=1, head_dim=HEAD_DIM)]
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // 8
        return tensor

    with LargestAllocation() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = mixer(*inputs, layout)
    with LargestAllocation() as backward:
        out.sum().backward()
    return forward.num_elements, backward.num_elements, sum(saved.values())


@pytest.mark.parametrize("name", NAMES)
def test_memory_grows_linearly_with_the_number_of_tokens(name, packed_qkv, small_mixer):
    small = measure(name, SMALL, packed_qkv, small_mixer)
    large = measure(name, LARGE, packed_qkv, small_mixer)
    allowed = 1.15 * (LARGE.num_tokens / SMALL.num_tokens) ** GROWTH.get(name, 1.0)
    for kind, before, after in zip(("forward", "backward", "saved"), small, large, strict=True):
        assert before > 0, kind
        assert after / before <= allowed, f"{kind}: {before} -> {after} elements"


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_has_the_size_of_an_attention_map(name, packed_qkv, small_mixer):
    forward, backward, _ = measure(name, LARGE, packed_qkv, small_mixer)
    assert max(forward, backward) < LARGE.num_tokens**2 / 8


def test_the_measure_sees_an_attention_map():
    recorder = LargestAllocation()
    q = torch.randn(1, 1, LARGE.num_tokens, HEAD_DIM, dtype=torch.float64)
    with recorder:
        (q @ q.transpose(-2, -1)).softmax(-1) @ q
    assert math.isclose(recorder.num_elements, LARGE.num_tokens**2)
