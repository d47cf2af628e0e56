"""A plain matrix product in Triton, x Wᵀ, the measure of LayerNorm + Linear's main loop; prints both, compiled.

    python tests/plain_gemm.py sm_90 gfx942

prints, for each chip, aot.py's records of the plain product ("plain") and of the forward kernels by the names that
survey.py gives their shapes, as one line of JSON. Not with TRITON_INTERPRET=1. Run by test_layer_norm_linear_cost.py.
"""

import json
import sys

import torch
import triton
import triton.language as tl
from vitriton.kernels import aot, configs
from vitriton.kernels.survey import Case, compile_case


@triton.jit
def plain_gemm_kernel(
    x_ptr, w_ptr, y_ptr, stride_xm, stride_wn, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M,N) = x (M,K) Wᵀ, W (N,K), K a multiple of BLOCK_K: a program makes a tile, as in Triton's tutorial."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows % M)[:, None] * stride_xm + ks[None, :]
    w_ptrs = w_ptr + (cols % N)[:, None] * stride_wn + ks[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K // BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs), tl.trans(tl.load(w_ptrs)), acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def plain(arch):
    """The record of the plain product with the forward kernel's own tile."""
    tiles = configs.tiles("prenorm", arch, torch.bfloat16)
    blocks = {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "BLOCK_K": tiles.BLOCK_K}
    pointers, ints = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), "*bf16"), ("stride_xm", "stride_wn", "M", "N", "K")
    args = pointers | dict.fromkeys(ints, "i32") | blocks
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return aot.report(plain_gemm_kernel, args, arch=arch, dtype="bf16", **options)


if __name__ == "__main__":
    for arch in sys.argv[1:]:
        case = Case("layer_norm_linear", arch, "bf16", None, True, ("qkv", "gelu", "gelu_tanh"))
        records = {"plain": plain(arch).to_dict()}
        for result in compile_case(case, ["layer_norm_linear_fwd"]):
            records[result.record.variants[0]] = result.record.to_dict()
        print(json.dumps(records))
