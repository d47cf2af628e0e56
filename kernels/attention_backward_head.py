"""Attention as Triton kernels: the backward pass of short sequences, in one kernel. The maths stands in attention.py.

A program owns a (batch, head). It takes one tile of keys after the other, keeps their dk and dv in registers, and walks
over all queries with them. What it adds to dq on the way goes into fp32 sums in memory that no other program touches:
five products of matrices instead of the seven of two kernels, no atomics, the same bits in every run. For half
precision only: in fp32 p would have to be divided by its own sum, which is known when all keys have passed.

The scratch of a head is a record for each BLOCK_M queries: lse, delta, and the sums of dq / scale. Queries that fill up
the last record have lse = inf, so that their p is 0. The sums do not lie in rows, but as tensor cores leave them in the
registers of warps of 16 rows each: so a thread's share is 16 bytes wide and takes no detour through shared memory.
"""

import triton
import triton.language as tl

from .attention import LOG2E, _common
from .attention_tiles import (
    _add_dot,
    _dot_parts,
    _exp2,
    _head_offset,
    _load_parts,
    _store_parts,
    _zero_parts,
)
from .launch import accumulator, cdiv, launch, tail
from .tiles import row_offset


@triton.jit
def _bwd_tile(
    q0, q1, k0, k1, v0, v1, do0, do1, lse, delta, dk0, dk1, dv0, dv1, key_end, scale_log2e,
    MASK: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys with one of queries: dk / scale and dv, with what the queries add, and ds (KEYS, ROWS)."""
    p = _exp2(_dot_parts(k0, k1, q0, q1, D1, ACC, PRECISION), scale_log2e, lse[None, :])  # (KEYS, ROWS)
    if MASK:  # a key that is not there has k = 0, yet p may be inf
        p = tl.where(tl.arange(0, k0.shape[0])[:, None] < key_end, p, 0.0)
    dv0, dv1 = _add_dot(dv0, dv1, p, do0, do1, D1, ACC, PRECISION)
    dp = _dot_parts(v0, v1, do0, do1, D1, ACC, PRECISION)
    ds = (p * (dp - delta[None, :])).to(q0.dtype)
    dk0, dk1 = _add_dot(dk0, dk1, ds, q0, q1, D1, ACC, PRECISION)
    return dk0, dk1, dv0, dv1, ds


# ---- the scratch


@triton.jit
def _sums(ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers to the sums of a tile (ROWS, COLS), in the order of `_to_sums`."""
    return ptr + tl.arange(0, ROWS * COLS // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]


@triton.jit
def _to_sums(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) -> (ROWS COLS / 128, 128): by columns of 16, row mod 16 / 8, warp; then lane, and 4 of a thread."""
    x = tl.reshape(x, (ROWS // 16, 2, 8, COLS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(x, (3, 1, 0, 2, 5, 4, 6)), (ROWS * COLS // 128, 128))


@triton.jit
def _from_sums(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`_to_sums`, back."""
    x = tl.reshape(x, (COLS // 16, 2, ROWS // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(x, (2, 1, 3, 0, 5, 4, 6)), (ROWS, COLS))


@triton.jit
def _add_to_sums(ptr, x, ROWS: tl.constexpr, COLS: tl.constexpr):
    ptrs = _sums(ptr, ROWS, COLS)
    tl.store(ptrs, tl.load(ptrs) + _to_sums(x, ROWS, COLS))


@triton.jit
def _bwd_start(
    do_ptr, out_ptr, lse_ptr, record_ptr, row_end, stride_don, stride_dod, stride_on, stride_od,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Fill a record: lse, delta, and sums of 0."""
    rows = tl.arange(0, BLOCK_M)
    do0, do1 = _load_parts(do_ptr, rows, row_end, stride_don, stride_dod, True, D, D0, D1, ALIGN, OFFSET)
    out0, out1 = _load_parts(out_ptr, rows, row_end, stride_on, stride_od, True, D, D0, D1, ALIGN, OFFSET)
    delta = tl.sum(do0.to(ACC) * out0.to(ACC), 1)
    tl.store(_sums(record_ptr + 2 * BLOCK_M, BLOCK_M, D0), tl.zeros((BLOCK_M * D0 // 128, 128), ACC))
    if D1 > 0:
        delta += tl.sum(do1.to(ACC) * out1.to(ACC), 1)
        tl.store(_sums(record_ptr + (2 + D0) * BLOCK_M, BLOCK_M, D1), tl.zeros((BLOCK_M * D1 // 128, 128), ACC))
    tl.store(record_ptr + rows, tl.load(lse_ptr + rows, mask=rows < row_end, other=float("inf")))
    tl.store(record_ptr + BLOCK_M + rows, delta)


@triton.jit
def _bwd_finish(
    dq_ptr, record_ptr, row_end, scale, stride_dqn, stride_dqd,
    ROWS: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The dq of a record."""
    dq0 = _from_sums(tl.load(_sums(record_ptr + 2 * BLOCK_M, ROWS, D0)), ROWS, D0) * scale
    if D1 > 0:
        dq1 = _from_sums(tl.load(_sums(record_ptr + (2 + D0) * BLOCK_M, ROWS, D1)), ROWS, D1) * scale
    else:
        dq1 = 0.0
    rows = tl.arange(0, ROWS)
    _store_parts(dq_ptr, dq0, dq1, rows, row_end, stride_dqn, stride_dqd, MASK, D, D0, D1, ALIGN, OFFSET)


# ---- the kernel


@triton.jit
def _bwd_queries(
    k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_ptr, do_ptr, record_ptr, row_end, key_end, scale_log2e,
    stride_qn, stride_qd, stride_don, stride_dod,
    ROWS: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries: dk / scale and dv, with what these queries add; their sums, with what the keys add."""
    rows = tl.arange(0, ROWS)
    q0, q1 = _load_parts(q_ptr, rows, row_end, stride_qn, stride_qd, MASK_M, D, D0, D1, ALIGN, OFFSET)
    do0, do1 = _load_parts(do_ptr, rows, row_end, stride_don, stride_dod, MASK_M, D, D0, D1, ALIGN, OFFSET)
    lse = tl.load(record_ptr + rows)
    delta = tl.load(record_ptr + BLOCK_M + rows)
    dk0, dk1, dv0, dv1, ds = _bwd_tile(
        q0, q1, k0, k1, v0, v1, do0, do1, lse, delta, dk0, dk1, dv0, dv1, key_end, scale_log2e,
        MASK_N, D1, ACC, PRECISION,
    )  # fmt: skip
    dq0 = tl.dot(tl.trans(ds), k0, out_dtype=ACC, input_precision=PRECISION)
    _add_to_sums(record_ptr + 2 * BLOCK_M, dq0, ROWS, D0)
    if D1 > 0:
        dq1 = tl.dot(tl.trans(ds), k1, out_dtype=ACC, input_precision=PRECISION)
        _add_to_sums(record_ptr + (2 + D0) * BLOCK_M, dq1, ROWS, D1)
    return dk0, dk1, dv0, dv1


@triton.jit
def _bwd_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, record_ptr, dk_ptr, dv_ptr, NQ, key_start, key_end, scale, scale_log2e,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_don, stride_dod,
    stride_dkn, stride_dkd, stride_dvn, stride_dvd,
    KEYS: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, and what these add to all sums."""
    tl.debug_barrier()  # what other threads stored in the scratch is seen from here on
    k_ptr += row_offset(key_start, stride_kn, ALIGN)
    v_ptr += row_offset(key_start, stride_vn, ALIGN)
    dk_ptr += row_offset(key_start, stride_dkn, ALIGN)
    dv_ptr += row_offset(key_start, stride_dvn, ALIGN)
    keys = tl.arange(0, KEYS)
    k0, k1 = _load_parts(k_ptr, keys, key_end, stride_kn, stride_kd, MASK, D, D0, D1, ALIGN, OFFSET)
    v0, v1 = _load_parts(v_ptr, keys, key_end, stride_vn, stride_vd, MASK, D, D0, D1, ALIGN, OFFSET)
    dk0, dk1 = _zero_parts(KEYS, D0, D1, ACC)
    dv0, dv1 = _zero_parts(KEYS, D0, D1, ACC)
    for _ in range(0, NQ // BLOCK_M):
        dk0, dk1, dv0, dv1 = _bwd_queries(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_ptr, do_ptr, record_ptr, BLOCK_M, key_end, scale_log2e,
            stride_qn, stride_qd, stride_don, stride_dod,
            BLOCK_M, False, MASK, BLOCK_M, D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
        q_ptr += tl.cast(BLOCK_M, OFFSET) * stride_qn
        do_ptr += tl.cast(BLOCK_M, OFFSET) * stride_don
        record_ptr += BLOCK_M * (2 + D0 + D1)
    if TAIL_M > 0:
        dk0, dk1, dv0, dv1 = _bwd_queries(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_ptr, do_ptr, record_ptr, NQ % BLOCK_M, key_end, scale_log2e,
            stride_qn, stride_qd, stride_don, stride_dod,
            TAIL_M, True, MASK, BLOCK_M, D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
    _store_parts(
        dk_ptr, dk0 * scale, dk1 * scale, keys, key_end, stride_dkn, stride_dkd, MASK, D, D0, D1, ALIGN, OFFSET
    )
    _store_parts(dv_ptr, dv0, dv1, keys, key_end, stride_dvn, stride_dvd, MASK, D, D0, D1, ALIGN, OFFSET)


@triton.jit
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, record_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd: tl.constexpr,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd: tl.constexpr,
    stride_ob, stride_oh, stride_on: tl.constexpr, stride_od: tl.constexpr,
    stride_dob, stride_doh, stride_don: tl.constexpr, stride_dod: tl.constexpr,
    stride_dqb, stride_dqh, stride_dqn: tl.constexpr, stride_dqd: tl.constexpr,
    stride_dkb, stride_dkh, stride_dkn: tl.constexpr, stride_dkd: tl.constexpr,
    stride_dvb, stride_dvh, stride_dvn: tl.constexpr, stride_dvd: tl.constexpr,
    H, NQ, NK, scale, scale_log2e,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes dq, dk and dv of one head."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q_ptr += _head_offset(b, h, stride_qb, stride_qh, ALIGN)
    k_ptr += _head_offset(b, h, stride_kb, stride_kh, ALIGN)
    v_ptr += _head_offset(b, h, stride_vb, stride_vh, ALIGN)
    out_ptr += _head_offset(b, h, stride_ob, stride_oh, ALIGN)
    do_ptr += _head_offset(b, h, stride_dob, stride_doh, ALIGN)
    dq_ptr += _head_offset(b, h, stride_dqb, stride_dqh, ALIGN)
    dk_ptr += _head_offset(b, h, stride_dkb, stride_dkh, ALIGN)
    dv_ptr += _head_offset(b, h, stride_dvb, stride_dvh, ALIGN)
    lse_ptr += (b * H + h) * NQ
    RECORD: tl.constexpr = 2 + D0 + D1  # numbers a query
    record_ptr += (b * H + h) * tl.cdiv(NQ, BLOCK_M) * (BLOCK_M * RECORD)

    for start in tl.range(0, NQ, BLOCK_M, num_stages=1):
        _bwd_start(
            do_ptr + row_offset(start, stride_don, ALIGN), out_ptr + row_offset(start, stride_on, ALIGN),
            lse_ptr + start, record_ptr + row_offset(start, RECORD, 16), NQ - start,
            stride_don, stride_dod, stride_on, stride_od, BLOCK_M, D, D0, D1, ALIGN, OFFSET, ACC,
        )  # fmt: skip
    # Not pipelined, nor are addresses made in advance: there are no registers for them.
    for start in tl.range(0, NK // BLOCK_N * BLOCK_N, BLOCK_N, num_stages=1, disable_licm=True):
        _bwd_keys(
            q_ptr, k_ptr, v_ptr, do_ptr, record_ptr, dk_ptr, dv_ptr, NQ, start, BLOCK_N, scale, scale_log2e,
            stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_don, stride_dod,
            stride_dkn, stride_dkd, stride_dvn, stride_dvd,
            BLOCK_N, False, BLOCK_M, TAIL_M, D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
    if TAIL_N > 0:
        _bwd_keys(
            q_ptr, k_ptr, v_ptr, do_ptr, record_ptr, dk_ptr, dv_ptr, NQ, NK - NK % BLOCK_N, NK % BLOCK_N,
            scale, scale_log2e,
            stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_don, stride_dod,
            stride_dkn, stride_dkd, stride_dvn, stride_dvd,
            TAIL_N, True, BLOCK_M, TAIL_M, D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
    tl.debug_barrier()
    for start in tl.range(0, NQ // BLOCK_M * BLOCK_M, BLOCK_M, num_stages=1):
        _bwd_finish(
            dq_ptr + row_offset(start, stride_dqn, ALIGN), record_ptr + row_offset(start, RECORD, 16), BLOCK_M, scale,
            stride_dqn, stride_dqd, BLOCK_M, False, BLOCK_M, D, D0, D1, ALIGN, OFFSET,
        )  # fmt: skip
    if TAIL_M > 0:
        start = NQ - NQ % BLOCK_M
        _bwd_finish(
            dq_ptr + row_offset(start, stride_dqn, ALIGN), record_ptr + row_offset(start, RECORD, 16), NQ - start,
            scale, stride_dqn, stride_dqd, TAIL_M, True, BLOCK_M, D, D0, D1, ALIGN, OFFSET,
        )  # fmt: skip


def attention_backward_heads(grad, q, k, v, out, lse, scale, dq, dk, dv, tiles):
    """As `attention_backward`, a program a head; lse is contiguous."""
    (b, h, nq, d), nk = q.shape, k.shape[2]
    common = _common(q, d, tiles.BLOCK_N, q, k, v, out, grad, dq, dk, dv)
    record = tiles.BLOCK_M * (2 + common["D0"] + common["D1"])
    records = q.new_empty(b, h, cdiv(nq, tiles.BLOCK_M), record, dtype=accumulator(q.dtype))
    launch(
        _attention_bwd_kernel, (b, h),
        q, k, v, out, grad, lse, records, dq, dk, dv,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), *grad.stride(),
        *dq.stride(), *dk.stride(), *dv.stride(),
        h, nq, nk, scale, scale * LOG2E,
        BLOCK_M=tiles.BLOCK_M, TAIL_M=tail(nq, tiles.BLOCK_M), BLOCK_N=tiles.BLOCK_N, TAIL_N=tail(nk, tiles.BLOCK_N),
        **common, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
