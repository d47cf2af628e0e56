"""LayerNorm + Linear (+ GELU) as Triton kernels: the backward pass. The maths stands in prenorm.py."""

import triton
import triton.language as tl

from . import configs
from .gelu import gelu_derivative
from .launch import cdiv, chip_of, dot_precision, launch, layout, tail, tl_accumulator
from .prenorm import fold, tile_of_program
from .tiles import aligned, load_tile, row_offset, store_tile


@triton.jit
def _bwd_rows_kernel(
    grad_ptr, z_ptr, c_ptr, d_ptr, dz_ptr, s1_ptr, s2_ptr, db_ptr, stride_gm, stride_gn, stride_zm, stride_zn, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program makes s1 and s2 of BLOCK_M rows, their part of db and, with an activation, dz."""
    N = aligned(N, ALIGN)
    start_m = tl.program_id(0) * BLOCK_M
    grad_ptr += row_offset(start_m, stride_gm, ALIGN)
    z_ptr += row_offset(start_m, stride_zm, ALIGN)
    if ACTIVATION is not None:
        dz_ptr += row_offset(start_m, N, ALIGN)
    db_ptr += row_offset(tl.program_id(0), N, 1)
    rows = tl.arange(0, BLOCK_M)
    row_end = M - start_m
    s1 = tl.zeros((BLOCK_M,), ACC)
    s2 = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        dz = load_tile(grad_ptr, rows, row_end, cols, N, stride_gm, stride_gn, True, True, ALIGN, OFFSET).to(ACC)
        z = load_tile(z_ptr, rows, row_end, cols, N, stride_zm, stride_zn, True, True, ALIGN, OFFSET).to(ACC)
        if ACTIVATION is not None:
            # rounded before it is summed, so that all of the backward pass sees one dz
            half: tl.constexpr = dz_ptr.dtype.element_ty.primitive_bitwidth == 16
            dz = (dz * gelu_derivative(z, ACTIVATION == "gelu_tanh", half)).to(dz_ptr.dtype.element_ty)
            store_tile(dz_ptr, dz, rows, row_end, cols, N, N, 1, True, True, ALIGN, OFFSET)
            dz = dz.to(ACC)
        c = tl.load(c_ptr + cols, mask=cols < N, other=0.0)
        d = tl.load(d_ptr + cols, mask=cols < N, other=0.0)
        s1 += tl.sum(dz * c[None, :], 1)
        s2 += tl.sum(dz * (z - d[None, :]), 1)
        tl.store(db_ptr + cols, tl.sum(dz, 0), mask=cols < N)
    tl.store(s1_ptr + start_m + rows, s1, mask=rows < row_end)
    tl.store(s2_ptr + start_m + rows, s2, mask=rows < row_end)


@triton.jit
def _dx_step(
    acc, dz_ptr, w_ptr, rows, cols, n_end, K, stride_gm, stride_gn, stride_wn,
    WIDTH: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dz W' over WIDTH of N."""
    ns = tl.arange(0, WIDTH)
    dz = load_tile(dz_ptr, rows, None, ns, n_end, stride_gm, stride_gn, False, MASK, ALIGN, OFFSET)
    w = load_tile(w_ptr, ns, n_end, cols, K, stride_wn, 1, MASK, True, ALIGN, OFFSET)
    return tl.dot(dz, w, acc, out_dtype=acc.dtype, input_precision=PRECISION)


@triton.jit
def _layer_norm_linear_dx_kernel(
    dz_ptr, w_ptr, x_ptr, mean_ptr, rstd_ptr, s1_ptr, s2_ptr, dx_ptr,
    stride_gm, stride_gn, stride_wn, stride_xm, stride_xk, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_N: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes a (BLOCK_M, BLOCK_K) tile of dx. w is W'."""
    N = aligned(N, ALIGN)
    K = aligned(K, ALIGN)
    tile_m, tile_k = tile_of_program(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, GROUP)
    start_m = tile_m * BLOCK_M
    dz_ptr += row_offset(start_m, stride_gm, ALIGN)
    x_ptr += row_offset(start_m, stride_xm, ALIGN)
    dx_ptr += row_offset(start_m, K, ALIGN)
    row_end = M - start_m
    out_rows = tl.arange(0, BLOCK_M)
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.minimum(out_rows, row_end - 1)
    mean = tl.load(mean_ptr + start_m + rows)
    acc = tl.zeros((BLOCK_M, BLOCK_K), mean.dtype)
    for _ in range(0, N // BLOCK_N):
        acc = _dx_step(
            acc, dz_ptr, w_ptr, rows, cols, None, K, stride_gm, stride_gn, stride_wn,
            BLOCK_N, False, ALIGN, OFFSET, PRECISION,
        )  # fmt: skip
        dz_ptr += tl.cast(BLOCK_N, OFFSET) * stride_gn
        w_ptr += tl.cast(BLOCK_N, OFFSET) * stride_wn
    if TAIL_N > 0:
        acc = _dx_step(
            acc, dz_ptr, w_ptr, rows, cols, N % BLOCK_N, K, stride_gm, stride_gn, stride_wn,
            TAIL_N, True, ALIGN, OFFSET, PRECISION,
        )  # fmt: skip
    rstd = tl.load(rstd_ptr + start_m + rows)
    x = load_tile(x_ptr, rows, None, cols, K, stride_xm, stride_xk, False, True, ALIGN, OFFSET).to(mean.dtype)
    x = (x - mean[:, None]) * (rstd * tl.load(s2_ptr + start_m + rows) / K)[:, None]
    dx = rstd[:, None] * (acc - (tl.load(s1_ptr + start_m + rows) / K)[:, None] - x)
    store_tile(dx_ptr, dx, out_rows, row_end, cols, K, K, 1, True, True, ALIGN, OFFSET)


@triton.jit
def _dw_step(
    acc, dz_ptr, x_ptr, mean_ptr, rstd_ptr, cols_n, cols_k, m_end, N, K, stride_gm, stride_gn, stride_xm, stride_xk,
    WIDTH: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dzᵀ x̂ over WIDTH rows."""
    rows = tl.arange(0, WIDTH)
    dz = load_tile(dz_ptr, rows, m_end, cols_n, N, stride_gm, stride_gn, MASK, True, ALIGN, OFFSET)
    x = load_tile(x_ptr, rows, m_end, cols_k, K, stride_xm, stride_xk, MASK, True, ALIGN, OFFSET)
    if MASK:
        mean = tl.load(mean_ptr + rows, mask=rows < m_end, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < m_end, other=0.0)
    else:
        mean = tl.load(mean_ptr + rows)
        rstd = tl.load(rstd_ptr + rows)
    x = ((x.to(mean.dtype) - mean[:, None]) * rstd[:, None]).to(dz.dtype)
    return tl.dot(tl.trans(dz), x, acc, out_dtype=acc.dtype, input_precision=PRECISION)


@triton.jit
def _dw_finish(
    g, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, tile_n, cols, N, K, stride_wn, stride_wk,
    ROWS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """From a whole tile of G: that of dW, and its part of dγ and dβ. w is W."""
    start_n = tile_n * ROWS
    rows = tl.arange(0, ROWS)
    row_end = N - start_n
    w_ptr += row_offset(start_n, stride_wn, ALIGN)
    dw_ptr += row_offset(start_n, K, ALIGN)
    db = tl.load(db_ptr + start_n + rows, mask=rows < row_end, other=0.0)
    gamma = tl.load(gamma_ptr + cols, mask=cols < K, other=0.0).to(g.dtype)
    beta = tl.load(beta_ptr + cols, mask=cols < K, other=0.0).to(g.dtype)
    dw = g * gamma[None, :] + db[:, None] * beta[None, :]
    store_tile(dw_ptr, dw, rows, row_end, cols, K, K, 1, True, True, ALIGN, OFFSET)
    tl.debug_barrier()  # so that w is not read before dw is written, for which there are no registers
    w = load_tile(w_ptr, rows, row_end, cols, K, stride_wn, stride_wk, True, True, ALIGN, OFFSET).to(g.dtype)
    parts = row_offset(tile_n, K, 1) + cols
    tl.store(dgamma_ptr + parts, tl.sum(w * g, 0), mask=cols < K)
    tl.store(dbeta_ptr + parts, tl.sum(w * db[:, None], 0), mask=cols < K)


@triton.jit
def _layer_norm_linear_dw_kernel(
    dz_ptr, x_ptr, mean_ptr, rstd_ptr, g_ptr, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk, M, N, K, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_M: tl.constexpr,
    SPLIT: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes a (BLOCK_N, BLOCK_K) tile of dW or, if SPLIT, that of G from rows_per_split of the rows."""
    N = aligned(N, ALIGN)
    K = aligned(K, ALIGN)
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile_n = tl.program_id(0) // blocks_k
    cols_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols_k = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.program_id(1) * rows_per_split
    count = tl.minimum(M - start, rows_per_split)
    dz_ptr += row_offset(start, stride_gm, ALIGN)
    x_ptr += row_offset(start, stride_xm, ALIGN)
    mean_ptr += start
    rstd_ptr += start
    acc = tl.zeros((BLOCK_N, BLOCK_K), mean_ptr.dtype.element_ty)
    for _ in range(0, count // BLOCK_M):
        acc = _dw_step(
            acc, dz_ptr, x_ptr, mean_ptr, rstd_ptr, cols_n, cols_k, None, N, K,
            stride_gm, stride_gn, stride_xm, stride_xk, BLOCK_M, False, ALIGN, OFFSET, PRECISION,
        )  # fmt: skip
        dz_ptr += tl.cast(BLOCK_M, OFFSET) * stride_gm
        x_ptr += tl.cast(BLOCK_M, OFFSET) * stride_xm
        mean_ptr += BLOCK_M
        rstd_ptr += BLOCK_M
    if TAIL_M > 0:
        acc = _dw_step(
            acc, dz_ptr, x_ptr, mean_ptr, rstd_ptr, cols_n, cols_k, count % BLOCK_M, N, K,
            stride_gm, stride_gn, stride_xm, stride_xk, TAIL_M, True, ALIGN, OFFSET, PRECISION,
        )  # fmt: skip
    if SPLIT:
        # one above the other: split by split, the rows of G
        g_ptr += row_offset(tl.program_id(1), N, 1) * K + row_offset(tile_n * BLOCK_N, K, ALIGN)
        rows = tl.arange(0, BLOCK_N)
        store_tile(g_ptr, acc, rows, N - tile_n * BLOCK_N, cols_k, K, K, 1, True, True, ALIGN, OFFSET)
    else:
        _dw_finish(
            acc, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, tile_n, cols_k, N, K,
            stride_wn, stride_wk, BLOCK_N, ALIGN, OFFSET,
        )  # fmt: skip


@triton.jit
def _sum_splits_kernel(
    g_ptr, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, stride_wn, stride_wk, N, K, splits,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A program adds up a (BLOCK_N, BLOCK_K) tile of G over the splits, and finishes it."""
    K = aligned(K, ALIGN)
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile_n = tl.program_id(0) // blocks_k
    g_ptr += row_offset(tile_n * BLOCK_N, K, ALIGN)
    rows = tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    g = tl.zeros((BLOCK_N, BLOCK_K), g_ptr.dtype.element_ty)
    for _ in range(0, splits):
        g += load_tile(g_ptr, rows, N - tile_n * BLOCK_N, cols, K, K, 1, True, True, ALIGN, OFFSET)
        g_ptr += row_offset(N, K, ALIGN)
    _dw_finish(
        g, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, tile_n, cols, N, K,
        stride_wn, stride_wk, BLOCK_N, ALIGN, OFFSET,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


def layer_norm_linear_backward(
    grad, x, norm_weight, norm_bias, weight, bias, z, mean, rstd, eps, activation, need_dx, need_dw
):
    """grad (M,N), z (M,N) -> dx (M,K) or None, (dnorm_weight, dnorm_bias, dweight, dbias) or None; none is empty."""
    (m, k), n = x.shape, weight.shape[0]
    chip, acc, precision = chip_of(x.device), mean.dtype, dot_precision(weight.dtype)
    folded, c, d = fold(norm_weight, norm_bias, weight, bias)
    dz = grad if activation is None else weight.new_empty(m, n)
    s1, s2 = x.new_empty(2, m, dtype=acc)
    rows = configs.row_tiles(n)
    blocks = cdiv(m, rows.BLOCK_M)
    db = x.new_empty(blocks, n, dtype=acc)
    launch(
        # twice the warps: the derivative of an activation takes registers
        _bwd_rows_kernel, (blocks,), grad, z, c, d, dz, s1, s2, db, *grad.stride(), *z.stride(), m, n,
        BLOCK_M=rows.BLOCK_M, BLOCK_N=rows.BLOCK_N, ACTIVATION=activation, **layout(grad, z, dz, widths=(n,)),
        ACC=tl_accumulator(x.dtype), num_warps=2 * rows.num_warps, num_stages=rows.num_stages,
    )  # fmt: skip
    db = db.sum(0)
    dx = None
    if need_dx:
        dx = x.new_empty(m, k)
        memory = layout(dz, folded, x, dx, widths=(n, k))
        tiles = configs.product_tiles(chip, weight.dtype, memory["ALIGN"])
        launch(
            _layer_norm_linear_dx_kernel, (cdiv(m, tiles.BLOCK_M) * cdiv(k, tiles.BLOCK_N),),
            dz, folded, x, mean, rstd, s1, s2, dx, *dz.stride(), k, *x.stride(), m, n, k,
            BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_K, BLOCK_K=tiles.BLOCK_N, TAIL_N=tail(n, tiles.BLOCK_K), GROUP=8,
            **memory, PRECISION=precision,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    if not need_dw:
        return dx, None
    dw = weight.new_empty(n, k)
    memory = layout(dz, x, dw, weight, widths=(n, k))
    tiles = configs.product_tiles(chip, weight.dtype, memory["ALIGN"])
    blocks_n, blocks_k = cdiv(n, tiles.BLOCK_M), cdiv(k, tiles.BLOCK_N)
    rows_per_split = configs.split_rows(chip, m, blocks_n * blocks_k, tiles.BLOCK_K)
    splits = cdiv(m, rows_per_split)
    dgamma, dbeta = x.new_empty(2, blocks_n, k, dtype=acc)
    g = x.new_empty(splits, n, k, dtype=acc) if splits > 1 else None
    finish = (weight, norm_weight.contiguous(), norm_bias.contiguous(), db, dw, dgamma, dbeta)
    launch(
        _layer_norm_linear_dw_kernel, (blocks_n * blocks_k, splits), dz, x, mean, rstd, g, *finish,
        *dz.stride(), *x.stride(), *weight.stride(), m, n, k, rows_per_split,
        BLOCK_M=tiles.BLOCK_K, BLOCK_N=tiles.BLOCK_M, BLOCK_K=tiles.BLOCK_N, TAIL_M=tail(m, tiles.BLOCK_K),
        SPLIT=splits > 1, **memory, PRECISION=precision,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            _sum_splits_kernel, (blocks_n * cdiv(k, 32),), g, *finish, *weight.stride(), n, k, splits,
            BLOCK_N=tiles.BLOCK_M, BLOCK_K=32, **memory, num_warps=4, num_stages=1,
        )  # fmt: skip
    dgamma, dbeta = dgamma.sum(0).to(norm_weight.dtype), dbeta.sum(0).to(norm_bias.dtype)
    return dx, (dgamma, dbeta, dw, None if bias is None else db.to(bias.dtype))
