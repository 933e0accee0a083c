"""Cuts the embedded slice of Fashion-MNIST (MIT licence) out of the original IDX files.

    python bench/embedded/build_data.py --source FOLDER

FOLDER holds the four ``*-ubyte.gz`` files as published (Debian: package ``dataset-fashion-mnist``, folder
``/usr/share/datasets/fashion-mnist``). The slice is the first 16,000 training and the first 4,000 test images, in the
published order, which is already random with respect to the classes.
"""

import argparse
import gzip
import io
import lzma
from pathlib import Path

import numpy as np

from adala.data.embedded import SLICE_PATH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the four published .gz files")
    source, arrays = parser.parse_args().source, {}
    for split, stem, count in (("train", "train", 16_000), ("val", "t10k", 4_000)):
        for part, kind, header_bytes, shape in (("images", "idx3", 16, (-1, 28, 28)), ("labels", "idx1", 8, (-1,))):
            content = gzip.decompress((source / f"{stem}-{part}-{kind}-ubyte.gz").read_bytes())
            arrays[f"{split}_{part}"] = np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)[:count]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    # xz over the whole archive: 374 bytes an image, where deflate (npz's own, or PNG's) needs 433.
    SLICE_PATH.write_bytes(lzma.compress(buffer.getvalue(), preset=9))
    print(f"{SLICE_PATH}: {SLICE_PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
