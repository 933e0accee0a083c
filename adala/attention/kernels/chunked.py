"""Linear attention with the feature map ELU + 1 on a CPU, a cache's worth of tokens at a time.

In plain tensor operations every intermediate (features of queries and keys, float32 copies, the numerator) is as large
as the input and goes through memory. Here each is a chunk that stays in the cache, in buffers that are used again, and
of all of them only the sums over tokens are kept for the backward pass, in which features are computed again.

Shapes: B batch, H heads, N tokens, d head dim; G images of a chunk and T of their tokens. Chunks are (G H, T, d), in
float32.

Paper: arXiv 2603.16063 (ViT-AdaLA); arXiv 2006.16236, eq. 7.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of a buffer, 1 MiB. On two cores with 1 MiB of second-level and 32 MiB of third-level cache 2^19 was 3 to 9 %
# faster at 1,025 tokens, and took more memory than fused softmax at 512 px; below 2^18 calls cost more than they save.
CHUNK_ELEMENTS = 2**18
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


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, den_added: float) -> None:
    """Writes normalised linear attention to ``out``, and the sums that it is made of to ``sums``.

    Args:
        q: Queries, (B, H, N, d), of any strides.
        k: Keys.
        v: Values.
        out: Of the shape of v and any strides.
        sums: S and z, (B, H, d + 1, d) float32: key features times values, and alone, summed over tokens.
        den_added: Added to the denominator.
    """
    batch, num_heads, num_tokens, width = q.shape
    buffers = _Buffers(q)
    sums.zero_()
    for images, pieces in chunks(batch, num_tokens, num_heads * width):
        key_values, normaliser = _parts(sums[images])
        for tokens in pieces:
            key_features = buffers.features("features", k[images, :, tokens])
            key_values += torch.bmm(key_features.transpose(1, 2), buffers.load("values", v[images, :, tokens]))
            normaliser += key_features.sum(1, keepdim=True)
        for tokens in pieces:
            query_features = buffers.features("features", q[images, :, tokens])
            numerator = buffers.product("values", query_features, key_values)
            denominator = buffers.row_sums(query_features, normaliser).add_(den_added)
            place = out[images, :, tokens]
            torch.div(numerator.view(place.shape), denominator.view(*place.shape[:-1], 1), out=place)


def backward(
    inputs: Sequence[Tensor], grad: Tensor, sums: Tensor, gradients: Sequence[Tensor], den_added: float
) -> None:
    """Writes the gradients of queries, keys and values.

    With features a and b and o = a S / den, the gradient of den is e = -(grad . o) / den: da = grad S^T / den + e z,
    dS = sum_tokens a^T grad / den, dz = sum_tokens e a; db = v dS^T + dz, dv = b dS.

    Args:
        inputs: q, k, v, (B, H, N, d) each, of any strides.
        grad: Gradient of the output, as these.
        sums: What :func:`forward` wrote.
        gradients: dq, dk, dv, written; as the inputs.
        den_added: As in :func:`forward`.
    """
    (q, k, v), (grad_q, grad_k, grad_v) = inputs, gradients
    batch, num_heads, num_tokens, width = q.shape
    buffers = _Buffers(q)
    for images, pieces in chunks(batch, num_tokens, num_heads * width):
        grad_sums = torch.zeros_like(sums[images])
        for tokens in pieces:
            here = (images, slice(None), tokens)
            _queries_backward(buffers, q[here], grad[here], sums[images], grad_sums, grad_q[here], den_added)
        grad_key_values, grad_normaliser = _parts(grad_sums)
        for tokens in pieces:
            here = (images, slice(None), tokens)
            key_features, values = buffers.features("features", k[here]), buffers.load("values", v[here])
            grad_features = buffers.take("scaled", values.shape)
            torch.baddbmm(grad_normaliser, values, grad_key_values.transpose(1, 2), out=grad_features)
            grad_v[here].copy_(buffers.product("product", key_features, grad_key_values).view(v[here].shape))
            _through_features(grad_features, key_features, grad_k[here])


def _queries_backward(
    buffers: _Buffers, q: Tensor, grad: Tensor, sums: Tensor, grad_sums: Tensor, grad_q: Tensor, den_added: float
) -> None:
    """Of one chunk: writes its dq, and adds its part to dS and dz.

    With t = S grad, the output needs no product of its own: grad . o = a . t / den.
    """
    (key_values, normaliser), (grad_key_values, grad_normaliser) = _parts(sums), _parts(grad_sums)
    query_features, arrived = buffers.features("features", q), buffers.load("arrived", grad)
    inverse = buffers.row_sums(query_features, normaliser).add_(den_added).reciprocal_()
    grad_features = buffers.product("values", arrived, key_values.transpose(1, 2))
    along_output = buffers.row_sums(query_features, grad_features).mul_(inverse)
    scaled = torch.mul(query_features, inverse, out=buffers.take("scaled", query_features.shape))
    grad_key_values += torch.bmm(scaled.transpose(1, 2), arrived)
    grad_normaliser -= scaled.mul_(along_output).sum(1, keepdim=True)
    grad_features.addcmul_(normaliser, along_output, value=-1).mul_(inverse)
    _through_features(grad_features, query_features, grad_q)


def _parts(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the sums (G, H, d + 1, d): S (G H, d, d) and z (G H, 1, d)."""
    sums = sums.flatten(0, 1)
    return sums[:, :-1], sums[:, -1:]


def _through_features(grad: Tensor, features: Tensor, place: Tensor) -> None:
    """Writes the gradient before the feature map to ``place``: its derivative is 1 above zero and exp(x) below."""
    torch.mul(grad.view(place.shape), features.clamp_(max=1).view(place.shape), out=place)
