"""Which tile sizes, warps and stages each kernel runs with: one table, with the reason for each row."""

from dataclasses import dataclass

from .launch import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tiles:
    """Tile sizes over (BLOCK_M, BLOCK_N) outputs (attention: queries and keys), warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    BLOCK_K: int = 0  # of a product: the width of a step of its sum


def head_dim_parts(head_dim):
    """Powers of two, D0 + D1 >= head_dim, that pad it least; D0 is at least 16 (tl.dot's least), D1 that or 0."""
    d0 = max(16, next_power_of_2(head_dim))
    half = d0 // 2
    if half >= 16 and half < head_dim:
        d1 = max(16, next_power_of_2(head_dim - half))
        if half + d1 < d0:
            return half, d1
    return d0, 0


def attention_forward_config(chip, dtype, head_dim, nq, nk):
    return Tiles(64, 64, 4, 2)


def attention_backward_config(chip, dtype, head_dim):
    return Tiles(64, 64, 4, 2)


def prenorm_rows_config(width):
    """Kernels that walk along rows of `width`: about 4096 elements a program, and at most 32 rows."""
    block_n = min(next_power_of_2(width), 1024)
    return Tiles(min(32, 4096 // block_n), block_n, 4, 1)


def prenorm_forward_config(chip, dtype, m, n, k):
    return Tiles(64, 64, 4, 3, 64)


def prenorm_backward_config(chip, dtype, m, n, k):
    return Tiles(64, 64, 4, 3, 64)


SM_COUNT = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "gfx1100": 96,
}


def split_rows(chip, m, tiles, block):
    """How many rows each program of the weight gradient sums: so many that about two programs a multiprocessor run."""
    splits = max(1, min(2 * SM_COUNT.get(chip, 1) // tiles, m // (8 * block)))
    return cdiv(cdiv(m, splits), block) * block
