"""A plain product of matrices, x wᵀ, to hold LayerNorm + Linear's main loop against. test_aot.py compiles it.

    python plain_product.py sm_90 fp16 '{"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, ...}'

prints the instructions of a warp in one iteration of its loop.
"""

import json
import sys

import triton
import triton.language as tl


@triton.jit
def plain_product_kernel(
    x_ptr, w_ptr, y_ptr, stride_xm, stride_wn, stride_ym, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program makes a (BLOCK_M, BLOCK_N) tile of y (M,N) from x (M,K) and w (N,K); BLOCK_K divides K."""
    start_m, start_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, cols, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # what lies beyond the edges reads the last row again
    x_ptrs = x_ptr + (start_m + tl.minimum(rows, M - start_m - 1))[:, None] * stride_xm + ks[None, :]
    w_ptrs = w_ptr + (start_n + tl.minimum(cols, N - start_n - 1))[:, None] * stride_wn + ks[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K // BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs), tl.trans(tl.load(w_ptrs)), acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    rows, cols = start_m + rows, start_n + cols
    y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (cols[None, :] < N))


def instructions(arch, dtype, config):
    from vitriton.kernels.aot import report

    tensors = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), f"*{dtype}")
    sizes = dict.fromkeys(("stride_xm", "stride_wn", "stride_ym", "M", "N", "K"), "i32")
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    record = report(
        plain_product_kernel, tensors | sizes | tile,
        arch=arch, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return record.hot.instructions


if __name__ == "__main__":
    print(instructions(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
