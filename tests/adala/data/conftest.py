"""Shards for the tests: small images whose content tells which sample they are."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from adala.data.index import build_index


def png(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of (height, width) pixels with fixed noise for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def write_shard(path: Path, samples: list[dict]) -> None:
    with TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)


@pytest.fixture
def shard_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of labelled shards with an index: numbers of samples in, path out. ``bad`` are broken images."""

    def write(*sizes: int, bad: tuple[int, ...] = (), labels: bool = True, name: str = "shards") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        number = 0
        for shard, size in enumerate(sizes):
            samples = []
            for _ in range(size):
                image = b"not an image" if number in bad else png(number)
                samples.append({"__key__": f"{number:04d}", "png": image} | ({"cls": number % 7} if labels else {}))
                number += 1
            write_shard(folder / f"train-{shard:05d}.tar", samples)
        build_index(folder)
        return folder

    return write


@pytest.fixture(name="png")
def png_fixture() -> Callable[..., bytes]:
    return png


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
