"""Attention as Triton kernels (Dao 2023, FlashAttention-2): the maths, and the forward pass.

    s = scale q kᵀ        p = softmax(s)        out = p v        lse = log₂ Σ exp s
    delta = Σ_d dout ⊙ out        ds = p ⊙ (dout vᵀ - delta)
    dq = scale ds k        dk = scale dsᵀ q        dv = pᵀ dout

q and out are (B,H,Nq,D), k and v (B,H,Nk,D). The forward pass walks over tiles of keys with a running maximum and sum,
so that no (Nq,Nk) map exists; the backward pass makes p again from lse, which is all that is kept beside q, k, v and
out (up to a constant: `lse_unit`). Sequences are cut into whole tiles, which carry no mask along the sequence, and one
tail as narrow as 16. Where sequences are short, there is no such walk (attention_short.py). Head dims are cut into two
parts (attention_tiles.py).
"""

import math

import triton
import triton.language as tl

from . import configs
from .attention_short import _fwd_short
from .attention_tiles import (
    LOWEST,
    _add_dot,
    _columns,
    _dot_parts,
    _exp2,
    _fwd_finish,
    _head_offset,
    _key_mask,
    _load_parts,
    _load_queries,
    _scale_parts,
    _values,
    _zero_parts,
)
from .launch import accumulator, chip_of, dot_precision, launch, layout, tail, tl_accumulator
from .tiles import row_offset

LOG2E = math.log2(math.e)  # exponents are of 2: scores are multiplied by scale_log2e = scale LOG2E
SMALLEST_SCALE = 1e-30  # instead of 0, which times the score -inf of a key that is not there would be NaN


@triton.jit
def _fwd_start(
    q_ptr, rows, row_end, stride_qn, stride_qd,
    MASK: tl.constexpr, SUMS: tl.constexpr, NEGATE: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The queries of a tile, and before any key their output, maximum (of s log2 e) (M,) and sums (M, SUMS)."""
    q0, q1 = _load_queries(q_ptr, rows, row_end, stride_qn, stride_qd, MASK, NEGATE, D, D0, D1, ALIGN, OFFSET)
    acc0, acc1 = _zero_parts(rows.shape[0], D0, DV, ACC)
    row_max = tl.full((rows.shape[0],), LOWEST, ACC)
    row_sum = tl.zeros((rows.shape[0], SUMS), ACC)
    return q0, q1, acc0, acc1, row_max, row_sum


@triton.jit
def _fwd_tile(
    q0, q1, k0, k1, v0, v1, acc0, acc1, row_max, row_sum, key_end, scale_log2e,
    MASK: tl.constexpr, FIRST: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries with one of keys: output, running maximum and sums of each query; if FIRST, not yet set."""
    s = _dot_parts(q0, q1, k0, k1, D1, ACC, PRECISION)  # (M, KEYS)
    if MASK:
        s += _key_mask(k0.shape[0], key_end, ACC)[None, :]
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2e)
    p = _exp2(s, scale_log2e, new_max[:, None])
    p_sum = tl.sum(_columns(p, row_sum.shape[1]), 1)
    if FIRST:
        row_sum = p_sum
    else:
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha[:, None] + p_sum
        acc0, acc1 = _scale_parts(acc0, acc1, alpha, DV)
    acc0, acc1 = _add_dot(acc0, acc1, p, v0, v1, DV, ACC, PRECISION)
    return acc0, acc1, new_max, row_sum


