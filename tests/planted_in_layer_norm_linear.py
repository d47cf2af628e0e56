"""Bugs to plant in the kernels of layer_norm_linear: see planted_bugs.py."""

from planted_bugs import Bug

__all__ = ["LAYER_NORM_LINEAR"]

LAYER_NORM_LINEAR = (
    Bug(
        "eps forgotten", "prenorm.py", within="def _row_statistics_kernel(",
        text="tl.rsqrt(squares / K + eps)", instead="tl.rsqrt(squares / K)",
        why="constant rows become inf and NaN",
        killed_by="test_numerics.py::test_constant_rows_and_zero_rows",
    ),
    Bug(
        "variance of a sample", "prenorm.py", within="def _row_statistics_kernel(",
        text="tl.rsqrt(squares / K + eps)", instead="tl.rsqrt(squares / (K - 1) + eps)",
        why="LayerNorm divides by K; at K = 768 the difference is 0.07%",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "padding counted in the variance", "prenorm.py", within="def _row_statistics_kernel(",
        text="centred = tl.where(cols[None, :] < K, x - chunk_mean[:, None], 0.0)",
        instead="centred = x - chunk_mean[:, None]",
        why="padded lanes add mean² to the variance, as they did in two known libraries",
        killed_by="test_layer_norm_linear.py::test_grid", quick=True,
    ),
    Bug(
        "variance as a difference of squares", "prenorm.py", within="def _row_statistics_kernel(",
        text="chunk_squares = tl.sum(centred * centred, 1) - n * rest * rest",
        instead="chunk_squares = tl.sum(x * x, 1) - n * chunk_mean * chunk_mean",
        why="it cancels where the mean is large beside the spread",
        killed_by="test_numerics.py::test_large_mean",
    ),
    Bug(
        "chunks' means not compared", "prenorm.py", within="def _row_statistics_kernel(",
        text="squares += chunk_squares + delta * delta * start * share", instead="squares += chunk_squares",
        why="rows wider than one chunk would miss the spread between chunks",
        killed_by="test_attacks.py::test_wide_rows",
    ),
    Bug(
        "rounding of a chunk's mean not mended", "prenorm.py", within="def _row_statistics_kernel(",
        text="delta = chunk_mean + rest - mean", instead="delta = chunk_mean - mean",
        why="the mean would be an ulp or two off",
        killed_by="test_properties.py::test_layer_norm_linear",
    ),
    Bug(
        "gamma not folded in", "prenorm.py", within="def _fold_kernel(",
        text="folded = (w * gamma[None, :])", instead="folded = w",
        why="norm_weight would be 1, as it is in a fresh model",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "beta forgotten", "prenorm.py", within="def _fold_kernel(",
        text="d += tl.sum(w * beta[None, :], 1)", instead="d += 0.0",
        why="norm_bias would be 0, as it is in a fresh model",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "bias not added", "prenorm.py", within="def _fold_kernel(",
        text="if HAS_BIAS:", instead="if False:",
        why="a Linear without its bias",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "mean not taken off the product", "prenorm.py", within="def _layer_norm_linear_fwd_kernel(",
        text="acc = -mean[:, None] * tl.load(c_ptr + start_n + out_cols)[None, :]",
        instead="acc = tl.zeros((BLOCK_M, BLOCK_N), mean.dtype)",
        why="right for rows whose mean is 0",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "large means cancelled", "prenorm.py",
        text="CENTRE_FROM = tl.constexpr(32.0)", instead="CENTRE_FROM = tl.constexpr(1e9)",
        why="x W - mean c cancels in half precision where |mean| is a thousand times the spread",
        killed_by="test_attacks.py::test_mean_against_weights_of_one_sign",
    ),
    Bug(
        "fp32 normalised after the product", "prenorm.py", within="def layer_norm_linear_forward(",
        text="ALWAYS_NORMALISE=x.element_size() > 2", instead="ALWAYS_NORMALISE=False",
        why="fp32 promises more digits than the mended product keeps",
        killed_by="test_attacks.py::test_mean_against_weights_of_one_sign",
    ),
    Bug(
        "rows beyond the last", "prenorm.py", within="def _layer_norm_linear_fwd_kernel(",
        text="rows = tl.minimum(out_rows, row_end - 1)", instead="rows = out_rows",
        why="loads past the end of x: a fault on a GPU, some day",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "last group of tiles", "prenorm.py", within="def tile_of_program(",
        text="rows = min(blocks_m - first, GROUP)", instead="rows = GROUP",
        why="right until the rows of tiles are no multiple of 8 and the columns more than one",
        killed_by="test_attacks.py::test_tiles_of_an_incomplete_group",
    ),
    Bug(
        "tanh's constant mistyped", "gelu.py", within="def gelu(",
        text="z + 0.044715", instead="z + 0.04715",
        why="off by 0.1%",
        killed_by="test_layer_norm_linear.py::test_activations_over_their_range",
    ),
    Bug(
        "a digit of GELU's polynomial mistyped", "gelu.py", within="def gelu(",
        text="p = p * a - 1.1494374", instead="p = p * a - 1.1484374",
        why="a quarter of the steps of fp16 off, which no test of a whole layer sees",
        killed_by="test_gelu.py::test_error",
    ),
    Bug(
        "GELU's derivative of positive numbers", "gelu.py", within="def gelu_derivative(",
        text="return tl.where(z > 0.0, 1.0 - r, r)", instead="return r",
        why="right for half of all numbers",
        killed_by="test_gelu.py::test_error",
    ),
    Bug(
        "GELU's derivative without its second term", "gelu.py", within="def gelu_derivative(",
        text=" + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)", instead="",
        why="near enough to train with, and wrong",
        killed_by="test_layer_norm_linear.py::test_activations_over_their_range",
    ),
    Bug(
        "gamma forgotten in dx", "prenorm_backward.py", within="def layer_norm_linear_backward(",
        text="dz, folded, x, mean, rstd", instead="dz, weight, x, mean, rstd",
        why="right where norm_weight is 1, as it is in a fresh model",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "dx: mean of the gradient not taken off", "prenorm_backward.py", within="def _layer_norm_linear_dx_kernel(",
        text="acc - (tl.load(s1_ptr + start_m + rows) / K)[:, None] - x", instead="acc - x",
        why="a row's mean would get a gradient that LayerNorm does not let through",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "dx: spread of the gradient not taken off", "prenorm_backward.py", within="def _layer_norm_linear_dx_kernel(",
        text="/ K)[:, None] - x)", instead="/ K)[:, None])",
        why="a row's spread would get a gradient that LayerNorm does not let through",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "dx: not divided by the spread", "prenorm_backward.py", within="def _layer_norm_linear_dx_kernel(",
        text="dx = rstd[:, None] * (acc", instead="dx = (acc",
        why="right for rows whose variance is 1, as those of randn nearly are",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "s2 with the bias in it", "prenorm_backward.py", within="def _bwd_rows_kernel(",
        text="s2 += tl.sum(dz * (z - d[None, :]), 1)", instead="s2 += tl.sum(dz * z, 1)",
        why="right where norm_bias and bias are 0, as they are in a fresh model",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "mean not taken off in dgamma and dW", "prenorm_backward.py", within="def _dw_step(",
        text="(x.to(mean.dtype) - mean[:, None]) * rstd[:, None]", instead="x.to(mean.dtype) * rstd[:, None]",
        why="right for rows whose mean is 0",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "beta forgotten in dW", "prenorm_backward.py", within="def _dw_finish(",
        text="dw = g * gamma[None, :] + db[:, None] * beta[None, :]", instead="dw = g * gamma[None, :]",
        why="right where norm_bias is 0, as it is in a fresh model",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "splits not summed", "prenorm_backward.py", within="def _sum_splits_kernel(",
        text="for _ in range(0, splits):", instead="for _ in range(0, 1):",
        why="dW of the first rows only, and only for batches large enough to be split",
        killed_by="test_layer_norm_linear.py::test_sums_over_many_rows",
    ),
    Bug(
        "partial sums of db dropped", "prenorm_backward.py", within="def layer_norm_linear_backward(",
        text="db = db.sum(0)", instead="db = db[0].clone()",
        why="db of the first rows only",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "partial sums of dgamma dropped", "prenorm_backward.py", within="def layer_norm_linear_backward(",
        text="dgamma.sum(0)", instead="dgamma[0].clone()",
        why="dgamma of the first outputs only",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "last features out of dx", "prenorm_backward.py", within="def _layer_norm_linear_dx_kernel(",
        text="if TAIL_N > 0:", instead="if False:",
        why="outputs left over of whole tiles would have no gradient",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
)  # fmt: skip
