"""LayerNorm + Linear (+ GELU) as Triton kernels: the maths of both passes, and the forward pass.

    x̂ = (x - mean) rstd        z = (γ ⊙ x̂ + β) Wᵀ + b = x̂ W'ᵀ + d        y = act(z)
    W' = γ ⊙ W                 d = W β + b

x is (M,K), W (N,K), z (M,N). The normalised rows are never stored. Half precision multiplies x itself and mends the
product, z = rstd (x W'ᵀ - mean c) + d, where c sums each row of W' as rounded, so that nothing stands between the loads
and the tensor cores. A tile with a row whose |mean| is large beside its spread, fp32 and fp64 normalise each tile of x
on its way into the product: there the subtraction would cancel what the product has rounded. (So a row's last bits may
depend on whether such a row is its neighbour in a tile.)
With dz = dy act'(z), G = dzᵀ x̂, and two sums over the N of a row, s1 = dz c and s2 = dz (z - d):

    dx = rstd (dz W' - (s1 + x̂ s2) / K)        db = Σ dz
    dW = γ ⊙ G + db βᵀ        dγ = Σ_n W ⊙ G        dβ = Wᵀ db

Kept for the backward pass: the inputs, mean and rstd (fp32) and z. No atomics: partial sums, added up in a fixed order.
"""

import triton
import triton.language as tl

from . import configs
from .gelu import gelu
from .launch import (
    accumulator,
    alignment,
    cdiv,
    chip_of,
    dot_precision,
    launch,
    layout,
    next_power_of_2,
    tail,
    tl_accumulator,
)
from .tiles import aligned, load_tile, row_offset, store_tile

# |mean| rstd from which a tile is normalised before its product, which until then loses at most this factor times the
# rounding error of fp32: nothing beside that of half precision.
CENTRE_FROM = tl.constexpr(32.0)


@triton.jit
def tile_of_program(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile that a program makes: GROUP rows of tiles are walked column by column, so that loads are shared."""
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
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program makes mean and rstd of BLOCK_M rows, reading them once (Chan et al. 1979: by chunks, each centred)."""
    K = aligned(K, ALIGN)
    start_m = tl.program_id(0) * BLOCK_M
    x_ptr += row_offset(start_m, stride_xm, ALIGN)
    rows = tl.arange(0, BLOCK_M)
    row_end = M - start_m
    mean = tl.zeros((BLOCK_M,), ACC)
    squares = tl.zeros((BLOCK_M,), ACC)  # Σ (x - mean)²
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, rows, row_end, cols, K, stride_xm, stride_xk, True, True, ALIGN, OFFSET).to(ACC)
        n = tl.sum((cols < K).to(ACC), 0)
        chunk_mean = tl.sum(x, 1) / n
        centred = tl.where(cols[None, :] < K, x - chunk_mean[:, None], 0.0)
        rest = tl.sum(centred, 1) / n  # what the rounding of chunk_mean left
        chunk_squares = tl.sum(centred * centred, 1) - n * rest * rest
        delta = chunk_mean + rest - mean
        share = n / (start + n)
        mean += delta * share
        squares += chunk_squares + delta * delta * start * share
    tl.store(mean_ptr + start_m + rows, mean, mask=rows < row_end)
    tl.store(rstd_ptr + start_m + rows, tl.rsqrt(squares / K + eps), mask=rows < row_end)


