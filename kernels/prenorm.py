"""LayerNorm + Linear (+ GELU) as Triton kernels, forward and backward.

    x̂ = (x - mean) rstd        z = (γ ⊙ x̂ + β) Wᵀ + b = x̂ W'ᵀ + d        y = act(z)        W' = γ ⊙ W
    d = W β + b

x is (M,K), W (N,K), z (M,N). The normalised rows are never stored. Half precision multiplies x itself and mends the
product, z = rstd (x W'ᵀ - mean c) + d, where c sums each row of W' as rounded, so that nothing stands between the loads
and the tensor cores. A tile with a row whose |mean| is large beside its spread, fp32 and fp64 normalise each tile of x
on its way into the product: there the subtraction would cancel what the product has rounded.
With dz = dy act'(z), G = dzᵀ x̂, and two sums over the N of a row, s1 = dz c and s2 = dz (z - d):

    dx = rstd (dz W' - (s1 + x̂ s2) / K)        db = Σ dz        dW = γ ⊙ G + db βᵀ        dγ = Σ_n W ⊙ G        dβ = Wᵀ db

Kept for the backward pass: the inputs, mean and rstd (fp32) and z. No atomics: partial sums, added up in a fixed order.
"""

import triton
import triton.language as tl

from .configs import prenorm_backward_config, prenorm_forward_config, prenorm_rows_config, split_rows
from .launch import accumulator, alignment, cdiv, chip_of, dot_precision, launch, next_power_of_2, tail, tl_accumulator
from .tiles import load_tile, store_tile

# |mean| rstd from which a tile is normalised before its product, which until then loses at most this factor times the
# rounding error of fp32: nothing beside that of half precision.
CENTRE_FROM = tl.constexpr(32.0)


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    if TANH:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 2 sqrt(2 / π)
    else:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_derivative(z, TANH: tl.constexpr):
    if TANH:
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _tile_of_program(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile that a program makes: GROUP rows of tiles are walked column by column, so that neighbours share loads."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    group_size = GROUP * tl.cdiv(N, BLOCK_N)
    first = (pid // group_size) * GROUP
    rows = min(blocks_m - first, GROUP)
    return first + (pid % group_size) % rows, (pid % group_size) // rows


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _row_statistics_kernel(
    x_ptr, mean_ptr, rstd_ptr, stride_xm, stride_xk, M, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program makes mean and rstd of BLOCK_M rows, reading them once (Chan et al. 1979: by chunks, each centred)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_M,), ACC)
    squares = tl.zeros((BLOCK_M,), ACC)  # Σ (x - mean)²
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, rows, M, cols, K, stride_xm, stride_xk, True, True, ALIGN).to(ACC)
        n = tl.sum((cols < K).to(ACC), 0)
        chunk_mean = tl.sum(x, 1) / n
        centred = tl.where(cols[None, :] < K, x - chunk_mean[:, None], 0.0)
        rest = tl.sum(centred, 1) / n  # what the rounding of chunk_mean left
        chunk_squares = tl.sum(centred * centred, 1) - n * rest * rest
        delta = chunk_mean + rest - mean
        share = n / (start + n)
        mean += delta * share
        squares += chunk_squares + delta * delta * start * share
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, tl.rsqrt(squares / K + eps), mask=rows < M)


@triton.jit
def _fold_kernel(
    w_ptr, gamma_ptr, beta_ptr, b_ptr, folded_ptr, c_ptr, d_ptr, stride_wn, stride_wk, N, K,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK_N rows of W' (in W's dtype), c and d."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.zeros((BLOCK_N,), ACC)
    d = tl.zeros((BLOCK_N,), ACC)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        w = load_tile(w_ptr, rows, N, cols, K, stride_wn, stride_wk, True, True, ALIGN).to(ACC)
        gamma = tl.load(gamma_ptr + cols, mask=cols < K, other=0.0).to(ACC)
        beta = tl.load(beta_ptr + cols, mask=cols < K, other=0.0).to(ACC)
        folded = (w * gamma[None, :]).to(folded_ptr.dtype.element_ty)
        store_tile(folded_ptr, folded, rows, N, cols, K, K, 1, ALIGN)
        c += tl.sum(folded.to(ACC), 1)
        d += tl.sum(w * beta[None, :], 1)
    if HAS_BIAS:
        d += tl.load(b_ptr + rows, mask=rows < N, other=0.0).to(ACC)
    tl.store(c_ptr + rows, c, mask=rows < N)
    tl.store(d_ptr + rows, d, mask=rows < N)


