"""The Triton programs of normalised linear attention under ELU + 1. Needs Triton: imported when a kernel first runs.

Shapes: B batch, H heads, N tokens, d head dim. A *pair* is one head of one image, B H of them. Tokens of a pair are
cut into *spans*, a program each; a span is walked in blocks. The *sums* of a pair are a (d + 1, d) float32 matrix: d
rows of S = sum_n b_n v_n^T, then z = sum_n b_n; in the backward pass dS and dz alike. Tiles are padded to powers of two
(``PADDED``, at least ``HEAD_DIM``). The formulas stand in elu.py.

Every product on tensor cores has one operand that came out of memory (v, or the gradient), which bf16 and tf32 hold
exactly, and one in float32. ``SCHEME`` says how the float32 operand is not rounded:

- ``"bf16"``, for bf16 tensors: it is cut into bf16 terms. Three hold the 24 bits of float32, for the sums; for features
  two do, 16 bits, as the rest differs from token to token and averages out;
- ``"tf32"``, for fp16 tensors, which bf16 cannot hold: two tf32 terms, 22 bits;
- ``"float32"``, for float32 tensors: no cut, the product itself is in float32.

A single rounded term is not enough. Of features 1 + x with small x, rounding to 11 bits leaves nothing of x, on which
the gradients of q and k depend, since in them the mean of the values cancels. Only the two products that nothing is
subtracted from, the output and the gradient of v, take one tf32 term an operand (:func:`_dot_rounded`).
"""

import triton
import triton.language as tl


@triton.jit
def _elu_plus_one(x):
    return tl.where(x > 0, x + 1.0, tl.exp(x))


@triton.jit
def _elu_derivative(x, feature):
    """1 above zero; exp(x) below, which is the feature itself."""
    return tl.where(x > 0, 1.0, feature)


@triton.jit
def _round_to_tf32(x):
    """To nearest. The chip cuts the last 13 bits off, which makes every sum too small by the same 3e-4."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # The carry would turn some NaN into numbers.
    return tl.where(x == x, rounded, x)


@triton.jit
def _as_operand(x, SCHEME: tl.constexpr):
    """What came out of memory, as an exact operand of a product."""
    if SCHEME == "bf16":
        operand = x
    else:
        operand = x.to(tl.float32)
    return operand


@triton.jit
def _cut_features(x, SCHEME: tl.constexpr):
    """Two terms, the larger first, and their sum.

    The sum is what stands for the features everywhere else: weights that are a little off still are weights, while two
    versions of one feature would not cancel where they have to.
    """
    if SCHEME == "bf16":
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        kept = high.to(tl.float32) + low.to(tl.float32)
    elif SCHEME == "tf32":
        high = _round_to_tf32(x)
        low = x - high
        kept = x
    else:
        high = x
        low = x
        kept = x
    return high, low, kept


@triton.jit
def _dot_features(high, low, exact, total, SCHEME: tl.constexpr):
    """total + x^T @ exact, for the terms of features ``x``."""
    if SCHEME == "bf16":
        total = tl.dot(tl.trans(low), exact, total)
        total = tl.dot(tl.trans(high), exact, total)
    elif SCHEME == "tf32":
        total = tl.dot(tl.trans(low), exact, total, input_precision="tf32")
        total = tl.dot(tl.trans(high), exact, total, input_precision="tf32")
    else:
        total = tl.dot(tl.trans(high), exact, total, input_precision="ieee")
    return total


@triton.jit
def _cut_sums(x, SCHEME: tl.constexpr):
    """Terms whose sum is ``x``, the largest first; those that a scheme has no use for are never computed with."""
    if SCHEME == "bf16":
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    elif SCHEME == "tf32":
        high = _round_to_tf32(x)
        middle = x - high
        low = middle
    else:
        high = x
        middle = x
        low = x
    return high, middle, low


@triton.jit
def _dot_sums(exact, high, middle, low, SCHEME: tl.constexpr):
    """exact @ x^T, for the terms of sums ``x`` as :func:`_cut_sums` gives them, once for a whole span."""
    if SCHEME == "bf16":
        total = tl.dot(exact, tl.trans(low))
        total = tl.dot(exact, tl.trans(middle), total)
        total = tl.dot(exact, tl.trans(high), total)
    elif SCHEME == "tf32":
        total = tl.dot(exact, tl.trans(middle), input_precision="tf32")
        total = tl.dot(exact, tl.trans(high), total, input_precision="tf32")
    else:
        total = tl.dot(exact, tl.trans(high), input_precision="ieee")
    return total


@triton.jit
def _dot_rounded(x, y, SCHEME: tl.constexpr):
    """x @ y of two float32 operands that :func:`_rounded` gave."""
    if SCHEME == "float32":
        total = tl.dot(x, y, input_precision="ieee")
    else:
        total = tl.dot(x, y, input_precision="tf32")
    return total


@triton.jit
def _rounded(x, SCHEME: tl.constexpr):
    if SCHEME != "float32":
        x = _round_to_tf32(x)
    return x


@triton.jit
def _start_of_pair(pair, num_heads, stride_batch, stride_head):
    """Offset of a pair's first token, in 64 bits: B N 3 H d may exceed what 32 hold."""
    return (pair // num_heads).to(tl.int64) * stride_batch + (pair % num_heads).to(tl.int64) * stride_head


@triton.jit
def _tile(rows, columns, stride_token, end, HEAD_DIM: tl.constexpr):
    """Offsets and mask of the (BLOCK, PADDED) tile of the tokens ``rows``."""
    offsets = rows.to(tl.int64)[:, None] * stride_token + columns[None, :]
    mask = (rows < end)[:, None] & (columns < HEAD_DIM)[None, :]
    return offsets, mask


@triton.jit
def _matrix_tile(columns, HEAD_DIM: tl.constexpr):
    """Offsets and mask of the d x d matrix in a pair's sums."""
    offsets = columns[:, None] * HEAD_DIM + columns[None, :]
    mask = (columns < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    return offsets, mask


@triton.jit
def _load_sums(sums, columns, HEAD_DIM: tl.constexpr):
    offsets, mask = _matrix_tile(columns, HEAD_DIM)
    matrix = tl.load(sums + offsets, mask=mask, other=0.0)
    vector = tl.load(sums + HEAD_DIM * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
    return matrix, vector


@triton.jit
def _store_sums(sums, matrix, vector, columns, HEAD_DIM: tl.constexpr):
    offsets, mask = _matrix_tile(columns, HEAD_DIM)
    tl.store(sums + offsets, matrix, mask=mask)
    tl.store(sums + HEAD_DIM * HEAD_DIM + columns, vector, mask=columns < HEAD_DIM)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def sum_keys(
    k,
    v,
    sums,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    num_tokens,
    num_heads,
    span,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCHEME: tl.constexpr,
):
    """S = sum_n b_n v_n^T and z = sum_n b_n over one span."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    k += _start_of_pair(pair, num_heads, k_batch, k_head)
    v += _start_of_pair(pair, num_heads, v_batch, v_head)
    columns = tl.arange(0, PADDED)
    key_values = tl.zeros((PADDED, PADDED), tl.float32)
    key_sum = tl.zeros((PADDED,), tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, num_tokens)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        offsets, mask = _tile(rows, columns, k_token, end, HEAD_DIM)
        b = _elu_plus_one(tl.load(k + offsets, mask=mask, other=0.0).to(tl.float32))
        # A row beyond the end was read as zero, whose feature is 1.
        b = tl.where((rows < end)[:, None], b, 0.0)
        offsets, mask = _tile(rows, columns, v_token, end, HEAD_DIM)
        value = _as_operand(tl.load(v + offsets, mask=mask, other=0.0), SCHEME)
        high, low, b = _cut_features(b, SCHEME)
        key_values = _dot_features(high, low, value, key_values, SCHEME)
        key_sum += tl.sum(b, 0)
    sums += (pair.to(tl.int64) * tl.num_programs(1) + split) * (HEAD_DIM * (HEAD_DIM + 1))
    _store_sums(sums, key_values, key_sum, columns, HEAD_DIM)


@triton.jit(do_not_specialize=["splits"])
def add_splits(parts, sums, splits, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the sums of a pair's spans, always in the same order."""
    pair = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < ELEMENTS
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + (pair * splits + split) * ELEMENTS + columns, mask=mask, other=0.0)
    tl.store(sums + pair * ELEMENTS + columns, total, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def mix_values(
    q,
    sums,
    out,
    q_batch,
    q_token,
    q_head,
    out_batch,
    out_token,
    out_head,
    num_tokens,
    num_heads,
    span,
    den_added,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCHEME: tl.constexpr,
):
    """o_n = a_n S / (a_n . z + den_added) for the tokens of one span."""
    pair = tl.program_id(0)
    q += _start_of_pair(pair, num_heads, q_batch, q_head)
    out += _start_of_pair(pair, num_heads, out_batch, out_head)
    columns = tl.arange(0, PADDED)
    key_values, key_sum = _load_sums(sums + pair.to(tl.int64) * (HEAD_DIM * (HEAD_DIM + 1)), columns, HEAD_DIM)
    key_values = _rounded(key_values, SCHEME)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, num_tokens)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        offsets, mask = _tile(rows, columns, q_token, end, HEAD_DIM)
        # Rounded for both, so that the weights of the values still sum to one.
        a = _rounded(_elu_plus_one(tl.load(q + offsets, mask=mask, other=0.0).to(tl.float32)), SCHEME)
        den = tl.sum(a * key_sum[None, :], 1) + den_added
        mixed = _dot_rounded(a, key_values, SCHEME) / den[:, None]
        offsets, mask = _tile(rows, columns, out_token, end, HEAD_DIM)
        tl.store(out + offsets, mixed, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def queries_backward(
    q,
    grad,
    sums,
    dq,
    grad_sums,
    q_batch,
    q_token,
    q_head,
    grad_batch,
    grad_token,
    grad_head,
    dq_batch,
    dq_token,
    dq_head,
    num_tokens,
    num_heads,
    span,
    den_added,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCHEME: tl.constexpr,
):
    """dq of one span, and its share of dS = sum_n a_n g_n^T and dz = sum_n a_n e_n.

    With t_n = S do_n, the output needs no product of its own: do_n . o_n = a_n . t_n / den_n.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    q += _start_of_pair(pair, num_heads, q_batch, q_head)
    grad += _start_of_pair(pair, num_heads, grad_batch, grad_head)
    dq += _start_of_pair(pair, num_heads, dq_batch, dq_head)
    columns = tl.arange(0, PADDED)
    key_values, key_sum = _load_sums(sums + pair.to(tl.int64) * (HEAD_DIM * (HEAD_DIM + 1)), columns, HEAD_DIM)
    sums_high, sums_middle, sums_low = _cut_sums(key_values, SCHEME)
    grad_key_values = tl.zeros((PADDED, PADDED), tl.float32)
    grad_key_sum = tl.zeros((PADDED,), tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, num_tokens)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        offsets, mask = _tile(rows, columns, q_token, end, HEAD_DIM)
        query = tl.load(q + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = _tile(rows, columns, grad_token, end, HEAD_DIM)
        do = _as_operand(tl.load(grad + offsets, mask=mask, other=0.0), SCHEME)
        a = _elu_plus_one(query)
        den = tl.sum(a * key_sum[None, :], 1) + den_added
        inverse = 1.0 / den
        t = _dot_sums(do, sums_high, sums_middle, sums_low, SCHEME)
        along_output = tl.sum(a * t, 1) * inverse
        da = (t - along_output[:, None] * key_sum[None, :]) * inverse[:, None]
        # The denominator goes to a and not to do, which is exact only as it came. Beyond the end, do was read as zero:
        # those rows add nothing.
        high, low, scaled = _cut_features(a * inverse[:, None], SCHEME)
        grad_key_values = _dot_features(high, low, do, grad_key_values, SCHEME)
        grad_key_sum -= tl.sum(scaled * along_output[:, None], 0)
        offsets, mask = _tile(rows, columns, dq_token, end, HEAD_DIM)
        tl.store(dq + offsets, da * _elu_derivative(query, a), mask=mask)
    grad_sums += (pair.to(tl.int64) * tl.num_programs(1) + split) * (HEAD_DIM * (HEAD_DIM + 1))
    _store_sums(grad_sums, grad_key_values, grad_key_sum, columns, HEAD_DIM)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def keys_backward(
    k,
    v,
    grad_sums,
    dk,
    dv,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    dk_batch,
    dk_token,
    dk_head,
    dv_batch,
    dv_token,
    dv_head,
    num_tokens,
    num_heads,
    span,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCHEME: tl.constexpr,
):
    """dk and dv of one span: db_n = dS v_n + dz, dv_n = dS^T b_n."""
    pair = tl.program_id(0)
    k += _start_of_pair(pair, num_heads, k_batch, k_head)
    v += _start_of_pair(pair, num_heads, v_batch, v_head)
    dk += _start_of_pair(pair, num_heads, dk_batch, dk_head)
    dv += _start_of_pair(pair, num_heads, dv_batch, dv_head)
    columns = tl.arange(0, PADDED)
    grad_sums += pair.to(tl.int64) * (HEAD_DIM * (HEAD_DIM + 1))
    grad_key_values, grad_key_sum = _load_sums(grad_sums, columns, HEAD_DIM)
    high, middle, low = _cut_sums(grad_key_values, SCHEME)
    grad_key_values = _rounded(grad_key_values, SCHEME)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, num_tokens)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        offsets, mask = _tile(rows, columns, k_token, end, HEAD_DIM)
        key = tl.load(k + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = _tile(rows, columns, v_token, end, HEAD_DIM)
        value = _as_operand(tl.load(v + offsets, mask=mask, other=0.0), SCHEME)
        b = _elu_plus_one(key)
        db = _dot_sums(value, high, middle, low, SCHEME) + grad_key_sum[None, :]
        offsets, mask = _tile(rows, columns, dk_token, end, HEAD_DIM)
        tl.store(dk + offsets, db * _elu_derivative(key, b), mask=mask)
        offsets, mask = _tile(rows, columns, dv_token, end, HEAD_DIM)
        tl.store(dv + offsets, _dot_rounded(_rounded(b, SCHEME), grad_key_values, SCHEME), mask=mask)
