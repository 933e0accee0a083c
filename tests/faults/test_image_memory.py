"""The largest images and masks that are read, decoded and transformed in less than 1 GiB above what was held before."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 8192
MASK_SIZE = (SIDE, SIDE // 2)
PROGRAM = """
import io, re, sys
from pathlib import Path
import torch
from PIL import Image
from adala.data.images import decode_image
from adala.data.joint import build_eval_pair_transform
from adala.data.masks import MaskFormat, read_mask
from adala.data.preparation import View

def peak_mib():
    # Not getrusage's, which begins at what the process held that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
view = View((512, 512), (0.5,) * 3, (0.5,) * 3, (16, 16))
form = MaskFormat(label_map={number: number % 250 for number in range(500)})
whole = build_eval_pair_transform(view.image_size, view.mean, view.std, view="whole", patch_size=16)
small = io.BytesIO()
Image.new("RGB", (30, 30)).save(small, "PNG")
view.image_transform("scale")(decode_image(small.getvalue()))
before = peak_mib()
content = Path(sys.argv[1]).read_bytes()
if sys.argv[1].endswith(".seg.png"):
    fields = {"seg.png": content, "jpg": Path(sys.argv[2]).read_bytes()}
    whole(decode_image(fields["jpg"]), read_mask(fields, form))
else:
    view.image_transform("scale")(decode_image(content))
print(round(peak_mib() - before))
"""


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def write(folder: Path, kind: str) -> list[Path]:
    """The file of an image, or those of a mask and its image."""
    path = folder / f"x.{kind}"
    if kind == "cmyk.jpg":
        Image.new("CMYK", (SIDE, SIDE), (9, 8, 7, 6)).save(path, progressive=True, quality=30, exif=turned())
    elif kind == "alpha.png":
        Image.new("RGBA", (SIDE, SIDE), (9, 8, 7, 6)).save(path, compress_level=1, exif=turned())
    elif kind == "deep.tif":
        Image.fromarray(np.full((SIDE, SIDE), 40_000, np.int32)).save(path, compression="tiff_lzw")
    elif kind == "lossless.webp":
        Image.new("RGBA", MASK_SIZE, (3, 4, 5, 6)).save(path, lossless=True)
    else:
        Image.fromarray(np.full(MASK_SIZE[::-1], 400, np.uint16)).save(path)
        Image.new("RGB", MASK_SIZE).save(folder / "x.jpg")
        return [path, folder / "x.jpg"]
    return [path]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["cmyk.jpg", "alpha.png", "deep.tif", "lossless.webp", "seg.png"])
def test_the_largest_images_fit_into_a_gibibyte(tmp_path: Path, kind: str) -> None:
    paths = write(tmp_path, kind)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 200 < int(done.stdout) < 1024
