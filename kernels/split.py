"""LayerNorm and Linear one by one, as two plain kernels: the other form, to be counted beside the fused one.

    x̂ = (x - mean) rstd γ + β, stored        y = x̂ Wᵀ

These are compiled by survey.py and never launched: on a GPU the split form is PyTorch's own LayerNorm and product
(`configs.splits`, `vitriton tune`), whose machine code no Triton compiles. They have the tiles and the loads of the
fused kernels, so that what is counted differs by the fusion alone. The product has no tail: BLOCK_K divides K.
"""

import triton
import triton.language as tl

from . import configs
from .launch import cdiv, chip_of, dot_precision, launch, next_power_of_2, tl_accumulator
from .prenorm import tile_of_program

__all__ = ["layer_norm_then_linear"]


@triton.jit
def _layer_norm_kernel(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, stride_xm, stride_ym, M, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program normalises BLOCK_M rows, whole in registers: K is at most BLOCK_K."""
    rows, cols = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_xm + cols[None, :], mask=inside, other=0.0).to(ACC)
    centred = tl.where(inside, x - (tl.sum(x, 1) / K)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / K + eps)
    gamma = tl.load(gamma_ptr + cols, mask=cols < K, other=0.0).to(ACC)
    beta = tl.load(beta_ptr + cols, mask=cols < K, other=0.0).to(ACC)
    y = centred * rstd[:, None] * gamma[None, :] + beta[None, :]
    y_ptrs = y_ptr + rows[:, None].to(tl.int64) * stride_ym + cols[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plain_product_kernel(
    x_ptr, w_ptr, y_ptr, stride_xm, stride_wn, stride_ym, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program makes a (BLOCK_M, BLOCK_N) tile of y (M,N) from x (M,K) and w (N,K)."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    rows, cols, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # what lies beyond the edges reads the last row again
    x_ptrs = x_ptr + (start_m + tl.minimum(rows, M - start_m - 1))[:, None] * stride_xm + ks[None, :]
    w_ptrs = w_ptr + (start_n + tl.minimum(cols, N - start_n - 1))[:, None] * stride_wn + ks[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for _ in range(0, K // BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs), tl.trans(tl.load(w_ptrs)), acc, out_dtype=ACC, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    rows, cols = start_m + rows, start_n + cols
    y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (cols[None, :] < N))


def layer_norm_then_linear(x, norm_weight, norm_bias, weight, eps):
    """x (M,K), weight (N,K), aligned: what the split form would launch, under `launch.record`."""
    (m, k), n = x.shape, weight.shape[0]
    tiles, block_k = configs.product_tiles(chip_of(x.device), weight.dtype, 16), next_power_of_2(k)
    block_m = max(1, 4096 // block_k)  # elements a program as in `configs.row_tiles`
    normalised, y = weight.new_empty(m, k), weight.new_empty(m, n)
    launch(
        _layer_norm_kernel, (cdiv(m, block_m),), x, norm_weight, norm_bias, normalised, k, k, m, k, eps,
        BLOCK_M=block_m, BLOCK_K=block_k, ACC=tl_accumulator(x.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    launch(
        _plain_product_kernel, (cdiv(m, tiles.BLOCK_M) * cdiv(n, tiles.BLOCK_N),),
        normalised, weight, y, k, k, n, m, n, k,
        BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, BLOCK_K=tiles.BLOCK_K, GROUP=8,
        ACC=tl_accumulator(x.dtype), PRECISION=dot_precision(x.dtype),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