@triton.jit
def _fold_kernel(
    w_ptr, gamma_ptr, beta_ptr, b_ptr, folded_ptr, c_ptr, d_ptr, stride_wn, stride_wk, N, K,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK_N rows of W' (in W's dtype), c and d."""
    K = aligned(K, ALIGN)
    start_n = tl.program_id(0) * BLOCK_N
    w_ptr += row_offset(start_n, stride_wn, ALIGN)
    folded_ptr += row_offset(start_n, K, ALIGN)
    rows = tl.arange(0, BLOCK_N)
    row_end = N - start_n
    c = tl.zeros((BLOCK_N,), ACC)
    d = tl.zeros((BLOCK_N,), ACC)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        w = load_tile(w_ptr, rows, row_end, cols, K, stride_wn, stride_wk, True, True, ALIGN, OFFSET).to(ACC)
        gamma = tl.load(gamma_ptr + cols, mask=cols < K, other=0.0).to(ACC)
        beta = tl.load(beta_ptr + cols, mask=cols < K, other=0.0).to(ACC)
        folded = (w * gamma[None, :]).to(folded_ptr.dtype.element_ty)
        store_tile(folded_ptr, folded, rows, row_end, cols, K, K, 1, True, True, ALIGN, OFFSET)
        c += tl.sum(folded.to(ACC), 1)
        d += tl.sum(w * beta[None, :], 1)
    if HAS_BIAS:
        d += tl.load(b_ptr + start_n + rows, mask=rows < row_end, other=0.0).to(ACC)
    tl.store(c_ptr + start_n + rows, c, mask=rows < row_end)
    tl.store(d_ptr + start_n + rows, d, mask=rows < row_end)


@triton.jit
def _fwd_step(
    acc, x_ptr, w_ptr, rows, cols, k_end, mean, rstd, stride_xm, stride_xk, stride_wn,
    WIDTH: tl.constexpr, MASK: tl.constexpr, NORMALISE: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x W'ᵀ, or acc + x̂ W'ᵀ, over WIDTH of K."""
    ks = tl.arange(0, WIDTH)
    x = load_tile(x_ptr, rows, None, ks, k_end, stride_xm, stride_xk, False, MASK, ALIGN, OFFSET)
    w = load_tile(w_ptr, cols, None, ks, k_end, stride_wn, 1, False, MASK, ALIGN, OFFSET)
    if NORMALISE:
        x = (x.to(mean.dtype) - mean[:, None]) * rstd[:, None]
        if MASK:  # -mean rstd may be inf in half precision, and inf times a zero of w is NaN
            x = tl.where(ks[None, :] < k_end, x, 0.0)
        x = x.to(w.dtype)
    return tl.dot(x, tl.trans(w), acc, out_dtype=acc.dtype, input_precision=PRECISION)


