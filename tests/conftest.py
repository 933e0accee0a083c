"""What all tests share: one thread, the modules in tests/fixtures, and a tiny teacher."""

import os
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks of a launcher and this process alike compute on the CPU, whatever else the machine has.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)
# The folder itself, not tests/: there, tests/adala would be found in place of the package.
sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

from tiny_teacher import build_tiny_teacher


@pytest.fixture
def teacher() -> VisionTransformer:
    return build_tiny_teacher()


@pytest.fixture
def images() -> torch.Tensor:
    """(4, 3, 16, 16)."""
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
