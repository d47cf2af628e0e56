"""Attention as Triton kernels (Dao 2023, FlashAttention-2): the maths, and the forward pass.

    s = scale q kᵀ        p = softmax(s)        out = p v        lse = log₂ Σ exp s
    delta = Σ_d dout ⊙ out        ds = p ⊙ (dout vᵀ - delta)
    dq = scale ds k        dk = scale dsᵀ q        dv = pᵀ dout

q and out are (B,H,Nq,D), k and v (B,H,Nk,D). The forward pass walks over tiles of keys with a running maximum and sum,
so that no (Nq,Nk) map exists; the backward pass makes p again from lse, which is all that is kept beside q, k, v and
out (up to a constant: `lse_unit`). Sequences are cut into whole tiles, which carry no mask along the sequence, and one
tail as narrow as 16. Head dims are cut into two powers of two, D0 + D1: 80 costs 64 + 16, not 128. The second part of a
tile is 0.0 where D1 is 0.
"""

import math

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import configs
from .launch import accumulator, chip_of, dot_precision, launch, layout, tail, tl_accumulator
from .tiles import load_tile, row_offset, store_tile

LOG2E = math.log2(math.e)  # exponents are of 2: scores are multiplied by scale_log2e = scale LOG2E
# Below every score, but finite: -inf would make NaN of -inf - -inf where all scores of a tile are -inf.
LOWEST = tl.constexpr(-3.4e38)
SMALLEST_SCALE = 1e-30  # instead of 0, which times the score -inf of a key that is not there would be NaN
GROUP = tl.constexpr(16)  # rows that the threads of 4 warps load at once at head dim 64


@triton.jit
def _load_parts(
    x_ptr, rows, row_end, stride_n, stride_d,
    MASK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """x[rows, :] as two parts, (ROWS, D0) and (ROWS, D1), with 0 from row_end on (if MASK) and from D on."""
    cols = tl.arange(0, D0)
    x0 = load_tile(x_ptr, rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0, ALIGN, OFFSET, GROUP)
    if D1 > 0:
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
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)
        store_tile(x_ptr, x1, rows, row_end, cols, D, stride_n, stride_d, MASK, D < D0 + D1, ALIGN, OFFSET, GROUP)


@triton.jit
def _zero_parts(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr):
    x0 = tl.zeros((ROWS, D0), ACC)
    if D1 > 0:
        x1 = tl.zeros((ROWS, D1), ACC)
    else:
        x1 = 0.0
    return x0, x1


