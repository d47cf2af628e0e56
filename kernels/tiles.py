"""Loads and stores of two-dimensional tiles, shared by the kernels."""

import triton
import triton.language as tl


@triton.jit
def _offsets(rows, cols, stride_row, stride_col, ALIGN: tl.constexpr):
    """ALIGN is a power of two that divides stride_row, which Triton itself finds out for multiples of 16 only."""
    return tl.multiple_of(rows[:, None].to(tl.int64) * stride_row, [1, ALIGN]) + cols[None, :] * stride_col


@triton.jit
def load_tile(
    x_ptr, rows, row_end, cols, col_end, stride_row, stride_col,
    MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """x[rows, cols] (ROWS, COLS), with 0 from row_end on if MASK_ROWS and from col_end on if MASK_COLS."""
    ptrs = x_ptr + _offsets(rows, cols, stride_row, stride_col, ALIGN)
    if MASK_ROWS and MASK_COLS:
        return tl.load(ptrs, mask=(rows[:, None] < row_end) & (cols[None, :] < col_end), other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None] < row_end, other=0.0)
    elif MASK_COLS:
        return tl.load(ptrs, mask=cols[None, :] < col_end, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(x_ptr, x, rows, row_end, cols, col_end, stride_row, stride_col, ALIGN: tl.constexpr):
    """x[rows, cols] = x below row_end and col_end, in x_ptr's dtype."""
    mask = (rows[:, None] < row_end) & (cols[None, :] < col_end)
    tl.store(x_ptr + _offsets(rows, cols, stride_row, stride_col, ALIGN), x.to(x_ptr.dtype.element_ty), mask=mask)
