"""The bench of the loader: what its contenders read, and its table."""

import json
import os
import time

import numpy as np
import pytest
import torch
from loader import Rate, bare_images, build_parser, cpu_s_of, main, photographs, row_of, tiles

from adala.data import View, build_index, load_index, write_shards
from adala.data.images import decode_image


def test_tiles_are_cut_from_real_photographs():
    photos = photographs(None, 224)
    assert len(photos) == 3 and all(min(photo.size) >= 224 for photo in photos)
    images = [decode_image(tile["jpg"]) for tile in tiles(photos, 6, 224)]
    assert all(image.size == (224, 224) and np.asarray(image).std() > 10 for image in images)
    with pytest.raises(ValueError, match="holds no photographs of 9000 px and more"):
        photographs(None, 9000)


def test_the_bare_loop_reads_all_images_over_and_over(tmp_path):
    write_shards(tiles(photographs(None, 32), 7, 32), tmp_path, "train", 3)
    paths = [shard.url for shard in load_index([str(tmp_path)]).shards]
    transform = View((32, 32), (0.5,) * 3, (0.5,) * 3, (16, 16)).image_transform("none", as_uint8=True)
    images = bare_images(paths, transform, 7)
    first, second = next(images), next(images)
    assert len(first) == 7 and len({image.numpy().tobytes() for image in first}) == 7
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert build_index(tmp_path).exists()


def test_ratios_are_those_of_medians():
    loader = [Rate(90.0, 45.0), Rate(110.0, 55.0), Rate(100.0, 50.0)]
    bare = [Rate(200.0, 50.0), Rate(100.0, 40.0), Rate(125.0, 60.0)]
    row = row_of(2, "bare", loader, bare)
    assert (row["images_per_s"], row["loader_over_it"], row["of_processor_time"]) == (125.0, 0.8, 1.0)
    assert row["interval"] == "0.45 .. 1.10"


def test_processor_time_is_that_of_the_process():
    before, own = cpu_s_of(os.getpid()), time.process_time()
    while time.process_time() - own < 0.3:
        sum(range(1000))
    assert cpu_s_of(os.getpid()) - before == pytest.approx(time.process_time() - own, abs=0.05)


def test_the_command_compares_and_writes_its_table(tmp_path):
    arguments = ["--workers", "0", "1", "--rounds", "2", "--seconds", "0.05", "--batch", "4", "--pixels", "32"]
    arguments += ["--samples", "40", "--shards", "2", "--shuffle-buffer", "8", "--out", str(tmp_path)]
    assert main([*arguments, "--at-least", "0.001"]) == 0
    found = json.loads((tmp_path / "loader.json").read_text())
    rows = [(row["workers"], row["contender"]) for row in found["rows"]]
    assert rows == [(n, name) for n in (0, 1) for name in ("loader", "bare", "delivered", "webdataset")]
    assert all(row["images_per_s"] > 0 and row["loader_over_it"] > 0 for row in found["rows"])
    assert found["conditions"]["machine"]["cpu_cores"] and found["conditions"]["seconds"] == 0.05
    assert main([*arguments[:2], *arguments[3:], "--at-least", "1000"]) == 1


def test_defaults_are_those_of_the_page():
    options = build_parser().parse_args([])
    assert (options.workers, options.pixels, options.batch, options.augmentation) == ([0, 1, 2], 224, 32, "crop")
