"""To which of three splits something belongs, by its name alone."""

import hashlib

SPLITS = ("train", "val", "test")
# Where train and val end, as shares of everything.
TRAIN_END, VAL_END = 0.5, 0.7


def split_of(name: str, seed: int = 0) -> str:
    """The split of what has this name: train, val or test in half, a fifth and three tenths of all cases.

    Nothing else is looked at, so that a new file leaves the splits of the others as they are.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if position < TRAIN_END else "val" if position < VAL_END else "test"
