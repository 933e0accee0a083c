"""Cuts conformance cases down to a size for the repository: ``python bench/reduce_oracles.py FROM TO``.

Keeps, of each mechanism's smallest-headed case in the folder FROM, the first batch entry and the first heads, in the
format of ``bench/conformance.py``. That is exact where no batch entry or head depends on another, which is checked;
tokens are all kept, since each output depends on all of them. Every number is one of the original's. Losses and their
gradients are means over batch and heads and are dropped.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from conformance import Case, check_case, load_case
from safetensors.torch import save_file

PER_HEAD = ("query_weight", "key_weight", "conv_weight")


def reduce_case(case: Case) -> Case:
    """The reduced case.

    Raises:
        ValueError: Its outputs depend on batch-mates or other heads.
    """
    # Mechanisms with weights for each head keep two, so that a mix-up of heads shows.
    num_heads = 2 if any(name in case.tensors for name in PER_HEAD) else 1
    tensors = {name: tensor for name, tensor in case.tensors.items() if name not in case.losses()}
    tensors |= {name: tensors[name][:1, :num_heads].contiguous() for name in ("q", "k", "v", "out", *case.outputs)}
    tensors |= {name: tensors[name][:num_heads].contiguous() for name in PER_HEAD if name in tensors}
    source = f"{case.source}; its first batch entry and first {num_heads} head(s), nothing recomputed"
    reduced = dataclasses.replace(case, tensors=tensors, source=source)
    failed = dict.fromkeys(comparison.tensor for comparison in check_case(reduced) if comparison.failed)
    if failed:
        raise ValueError(f"{case.mechanism} {case.case} cannot be cut: {', '.join(failed)} would change")
    return reduced


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="FROM", help="a folder of conformance cases of either format")
    parser.add_argument("target", type=Path, metavar="TO", help="the folder for the reduced ones")
    folders = parser.parse_args(arguments)
    folders.target.mkdir(parents=True, exist_ok=True)
    cases = [(path.name, load_case(path)) for path in folders.source.glob("*.safetensors")]
    by_size = sorted((case.tensors["q"][0, 0].numel(), name, case) for name, case in cases if "q" in case.tensors)
    for name, case in {case.mechanism: (name, case) for _, name, case in reversed(by_size)}.values():
        meta = vars(reduce_case(case)).copy()
        save_file(meta.pop("tensors"), folders.target / name, metadata={"meta": json.dumps(meta)})
        print(f"{name}: {(folders.target / name).stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
