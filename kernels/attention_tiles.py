"""What attention's kernels share: tiles of q, k, v, out and their gradients, in two parts of the head dim; softmax.

Head dims are cut into two powers of two, D0 + D1: 80 costs 64 + 16, not 128. The second part of a tile is 0.0 where D1
is 0. Where D1 is 24, it is a pair itself, of 16 and 8 columns: only of v and out, whose columns tensor cores take by
eights, while they sum over those of q and k by sixteens. Names of dims: M queries, KEYS keys.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .tiles import load_tile, store_tile

# Below every score, but finite: -inf would make NaN of -inf - -inf where all scores of a tile are -inf.
LOWEST = tl.constexpr(-3.4e38)
GROUP = tl.constexpr(16)  # rows that the threads of 4 warps load at once at head dim 64


@triton.jit
def _load_parts(
    x_ptr, rows, row_end, stride_n, stride_d,
    MASK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """x[rows, :] as two parts, (ROWS, D0) and (ROWS, D1), with 0 from row_end on (if MASK) and from D on."""
    cols = tl.arange(0, D0)
    x0 = load_tile(x_ptr, rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0, ALIGN, OFFSET, GROUP)
    if D1 == 24:
        cols = D0 + tl.arange(0, 16)
        a = load_tile(x_ptr, rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0 + 16, ALIGN, OFFSET, GROUP)
        cols = D0 + 16 + tl.arange(0, 8)
        b = load_tile(x_ptr, rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0 + D1, ALIGN, OFFSET, GROUP)
        x1 = (a, b)
    elif D1 > 0:
        cols = D0 + tl.arange(0, D1)
        x1 = load_tile(x_ptr, rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0 + D1, ALIGN, OFFSET, GROUP)
    else:
        x1 = 0.0
    return x0, x1


@triton.jit
def _store_parts(
    x_ptr, x0, x1, rows, row_end, stride_n, stride_d,
    MASK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, D0)
    store_tile(x_ptr, x0, rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0, ALIGN, OFFSET, GROUP)
    if D1 == 24:
        cols = D0 + tl.arange(0, 16)
        store_tile(x_ptr, x1[0], rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0 + 16, ALIGN, OFFSET, GROUP)
        cols = D0 + 16 + tl.arange(0, 8)
        store_tile(x_ptr, x1[1], rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0 + D1, ALIGN, OFFSET, GROUP)
    elif D1 > 0:
        cols = D0 + tl.arange(0, D1)
        store_tile(x_ptr, x1, rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0 + D1, ALIGN, OFFSET, GROUP)


@triton.jit
def _zero_parts(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr):
    x0 = tl.zeros((ROWS, D0), ACC)
    if D1 == 24:
        x1 = (tl.zeros((ROWS, 16), ACC), tl.zeros((ROWS, 8), ACC))
    elif D1 > 0:
        x1 = tl.zeros((ROWS, D1), ACC)
    else:
        x1 = 0.0
    return x0, x1


@triton.jit
def _dot_parts(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ, summed over both parts of the head dim."""
    c = tl.dot(a0, tl.trans(b0), out_dtype=ACC, input_precision=PRECISION)
    if D1 > 0:  # transposed only now: both before the first product cost 2% on sm_100 at head dim 256
        c = tl.dot(a1, tl.trans(b1), c, out_dtype=ACC, input_precision=PRECISION)
    return c


@triton.jit
def _trans_parts(x0, x1, D1: tl.constexpr):
    if D1 > 0:
        x1 = tl.trans(x1)
    return tl.trans(x0), x1


@triton.jit
def _dot_trans(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b, where the two parts of b are transposed already."""
    c = tl.dot(a0, b0, out_dtype=ACC, input_precision=PRECISION)
    if D1 > 0:
        c = tl.dot(a1, b1, c, out_dtype=ACC, input_precision=PRECISION)
    return c


@triton.jit
def _add_dot(acc0, acc1, a, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, for both parts of b's head dim."""
    a = a.to(b0.dtype)
    if D1 == 24:
        c = tl.dot(a, b1[1], acc1[1], out_dtype=ACC, input_precision=PRECISION)
        acc1 = (tl.dot(a, b1[0], acc1[0], out_dtype=ACC, input_precision=PRECISION), c)
    elif D1 > 0:  # first: the last product decides which warps share rows, and a wide one lets fewer repeat work
        acc1 = tl.dot(a, b1, acc1, out_dtype=ACC, input_precision=PRECISION)
    acc0 = tl.dot(a, b0, acc0, out_dtype=ACC, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _scale_parts(x0, x1, factor, D1: tl.constexpr):
    """x times a factor for each row."""
    x0 = x0 * factor[:, None]
    if D1 == 24:
        x1 = (x1[0] * factor[:, None], x1[1] * factor[:, None])
    elif D1 > 0:
        x1 = x1 * factor[:, None]
    return x0, x1


@triton.jit
def _head_offset(b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    return tl.multiple_of(b * stride_b + h * stride_h, ALIGN)


@triton.jit
def _values(k_ptr, v_ptr, V_OFFSET: tl.constexpr):
    """Where v is: if V_OFFSET, that far behind k, so that addresses of v are those of k and a constant."""
    if V_OFFSET > 0:
        v_ptr = k_ptr + V_OFFSET
    return v_ptr


@triton.jit
def _load_queries(
    q_ptr, rows, row_end, stride_qn, stride_qd, MASK: tl.constexpr, NEGATE: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    q0, q1 = _load_parts(q_ptr, rows, row_end, stride_qn, stride_qd, MASK, D, D0, D1, ALIGN, OFFSET)
    if NEGATE:  # a negative scale would turn the maximum into a minimum
        q0 = -q0
        q1 = -q1
    return q0, q1


@triton.jit
def _exp2(s, scale_log2e, shift):
    """2 ** (s scale_log2e - shift), whose argument is rounded once: one FMA and one exp2 a pair."""
    return tl.exp2(tl.fma(s, tl.full((), scale_log2e, s.dtype), -shift))


@triton.jit
def _key_mask(KEYS: tl.constexpr, key_end, ACC: tl.constexpr):
    """What is added to the scores of KEYS keys: 0, or -inf from key_end on."""
    return tl.where(tl.arange(0, KEYS) < key_end, 0.0, -float("inf")).to(ACC)


@triton.jit
def _columns(x, SUMS: tl.constexpr):
    """(M, N) -> (M, N / SUMS, SUMS): a reduction along the second is each thread's own, without shuffles."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // SUMS, SUMS))


@triton.jit
def _fwd_finish(
    out_ptr, lse_ptr, acc0, acc1, row_max, row_sum, rows, row_end, stride_on, stride_od,
    MASK: tl.constexpr, FAST: tl.constexpr, LSE_UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    row_sum = tl.sum(row_sum, 1)  # at least 1, and finite: no special case of division or logarithm
    if FAST:
        share = libdevice.fast_dividef(1.0, row_sum)
        lse = row_max + libdevice.fast_log2f(row_sum)
    else:
        share = 1.0 / row_sum
        lse = row_max + tl.log2(row_sum * LSE_UNIT)
    acc0, acc1 = _scale_parts(acc0, acc1, share, D1)
    _store_parts(out_ptr, acc0, acc1, rows, row_end, stride_on, stride_od, MASK, D, D0, D1, ALIGN, OFFSET)
    if MASK:
        tl.store(lse_ptr + rows, lse, mask=rows < row_end)
    else:
        tl.store(lse_ptr + rows, lse)