@triton.jit
def _fwd_product(
    acc, x_ptr, w_ptr, rows, cols, mean, rstd, K, stride_xm, stride_xk, stride_wn,
    BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, NORMALISE: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x W'ᵀ, or acc + x̂ W'ᵀ, over all of K: (BLOCK_M, BLOCK_N)."""
    for _ in range(0, K // BLOCK_K):
        acc = _fwd_step(
            acc, x_ptr, w_ptr, rows, cols, None, mean, rstd, stride_xm, stride_xk, stride_wn,
            BLOCK_K, False, NORMALISE, ALIGN, OFFSET, PRECISION,
        )  # fmt: skip
        x_ptr += tl.cast(BLOCK_K, OFFSET) * stride_xk
        w_ptr += BLOCK_K
    if TAIL_K > 0:
        acc = _fwd_step(
            acc, x_ptr, w_ptr, rows, cols, K % BLOCK_K, mean, rstd, stride_xm, stride_xk, stride_wn,
            TAIL_K, True, NORMALISE, ALIGN, OFFSET, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _layer_norm_linear_fwd_kernel(
    x_ptr, w_ptr, c_ptr, d_ptr, mean_ptr, rstd_ptr, y_ptr, z_ptr, stride_xm, stride_xk, stride_wn, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, GROUP: tl.constexpr,
    ALWAYS_NORMALISE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
    ALIGN: tl.constexpr, OFFSET: tl.constexpr, ALIGN_Y: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes a (BLOCK_M, BLOCK_N) tile of y and, if SAVE, of z. w is W'; c and d have room for whole tiles."""
    N = aligned(N, ALIGN_Y)
    K = aligned(K, ALIGN)
    tile_m, tile_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    start_m = tile_m * BLOCK_M
    start_n = tile_n * BLOCK_N
    x_ptr += row_offset(start_m, stride_xm, ALIGN)
    w_ptr += row_offset(start_n, stride_wn, ALIGN)
    out_offset = row_offset(start_m, N, ALIGN_Y) + start_n
    out_rows = tl.arange(0, BLOCK_M)
    out_cols = tl.arange(0, BLOCK_N)
    row_end = M - start_m
    col_end = N - start_n
    # what lies beyond the edges reads the last row again, so that no load of the main loop has a mask
    rows = tl.minimum(out_rows, row_end - 1)
    cols = tl.minimum(out_cols, col_end - 1)
    mean = tl.load(mean_ptr + start_m + rows)
    rstd = tl.load(rstd_ptr + start_m + rows)
    d = tl.load(d_ptr + start_n + out_cols)[None, :]
    if ALWAYS_NORMALISE or tl.max(tl.abs(mean) * rstd, 0) > CENTRE_FROM:
        acc = tl.zeros((BLOCK_M, BLOCK_N), mean.dtype)
        z = d + _fwd_product(
            acc, x_ptr, w_ptr, rows, cols, mean, rstd, K, stride_xm, stride_xk, stride_wn,
            BLOCK_K, TAIL_K, True, ALIGN, OFFSET, PRECISION,
        )  # fmt: skip
    else:
        # the sum starts at -mean c, made while the first tiles of x and W' are on their way
        acc = -mean[:, None] * tl.load(c_ptr + start_n + out_cols)[None, :]
        acc = _fwd_product(
            acc, x_ptr, w_ptr, rows, cols, mean, rstd, K, stride_xm, stride_xk, stride_wn,
            BLOCK_K, TAIL_K, False, ALIGN, OFFSET, PRECISION,
        )  # fmt: skip
        # not z * rstd + d: the compiler would share that addition with the other way, and then wait after every wgmma
        z = tl.fma(acc, rstd[:, None], d)
    if SAVE:
        store_tile(z_ptr + out_offset, z, out_rows, row_end, out_cols, col_end, N, 1, True, True, ALIGN_Y, OFFSET)
    if ACTIVATION is not None:
        z = gelu(z, ACTIVATION == "gelu_tanh", y_ptr.dtype.element_ty.primitive_bitwidth == 16)
    store_tile(y_ptr + out_offset, z, out_rows, row_end, out_cols, col_end, N, 1, True, True, ALIGN_Y, OFFSET)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def fold(norm_weight, norm_bias, weight, bias):
    """W', c and d, of parameters with any strides."""
    n, k = weight.shape
    norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    bias = bias if bias is None else bias.contiguous()
    folded = weight.new_empty(n, k)
    c, d = weight.new_empty(2, cdiv(n, 256) * 256, dtype=accumulator(weight.dtype))  # room for whole tiles
    block_k = min(next_power_of_2(k), 1024)
    launch(
        _fold_kernel, (cdiv(n, 4),),
        weight, norm_weight, norm_bias, bias, folded, c, d, *weight.stride(), n, k, HAS_BIAS=bias is not None,
        BLOCK_N=4, BLOCK_K=block_k, **layout(weight, folded, widths=(k,)), ACC=tl_accumulator(weight.dtype),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return folded, c, d


def layer_norm_linear_forward(x, norm_weight, norm_bias, weight, bias, eps, activation, save_preactivation):
    """x (M,K), weight (N,K), none empty -> y (M,N), its pre-activation (M,N) or None, mean (M,), rstd (M,)."""
    (m, k), n = x.shape, weight.shape[0]
    mean, rstd = (x.new_empty(m, dtype=accumulator(x.dtype)) for _ in range(2))  # outputs must not share memory
    rows = configs.row_tiles(k)
    launch(
        _row_statistics_kernel, (cdiv(m, rows.BLOCK_M),), x, mean, rstd, *x.stride(), m, k, eps,
        BLOCK_M=rows.BLOCK_M, BLOCK_K=rows.BLOCK_N, **layout(x, widths=(k,)), ACC=tl_accumulator(x.dtype),
        num_warps=rows.num_warps, num_stages=rows.num_stages,
    )  # fmt: skip
    folded, c, d = fold(norm_weight, norm_bias, weight, bias)
    y = weight.new_empty(m, n)
    z = weight.new_empty(m, n) if save_preactivation else None
    memory = layout(x, folded, widths=(k,))
    tiles = configs.product_tiles(chip_of(x.device), weight.dtype, memory["ALIGN"])
    launch(
        _layer_norm_linear_fwd_kernel, (cdiv(m, tiles.BLOCK_M) * cdiv(n, tiles.BLOCK_N),),
        x, folded, c, d, mean, rstd, y, z, *x.stride(), k, m, n, k,
        BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, BLOCK_K=tiles.BLOCK_K, TAIL_K=tail(k, tiles.BLOCK_K), GROUP=8,
        ALWAYS_NORMALISE=x.element_size() > 2, ACTIVATION=activation, SAVE=save_preactivation,
        **memory, ALIGN_Y=alignment(y), PRECISION=dot_precision(weight.dtype),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return y, z, mean, rstd
