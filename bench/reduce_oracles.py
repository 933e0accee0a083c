"""Cuts conformance cases down to a size for the repository: ``python bench/reduce_oracles.py FROM TO``.

Keeps, of each method's smallest-headed case in the folder FROM, the first batch entry and the first heads. That is
exact, because no mechanism mixes batch entries or heads; tokens are all kept, since each output depends on all of them.
Nothing is computed: every number is one of the original's. Losses and their gradients are means over batch and heads
and are dropped, and so are the statistics in the metadata that described the whole.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

PER_BATCH_AND_HEAD = ("q", "k", "v", "out", "out_eps0", "out_exact")
PER_HEAD = ("W_q", "W_k", "conv_weight")
SHARED = ("E", "F", "projection")
DROPPED = ("loss_", "grad_")
KEPT_METADATA = ("method", "case", "hyper", "source", "official_fp32_max_abs_err")

# Methods with weights for each head keep two, so that a mix-up of heads shows.
NUM_HEADS = {"hedgehog": 2, "lolcats": 2}


def reduce_case(path: Path, target: Path) -> int:
    """Writes the reduced case, and returns its size in bytes.

    Raises:
        ValueError: A tensor that this program does not know how to cut, or outputs that depend on batch-mates.
    """
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["meta"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "over all batches and heads" in str(meta["hyper"].get("pinv_init", "")).lower():
        raise ValueError(f"{path}: its outputs depend on the whole batch and cannot be cut")
    num_heads = NUM_HEADS.get(meta["method"], 1)
    reduced = {}
    for name, tensor in tensors.items():
        if name in PER_BATCH_AND_HEAD:
            reduced[name] = tensor[:1, :num_heads].contiguous()
        elif name in PER_HEAD:
            reduced[name] = tensor[:num_heads].contiguous()
        elif name in SHARED:
            reduced[name] = tensor
        elif not name.startswith(DROPPED):
            raise ValueError(f"{path}: unknown tensor {name!r}")
    meta = {key: meta[key] for key in KEPT_METADATA if key in meta}
    meta["hyper"] |= {"B": 1, "H": num_heads}
    meta["reduced"] = f"first batch entry and first {num_heads} head(s) of the original case, nothing recomputed"
    save_file(reduced, target, metadata={"meta": json.dumps(meta)})
    return target.stat().st_size


def smallest_cases(folder: Path) -> list[Path]:
    """For each method of the folder, the case with the smallest heads."""
    smallest: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["meta"])
            if "q" not in file.keys():
                continue
            _, _, num_tokens, head_dim = file.get_slice("q").get_shape()
        candidate = (num_tokens * head_dim, path)
        smallest[meta["method"]] = min(candidate, smallest.get(meta["method"], candidate))
    return [path for _, path in smallest.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="FROM", help="a folder of conformance cases")
    parser.add_argument("target", type=Path, metavar="TO", help="the folder for the reduced ones")
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    total_bytes = 0
    for path in smallest_cases(arguments.source):
        size = reduce_case(path, arguments.target / path.name)
        total_bytes += size
        print(f"{path.name}: {size / 1024:.0f} KiB")
    print(f"{total_bytes / 2**20:.2f} MiB in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
