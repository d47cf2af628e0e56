"""Loads and stores of two-dimensional tiles, shared by the kernels. `rows` and `cols` count from x_ptr."""

import triton
import triton.language as tl


@triton.jit
def _offsets(
    rows, cols, stride_row, stride_col, ALIGN: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """In elements, of type OFFSET: int32 unless a tile can span 2³¹. ALIGN is a power of two that divides stride_row,
    which Triton itself finds out for multiples of 16 only.

    With GROUP, rows are counted in groups: where all threads load GROUP rows at once, a thread's rows lie that far
    apart, and its addresses are one register and constants if stride_row is known at compile time.
    """
    along = cols[None, :].to(OFFSET) * stride_col
    if GROUP == 0:
        return tl.multiple_of(rows[:, None].to(OFFSET) * stride_row, [1, ALIGN]) + along
    within, groups = (rows % GROUP)[:, None].to(OFFSET), (rows // GROUP)[:, None].to(OFFSET)
    offsets = tl.multiple_of(within * stride_row, [1, ALIGN]) + along
    return offsets + tl.multiple_of(groups * (GROUP * stride_row), [1, ALIGN])


@triton.jit
def aligned(n, ALIGN: tl.constexpr):
    """n, of which the caller knows that ALIGN divides it, said so that masks of `n` columns keep loads wide."""
    return n // ALIGN * ALIGN


@triton.jit
def row_offset(row, stride_row, ALIGN: tl.constexpr):
    """Where row `row` begins, in elements: int64."""
    return tl.multiple_of(tl.cast(row, tl.int64) * stride_row, ALIGN)


@triton.jit
def load_tile(
    x_ptr, rows, row_end, cols, col_end, stride_row, stride_col,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr = 0,
):  # fmt: skip
    """x[rows, cols] (ROWS, COLS), with 0 from row_end on if MASK_ROWS and from col_end on if MASK_COLS."""
    ptrs = x_ptr + _offsets(rows, cols, stride_row, stride_col, ALIGN, OFFSET, GROUP)
    if MASK_ROWS and MASK_COLS:
        return tl.load(ptrs, mask=(rows[:, None] < row_end) & (cols[None, :] < col_end), other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None] < row_end, other=0.0)
    elif MASK_COLS:
        return tl.load(ptrs, mask=cols[None, :] < col_end, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(
    x_ptr, x, rows, row_end, cols, col_end, stride_row, stride_col,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, ALIGN: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr = 0,
):  # fmt: skip
    """x[rows, cols] = x, in x_ptr's dtype; not from row_end on if MASK_ROWS, nor from col_end on if MASK_COLS."""
    ptrs = x_ptr + _offsets(rows, cols, stride_row, stride_col, ALIGN, OFFSET, GROUP)
    x = x.to(x_ptr.dtype.element_ty)
    if MASK_ROWS and MASK_COLS:
        tl.store(ptrs, x, mask=(rows[:, None] < row_end) & (cols[None, :] < col_end))
    elif MASK_ROWS:
        tl.store(ptrs, x, mask=rows[:, None] < row_end)
    elif MASK_COLS:
        tl.store(ptrs, x, mask=cols[None, :] < col_end)
    else:
        tl.store(ptrs, x)
