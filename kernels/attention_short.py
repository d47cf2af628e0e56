"""Attention as Triton kernels: the forward pass of short sequences, all keys at once. The maths stands in attention.py.

Up to some 270 keys, all scores of 64 queries fit into the registers of 4 warps. Then the maximum of a row is known
before its first exponential, and no sum and no output is ever rescaled. Keys come in up to three tiles, a, b and c, the
last with a mask; k and v go into shared memory once, and the program walks over tiles of queries instead.

A few queries left over are no tile of 64, most of it padding, but the columns of a product whose rows are keys.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    LOWEST,
    _add_dot,
    _columns,
    _dot_trans,
    _exp2,
    _fwd_finish,
    _key_mask,
    _load_parts,
    _load_queries,
    _trans_parts,
    _zero_parts,
)
from .tiles import row_offset


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
        if KEYS_C == 8:  # tensor cores sum over no fewer than 16
            p = tl.join(p.to(vc0.dtype), tl.zeros((p.shape[0], 8), vc0.dtype))
            p = tl.reshape(tl.permute(p, (0, 2, 1)), (p.shape[0], 16))
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
    ROWS_C: tl.constexpr = 16 if KEYS_C == 8 else KEYS_C  # of v, and of k where its rows are those of a product
    ka0, ka1 = _short_load(k_ptr, stride_kn, stride_kd, NK, 0, KEYS_A, False, D, D0, D1, ALIGN, OFFSET)
    kb0, kb1 = _short_load(k_ptr, stride_kn, stride_kd, NK, KEYS_A, KEYS_B, False, D, D0, D1, ALIGN, OFFSET)
    kc0, kc1 = _short_load(k_ptr, stride_kn, stride_kd, NK, C, KEYS_C, True, D, D0, D1, ALIGN, OFFSET)
    va0, va1 = _short_load(v_ptr, stride_vn, stride_vd, NK, 0, KEYS_A, False, D, D0, D1, ALIGN, OFFSET)
    vb0, vb1 = _short_load(v_ptr, stride_vn, stride_vd, NK, KEYS_A, KEYS_B, False, D, D0, D1, ALIGN, OFFSET)
    vc0, vc1 = _short_load(v_ptr, stride_vn, stride_vd, NK, C, ROWS_C, True, D, D0, D1, ALIGN, OFFSET)
    # here, not in the loop: or k would stay in registers, and go to shared memory for each tile of queries again
    ta0, ta1 = _short_trans(ka0, ka1, KEYS_A, D1)
    tb0, tb1 = _short_trans(kb0, kb1, KEYS_B, D1)
    tc0, tc1 = _short_trans(kc0, kc1, KEYS_C, D1)
    MASK: tl.constexpr = LAST_M == M
    # before the loop, through which addresses of the last keys would stay in registers otherwise, and spill
    if LAST_M > 0 and not MASK:  # noqa: SIM102  what is known when compiling, and what is not
        if NQ <= TILES * M + LAST_M:  # in the last program
            start = NQ // M * M
            end = NQ - start
            rest = tl.arange(0, LAST_M)
            rest_q_ptr = q_ptr + row_offset(start, stride_qn, ALIGN)
            rest_out_ptr = out_ptr + row_offset(start, stride_on, ALIGN)
            q0, q1 = _load_queries(rest_q_ptr, rest, end, stride_qn, stride_qd, True, NEGATE, D, D0, D1, ALIGN, OFFSET)
            kr0, kr1 = _short_load(k_ptr, stride_kn, stride_kd, NK, C, ROWS_C, True, D, D0, D1, ALIGN, OFFSET)
            acc0, acc1, row_max, row_sum = _short_rest(
                q0, q1, ka0, ka1, kb0, kb1, kr0, kr1, va0, va1, vb0, vb1, vc0, vc1, NK - C, scale_log2e,
                KEYS_B, ROWS_C, D0, D1, ACC, PRECISION,
            )  # fmt: skip
            _fwd_finish(
                rest_out_ptr, lse_ptr + start, acc0, acc1, row_max, row_sum, rest, end, stride_on, stride_od,
                True, FAST, LSE_UNIT, D, D0, D1, ALIGN, OFFSET,
            )  # fmt: skip
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
