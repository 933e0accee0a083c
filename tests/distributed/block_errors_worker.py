"""Block errors over two ranks; run by tests/adala/test_block_errors.py. The last argument is the folder for results."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tiny_teacher import build_tiny_teacher

from adala.distributed import close_distributed, init_distributed, rank
from adala.evaluation import measure_block_errors
from adala.students import linearize


def main(folder: Path) -> None:
    init_distributed()
    images = torch.load(folder / "images.pt")
    # Unequal parts: what counts is images, not ranks.
    own = (images[:-1], images[-1:])[rank()]
    teacher = build_tiny_teacher()
    report = measure_block_errors(teacher, {"student": linearize(teacher, "linear").eval()}, [{"image": own}])
    (folder / f"rank{rank()}.json").write_text(json.dumps(asdict(report)))
    close_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
