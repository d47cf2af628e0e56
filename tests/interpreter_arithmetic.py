"""The arithmetic of a GPU in Triton's interpreter, where NumPy's is another: fused multiply-add, products and sums.

A GPU rounds a fused multiply-add once, the interpreter twice. A GPU gives an element of a product of tiles the same
bits wherever it stands in the tile, and in the transposed product too; NumPy's BLAS sums in an order that depends on
processor, shape and place. Here each such sum is rounded once, and what a test sees is the kernel's own rounding. A GPU
sums along a dim of a tile as a tree over threads, NumPy one after the other along all dims but the last: of 128 numbers
that errs more than twice as much.
"""

import numpy as np
from memory_guards import patch


def gpu_arithmetic(patches):
    """Compute so until `patches` closes."""
    from triton.runtime import interpreter

    def wide(array):  # in fp64 the product of two fp32 numbers is exact
        return array.astype(np.float64) if array.dtype == np.float32 else array

    def create_fma(original):
        def fused(self, x, y, z):
            result = wide(x.data) * wide(y.data) + wide(z.data)
            return interpreter.TensorHandle(result.astype(z.data.dtype), z.dtype.scalar)

        return fused

    def create_dot(original):
        def rounded_once(self, a, b, d, *rest):
            if a.data.dtype != np.float32:
                return original(self, a, b, d, *rest)
            result = np.matmul(wide(a.data), wide(b.data)).astype(np.float32) + d.data
            return interpreter.TensorHandle(result, d.dtype.scalar)

        return rounded_once

    def sum_along(original):
        def as_a_tree(self, input):
            total = input.handle.data
            if self.axis is None or total.dtype != np.float32:
                return original(self, input)
            while total.shape[self.axis] > 1:  # Triton's dims are powers of two
                total = np.add(*np.split(total, 2, self.axis))
            return self.to_tensor(total if self.keep_dims else total.squeeze(self.axis), input.dtype)

        return as_a_tree

    patch(patches, interpreter.ReduceOps, "sum", sum_along)
    patch(patches, interpreter.InterpreterBuilder, "create_fma", create_fma)
    patch(patches, interpreter.InterpreterBuilder, "create_dot", create_dot)
