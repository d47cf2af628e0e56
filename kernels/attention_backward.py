"""Attention as Triton kernels: the backward pass, in two kernels. The maths stands in attention.py.

One for dq, one for dk and dv, so that each gradient has one owner and both fill the chip at any batch. Where batch and
heads fill it alone and sequences are short, the one of attention_backward_head.py runs instead.

p is made again as exp2(s - lse). In fp32 the rounding of lse, which is an error of all p of a row, would be most of the
error of the gradients where logits are large; there (RESUM) p is divided by its own sum over the keys, as in a softmax:
the kernel of dq finds that sum, and leaves 1 / sum as `share` to that of dk and dv.
"""

import triton
import triton.language as tl

from . import configs
from .attention import LOG2E, _common, keys_and_values
from .attention_backward_head import _bwd_tile, attention_backward_heads
from .attention_tiles import (
    _add_dot,
    _dot_parts,
    _exp2,
    _head_offset,
    _load_parts,
    _store_parts,
    _values,
    _zero_parts,
)
from .launch import alignment, cdiv, chip_of, launch, tail
from .tiles import row_offset


@triton.jit
def _bwd_dq_keys(
    q0, q1, do0, do1, lse, delta, dq0, dq1, p_sum, k_ptr, v_ptr, key_end, scale_log2e,
    stride_kn, stride_kd, stride_vn, stride_vd,
    KEYS: tl.constexpr, MASK: tl.constexpr, RESUM: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: dq / scale and, if RESUM, the sum of p, with what these keys add."""
    keys = tl.arange(0, KEYS)
    k0, k1 = _load_parts(k_ptr, keys, key_end, stride_kn, stride_kd, MASK, D, D0, D1, ALIGN, OFFSET)
    v0, v1 = _load_parts(v_ptr, keys, key_end, stride_vn, stride_vd, MASK, D, D0, D1, ALIGN, OFFSET)
    p = _exp2(_dot_parts(q0, q1, k0, k1, D1, ACC, PRECISION), scale_log2e, lse[:, None])  # (M, KEYS)
    if MASK:  # a key that is not there has k = 0, yet p may be inf
        p = tl.where(keys[None, :] < key_end, p, 0.0)
    if RESUM:
        p_sum += tl.sum(p, 1)
    dp = _dot_parts(do0, do1, v0, v1, D1, ACC, PRECISION)
    ds = p * (dp - delta[:, None])
    dq0, dq1 = _add_dot(dq0, dq1, ds, k0, k1, D1, ACC, PRECISION)
    return dq0, dq1, p_sum


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, share_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd: tl.constexpr,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd: tl.constexpr,
    stride_ob, stride_oh, stride_on: tl.constexpr, stride_od: tl.constexpr,
    stride_dob, stride_doh, stride_don: tl.constexpr, stride_dod: tl.constexpr,
    stride_dqb, stride_dqh, stride_dqn: tl.constexpr, stride_dqd: tl.constexpr,
    H, NQ, NK, scale, scale_log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, RESUM: tl.constexpr, V_OFFSET: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK_M rows of dq of one head, of delta and, if RESUM, of share."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    row_start = tl.program_id(1) * BLOCK_M
    q_ptr += _head_offset(b, h, stride_qb, stride_qh, ALIGN) + row_offset(row_start, stride_qn, ALIGN)
    k_ptr += _head_offset(b, h, stride_kb, stride_kh, ALIGN)
    v_ptr = _values(k_ptr, v_ptr + _head_offset(b, h, stride_vb, stride_vh, ALIGN), V_OFFSET)
    out_ptr += _head_offset(b, h, stride_ob, stride_oh, ALIGN) + row_offset(row_start, stride_on, ALIGN)
    do_ptr += _head_offset(b, h, stride_dob, stride_doh, ALIGN) + row_offset(row_start, stride_don, ALIGN)
    dq_ptr += _head_offset(b, h, stride_dqb, stride_dqh, ALIGN) + row_offset(row_start, stride_dqn, ALIGN)
    lse_ptr += (b * H + h) * NQ + row_start
    delta_ptr += (b * H + h) * NQ + row_start
    share_ptr += (b * H + h) * NQ + row_start

    rows = tl.arange(0, BLOCK_M)
    row_end = NQ - row_start
    q0, q1 = _load_parts(q_ptr, rows, row_end, stride_qn, stride_qd, True, D, D0, D1, ALIGN, OFFSET)
    do0, do1 = _load_parts(do_ptr, rows, row_end, stride_don, stride_dod, True, D, D0, D1, ALIGN, OFFSET)
    out0, out1 = _load_parts(out_ptr, rows, row_end, stride_on, stride_od, True, D, D0, D1, ALIGN, OFFSET)
    delta = tl.sum(do0.to(ACC) * out0.to(ACC), 1)
    if D1 > 0:
        delta += tl.sum(do1.to(ACC) * out1.to(ACC), 1)
    tl.store(delta_ptr + rows, delta, mask=rows < row_end)
    lse = tl.load(lse_ptr + rows, mask=rows < row_end, other=0.0)
    dq0, dq1 = _zero_parts(BLOCK_M, D0, D1, ACC)
    p_sum = tl.zeros((BLOCK_M,), ACC)
    for _ in range(0, NK // BLOCK_N):
        v_ptr = _values(k_ptr, v_ptr, V_OFFSET)
        dq0, dq1, p_sum = _bwd_dq_keys(
            q0, q1, do0, do1, lse, delta, dq0, dq1, p_sum, k_ptr, v_ptr, BLOCK_N, scale_log2e,
            stride_kn, stride_kd, stride_vn, stride_vd, BLOCK_N, False, RESUM,
            D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
        k_ptr += tl.cast(BLOCK_N, OFFSET) * stride_kn
        v_ptr += tl.cast(BLOCK_N, OFFSET) * stride_vn
    v_ptr = _values(k_ptr, v_ptr, V_OFFSET)
    if TAIL_N > 0:
        dq0, dq1, p_sum = _bwd_dq_keys(
            q0, q1, do0, do1, lse, delta, dq0, dq1, p_sum, k_ptr, v_ptr, NK % BLOCK_N, scale_log2e,
            stride_kn, stride_kd, stride_vn, stride_vd, TAIL_N, True, RESUM,
            D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
    if RESUM:
        share = 1.0 / p_sum
        tl.store(share_ptr + rows, share, mask=rows < row_end)
        dq0 *= share[:, None]
        dq1 *= share[:, None] if D1 > 0 else 1.0
    _store_parts(
        dq_ptr, dq0 * scale, dq1 * scale, rows, row_end, stride_dqn, stride_dqd, True, D, D0, D1, ALIGN, OFFSET
    )


@triton.jit
def _bwd_dkdv_queries(
    k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_ptr, do_ptr, lse_ptr, delta_ptr, share_ptr, row_end, scale_log2e,
    stride_qn, stride_qd, stride_don, stride_dod,
    ROWS: tl.constexpr, MASK: tl.constexpr, RESUM: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: dk / scale and dv, with what these queries add. Tiles of p and ds are transposed here."""
    rows = tl.arange(0, ROWS)
    q0, q1 = _load_parts(q_ptr, rows, row_end, stride_qn, stride_qd, MASK, D, D0, D1, ALIGN, OFFSET)
    do0, do1 = _load_parts(do_ptr, rows, row_end, stride_don, stride_dod, MASK, D, D0, D1, ALIGN, OFFSET)
    if MASK:  # a query that is not there gets p = exp2(-inf) = 0
        lse = tl.load(lse_ptr + rows, mask=rows < row_end, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < row_end, other=0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    if RESUM:  # dv and dk are linear in do and delta, so these are multiplied instead of p
        share = tl.load(share_ptr + rows, mask=rows < row_end, other=0.0)
        do0 *= share[:, None]
        do1 *= share[:, None] if D1 > 0 else 1.0
        delta *= share
    dk0, dk1, dv0, dv1, _ = _bwd_tile(
        q0, q1, k0, k1, v0, v1, do0, do1, lse, delta, dk0, dk1, dv0, dv1, 0, scale_log2e, False, D1, ACC, PRECISION
    )
    return dk0, dk1, dv0, dv1


@triton.jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, share_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd: tl.constexpr,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd: tl.constexpr,
    stride_dob, stride_doh, stride_don: tl.constexpr, stride_dod: tl.constexpr,
    stride_dkb, stride_dkh, stride_dkn: tl.constexpr, stride_dkd: tl.constexpr,
    stride_dvb, stride_dvh, stride_dvn: tl.constexpr, stride_dvd: tl.constexpr,
    H, NQ, NK, scale, scale_log2e,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, RESUM: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK_N rows of dk and dv of one head."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_start = tl.program_id(1) * BLOCK_N
    q_ptr += _head_offset(b, h, stride_qb, stride_qh, ALIGN)
    k_ptr += _head_offset(b, h, stride_kb, stride_kh, ALIGN) + row_offset(key_start, stride_kn, ALIGN)
    v_ptr += _head_offset(b, h, stride_vb, stride_vh, ALIGN) + row_offset(key_start, stride_vn, ALIGN)
    do_ptr += _head_offset(b, h, stride_dob, stride_doh, ALIGN)
    dk_ptr += _head_offset(b, h, stride_dkb, stride_dkh, ALIGN) + row_offset(key_start, stride_dkn, ALIGN)
    dv_ptr += _head_offset(b, h, stride_dvb, stride_dvh, ALIGN) + row_offset(key_start, stride_dvn, ALIGN)
    lse_ptr += (b * H + h) * NQ
    delta_ptr += (b * H + h) * NQ
    share_ptr += (b * H + h) * NQ

    keys = tl.arange(0, BLOCK_N)
    key_end = NK - key_start
    k0, k1 = _load_parts(k_ptr, keys, key_end, stride_kn, stride_kd, True, D, D0, D1, ALIGN, OFFSET)
    v0, v1 = _load_parts(v_ptr, keys, key_end, stride_vn, stride_vd, True, D, D0, D1, ALIGN, OFFSET)
    dk0, dk1 = _zero_parts(BLOCK_N, D0, D1, ACC)
    dv0, dv1 = _zero_parts(BLOCK_N, D0, D1, ACC)
    for _ in range(0, NQ // BLOCK_M):
        dk0, dk1, dv0, dv1 = _bwd_dkdv_queries(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_ptr, do_ptr, lse_ptr, delta_ptr, share_ptr, BLOCK_M, scale_log2e,
            stride_qn, stride_qd, stride_don, stride_dod, BLOCK_M, False, RESUM,
            D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
        q_ptr += tl.cast(BLOCK_M, OFFSET) * stride_qn
        do_ptr += tl.cast(BLOCK_M, OFFSET) * stride_don
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
        share_ptr += BLOCK_M
    if TAIL_M > 0:
        dk0, dk1, dv0, dv1 = _bwd_dkdv_queries(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, q_ptr, do_ptr, lse_ptr, delta_ptr, share_ptr, NQ % BLOCK_M, scale_log2e,
            stride_qn, stride_qd, stride_don, stride_dod, TAIL_M, True, RESUM,
            D, D0, D1, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
    _store_parts(
        dk_ptr, dk0 * scale, dk1 * scale, keys, key_end, stride_dkn, stride_dkd, True, D, D0, D1, ALIGN, OFFSET
    )
    _store_parts(dv_ptr, dv0, dv1, keys, key_end, stride_dvn, stride_dvd, True, D, D0, D1, ALIGN, OFFSET)


def attention_backward(grad, q, k, v, out, lse, scale, dq, dk, dv):
    """Write the gradients of q, k and v into dq, dk and dv, of any strides; no argument is empty."""
    (b, h, nq, d), nk = q.shape, k.shape[2]
    lse = lse.contiguous()
    tensors = (q, k, v, out, grad, dq, dk, dv)
    chip, align = chip_of(q.device), alignment(*tensors)
    tiles = configs.one_backward_kernel(chip, q.dtype, d, align, b * h, max(nq, nk))
    if tiles is not None:
        attention_backward_heads(grad, q, k, v, out, lse, scale, dq, dk, dv, tiles)
        return
    delta = lse.new_empty(lse.shape)
    resum = q.dtype.itemsize > 2  # beside half-precision operands, the rounding of lse is nothing
    share = lse.new_empty(lse.shape) if resum else delta
    tiles = configs.attention_tiles("attention_bwd_dq", chip, q.dtype, d, align)
    keys, v_offset = keys_and_values(k, v)
    launch(
        _attention_bwd_dq_kernel, (b, cdiv(nq, tiles.BLOCK_M), h),
        q, keys, v, out, grad, lse, delta, share, dq,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), *grad.stride(), *dq.stride(),
        h, nq, nk, scale, scale * LOG2E,
        BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, TAIL_N=tail(nk, tiles.BLOCK_N), RESUM=resum, V_OFFSET=v_offset,
        **_common(q, d, tiles.BLOCK_M, *tensors), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    tiles = configs.attention_tiles("attention_bwd_dkdv", chip, q.dtype, d, align)
    launch(
        _attention_bwd_dkdv_kernel, (b, cdiv(nk, tiles.BLOCK_N), h),
        q, k, v, grad, lse, delta, share, dk, dv,
        *q.stride(), *k.stride(), *v.stride(), *grad.stride(), *dk.stride(), *dv.stride(),
        h, nq, nk, scale, scale * LOG2E,
        BLOCK_M=tiles.BLOCK_M, TAIL_M=tail(nq, tiles.BLOCK_M), BLOCK_N=tiles.BLOCK_N, RESUM=resum,
        **_common(q, d, tiles.BLOCK_N, *tensors), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
