"""What all tests share: one thread, the modules in tests/fixtures, and a tiny teacher."""

import os
import subprocess
import sys
from collections.abc import Iterator
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

BUILT = "deepspeed_shm_comm/deepspeed_shm_comm.so"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Has DeepSpeed compile its CPU communication, once, before any test's time runs: it takes a minute or more."""
    is_worker = hasattr(session.config, "workerinput")
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not is_worker and not (folder and (Path(folder) / BUILT).exists()):
        program = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
        # ninja, which compiles, may be there alone.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path}
        subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, env=environment)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Commands that are called within this process set the number that they were asked for, and leave it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def teacher() -> VisionTransformer:
    return build_tiny_teacher()


@pytest.fixture
def images() -> torch.Tensor:
    """(4, 3, 16, 16)."""
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
