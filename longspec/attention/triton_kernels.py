# mypy: ignore-errors
# ruff: noqa: N803, N806
# Triton's language: no Python types, and capitals for compile-time constants.
"""The Triton kernels of `longspec.attention.triton`, which documents their arguments. This file imports triton.

Flash-decoding: one program takes the columns of one chunk for one key head and up to 64 of the rows that share it
(the query heads of a group, stacked, as in `longspec.attention.reference`, which is the naive form of both), keeps a
running softmax, and stores an output and a log-sum-exp; `joined` merges the chunks. Each key is loaded once for its
group, and chunks fill the GPU when there is one row to compute.

`coded` never writes a dequantized key to memory. With a key's value low_d + step_d * code_jd in channel d of a block
of 64 rows,

    q . k_j  =  sum_d (q_d * step_d) * code_jd  +  sum_d q_d * low_d

so a block's scales multiply the query once instead of 64 keys; a value's scales, one pair a row, multiply its weight:

    sum_j p_j * v_j  =  sum_j (p_j * step_j) * code_j  +  sum_j p_j * low_j        the second sum is the same for all
    d

Tensor cores take the scaled query rounded to 16 bits. Codes are centred on their middle, and low is shifted to it, so
that the rounding error is scaled by half of the codes' range instead of all of it.

Letters: M rows of a tile, N columns of a tile, K key heads, G query heads a key head, D head dimension, S bytes of a
row of codes; M, N and names with PADDED are powers of two. Scores are in base 2, whose exponential is one
instruction.
"""

import torch
import triton
import triton.language as tl

__all__ = [
    "code_channels",
    "coded",
    "coded_columns",
    "dense",
    "dtypes",
    "joined",
    "query_tile",
    "running",
    "scored",
    "stored",
    "tile_rows",
]