@triton.jit
def _dot_parts(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ, summed over both parts of the head dim."""
    b0, b1 = _trans_parts(b0, b1, D1)
    return _dot_trans(a0, a1, b0, b1, D1, ACC, PRECISION)


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
    if D1 > 0:  # first: the last product decides which warps share rows, and a wide one lets fewer repeat work
        acc1 = tl.dot(a, b1, acc1, out_dtype=ACC, input_precision=PRECISION)
    acc0 = tl.dot(a, b0, acc0, out_dtype=ACC, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _head_offset(b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    return tl.multiple_of(b * stride_b + h * stride_h, ALIGN)


@triton.jit
def _values(k_ptr, v_ptr, V_OFFSET: tl.constexpr):
    """Where v is: if V_OFFSET, that far behind k, so that addresses of v are those of k and a constant."""
    if V_OFFSET > 0:
        v_ptr = k_ptr + V_OFFSET
    return v_ptr


# ---------------------------------------------------------------------------------------------------------------------
# Forward


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
def _fwd_start(
    q_ptr, rows, row_end, stride_qn, stride_qd,
    MASK: tl.constexpr, SUMS: tl.constexpr, NEGATE: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The queries of a tile, and before any key their output, maximum (of s log2 e) (M,) and sums (M, SUMS)."""
    q0, q1 = _load_queries(q_ptr, rows, row_end, stride_qn, stride_qd, MASK, NEGATE, D, D0, D1, ALIGN, OFFSET)
    acc0, acc1 = _zero_parts(rows.shape[0], D0, D1, ACC)
    row_max = tl.full((rows.shape[0],), LOWEST, ACC)
    row_sum = tl.zeros((rows.shape[0], SUMS), ACC)
    return q0, q1, acc0, acc1, row_max, row_sum


@triton.jit
def _exp2(s, scale_log2e, shift):
    """2 ** (s scale_log2e - shift), whose argument is rounded once: one FMA and one exp2 a pair."""
    return tl.exp2(tl.fma(s, tl.full((), scale_log2e, s.dtype), -shift))


@triton.jit
def _fwd_tile(
    q0, q1, k0, k1, v0, v1, acc0, acc1, row_max, row_sum, key_end, scale_log2e,
    MASK: tl.constexpr, FIRST: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries with one of keys: output, running maximum and sums of each query; if FIRST, not yet set."""
    s = _dot_parts(q0, q1, k0, k1, D1, ACC, PRECISION)  # (M, KEYS)
    if MASK:
        s += tl.where(tl.arange(0, k0.shape[0]) < key_end, 0.0, -float("inf")).to(ACC)[None, :]
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2e)
    p = _exp2(s, scale_log2e, new_max[:, None])
    SUMS: tl.constexpr = row_sum.shape[1]
    p_sum = tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // SUMS, SUMS)), 1)  # each thread its own: no shuffles
    if FIRST:
        row_sum = p_sum
    else:
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha[:, None] + p_sum
        acc0 = acc0 * alpha[:, None]
        if D1 > 0:
            acc1 = acc1 * alpha[:, None]
    acc0, acc1 = _add_dot(acc0, acc1, p, v0, v1, D1, ACC, PRECISION)
    return acc0, acc1, new_max, row_sum


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
    _store_parts(
        out_ptr, acc0 * share[:, None], acc1 * share[:, None] if D1 > 0 else acc1, rows, row_end, stride_on, stride_od,
        MASK, D, D0, D1, ALIGN, OFFSET,
    )  # fmt: skip
    if MASK:
        tl.store(lse_ptr + rows, lse, mask=rows < row_end)
    else:
        tl.store(lse_ptr + rows, lse)


@triton.jit
def _fwd_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, NQ, NK, scale_log2e,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_on, stride_od,
    M: tl.constexpr, MASK_M: tl.constexpr, SIDE_M: tl.constexpr, V_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr, LOOP_N: tl.constexpr, TAIL_N: tl.constexpr,
    NEGATE: tl.constexpr, FAST: tl.constexpr, LSE_UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first M of NQ queries from q_ptr, with all keys; beside them, in a tile of SIDE_M, those that follow."""
    rows = tl.arange(0, M)
    # Rows of a tile of 16 are shared by warps: 16 sums a row let two of them keep their own.
    q0, q1, acc0, acc1, row_max, row_sum = _fwd_start(
        q_ptr, rows, NQ, stride_qn, stride_qd, MASK_M, 16 if M == 16 else 8, NEGATE, D, D0, D1, ALIGN, OFFSET, ACC
    )
    if SIDE_M > 0:
        side = M + tl.arange(0, SIDE_M)
        side_q0, side_q1, side_acc0, side_acc1, side_max, side_sum = _fwd_start(
            q_ptr, side, NQ, stride_qn, stride_qd, True, 8, NEGATE, D, D0, D1, ALIGN, OFFSET, ACC
        )
    if TAIL_N > 0:  # first, while there is nothing to rescale
        key_end = NK % BLOCK_N
        tail_k_ptr = k_ptr + row_offset(NK - key_end, stride_kn, ALIGN)
        tail_v_ptr = v_ptr + row_offset(NK - key_end, stride_vn, ALIGN)
        keys = tl.arange(0, TAIL_N)
        tail_k0, tail_k1 = _load_parts(
            tail_k_ptr, keys, key_end, stride_kn, stride_kd, True, D, D0, D1, ALIGN, OFFSET
        )  # fmt: skip
        tail_v0, tail_v1 = _load_parts(
            tail_v_ptr, keys, key_end, stride_vn, stride_vd, True, D, D0, D1, ALIGN, OFFSET
        )  # fmt: skip
        if SIDE_M > 0:
            side_acc0, side_acc1, side_max, side_sum = _fwd_tile(
                side_q0, side_q1, tail_k0, tail_k1, tail_v0, tail_v1, side_acc0, side_acc1, side_max, side_sum,
                key_end, scale_log2e, True, True, D1, ACC, PRECISION,
            )  # fmt: skip
        acc0, acc1, row_max, row_sum = _fwd_tile(
            q0, q1, tail_k0, tail_k1, tail_v0, tail_v1, acc0, acc1, row_max, row_sum,
            key_end, scale_log2e, True, True, D1, ACC, PRECISION,
        )  # fmt: skip
    if LOOP_N:
        tl.assume(NK >= BLOCK_N)  # or the loop is guarded, and the sums are set to 0 on both ways
        for _ in range(0, NK // BLOCK_N):
            v_ptr = _values(k_ptr, v_ptr, V_OFFSET)
            keys_n = tl.arange(0, BLOCK_N)
            k0, k1 = _load_parts(k_ptr, keys_n, BLOCK_N, stride_kn, stride_kd, False, D, D0, D1, ALIGN, OFFSET)
            v0, v1 = _load_parts(v_ptr, keys_n, BLOCK_N, stride_vn, stride_vd, False, D, D0, D1, ALIGN, OFFSET)
            if SIDE_M > 0:
                side_acc0, side_acc1, side_max, side_sum = _fwd_tile(
                    side_q0, side_q1, k0, k1, v0, v1, side_acc0, side_acc1, side_max, side_sum,
                    BLOCK_N, scale_log2e, False, False, D1, ACC, PRECISION,
                )  # fmt: skip
            acc0, acc1, row_max, row_sum = _fwd_tile(
                q0, q1, k0, k1, v0, v1, acc0, acc1, row_max, row_sum,
                BLOCK_N, scale_log2e, False, False, D1, ACC, PRECISION,
            )  # fmt: skip
            k_ptr += tl.cast(BLOCK_N, OFFSET) * stride_kn
            v_ptr += tl.cast(BLOCK_N, OFFSET) * stride_vn
    if SIDE_M > 0:
        _fwd_finish(
            out_ptr, lse_ptr, side_acc0, side_acc1, side_max, side_sum, side, NQ, stride_on, stride_od,
            True, FAST, LSE_UNIT, D, D0, D1, ALIGN, OFFSET,
        )  # fmt: skip
    _fwd_finish(
        out_ptr, lse_ptr, acc0, acc1, row_max, row_sum, rows, NQ, stride_on, stride_od,
        MASK_M, FAST, LSE_UNIT, D, D0, D1, ALIGN, OFFSET,
    )  # fmt: skip


# Short sequences: all keys at once, in up to three tiles a, b and c, whose shared memory every tile of queries reads


@triton.jit
def _short_load(
    x_ptr, stride_n, stride_d, end, START: tl.constexpr, ROWS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """ROWS rows of k or v from START on, as two parts; if there are none, 0.0."""
    x0, x1 = 0.0, 0.0
    if ROWS > 0:
        x_ptr += row_offset(START, stride_n, ALIGN)
        x0, x1 = _load_parts(
            x_ptr, tl.arange(0, ROWS), end - START, stride_n, stride_d, MASK, D, D0, D1, ALIGN, OFFSET
        )  # fmt: skip
    return x0, x1


@triton.jit
def _short_trans(x0, x1, ROWS: tl.constexpr, D1: tl.constexpr):
    if ROWS > 0:
        x0, x1 = _trans_parts(x0, x1, D1)
    return x0, x1


@triton.jit
def _key_mask(KEYS: tl.constexpr, key_end, ACC: tl.constexpr):
    """What is added to the scores of KEYS keys: 0, or -inf from key_end on."""
    return tl.where(tl.arange(0, KEYS) < key_end, 0.0, -float("inf")).to(ACC)


@triton.jit
def _columns(x, SUMS: tl.constexpr):
    """(M, N) -> (M, N / SUMS, SUMS): a reduction along the second is each thread's own, without shuffles."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // SUMS, SUMS))


@triton.jit
def _short_tile(
    q0, q1, ka0, ka1, kb0, kb1, kc0, kc1, va0, va1, vb0, vb1, vc0, vc1, key_end, scale_log2e,
    KEYS_B: tl.constexpr, KEYS_C: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries with all keys, of which k is transposed: output, maximum (of s log2 e) and sums (M, 8)."""
    a = _dot_trans(q0, q1, ka0, ka1, D1, ACC, PRECISION)  # (M, KEYS_A)
    row_max = tl.max(_columns(a, 8), 1)
    if KEYS_B > 0:
        b = _dot_trans(q0, q1, kb0, kb1, D1, ACC, PRECISION)
        row_max = tl.maximum(row_max, tl.max(_columns(b, 8), 1))
    if KEYS_C > 0:
        c = _dot_trans(q0, q1, kc0, kc1, D1, ACC, PRECISION) + _key_mask(KEYS_C, key_end, ACC)[None, :]
        row_max = tl.maximum(row_max, tl.max(_columns(c, 8), 1))
    row_max = tl.maximum(tl.max(row_max, 1) * scale_log2e, LOWEST)
    acc0, acc1 = _zero_parts(q0.shape[0], D0, D1, ACC)
    p = _exp2(a, scale_log2e, row_max[:, None])
    row_sum = tl.sum(_columns(p, 8), 1)
    acc0, acc1 = _add_dot(acc0, acc1, p, va0, va1, D1, ACC, PRECISION)
    if KEYS_B > 0:
        p = _exp2(b, scale_log2e, row_max[:, None])
        row_sum += tl.sum(_columns(p, 8), 1)
        acc0, acc1 = _add_dot(acc0, acc1, p, vb0, vb1, D1, ACC, PRECISION)
    if KEYS_C > 0:
        p = _exp2(c, scale_log2e, row_max[:, None])
        row_sum += tl.sum(_columns(p, 8), 1)
        acc0, acc1 = _add_dot(acc0, acc1, p, vc0, vc1, D1, ACC, PRECISION)
    return acc0, acc1, row_max, row_sum


@triton.jit
def _add_dot_trans(acc0, acc1, p, v0, v1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + vᵀ p, for both parts of v's head dim."""
    p = p.to(v0.dtype)
    if D1 > 0:
        acc1 = tl.dot(tl.trans(v1), p, acc1, out_dtype=ACC, input_precision=PRECISION)
    acc0 = tl.dot(tl.trans(v0), p, acc0, out_dtype=ACC, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _short_rest(
    q0, q1, ka0, ka1, kb0, kb1, kc0, kc1, va0, va1, vb0, vb1, vc0, vc1, key_end, scale_log2e,
    KEYS_B: tl.constexpr, KEYS_C: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A few queries with all keys: output, maximum and sums (M, 1). Scores and output are made transposed, as tensor
    cores take a few columns, but no fewer than 64 rows."""
    M: tl.constexpr = q0.shape[0]
    q0, q1 = _trans_parts(q0, q1, D1)
    a = _dot_trans(ka0, ka1, q0, q1, D1, ACC, PRECISION)  # (KEYS_A, M)
    row_max = tl.max(a, 0)
    if KEYS_B > 0:
        b = _dot_trans(kb0, kb1, q0, q1, D1, ACC, PRECISION)
        row_max = tl.maximum(row_max, tl.max(b, 0))
    if KEYS_C > 0:
        c = _dot_trans(kc0, kc1, q0, q1, D1, ACC, PRECISION) + _key_mask(KEYS_C, key_end, ACC)[:, None]
        row_max = tl.maximum(row_max, tl.max(c, 0))
    row_max = tl.maximum(row_max * scale_log2e, LOWEST)
    acc0 = tl.zeros((D0, M), ACC)
    acc1 = tl.zeros((D1, M), ACC) if D1 > 0 else 0.0
    p = _exp2(a, scale_log2e, row_max[None, :])
    row_sum = tl.sum(p, 0)
    acc0, acc1 = _add_dot_trans(acc0, acc1, p, va0, va1, D1, ACC, PRECISION)
    if KEYS_B > 0:
        p = _exp2(b, scale_log2e, row_max[None, :])
        row_sum += tl.sum(p, 0)
        acc0, acc1 = _add_dot_trans(acc0, acc1, p, vb0, vb1, D1, ACC, PRECISION)
    if KEYS_C > 0:
        p = _exp2(c, scale_log2e, row_max[None, :])
        row_sum += tl.sum(p, 0)
        acc0, acc1 = _add_dot_trans(acc0, acc1, p, vc0, vc1, D1, ACC, PRECISION)
    acc0, acc1 = _trans_parts(acc0, acc1, D1)
    return acc0, acc1, row_max, row_sum[:, None]


@triton.jit
def _fwd_short(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, NQ, NK, scale_log2e,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_on, stride_od,
    M: tl.constexpr, TILES: tl.constexpr, LAST_M: tl.constexpr,
    KEYS_A: tl.constexpr, KEYS_B: tl.constexpr, KEYS_C: tl.constexpr,
    NEGATE: tl.constexpr, FAST: tl.constexpr, LSE_UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to TILES tiles of M of NQ queries from q_ptr, with all keys. What is left of them is in a tile with a mask if
    LAST_M is M, otherwise in one of LAST_M."""
    C: tl.constexpr = KEYS_A + KEYS_B
    ka0, ka1 = _short_load(k_ptr, stride_kn, stride_kd, NK, 0, KEYS_A, False, D, D0, D1, ALIGN, OFFSET)
    kb0, kb1 = _short_load(k_ptr, stride_kn, stride_kd, NK, KEYS_A, KEYS_B, False, D, D0, D1, ALIGN, OFFSET)
    kc0, kc1 = _short_load(k_ptr, stride_kn, stride_kd, NK, C, KEYS_C, True, D, D0, D1, ALIGN, OFFSET)
    va0, va1 = _short_load(v_ptr, stride_vn, stride_vd, NK, 0, KEYS_A, False, D, D0, D1, ALIGN, OFFSET)
    vb0, vb1 = _short_load(v_ptr, stride_vn, stride_vd, NK, KEYS_A, KEYS_B, False, D, D0, D1, ALIGN, OFFSET)
    vc0, vc1 = _short_load(v_ptr, stride_vn, stride_vd, NK, C, KEYS_C, True, D, D0, D1, ALIGN, OFFSET)
    # here, not in the loop: or k would stay in registers, and go to shared memory for each tile of queries again
    ta0, ta1 = _short_trans(ka0, ka1, KEYS_A, D1)
    tb0, tb1 = _short_trans(kb0, kb1, KEYS_B, D1)
    tc0, tc1 = _short_trans(kc0, kc1, KEYS_C, D1)
    MASK: tl.constexpr = LAST_M == M
    rows = tl.arange(0, M)
    # in two parts there is so much that does not change in the loop that it spills, if it is kept in registers
    for _ in tl.range(0, tl.minimum((NQ + (M - 1 if MASK else 0)) // M, TILES), disable_licm=D1 > 0):
        q0, q1 = _load_queries(q_ptr, rows, NQ, stride_qn, stride_qd, MASK, NEGATE, D, D0, D1, ALIGN, OFFSET)
        acc0, acc1, row_max, row_sum = _short_tile(
            q0, q1, ta0, ta1, tb0, tb1, tc0, tc1, va0, va1, vb0, vb1, vc0, vc1, NK - C, scale_log2e,
            KEYS_B, KEYS_C, D0, D1, ACC, PRECISION,
        )  # fmt: skip
        _fwd_finish(
            out_ptr, lse_ptr, acc0, acc1, row_max, row_sum, rows, NQ, stride_on, stride_od,
            MASK, FAST, LSE_UNIT, D, D0, D1, ALIGN, OFFSET,
        )  # fmt: skip
        q_ptr += tl.cast(M, OFFSET) * stride_qn
        out_ptr += tl.cast(M, OFFSET) * stride_on
        lse_ptr += M
        NQ -= M
    if LAST_M > 0 and not MASK:
        if NQ <= LAST_M:  # in the last program; before it, there are whole tiles left
            rest = tl.arange(0, LAST_M)
            q0, q1 = _load_queries(q_ptr, rest, NQ, stride_qn, stride_qd, True, NEGATE, D, D0, D1, ALIGN, OFFSET)
            acc0, acc1, row_max, row_sum = _short_rest(
                q0, q1, ka0, ka1, kb0, kb1, kc0, kc1, va0, va1, vb0, vb1, vc0, vc1, NK - C, scale_log2e,
                KEYS_B, KEYS_C, D0, D1, ACC, PRECISION,
            )  # fmt: skip
            _fwd_finish(
                out_ptr, lse_ptr, acc0, acc1, row_max, row_sum, rest, NQ, stride_on, stride_od,
                True, FAST, LSE_UNIT, D, D0, D1, ALIGN, OFFSET,
            )  # fmt: skip


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd: tl.constexpr,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd: tl.constexpr,
    stride_ob, stride_oh, stride_on: tl.constexpr, stride_od: tl.constexpr,
    H, NQ, NK, scale_log2e,
    BLOCK_M: tl.constexpr, LAST_M: tl.constexpr, SIDE_M: tl.constexpr, V_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr, LOOP_N: tl.constexpr, TAIL_N: tl.constexpr, TILES: tl.constexpr, NEXT_N: tl.constexpr,
    NEGATE: tl.constexpr, FAST: tl.constexpr, LSE_UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK_M rows of out and lse of one head. If LAST_M, the last of a head makes all that are left:
    up to LAST_M, or if SIDE_M, all of LAST_M and up to SIDE_M more.

    If TILES, it makes that many times as many, with all keys at once, in tiles of BLOCK_N, NEXT_N and TAIL_N."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    row_start = tl.program_id(1) * (BLOCK_M * TILES if TILES > 0 else BLOCK_M)
    q_ptr += _head_offset(b, h, stride_qb, stride_qh, ALIGN) + row_offset(row_start, stride_qn, ALIGN)
    k_ptr += _head_offset(b, h, stride_kb, stride_kh, ALIGN)
    v_ptr = _values(k_ptr, v_ptr + _head_offset(b, h, stride_vb, stride_vh, ALIGN), V_OFFSET)
    out_ptr += _head_offset(b, h, stride_ob, stride_oh, ALIGN) + row_offset(row_start, stride_on, ALIGN)
    lse_ptr += (b * H + h) * NQ + row_start
    if TILES > 0:
        _fwd_short(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, NQ - row_start, NK, scale_log2e,
            stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_on, stride_od,
            BLOCK_M, TILES, LAST_M, BLOCK_N, NEXT_N, TAIL_N, NEGATE, FAST, LSE_UNIT,
            D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
    elif LAST_M == 0 or tl.program_id(1) + 1 < tl.num_programs(1):
        _fwd_queries(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, NQ - row_start, NK, scale_log2e,
            stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_on, stride_od,
            BLOCK_M, False, 0, V_OFFSET, BLOCK_N, LOOP_N, TAIL_N, NEGATE, FAST, LSE_UNIT,
            D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
    else:
        _fwd_queries(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, NQ - row_start, NK, scale_log2e,
            stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_on, stride_od,
            LAST_M, SIDE_M == 0, SIDE_M, V_OFFSET, BLOCK_N, LOOP_N, TAIL_N, NEGATE, FAST, LSE_UNIT,
            D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def _common(x, d, rows, *tensors):
    """The compile-time arguments that every kernel here takes."""
    d0, d1 = configs.head_dim_parts(d, rows)
    return {
        "D": d, "D0": d0, "D1": d1,
        **layout(*tensors),
        "ACC": tl_accumulator(x.dtype), "PRECISION": dot_precision(x.dtype),
    }  # fmt: skip


def lse_unit(dtype, nk):
    """A power of two near 1 / Nk. In fp32 lse is of probabilities in units of it: then scores less lse, where rows are
    flat, are near 0, and their rounding, which is an error of the p that backward makes of them, is an eighth.

    Backward divides by the sum of these p there, so that the unit goes out. In half precision it does not.
    """
    return 1.0 if dtype.itemsize == 2 else 2.0 ** -round(math.log2(nk))


def keys_and_values(k, v):
    """(a tensor that begins where k does, and V_OFFSET): that of both, where v lies beside k in rows of one tensor, as
    parts of a projection do; else k and 0."""
    offset = v.storage_offset() - k.storage_offset()
    one = k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    if one and k.stride() == v.stride() and 0 < offset < k.stride(2):
        return k.as_strided((2, *k.shape), (offset, *k.stride())), offset
    return k, 0


def attention_forward(q, k, v, scale):
    """q (B,H,Nq,D), k and v (B,H,Nk,D), none empty -> out (B,H,Nq,D) laid out as (B,Nq,H,D), lse (B,H,Nq)."""
    (b, h, nq, d), nk = q.shape, k.shape[2]
    out = q.new_empty_strided((b, h, nq, d), (nq * h * d, d, h * d, 1))
    lse = q.new_empty(b, h, nq, dtype=accumulator(q.dtype))
    chip = chip_of(q.device)
    align = layout(q, k, v, out)["ALIGN"]
    short = configs.short_tiles(chip, q.dtype, d, nq, nk, align)
    if short:
        tiles, programs, last_m, cut = short
    else:
        tiles, programs, last_m, side_m = configs.query_tiles(chip, q.dtype, d, nq, align)
        cut = {"SIDE_M": side_m, "BLOCK_N": tiles.BLOCK_N, "TAIL_N": tail(nk, tiles.BLOCK_N), "TILES": 0, "NEXT_N": 0}
    keys, v_offset = keys_and_values(k, v)
    launch(
        _attention_fwd_kernel, (b, programs, h),
        q, keys, v, out, lse, *q.stride(), *k.stride(), *v.stride(), *out.stride(), h, nq, nk,
        max(abs(scale), SMALLEST_SCALE) * LOG2E,
        BLOCK_M=tiles.BLOCK_M, LAST_M=last_m, V_OFFSET=v_offset, LOOP_N=nk >= cut["BLOCK_N"], **cut,
        NEGATE=scale < 0, FAST=q.dtype.itemsize == 2 and chip.startswith("sm_"),  # CUDA's approximations
        LSE_UNIT=lse_unit(q.dtype, nk),
        **_common(q, d, tiles.BLOCK_M, q, k, v, out), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse
