"""Linear attention with the feature map ELU + 1 on a CPU, a cache's worth of tokens at a time.

In plain tensor operations every intermediate (features of queries and keys, float32 copies, the numerator) is as large
as the input and goes through memory. Here each is a chunk that stays in the cache, in buffers that are used again, and
of all of them only the sums over tokens are kept for the backward pass, in which features are computed again.

Shapes: B batch, H heads, N tokens, d head dim; G images of a chunk and T of their tokens. Chunks are (G H, T, d), in
float32.

Paper: arXiv 2603.16063 (ViT-AdaLA); arXiv 2006.16236, eq. 7.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a buffer, 2 MiB. Of 2^15 to 2^19 it was the fastest on two cores with 1 MiB of second-level and 32 MiB of
# third-level cache: below that, calls cost more than the memory that they save.
CHUNK_ELEMENTS = 2**19
LOG2_E = math.log2(math.e)


def chunks(batch: int, num_tokens: int, width: int) -> Iterator[tuple[slice, list[slice]]]:
    """Images that are worked on together, and the pieces that their tokens are cut into.

    How tokens are cut does not depend on the batch, so that an image's result does not either.

    Args:
        batch: B.
        num_tokens: N.
        width: H d.
    """
    pieces = -(-num_tokens * width // CHUNK_ELEMENTS)
    tokens = -(-num_tokens // pieces)
    images = max(1, CHUNK_ELEMENTS // (tokens * width))
    cut = [slice(start, min(start + tokens, num_tokens)) for start in range(0, num_tokens, tokens)]
    for first in range(0, batch, images):
        yield slice(first, min(first + images, batch)), cut


class _Buffers:
    """Memory of chunks by name, made once and used again."""

    def __init__(self, like: Tensor):
        self._like = like
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        size = shape.numel()
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self._like.new_empty(size, dtype=torch.float32)
        return self._memory[name][:size].view(shape)

    def load(self, name: str, x: Tensor) -> Tensor:
        """(G, H, T, d) as (G H, T, d) in float32; what is that already is not copied."""
        if x.dtype == torch.float32 and len(x) == 1:
            return x[0]
        return self.take(name, x.shape).copy_(x).view(-1, *x.shape[2:])

    def features(self, name: str, x: Tensor) -> Tensor:
        """ELU(x) + 1 of (G, H, T, d) as exp(min(x, 0)) + max(x, 0), in which small values survive."""
        x = self.take(name, x.shape).copy_(x).view(-1, *x.shape[2:])
        positive = x.relu()
        # By a power of two: PyTorch's exponential takes three times as long on some processors.
        return x.sub_(positive).mul_(LOG2_E).exp2_().add_(positive)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """The matrix product of (G H, m, n) and (G H, n, d)."""
        return torch.bmm(left, right, out=self.take(name, torch.Size((*left.shape[:-1], right.shape[-1]))))

    def row_sums(self, left: Tensor, right: Tensor) -> Tensor:
        """(G H, T, 1), of the products of two that may be broadcast: faster than a matrix product with one column."""
        return torch.mul(left, right, out=self.take("product", left.shape)).sum(-1, keepdim=True)


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, den_added: float) -> Tensor:
    """Writes normalised linear attention into ``out``.

    Args:
        q: Queries, (B, H, N, d), of any strides.
        k: Keys.
        v: Values.
        out: Of that shape and any strides.
        den_added: Added to the denominator.

    Returns:
        (B, H, d + 1, d) sums over tokens of [v, 1] times key features, in float32: the last row is the normaliser.
    """
    batch, num_heads, num_tokens, width = q.shape
    buffers = _Buffers(q)
    sums = q.new_zeros(batch, num_heads, width + 1, width, dtype=torch.float32)
    for images, pieces in chunks(batch, num_tokens, num_heads * width):
        values_keys, normaliser = _parts(sums[images])
        for tokens in pieces:
            key_features = buffers.features("features", k[images, :, tokens])
            values_keys += torch.bmm(buffers.load("values", v[images, :, tokens]).transpose(1, 2), key_features)
            normaliser += key_features.sum(1, keepdim=True)
        key_values = values_keys.transpose(1, 2).contiguous()
        for tokens in pieces:
            query_features = buffers.features("features", q[images, :, tokens])
            numerator = buffers.product("values", query_features, key_values)
            denominator = buffers.row_sums(query_features, normaliser).add_(den_added)
            place = out[images, :, tokens]
            torch.div(numerator.view(place.shape), denominator.view(*place.shape[:-1], 1), out=place)
    return sums


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, grads: tuple[Tensor, Tensor, Tensor], den_added: float
) -> None:
    """Writes the gradients of queries, keys and values into ``grads``.

    With features a and b, sums S and z, o = a S / den and g = grad / den, the gradient of den is e = -(g . o):
    da = g S^T + e z, dS = sum_tokens a^T g, dz = sum_tokens e a; db = v dS^T + dz, dv = b dS.

    Args:
        grad: Gradient of the output, (B, H, N, d), of any strides.
        q: Queries, as in :func:`forward`.
        k: Keys.
        v: Values.
        sums: What :func:`forward` returned.
        grads: Of the shape of q, k and v each, of any strides.
        den_added: As in :func:`forward`.
    """
    batch, num_heads, num_tokens, width = q.shape
    buffers = _Buffers(q)
    grad_q, grad_k, grad_v = grads
    for images, pieces in chunks(batch, num_tokens, num_heads * width):
        values_keys, normaliser = _parts(sums[images])
        key_values = values_keys.transpose(1, 2).contiguous()
        grad_sums = values_keys.new_zeros(len(values_keys), width + 1, width)
        grad_values_keys, grad_normaliser = _parts(grad_sums[None])
        for tokens in pieces:
            query_features = buffers.features("features", q[images, :, tokens])
            denominator = buffers.row_sums(query_features, normaliser).add_(den_added)
            arrived = buffers.load("grad", grad[images, :, tokens])
            scaled = torch.div(arrived, denominator, out=buffers.take("scaled", arrived.shape))
            numerator = buffers.product("values", query_features, key_values)
            grad_denominator = buffers.row_sums(numerator, scaled).div_(denominator).neg_()
            grad_values_keys += torch.bmm(scaled.transpose(1, 2), query_features)
            grad_features = buffers.product("values", scaled, values_keys).addcmul_(normaliser, grad_denominator)
            grad_normaliser += torch.mul(
                query_features, grad_denominator, out=buffers.take("product", query_features.shape)
            ).sum(1, keepdim=True)
            _through_features(grad_features, query_features, grad_q[images, :, tokens])
        grad_key_values = grad_values_keys.transpose(1, 2).contiguous()
        for tokens in pieces:
            key_features = buffers.features("features", k[images, :, tokens])
            values = buffers.load("values", v[images, :, tokens])
            grad_features = torch.baddbmm(
                grad_normaliser, values, grad_values_keys, out=buffers.take("scaled", values.shape)
            )
            place = grad_v[images, :, tokens]
            place.copy_(buffers.product("product", key_features, grad_key_values).view(place.shape))
            _through_features(grad_features, key_features, grad_k[images, :, tokens])


def _parts(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the sums (G, H, d + 1, d): S^T (G H, d, d) and z (G H, 1, d)."""
    sums = sums.flatten(0, 1)
    return sums[:, :-1], sums[:, -1:]


def _through_features(grad: Tensor, features: Tensor, place: Tensor) -> None:
    """Writes the gradient before the feature map to ``place``: its derivative is 1 above zero and exp(x) below."""
    torch.mul(grad.view(place.shape), features.clamp_(max=1).view(place.shape), out=place)