BLOCK = tl.constexpr(64)  # longspec.cache.stage.BLOCK
LN2 = tl.constexpr(0.6931471805599453)
MOST_CHUNKS = tl.constexpr(128)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["q", "n", "t", "chunk"])
def dense(
    queries, keys, values, first, last, tail, output, lse,
    q, n, t, chunk, multiplier, softcap, query_row, query_head, tail_row, key_head, key_row, value_head, value_row,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr, TAILED: tl.constexpr,
    CAPPED: tl.constexpr, ROUNDED: tl.constexpr, DOT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Keys and values [K, n, D] of any strides but 1 in D. Of the last t columns, rows attend to those set in `tail`
    [q, t].
    """
    row, head, real = tile_rows(q, G, M)
    channel = tl.arange(0, D_PADDED)
    inside = channel < D
    query = query_tile(queries, row, head, real, channel, inside, query_row, query_head)
    begins, ends, start, stop = _reach(first, last, row, real, n, chunk, BOUNDED, M, N)
    at = tl.arange(0, N)
    key_tile = keys + _head_offset(key_head) + at[:, None] * key_row + channel[None, :]
    value_tile = values + _head_offset(value_head) + at[:, None] * value_row + channel[None, :]

    maximum, total = tl.full([M], NOTHING, tl.float32), tl.zeros([M], tl.float32)
    summed = tl.zeros([M, D_PADDED], tl.float32)
    for begin in range(start, stop, N):
        column = begin + at
        held = (column < n)[:, None] & inside[None, :]
        key = tl.load(key_tile + tl.cast(begin, tl.int64) * key_row, held, 0.0)
        scores = tl.dot(query.to(DOT), tl.trans(key.to(DOT)), input_precision="ieee")
        scores = scored(scores, multiplier, softcap, CAPPED)
        scores = _masked(scores, column, begins, ends, tail, row, real, n, t, tail_row, TAILED)
        weights, kept, maximum, total = running(scores, maximum, total)
        value = tl.load(value_tile + tl.cast(begin, tl.int64) * value_row, held, 0.0)
        weights = weights.to(ROUNDED).to(DOT)
        summed = summed * kept[:, None] + tl.dot(weights, value.to(DOT), input_precision="ieee")
    stored(output, lse, summed, maximum, total, q, row, head, real, channel, inside, K * G, D)


@triton.jit(do_not_specialize=["q", "n", "t", "chunk"])
def coded(
    queries, key_codes, key_lower, key_step, key_low, value_codes, value_lower, value_step, value_low,
    first, last, tail, output, lse,
    q, n, t, chunk, multiplier, softcap, query_row, query_head, tail_row, plane_blocks, scale_blocks,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr, TAILED: tl.constexpr,
    CAPPED: tl.constexpr, ROUNDED: tl.constexpr, DOT: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DUAL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Codes in the layout of `longspec.cache.codes`: BITS a code and plane, and in the dual codec a second, lower
    plane.

    plane_blocks, scale_blocks: the strides from head to head, in blocks, of codes and of scales.
    """
    row, head, real = tile_rows(q, G, M)
    channel, inside = code_channels(D, D_PADDED, BITS)
    query = query_tile(queries, row, head, real, channel, inside, query_row, query_head)
    begins, ends, start, stop = _reach(first, last, row, real, n, chunk, BOUNDED, M, N)
    summed, maximum, total = coded_columns(
        query, key_codes, key_lower, key_step, key_low, value_codes, value_lower, value_step, value_low,
        begins, ends, start, stop, tail, row, real, n, t, tail_row,
        multiplier, softcap, _head_offset(plane_blocks), _head_offset(scale_blocks),
        D, TAILED, CAPPED, ROUNDED, DOT, BITS, SYMMETRIC, DUAL, M, N, D_PADDED,
    )  # fmt: skip
    stored(output, lse, summed, maximum, total, q, row, head, real, channel, inside, K * G, D)


@triton.jit
def code_channels(D: tl.constexpr, D_PADDED: tl.constexpr, BITS: tl.constexpr):
    """The channels of unpacked codes, and a mask of the real ones. A byte holds codes whose channels are S apart;
    unpacked, they are S_PADDED apart.
    """
    S: tl.constexpr = D * BITS // 8
    S_PADDED: tl.constexpr = D_PADDED * BITS // 8
    unpacked = tl.arange(0, D_PADDED)
    return unpacked // S_PADDED * S + unpacked % S_PADDED, unpacked % S_PADDED < S


@triton.jit
def coded_columns(
    query, key_codes, key_lower, key_step, key_low, value_codes, value_lower, value_step, value_low,
    begins, ends, start, stop, tail, row, real, n, t, tail_row, multiplier, softcap, plane, scale,
    D: tl.constexpr, TAILED: tl.constexpr, CAPPED: tl.constexpr, ROUNDED: tl.constexpr, DOT: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DUAL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """The running softmax of a tile of rows over the columns start..stop: weighted sum, maximum and total.

    plane, scale: blocks before those of this program's head.
    """
    MIDDLE: tl.constexpr = 0 if SYMMETRIC else 128 if DUAL else 1 << (BITS - 1)
    S: tl.constexpr = D * BITS // 8
    S_PADDED: tl.constexpr = D_PADDED * BITS // 8
    channel, inside = code_channels(D, D_PADDED, BITS)
    byte = tl.arange(0, S_PADDED)
    at = tl.arange(0, N)

    maximum, total = tl.full([M], NOTHING, tl.float32), tl.zeros([M], tl.float32)
    summed, alike = tl.zeros([M, D_PADDED], tl.float32), tl.zeros([M], tl.float32)
    for begin in range(start, stop, N):
        column, here = begin + at, tl.cast(begin, tl.int64)
        codes_at = (plane * BLOCK + here) * S
        scale_at = scale + here // BLOCK

        # Load all scales before the first is needed: unlike codes they aren't prefetched by the pipeliner.
        row_at = scale * BLOCK + here + at
        key_steps = tl.load(key_step + scale_at * D + channel, inside, 0.0).to(tl.float32)
        value_steps = tl.load(value_step + row_at).to(tl.float32)
        if not SYMMETRIC:
            key_lows = tl.load(key_low + scale_at * D + channel, inside, 0.0).to(tl.float32) + key_steps * MIDDLE
            value_lows = tl.load(value_low + row_at).to(tl.float32) + value_steps * MIDDLE

        codes = _codes(key_codes, key_lower, codes_at, at, byte, S, BITS, DUAL)
        scaled = (query.to(tl.float32) * key_steps[None, :]).to(ROUNDED).to(DOT)
        scores = tl.dot(scaled, tl.trans((codes.to(tl.float32) - MIDDLE).to(DOT)), input_precision="ieee")
        if not SYMMETRIC:
            scores += tl.sum(query.to(tl.float32) * key_lows[None, :], 1)[:, None]
        scores = scored(scores, multiplier, softcap, CAPPED)
        scores = _masked(scores, column, begins, ends, tail, row, real, n, t, tail_row, TAILED)
        weights, kept, maximum, total = running(scores, maximum, total)

        codes = _codes(value_codes, value_lower, codes_at, at, byte, S, BITS, DUAL)
        scaled = (weights * value_steps[None, :]).to(ROUNDED).to(DOT)
        centred = (codes.to(tl.float32) - MIDDLE).to(DOT)
        summed = summed * kept[:, None] + tl.dot(scaled, centred, input_precision="ieee")
        if not SYMMETRIC:
            alike = alike * kept + tl.sum(weights * value_lows[None, :], 1)
    return summed + alike[:, None], maximum, total


@triton.jit(do_not_specialize=["chunks"])
def joined(outputs, lses, output, lse, chunks, rows, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Merge the chunks' outputs [chunks, rows, D] and log-sum-exps [chunks, rows] for one of the rows q * H."""
    row = tl.program_id(0)
    chunk, channel = tl.arange(0, MOST_CHUNKS), tl.arange(0, D_PADDED)
    inside = channel < D
    each = tl.load(lses + chunk * rows + row, chunk < chunks, NOTHING)
    maximum = tl.max(each, 0)
    base = tl.where(maximum == NOTHING, 0.0, maximum)
    total = tl.sum(tl.exp(each - base), 0)
    summed = tl.zeros([D_PADDED], tl.float32)
    some = tl.arange(0, 16)
    for begin in range(0, chunks, 16):
        one = begin + some
        weight = tl.exp(tl.load(lses + one * rows + row, one < chunks, NOTHING) - base)
        partial = outputs + (one * rows + row)[:, None] * D + channel[None, :]
        partial = tl.load(partial, (one < chunks)[:, None] & inside[None, :], 0.0)
        summed += tl.sum(weight[:, None] * partial, 0)
    tl.store(output + row * D + channel, summed / tl.where(total == 0, 1.0, total), inside)
    tl.store(lse + row, tl.where(total == 0, NOTHING, base + tl.log(tl.where(total == 0, 1.0, total))))


@triton.jit
def _head_offset(distance):
    """The offset of this program's key head, in elements."""
    return tl.program_id(2).to(tl.int64) * distance


@triton.jit
def tile_rows(q, G: tl.constexpr, M: tl.constexpr):
    """The indices of this tile's M rows in the pass, their query heads, and a mask of the real ones."""
    place = tl.program_id(0) * M + tl.arange(0, M)
    return place % q, tl.program_id(2) * G + place // q, place < G * q


@triton.jit
def query_tile(queries, row, head, real, channel, inside, query_row, query_head):
    place = queries + (row * query_row + head * query_head)[:, None] + channel[None, :]
    return tl.load(place, real[:, None] & inside[None, :], 0.0)


@triton.jit
def _reach(first, last, row, real, n, chunk, BOUNDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Each row's first and last column, and the range of this program's chunk that any of them attends to."""
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, n)
    if BOUNDED:
        begins = tl.load(first + row, real, n).to(tl.int32)
        ends = tl.minimum(tl.load(last + row, real, 0).to(tl.int32), n)
        start = tl.maximum(start, tl.min(begins, 0) // N * N)
        stop = tl.minimum(stop, tl.max(ends, 0))
    else:
        begins, ends = tl.zeros([M], tl.int32), tl.full([M], 0, tl.int32) + n
    return begins, ends, start, stop


@triton.jit
def scored(products, multiplier, softcap, CAPPED: tl.constexpr):
    """Scores in base 2 of the products of queries and keys. With a softcap, `multiplier` is scale / softcap."""
    if CAPPED:
        ratio = products * multiplier
        small = tl.exp(-2.0 * tl.abs(ratio))
        scores = softcap * tl.where(ratio < 0, -1.0, 1.0) * (1.0 - small) / (1.0 + small)  # softcap * tanh(ratio)
    else:
        scores = products * multiplier
    return scores


@triton.jit
def _masked(scores, column, begins, ends, tail, row, real, n, t, tail_row, TAILED: tl.constexpr):
    """Scores with -inf where a row may not attend to a column."""
    allowed = (column[None, :] >= begins[:, None]) & (column[None, :] < ends[:, None])
    if TAILED:  # noqa: SIM102 - one is a compile-time condition, the other isn't
        if tl.max(column, 0) >= n - t:  # most tiles lie before the tail and need no mask
            in_tail = (column >= n - t) & (column < n)
            ancestor = tail + row[:, None] * tail_row + (column - (n - t))[None, :]
            allowed &= tl.load(ancestor, real[:, None] & in_tail[None, :], 1) != 0
    return tl.where(allowed, scores, NOTHING)


@triton.jit
def running(scores, maximum, total):
    """Update a running softmax by one tile: its weights, the factor for earlier sums, maximum, total."""
    new = tl.maximum(maximum, tl.max(scores, 1))
    base = tl.where(new == NOTHING, 0.0, new)
    weights, kept = tl.exp2(scores - base[:, None]), tl.exp2(maximum - base)
    return weights, kept, new, total * kept + tl.sum(weights, 1)


@triton.jit
def _codes(upper, lower, codes_at, at, byte, S: tl.constexpr, BITS: tl.constexpr, DUAL: tl.constexpr):
    """The codes [N, D_PADDED] of the rows `at`."""
    place = codes_at + at[:, None] * S + byte[None, :]
    codes = _unpacked(tl.load(upper + place, (byte < S)[None, :], 0), BITS)
    if DUAL:
        codes = (codes << 4) | _unpacked(tl.load(lower + place, (byte < S)[None, :], 0), BITS)
    return codes


@triton.jit
def _unpacked(packed, BITS: tl.constexpr):
    """Unpack bytes [N, s] to codes [N, 8 / BITS * s]: the inverse of `longspec.cache.codes.pack`."""
    if BITS == 4:
        halves = tl.join(packed & 15, packed >> 4)
        codes = tl.permute(halves, (0, 2, 1)).reshape(packed.shape[0], 2 * packed.shape[1])
    elif BITS == 2:
        even, odd = tl.join(packed & 3, (packed >> 4) & 3), tl.join((packed >> 2) & 3, packed >> 6)
        fourths = tl.join(even, odd)  # [N, s, 2, 2]: code 2 a + b in [a, b]
        codes = tl.permute(fourths, (0, 2, 3, 1)).reshape(packed.shape[0], 4 * packed.shape[1])
    else:
        codes = packed
    return codes


@triton.jit
def stored(
    output, lse, summed, maximum, total, q, row, head, real, channel, inside, H: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Store the output [q, H, D] and log-sum-exp [q, H]; zeros and -inf for a row without columns."""
    place = (tl.program_id(1) * q + row) * H + head
    some = tl.where(total == 0, 1.0, total)
    tl.store(output + place[:, None] * D + channel[None, :], summed / some[:, None], real[:, None] & inside[None, :])
    tl.store(lse + place, tl.where(total == 0, NOTHING, (maximum + tl.log2(some)) * LN2), real)


def dtypes(queries: torch.dtype, is_coded: bool) -> dict[str, tl.dtype]:
    """The dtypes that weights and scaled queries are rounded to, and that products are computed in.

    A weight times a value's scale can be below fp16's range, so codes are multiplied in bf16. The interpreter can't
    multiply bf16, and multiplies the rounded numbers in fp32.
    """
    if queries == torch.float32:
        rounded = tl.float32
    else:
        rounded = tl.float16 if queries == torch.float16 and not is_coded else tl.bfloat16
    interpreted = not isinstance(stored, triton.JITFunction)
    return {"ROUNDED": rounded, "DOT": tl.float32 if interpreted and rounded == tl.bfloat16 else rounded}
