"""Whether an exported model gives what PyTorch gives, on real images.

Shapes: B batch, N tokens, D embed dim, K classes, H, W height and width of an image in pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from adala.data import build_eval_transform
from adala.data.embedded import load_split
from adala.data.images import IMAGE_FIELDS, DecodeError, decode_image

# Below it, an export is refused: rounding in another order costs a hundred times less.
LEAST_COSINE = 0.9999
# Of the largest norm among tokens: a hundred roundings of float32.
NEGLIGIBLE = 1e-5

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How close an exported model is to PyTorch's.

    Attributes:
        worst_cosine: The smallest of all tokens' (all images' or pixels' where the model gives a task's scores).
        largest_difference: The largest absolute one of all values.
        largest_value: The largest absolute one of PyTorch's values, which the difference is to be seen against.
        batch_sizes: Batches that both were given.
    """

    worst_cosine: float
    largest_difference: float
    largest_value: float
    batch_sizes: tuple[int, ...]

    def __str__(self) -> str:
        batches = ", ".join(str(size) for size in self.batch_sizes)
        return (
            f"against PyTorch on real images in batches of {batches}: worst cosine {self.worst_cosine:.8f}, largest "
            f"absolute difference {self.largest_difference:.2e} of values up to {self.largest_value:.3g}"
        )


@torch.no_grad()
def compare(exported: Model, expected: Model, images: Tensor, batch_sizes: Sequence[int]) -> Agreement:
    """Runs both models on the same images.

    Args:
        exported: What is to be judged.
        expected: PyTorch's model.
        images: (n, 3, H, W), normalised, at least as many as the largest batch.
        batch_sizes: Batches to run.

    Raises:
        ValueError: A token's cosine is below ``LEAST_COSINE`` or not a number, or a shape differs.
    """
    cosines, differences, values = [], [], []
    for size in batch_sizes:
        ours, theirs = exported(images[:size]).double().cpu(), expected(images[:size]).double().cpu()
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the exported model gives {tuple(ours.shape)} for a batch of {size}, PyTorch's {tuple(theirs.shape)}: "
                "it is refused"
            )
        cosines.append(_cosine(ours, theirs).min())
        differences.append((ours - theirs).abs().max())
        values.append(theirs.abs().max())
    found = (float(torch.stack(each).max()) for each in (differences, values))
    agreement = Agreement(float(torch.stack(cosines).min()), *found, tuple(batch_sizes))
    # A cosine that is not a number is not at least anything.
    if not agreement.worst_cosine >= LEAST_COSINE:
        raise ValueError(f"the exported model is refused, its cosine is below {LEAST_COSINE} ({agreement})")
    return agreement


def _cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each token (B, N, D), image (B, K) or pixel (B, K, H, W)."""
    dim = 1 if ours.ndim == 4 else -1
    our_norms, their_norms = ours.norm(dim=dim), theirs.norm(dim=dim)
    norms = our_norms * their_norms
    # Zero beside zero is no disagreement, zero beside anything else is a full one. What is zero but for the rounding of
    # the largest has no direction: scores of a pixel that no mask covers.
    both_zero = torch.maximum(our_norms, their_norms) <= NEGLIGIBLE * their_norms.max()
    cosine = (ours * theirs).sum(dim=dim) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return torch.where(both_zero, torch.ones_like(cosine), cosine)


def sample_images(
    count: int,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    files: Iterable[str | Path] | None = None,
) -> Tensor:
    """Real images to compare on, (count, 3, H, W), normalised.

    Args:
        count: How many; where there are fewer, they come again.
        image_size: H and W in pixels, which they are resized to cover and cut to.
        mean: Per channel, of values in 0 .. 1.
        std: Per channel.
        files: Files of images, or folders whose images they are; None takes those that travel in the package.

    Raises:
        ValueError: A file that cannot be read, or none.
    """
    transform = build_eval_transform(image_size, mean, std)
    found = _embedded(count) if files is None else _read(files, count)
    images = [transform(image) for image in found]
    return torch.stack([images[number % len(images)] for number in range(count)])


def _embedded(count: int) -> list[Image.Image]:
    images, _ = load_split("val")
    return [Image.fromarray(image).convert("RGB") for image in images[:count]]


def _read(files: Iterable[str | Path], count: int) -> list[Image.Image]:
    paths: list[Path] = []
    for name in files:
        path = Path(name).expanduser()
        inside = path.rglob("*") if path.is_dir() else [path]
        paths += sorted(each for each in inside if each == path or each.suffix.lower()[1:] in IMAGE_FIELDS)
    if not paths:
        raise ValueError(f"there is no image in {', '.join(map(str, files))}: name files, or folders of images")
    images = []
    for path in paths[:count]:
        try:
            images.append(decode_image(path.read_bytes()))
        except (DecodeError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): name another one") from error
    return images
