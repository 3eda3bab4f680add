# mypy: ignore-errors
# ruff: noqa: N803
# Triton's language: no Python types, and capitals for compile-time constants.
"""The Triton kernels between a layer's products, for recorded passes (`longspec.model.gpu.cuda_graphs`).

A recorded launch always has the same arguments. So the inputs that change from pass to pass are in device memory, in
int64:

    text     [6]          columns of the buffers before the stage, the pass's first staged row, its rows, the buffers'
                          capacity, the sequence's position of their first column, and columns attended to as codes
    rows     [4, R]       per row: its token, its position, whether its sequence is planned to be long, and a bit mask
                          of the staged rows that it attends to
    places   [layers, P]  per layer: the address of its rows [2, K, capacity, D]; and, for quantized caches, those of
                          its eight tensors of codes, and their capacity in blocks

Letters as in `longspec.attention.triton_kernels`; R rows of the recorded pass, padded: those beyond the real ones are
computed and ignored.
"""

import triton
import triton.language as tl

from longspec.attention.triton_kernels import (
    BLOCK,
    NOTHING,
    code_channels,
    coded_columns,
    query_tile,
    running,
    scored,
    stored,
    tile_rows,
)

__all__ = ["added", "gated", "put", "read", "read_codes"]

FIRST, COUNT, CAPACITY, START, CODED = (tl.constexpr(i) for i in range(1, 6))  # indices of text
POSITION, READS = tl.constexpr(1), tl.constexpr(3)  # indices of rows
SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["layer"])
def put(
    made, cos, sin, text, places, layer, queries,
    P: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Rotate one head of one row of made [R, (H + 2 K) * D] by cos and sin [R, 1, DIMS], except values, and store it:
    to queries [R, H, D], or to its place in the layer's buffer.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, D_PADDED)
    inside = channel < D
    source = made + (row * (H + 2 * K) + head) * D
    own = tl.load(source + channel, inside, 0.0)
    if DIMS > 0:  # noqa: SIM102 - one is a compile-time condition, the other isn't
        if head < H + K:
            turned, half = channel < DIMS, DIMS // 2
            other = tl.load(source + tl.where(channel < half, channel + half, channel - half), turned, 0.0)
            c = tl.load(cos + row * DIMS + channel, turned, 1.0).to(tl.float32)
            s = tl.load(sin + row * DIMS + channel, turned, 0.0).to(tl.float32)
            own = (own.to(tl.float32) * c + other.to(tl.float32) * s).to(own.dtype)
    if head < H:
        tl.store(queries + (row * H + head) * D + channel, own, inside)
    elif row < tl.load(text + COUNT):
        at = tl.load(text) + tl.load(text + FIRST) + row
        place = _place(places + layer * P, made.dtype.element_ty) + ((head - H) * tl.load(text + CAPACITY) + at) * D
        tl.store(place + channel, own, inside)


@triton.jit(do_not_specialize=["layer", "R", "window"])
def read(
    queries, text, rows, places, layer, output, lse, R, window, multiplier, softcap,
    P: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NEAR: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, ROUNDED: tl.constexpr, DOT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Attention of queries [R, K * G, D] over the layer's buffer: for each chunk of columns an output [R, K * G, D]
    and a log-sum-exp [R, K * G] in fp32. There are as many chunks as programs, however long the sequence is.

    window: the attention window in positions, the own one included; at least the number of staged rows, for which
    their bits alone decide. NEAR: the residual window, which isn't attended to as codes, as in
    `longspec.cache.quantized`.
    """
    row, head, real = tile_rows(R, G, M)
    channel = tl.arange(0, D_PADDED)
    inside = channel < D
    query = query_tile(queries, row, head, real, channel, inside, K * G * D, D)
    before = tl.load(text)
    n = before + tl.load(text + FIRST) + tl.load(text + COUNT)
    start, stop = _chunk(n)
    position = tl.load(rows + POSITION * R + row, real, 1 << 40)
    begins = _begin(position, window, WINDOWED)
    if NEAR:
        begins = tl.maximum(begins, _near(position))
    begins -= tl.load(text + START)
    start = tl.maximum(start, tl.min(begins, 0) // N * N)
    bits = tl.load(rows + READS * R + row, real, 0)
    at = tl.arange(0, N)
    capacity = tl.multiple_of(tl.load(text + CAPACITY), 16)
    keys = _place(places + layer * P, queries.dtype.element_ty) + tl.program_id(2) * capacity * D
    keys += at[:, None] * D + channel[None, :]
    values = keys + K * capacity * D

    maximum, total = tl.full([M], NOTHING, tl.float32), tl.zeros([M], tl.float32)
    summed = tl.zeros([M, D_PADDED], tl.float32)
    for begin in range(start, stop, N):
        column = begin + at
        held = (column < n)[:, None] & inside[None, :]
        key = tl.load(keys + begin * D, held, 0.0)
        scores = tl.dot(query.to(DOT), tl.trans(key.to(DOT)), input_precision="ieee")
        scores = scored(scores, multiplier, softcap, CAPPED)
        own = ((bits[:, None] >> tl.maximum(column - before, 0)[None, :]) & 1) != 0
        allowed = tl.where((column < before)[None, :], column[None, :] >= begins[:, None], own)
        scores = tl.where(allowed & (column < n)[None, :], scores, NOTHING)
        weights, kept, maximum, total = running(scores, maximum, total)
        value = tl.load(values + begin * D, held, 0.0)
        weights = weights.to(ROUNDED).to(DOT)
        summed = summed * kept[:, None] + tl.dot(weights, value.to(DOT), input_precision="ieee")
    stored(output, lse, summed, maximum, total, R, row, head, real, channel, inside, K * G, D)


@triton.jit(do_not_specialize=["layer", "R", "window"])
def read_codes(
    queries, text, rows, places, layer, output, lse, R, window, multiplier, softcap,
    P: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    ROUNDED: tl.constexpr, DOT: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DUAL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Attention over the layer's codes: each row attends to those before its residual window."""
    row, head, real = tile_rows(R, G, M)
    channel, inside = code_channels(D, D_PADDED, BITS)
    query = query_tile(queries, row, head, real, channel, inside, K * G * D, D)
    n = tl.load(text + CODED)
    start, stop = _chunk(n)
    position = tl.load(rows + POSITION * R + row, real, 0)
    begins, ends = _begin(position, window, WINDOWED), tl.minimum(_near(position), n)
    if WINDOWED:
        start = tl.maximum(start, tl.min(tl.where(real, begins, n), 0) // N * N)
    own = places + layer * P + 1
    packed: tl.constexpr = tl.int8 if SYMMETRIC else tl.uint8
    head_at = tl.program_id(2) * tl.load(own + 8)
    summed, maximum, total = coded_columns(
        query, _place(own, packed), _place(own + 1, packed), _place(own + 2, tl.float16), _place(own + 3, tl.float16),
        _place(own + 4, packed), _place(own + 5, packed), _place(own + 6, tl.float16), _place(own + 7, tl.float16),
        begins, ends, start, stop, text, row, real, n, 0, 0, multiplier, softcap, head_at, head_at,
        D, False, CAPPED, ROUNDED, DOT, BITS, SYMMETRIC, DUAL, M, N, D_PADDED,
    )  # fmt: skip
    stored(output, lse, summed, maximum, total, R, row, head, real, channel, inside, K * G, D)


@triton.jit
def added(
    hidden, other, weight, total, output, eps, W, ADDED: tl.constexpr, W_PADDED: tl.constexpr
):  # fmt: skip
    """One row [W]: total = hidden + other, where ADDED, and output = its root mean square norm."""
    place = tl.program_id(0) * W
    channel = tl.arange(0, W_PADDED)
    inside = channel < W
    own = tl.load(hidden + place + channel, inside, 0.0)
    wide = own.to(tl.float32)
    if ADDED:
        rounded = (wide + tl.load(other + place + channel, inside, 0.0).to(tl.float32)).to(own.dtype)
        tl.store(total + place + channel, rounded, inside)
        wide = rounded.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / W + eps) * tl.load(weight + channel, inside, 0.0).to(tl.float32)
    tl.store(output + place + channel, normed.to(own.dtype), inside)


@triton.jit
def gated(made, output, W, ACTIVATION: tl.constexpr, N: tl.constexpr):
    """N channels of one row: output [R, W] = activation(gate) * up, of made [R, 2 W]."""
    row, channel = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    inside = channel < W
    gate = tl.load(made + row * 2 * W + channel, inside, 0.0)
    up = tl.load(made + row * 2 * W + W + channel, inside, 0.0)
    x = gate.to(tl.float32)
    if ACTIVATION == SILU:
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))  # 0.5 * (1 + tanh(inner))
    rounded = x.to(gate.dtype).to(tl.float32)  # as torch's activation rounds
    tl.store(output + row * W + channel, (rounded * up.to(tl.float32)).to(gate.dtype), inside)


@triton.jit
def _place(place, element: tl.constexpr):
    """A pointer to elements at the address in a word: a multiple of 16 bytes, which a compiler can't infer from a
    number.
    """
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(element)), 16)


@triton.jit
def _chunk(n):
    """The columns of this program's chunk, a multiple of the block."""
    size = tl.cdiv(tl.cdiv(n, tl.num_programs(1)), BLOCK) * BLOCK
    start = tl.program_id(1) * size
    return start, tl.minimum(start + size, n)


@triton.jit
def _begin(position, window, WINDOWED: tl.constexpr):
    """The first position that a row attends to."""
    return tl.maximum(position - window + 1, 0) if WINDOWED else position * 0


@triton.jit
def _near(position):
    """The same as `longspec.cache.dense.near_start`."""
    return tl.maximum(position // BLOCK - 1, 0) * BLOCK