@triton.jit
def _fwd_step(
    acc, x_ptr, w_ptr, rows, cols, k_end, mean, rstd, stride_xm, stride_xk, stride_wn,
    WIDTH: tl.constexpr, MASK: tl.constexpr, NORMALISE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x W'ᵀ, or acc + x̂ W'ᵀ, over WIDTH of K."""
    ks = tl.arange(0, WIDTH)
    x = load_tile(x_ptr, rows, None, ks, k_end, stride_xm, stride_xk, False, MASK, ALIGN)
    w = load_tile(w_ptr, cols, None, ks, k_end, stride_wn, 1, False, MASK, ALIGN)
    if NORMALISE:
        x = (x.to(mean.dtype) - mean[:, None]) * rstd[:, None]
        if MASK:  # -mean rstd may be inf in half precision, and inf times a zero of w is NaN
            x = tl.where(ks[None, :] < k_end, x, 0.0)
        x = x.to(w.dtype)
    return tl.dot(x, tl.trans(w), acc, out_dtype=acc.dtype, input_precision=PRECISION)


@triton.jit
def _fwd_product(
    x_ptr, w_ptr, rows, cols, mean, rstd, K, stride_xm, stride_xk, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
    NORMALISE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x W'ᵀ, or x̂ W'ᵀ, over all of K: (BLOCK_M, BLOCK_N)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), mean.dtype)
    for _ in range(0, K // BLOCK_K):
        acc = _fwd_step(
            acc, x_ptr, w_ptr, rows, cols, None, mean, rstd, stride_xm, stride_xk, stride_wn,
            BLOCK_K, False, NORMALISE, ALIGN, PRECISION,
        )  # fmt: skip
        x_ptr += BLOCK_K * stride_xk
        w_ptr += BLOCK_K
    if TAIL_K > 0:
        acc = _fwd_step(
            acc, x_ptr, w_ptr, rows, cols, K % BLOCK_K, mean, rstd, stride_xm, stride_xk, stride_wn,
            TAIL_K, True, NORMALISE, ALIGN, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _layer_norm_linear_fwd_kernel(
    x_ptr, w_ptr, c_ptr, d_ptr, mean_ptr, rstd_ptr, y_ptr, z_ptr, stride_xm, stride_xk, stride_wn, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, GROUP: tl.constexpr,
    ALWAYS_NORMALISE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_Y: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes a (BLOCK_M, BLOCK_N) tile of y and, if SAVE, of z. w is W'."""
    tile_m, tile_n = _tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    out_rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    out_cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # what lies beyond the edges reads the last row again, so that no load of the main loop has a mask
    rows = tl.minimum(out_rows, M - 1)
    cols = tl.minimum(out_cols, N - 1)
    mean = tl.load(mean_ptr + rows)
    rstd = tl.load(rstd_ptr + rows)
    d = tl.load(d_ptr + cols)[None, :]
    if ALWAYS_NORMALISE or tl.max(tl.abs(mean) * rstd, 0) > CENTRE_FROM:
        z = d + _fwd_product(
            x_ptr, w_ptr, rows, cols, mean, rstd, K, stride_xm, stride_xk, stride_wn,
            BLOCK_M, BLOCK_N, BLOCK_K, TAIL_K, True, ALIGN, PRECISION,
        )  # fmt: skip
    else:
        z = _fwd_product(
            x_ptr, w_ptr, rows, cols, mean, rstd, K, stride_xm, stride_xk, stride_wn,
            BLOCK_M, BLOCK_N, BLOCK_K, TAIL_K, False, ALIGN, PRECISION,
        )  # fmt: skip
        z = z * rstd[:, None] + (d - (mean * rstd)[:, None] * tl.load(c_ptr + cols)[None, :])
    if SAVE:
        store_tile(z_ptr, z, out_rows, M, out_cols, N, N, 1, ALIGN_Y)
    if ACTIVATION is not None:
        z = _gelu(z, ACTIVATION == "gelu_tanh")
    store_tile(y_ptr, z, out_rows, M, out_cols, N, N, 1, ALIGN_Y)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit
def _bwd_rows_kernel(
    grad_ptr, z_ptr, c_ptr, d_ptr, dz_ptr, s1_ptr, s2_ptr, db_ptr, stride_gm, stride_gn, stride_zm, stride_zn, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program makes s1 and s2 of BLOCK_M rows, their part of db and, with an activation, dz."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s1 = tl.zeros((BLOCK_M,), ACC)
    s2 = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        dz = load_tile(grad_ptr, rows, M, cols, N, stride_gm, stride_gn, True, True, ALIGN).to(ACC)
        z = load_tile(z_ptr, rows, M, cols, N, stride_zm, stride_zn, True, True, ALIGN).to(ACC)
        if ACTIVATION is not None:
            # rounded before it is summed, so that all of the backward pass sees one dz
            dz = (dz * _gelu_derivative(z, ACTIVATION == "gelu_tanh")).to(dz_ptr.dtype.element_ty)
            store_tile(dz_ptr, dz, rows, M, cols, N, N, 1, ALIGN)
            dz = dz.to(ACC)
        c = tl.load(c_ptr + cols, mask=cols < N, other=0.0)
        d = tl.load(d_ptr + cols, mask=cols < N, other=0.0)
        s1 += tl.sum(dz * c[None, :], 1)
        s2 += tl.sum(dz * (z - d[None, :]), 1)
        tl.store(db_ptr + tl.program_id(0).to(tl.int64) * N + cols, tl.sum(dz, 0), mask=cols < N)
    tl.store(s1_ptr + rows, s1, mask=rows < M)
    tl.store(s2_ptr + rows, s2, mask=rows < M)


@triton.jit
def _dx_step(
    acc, dz_ptr, w_ptr, rows, cols, n_end, K, stride_gm, stride_gn, stride_wn,
    WIDTH: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dz W' over WIDTH of N."""
    ns = tl.arange(0, WIDTH)
    dz = load_tile(dz_ptr, rows, None, ns, n_end, stride_gm, stride_gn, False, MASK, ALIGN)
    w = load_tile(w_ptr, ns, n_end, cols, K, stride_wn, 1, MASK, True, ALIGN)
    return tl.dot(dz, w, acc, out_dtype=acc.dtype, input_precision=PRECISION)


@triton.jit
def _layer_norm_linear_dx_kernel(
    dz_ptr, w_ptr, x_ptr, mean_ptr, rstd_ptr, s1_ptr, s2_ptr, dx_ptr,
    stride_gm, stride_gn, stride_wn, stride_xm, stride_xk, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_N: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes a (BLOCK_M, BLOCK_K) tile of dx. w is W'."""
    tile_m, tile_k = _tile_of_program(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, GROUP)
    out_rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.minimum(out_rows, M - 1)
    mean = tl.load(mean_ptr + rows)
    acc = tl.zeros((BLOCK_M, BLOCK_K), mean.dtype)
    for _ in range(0, N // BLOCK_N):
        acc = _dx_step(
            acc, dz_ptr, w_ptr, rows, cols, None, K, stride_gm, stride_gn, stride_wn, BLOCK_N, False, ALIGN, PRECISION
        )
        dz_ptr += BLOCK_N * stride_gn
        w_ptr += BLOCK_N * stride_wn
    if TAIL_N > 0:
        acc = _dx_step(
            acc, dz_ptr, w_ptr, rows, cols, N % BLOCK_N, K, stride_gm, stride_gn, stride_wn,
            TAIL_N, True, ALIGN, PRECISION,
        )  # fmt: skip
    rstd = tl.load(rstd_ptr + rows)
    x = load_tile(x_ptr, rows, None, cols, K, stride_xm, stride_xk, False, True, ALIGN).to(mean.dtype)
    x = (x - mean[:, None]) * (rstd * tl.load(s2_ptr + rows) / K)[:, None]
    dx = rstd[:, None] * (acc - (tl.load(s1_ptr + rows) / K)[:, None] - x)
    store_tile(dx_ptr, dx, out_rows, M, cols, K, K, 1, ALIGN)


@triton.jit
def _dw_step(
    acc, dz_ptr, x_ptr, mean_ptr, rstd_ptr, cols_n, cols_k, m_end, N, K, stride_gm, stride_gn, stride_xm, stride_xk,
    WIDTH: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dzᵀ x̂ over WIDTH rows."""
    rows = tl.arange(0, WIDTH)
    dz = load_tile(dz_ptr, rows, m_end, cols_n, N, stride_gm, stride_gn, MASK, True, ALIGN)
    x = load_tile(x_ptr, rows, m_end, cols_k, K, stride_xm, stride_xk, MASK, True, ALIGN)
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
    g, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, tile_n, rows, cols, N, K,
    stride_wn, stride_wk, ALIGN: tl.constexpr,
):  # fmt: skip
    """From a whole tile of G: that of dW, and its part of dγ and dβ. w is W."""
    w = load_tile(w_ptr, rows, N, cols, K, stride_wn, stride_wk, True, True, ALIGN).to(g.dtype)
    db = tl.load(db_ptr + rows, mask=rows < N, other=0.0)
    gamma = tl.load(gamma_ptr + cols, mask=cols < K, other=0.0).to(g.dtype)
    beta = tl.load(beta_ptr + cols, mask=cols < K, other=0.0).to(g.dtype)
    store_tile(dw_ptr, g * gamma[None, :] + db[:, None] * beta[None, :], rows, N, cols, K, K, 1, ALIGN)
    parts = tile_n.to(tl.int64) * K + cols
    tl.store(dgamma_ptr + parts, tl.sum(w * g, 0), mask=cols < K)
    tl.store(dbeta_ptr + parts, tl.sum(w * db[:, None], 0), mask=cols < K)


@triton.jit
def _layer_norm_linear_dw_kernel(
    dz_ptr, x_ptr, mean_ptr, rstd_ptr, g_ptr, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk, M, N, K, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_M: tl.constexpr,
    SPLIT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes a (BLOCK_N, BLOCK_K) tile of dW or, if SPLIT, that of G from rows_per_split of the rows."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile_n = tl.program_id(0) // blocks_k
    cols_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols_k = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.program_id(1) * rows_per_split
    count = tl.minimum(M - start, rows_per_split)
    dz_ptr += start.to(tl.int64) * stride_gm
    x_ptr += start.to(tl.int64) * stride_xm
    mean_ptr += start
    rstd_ptr += start
    acc = tl.zeros((BLOCK_N, BLOCK_K), mean_ptr.dtype.element_ty)
    for _ in range(0, count // BLOCK_M):
        acc = _dw_step(
            acc, dz_ptr, x_ptr, mean_ptr, rstd_ptr, cols_n, cols_k, None, N, K,
            stride_gm, stride_gn, stride_xm, stride_xk, BLOCK_M, False, ALIGN, PRECISION,
        )  # fmt: skip
        dz_ptr += BLOCK_M * stride_gm
        x_ptr += BLOCK_M * stride_xm
        mean_ptr += BLOCK_M
        rstd_ptr += BLOCK_M
    if TAIL_M > 0:
        acc = _dw_step(
            acc, dz_ptr, x_ptr, mean_ptr, rstd_ptr, cols_n, cols_k, count % BLOCK_M, N, K,
            stride_gm, stride_gn, stride_xm, stride_xk, TAIL_M, True, ALIGN, PRECISION,
        )  # fmt: skip
    if SPLIT:
        g_ptr += tl.program_id(1).to(tl.int64) * N * K
        store_tile(g_ptr, acc, cols_n, N, cols_k, K, K, 1, ALIGN)
    else:
        _dw_finish(
            acc, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, tile_n, cols_n, cols_k, N, K,
            stride_wn, stride_wk, ALIGN,
        )  # fmt: skip


@triton.jit
def _sum_splits_kernel(
    g_ptr, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, stride_wn, stride_wk, N, K, splits,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program adds up a (BLOCK_N, BLOCK_K) tile of G over the splits, and finishes it."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile_n = tl.program_id(0) // blocks_k
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    g = tl.zeros((BLOCK_N, BLOCK_K), g_ptr.dtype.element_ty)
    for _ in range(0, splits):
        g += load_tile(g_ptr, rows, N, cols, K, K, 1, True, True, ALIGN)
        g_ptr += N.to(tl.int64) * K
    _dw_finish(
        g, w_ptr, gamma_ptr, beta_ptr, db_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, tile_n, rows, cols, N, K,
        stride_wn, stride_wk, ALIGN,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def _fold(norm_weight, norm_bias, weight, bias):
    """W', c and d."""
    n, k = weight.shape
    folded = weight.new_empty(n, k)
    c, d = weight.new_empty(2, n, dtype=accumulator(weight.dtype))
    block_k = min(next_power_of_2(k), 1024)
    launch(
        _fold_kernel, (cdiv(n, 4),),
        weight, norm_weight, norm_bias, bias, folded, c, d, *weight.stride(), n, k, HAS_BIAS=bias is not None,
        BLOCK_N=4, BLOCK_K=block_k, ALIGN=alignment(weight, folded), ACC=tl_accumulator(weight.dtype),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return folded, c, d


def layer_norm_linear_forward(x, norm_weight, norm_bias, weight, bias, eps, activation, save_preactivation):
    """x (M,K), weight (N,K), none empty -> y (M,N), its pre-activation (M,N) or None, mean (M,), rstd (M,)."""
    (m, k), n = x.shape, weight.shape[0]
    mean, rstd = x.new_empty(2, m, dtype=accumulator(x.dtype))
    rows = prenorm_rows_config(k)
    launch(
        _row_statistics_kernel, (cdiv(m, rows.BLOCK_M),), x, mean, rstd, *x.stride(), m, k, eps,
        BLOCK_M=rows.BLOCK_M, BLOCK_K=rows.BLOCK_N, ALIGN=alignment(x), ACC=tl_accumulator(x.dtype),
        num_warps=rows.num_warps, num_stages=rows.num_stages,
    )  # fmt: skip
    folded, c, d = _fold(norm_weight, norm_bias, weight, bias)
    y = weight.new_empty(m, n)
    z = weight.new_empty(m, n) if save_preactivation else None
    tiles = prenorm_forward_config(chip_of(x.device), weight.dtype, m, n, k)
    launch(
        _layer_norm_linear_fwd_kernel, (cdiv(m, tiles.BLOCK_M) * cdiv(n, tiles.BLOCK_N),),
        x, folded, c, d, mean, rstd, y, z, *x.stride(), k, m, n, k,
        BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, BLOCK_K=tiles.BLOCK_K, TAIL_K=tail(k, tiles.BLOCK_K), GROUP=8,
        ALWAYS_NORMALISE=x.element_size() > 2, ACTIVATION=activation, SAVE=save_preactivation,
        ALIGN=alignment(x, folded), ALIGN_Y=alignment(y), PRECISION=dot_precision(weight.dtype),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return y, z, mean, rstd


def layer_norm_linear_backward(
    grad, x, norm_weight, norm_bias, weight, bias, z, mean, rstd, eps, activation, need_dx, need_dw
):
    """grad (M,N), z (M,N) -> dx (M,K) or None, (dnorm_weight, dnorm_bias, dweight, dbias) or None; none is empty."""
    (m, k), n = x.shape, weight.shape[0]
    chip, acc, precision = chip_of(x.device), mean.dtype, dot_precision(weight.dtype)
    folded, c, d = _fold(norm_weight, norm_bias, weight, bias)
    dz = grad if activation is None else weight.new_empty(m, n)
    s1, s2 = x.new_empty(2, m, dtype=acc)
    rows = prenorm_rows_config(n)
    blocks = cdiv(m, rows.BLOCK_M)
    db = x.new_empty(blocks, n, dtype=acc)
    launch(
        _bwd_rows_kernel, (blocks,), grad, z, c, d, dz, s1, s2, db, *grad.stride(), *z.stride(), m, n,
        BLOCK_M=rows.BLOCK_M, BLOCK_N=rows.BLOCK_N, ACTIVATION=activation, ALIGN=alignment(grad, z, dz),
        ACC=tl_accumulator(x.dtype), num_warps=rows.num_warps, num_stages=rows.num_stages,
    )  # fmt: skip
    db = db.sum(0)
    tiles = prenorm_backward_config(chip, weight.dtype, m, n, k)
    dx = None
    if need_dx:
        dx = x.new_empty(m, k)
        launch(
            _layer_norm_linear_dx_kernel, (cdiv(m, tiles.BLOCK_M) * cdiv(k, tiles.BLOCK_N),),
            dz, folded, x, mean, rstd, s1, s2, dx, *dz.stride(), k, *x.stride(), m, n, k,
            BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_K, BLOCK_K=tiles.BLOCK_N, TAIL_N=tail(n, tiles.BLOCK_K), GROUP=8,
            ALIGN=alignment(dz, folded, x, dx), PRECISION=precision,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    if not need_dw:
        return dx, None
    blocks_n, blocks_k = cdiv(n, tiles.BLOCK_M), cdiv(k, tiles.BLOCK_N)
    rows_per_split = split_rows(chip, m, blocks_n * blocks_k, tiles.BLOCK_K)
    splits = cdiv(m, rows_per_split)
    dw = weight.new_empty(n, k)
    dgamma, dbeta = x.new_empty(2, blocks_n, k, dtype=acc)
    g = x.new_empty(splits, n, k, dtype=acc) if splits > 1 else None
    finish = (weight, norm_weight, norm_bias, db, dw, dgamma, dbeta)
    launch(
        _layer_norm_linear_dw_kernel, (blocks_n * blocks_k, splits), dz, x, mean, rstd, g, *finish,
        *dz.stride(), *x.stride(), *weight.stride(), m, n, k, rows_per_split,
        BLOCK_M=tiles.BLOCK_K, BLOCK_N=tiles.BLOCK_M, BLOCK_K=tiles.BLOCK_N, TAIL_M=tail(m, tiles.BLOCK_K),
        SPLIT=splits > 1, ALIGN=alignment(dz, x, dw, weight), PRECISION=precision,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            _sum_splits_kernel, (blocks_n * blocks_k,), g, *finish, *weight.stride(), n, k, splits,
            BLOCK_N=tiles.BLOCK_M, BLOCK_K=tiles.BLOCK_N, ALIGN=alignment(dw, weight),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    dgamma, dbeta = dgamma.sum(0).to(norm_weight.dtype), dbeta.sum(0).to(norm_bias.dtype)
    return dx, (dgamma, dbeta, dw, None if bias is None else db.to(bias.dtype))