@triton.jit
def _fwd_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, NQ, NK, scale_log2e,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_on, stride_od,
    M: tl.constexpr, MASK_M: tl.constexpr, SIDE_M: tl.constexpr, SUMS: tl.constexpr, V_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr, LOOP_N: tl.constexpr, TAIL_N: tl.constexpr,
    NEGATE: tl.constexpr, FAST: tl.constexpr, LSE_UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first M of NQ queries from q_ptr, with all keys; beside them, in a tile of SIDE_M, those that follow."""
    rows = tl.arange(0, M)
    # Rows of a tile of 16 are shared by warps: 16 sums a row let two of them keep their own.
    q0, q1, acc0, acc1, row_max, row_sum = _fwd_start(
        q_ptr, rows, NQ, stride_qn, stride_qd, MASK_M, 16 if M == 16 else SUMS, NEGATE,
        D, D0, D1, DV, ALIGN, OFFSET, ACC,
    )  # fmt: skip
    if SIDE_M > 0:
        side = M + tl.arange(0, SIDE_M)
        side_q0, side_q1, side_acc0, side_acc1, side_max, side_sum = _fwd_start(
            q_ptr, side, NQ, stride_qn, stride_qd, True, SUMS, NEGATE, D, D0, D1, DV, ALIGN, OFFSET, ACC
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
            tail_v_ptr, keys, key_end, stride_vn, stride_vd, True, D, D0, DV, ALIGN, OFFSET
        )  # fmt: skip
        if SIDE_M > 0:
            side_acc0, side_acc1, side_max, side_sum = _fwd_tile(
                side_q0, side_q1, tail_k0, tail_k1, tail_v0, tail_v1, side_acc0, side_acc1, side_max, side_sum,
                key_end, scale_log2e, True, True, D1, DV, ACC, PRECISION,
            )  # fmt: skip
        acc0, acc1, row_max, row_sum = _fwd_tile(
            q0, q1, tail_k0, tail_k1, tail_v0, tail_v1, acc0, acc1, row_max, row_sum,
            key_end, scale_log2e, True, True, D1, DV, ACC, PRECISION,
        )  # fmt: skip
    if LOOP_N:
        tl.assume(NK >= BLOCK_N)  # or the loop is guarded, and the sums are set to 0 on both ways
        for _ in range(0, NK // BLOCK_N):
            v_ptr = _values(k_ptr, v_ptr, V_OFFSET)
            keys_n = tl.arange(0, BLOCK_N)
            k0, k1 = _load_parts(k_ptr, keys_n, BLOCK_N, stride_kn, stride_kd, False, D, D0, D1, ALIGN, OFFSET)
            v0, v1 = _load_parts(v_ptr, keys_n, BLOCK_N, stride_vn, stride_vd, False, D, D0, DV, ALIGN, OFFSET)
            if SIDE_M > 0:
                side_acc0, side_acc1, side_max, side_sum = _fwd_tile(
                    side_q0, side_q1, k0, k1, v0, v1, side_acc0, side_acc1, side_max, side_sum,
                    BLOCK_N, scale_log2e, False, False, D1, DV, ACC, PRECISION,
                )  # fmt: skip
            acc0, acc1, row_max, row_sum = _fwd_tile(
                q0, q1, k0, k1, v0, v1, acc0, acc1, row_max, row_sum,
                BLOCK_N, scale_log2e, False, False, D1, DV, ACC, PRECISION,
            )  # fmt: skip
            k_ptr += tl.cast(BLOCK_N, OFFSET) * stride_kn
            v_ptr += tl.cast(BLOCK_N, OFFSET) * stride_vn
    if SIDE_M > 0:
        _fwd_finish(
            out_ptr, lse_ptr, side_acc0, side_acc1, side_max, side_sum, side, NQ, stride_on, stride_od,
            True, FAST, LSE_UNIT, D, D0, DV, ALIGN, OFFSET,
        )  # fmt: skip
    _fwd_finish(
        out_ptr, lse_ptr, acc0, acc1, row_max, row_sum, rows, NQ, stride_on, stride_od,
        MASK_M, FAST, LSE_UNIT, D, D0, DV, ALIGN, OFFSET,
    )  # fmt: skip


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_qd: tl.constexpr,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd: tl.constexpr,
    stride_ob, stride_oh, stride_on: tl.constexpr, stride_od: tl.constexpr,
    H, NQ, NK, scale_log2e,
    BLOCK_M: tl.constexpr, LAST_M: tl.constexpr, SIDE_M: tl.constexpr, SUMS: tl.constexpr, V_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr, LOOP_N: tl.constexpr, TAIL_N: tl.constexpr, TILES: tl.constexpr, NEXT_N: tl.constexpr,
    NEGATE: tl.constexpr, FAST: tl.constexpr, LSE_UNIT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
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
            BLOCK_M, False, 0, SUMS, V_OFFSET, BLOCK_N, LOOP_N, TAIL_N, NEGATE, FAST, LSE_UNIT,
            D, D0, D1, DV, ALIGN, OFFSET, ACC, PRECISION,
        )  # fmt: skip
    else:
        _fwd_queries(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, NQ - row_start, NK, scale_log2e,
            stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_on, stride_od,
            LAST_M, SIDE_M == 0, SIDE_M, SUMS, V_OFFSET, BLOCK_N, LOOP_N, TAIL_N, NEGATE, FAST, LSE_UNIT,
            D, D0, D1, DV, ALIGN, OFFSET, ACC, PRECISION,
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
    common = _common(q, d, tiles.BLOCK_M, q, k, v, out)
    dv = 24 if not short and configs.three_parts(chip, q.dtype, d, align) else common["D1"]
    launch(
        _attention_fwd_kernel, (b, programs, h),
        q, keys, v, out, lse, *q.stride(), *k.stride(), *v.stride(), *out.stride(), h, nq, nk,
        max(abs(scale), SMALLEST_SCALE) * LOG2E,
        BLOCK_M=tiles.BLOCK_M, LAST_M=last_m, SUMS=configs.sums_of_a_row(chip), V_OFFSET=v_offset,
        LOOP_N=nk >= cut["BLOCK_N"], **cut, DV=dv,
        NEGATE=scale < 0, FAST=q.dtype.itemsize == 2 and chip.startswith("sm_"),  # CUDA's approximations
        LSE_UNIT=lse_unit(q.dtype, nk),
        **common, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse
