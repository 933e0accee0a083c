"""The embedded default: a slice of Fashion-MNIST and a small softmax ViT trained on it. Nothing is downloaded.

``fashion_mnist.npz.xz`` holds the first 16,000 training and 4,000 test images (Zalando SE, MIT licence, see
``LICENSE``); ``bench/embedded/build_data.py`` cut it out. ``teacher.safetensors`` was trained by
``bench/embedded/train_teacher.py``; its measured top-1 stands in ``teacher.json``.
"""

import io
import lzma
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SLICE_PATH = FOLDER / "fashion_mnist.npz.xz"
TEACHER_PATH = FOLDER / "teacher.safetensors"
CLASS_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, 28, 28) uint8 and labels (n,) uint8 of ``train`` (16,000) or ``val`` (4,000).

    Raises:
        ValueError: ``split`` is neither.
    """
    if split not in ("train", "val"):
        raise ValueError(f"the embedded data has the splits train and val, not {split!r}")
    with np.load(io.BytesIO(lzma.decompress(SLICE_PATH.read_bytes()))) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]
