"""Bugs to plant in the kernels, one at a time, and the test that must then fail. test_planted_bugs.py plants them.

Each is a mistake that somebody could make tomorrow, and many of them have been made in libraries like this one. `text`
stands exactly once in the file, in the function that `within` names if it is given (a piece of text that begins it).
"""

from dataclasses import dataclass

__all__ = ["BUGS", "Bug", "Stale"]


class Stale(AssertionError):
    """The table no longer fits the source."""


@dataclass(frozen=True)
class Bug:
    """`text` of kernels/`file` becomes `instead`; `why` it matters; `killed_by` the tests, as pytest takes them."""

    name: str
    file: str
    text: str
    instead: str
    why: str
    killed_by: str
    within: str = ""
    quick: bool = False  # planted in every run of the tests, not with `-m slow` only

    def plant(self, source):
        """The source with the bug; raises Stale where `text` does not stand there exactly once."""
        start, end = 0, len(source)
        if self.within:
            if source.count(self.within) != 1:
                raise Stale(f"{self.name}: kernels/{self.file} has {self.within!r} {source.count(self.within)} times")
            start = source.index(self.within)
            end = source.find("\n\n\n", start) % (len(source) + 1)
        found = source.count(self.text, start, end)
        if found != 1:
            raise Stale(
                f"{self.name}: {self.text!r} stands {found} times in {self.within or 'kernels/' + self.file}; it must "
                "stand there once: change tests/planted_bugs.py as the code changed"
            )
        at = source.index(self.text, start, end)
        return source[:at] + self.instead + source[at + len(self.text) :]


FORWARD = (
    Bug(
        "keys: mask dropped", "attention.py", within="def _fwd_tile(",
        text="if MASK:\n        s +=", instead="if MASK:\n        unused = s +",
        why="keys that are not there get a weight of exp(0)",
        killed_by="test_attention.py::test_more_or_fewer_keys_than_queries", quick=True,
    ),
    Bug(
        "keys: mask off by one", "attention_tiles.py", within="def _key_mask(",
        text="tl.arange(0, KEYS) < key_end", instead="tl.arange(0, KEYS) <= key_end",
        why="one key of zeros takes part where the tail is wider than the keys left over",
        killed_by="test_attention.py::test_more_or_fewer_keys_than_queries",
    ),
    Bug(
        "scale forgotten", "attention.py", within="def _fwd_tile(",
        text="p = _exp2(s, scale_log2e, new_max[:, None])", instead="p = _exp2(s, 1.0, new_max[:, None])",
        why="whole tiles of keys would get another softmax than the tail",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "keys taken for values", "attention_tiles.py", within="def _values(",
        text="v_ptr = k_ptr + V_OFFSET", instead="v_ptr = k_ptr",
        why="only where both are parts of one projection, as in every ViT",
        killed_by="test_attention.py::test_qkv_attention",
    ),
    Bug(
        "values looked for with the keys' strides", "attention.py", within="def keys_and_values(",
        text="one and k.stride() == v.stride() and", instead="one and",
        why="values that lie otherwise in the keys' tensor would be others",
        killed_by="test_attention.py::test_values_are_found_from_keys_only_in_rows_of_one_tensor",
    ),
    Bug(
        "output not rescaled", "attention.py", within="def _fwd_tile(",
        text="acc0, acc1 = _scale_parts(acc0, acc1, alpha, DV)", instead="acc0, acc1 = acc0, acc1",
        why="keys before a larger maximum keep too much weight",
        killed_by="test_attention.py::test_attention", quick=True,
    ),
    Bug(
        "second part of the output not rescaled", "attention_tiles.py", within="def _scale_parts(",
        text="    elif D1 > 0:\n        x1 = x1 * factor[:, None]\n", instead="",
        why="only head dims of two parts, such as 72 and 80, would be wrong, and only in their last columns",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "third part of the output not rescaled", "attention_tiles.py", within="def _scale_parts(",
        text="x1[1] * factor[:, None])", instead="x1[1])",
        why="only the last columns of head dims 81 to 88 would be wrong",
        killed_by="test_attention.py::test_values_in_three_parts",
    ),
    Bug(
        "third part of the output elsewhere", "attention_tiles.py", within="def _store_parts(",
        text="cols = D0 + 16 + tl.arange(0, 8)", instead="cols = D0 + 8 + tl.arange(0, 8)",
        why="the last columns would keep what was in memory",
        killed_by="test_attention.py::test_values_in_three_parts",
    ),
    Bug(
        "sum not rescaled", "attention.py", within="def _fwd_tile(",
        text="row_sum = row_sum * alpha[:, None] + p_sum", instead="row_sum = row_sum + p_sum",
        why="the weights of a query no longer add up to 1",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "maximum of this tile alone", "attention.py", within="def _fwd_tile(",
        text="new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2e)",
        instead="new_max = tl.max(s, 1) * scale_log2e",
        why="right until a later tile is so much lower that exp2 of the difference overflows",
        killed_by="test_attacks.py::test_later_keys_far_lower",
    ),
    Bug(
        "a maximum that starts too high", "attention_tiles.py",
        text="LOWEST = tl.constexpr(-3.4e38)", instead="LOWEST = tl.constexpr(-1e4)",
        why="rows whose logits are all below the sentinel underflow to zeros, as they did elsewhere",
        killed_by="test_numerics.py::test_all_logits_far_from_zero",
    ),
    Bug(
        "the first row beside a tile left out", "attention.py", within="def _fwd_queries(",
        text="side = M + tl.arange(0, SIDE_M)", instead="side = M + 1 + tl.arange(0, SIDE_M)",
        why="one query of every head, at N = 257 the last, would keep what was in memory",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "rows beside a tile miss whole tiles of keys", "attention.py", within="def _fwd_queries(",
        text="            if SIDE_M > 0:\n", instead="            if False:\n",
        why="the last queries would see the last few keys only",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "too few programs", "configs.py", within="def query_tiles(",
        text="return chosen, whole + (left > 0), last, 0", instead="return chosen, max(whole, 1), last, 0",
        why="the queries left over whole tiles would keep what was in memory",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "negative scale", "attention_tiles.py", within="def _load_queries(",
        text="if NEGATE:", instead="if False:",
        why="attention with a negative scale would be that of its absolute value",
        killed_by="test_attention.py::test_scale",
    ),
    Bug(
        "second part of the head dim not multiplied", "attention_tiles.py", within="def _dot_trans(",
        text="c = tl.dot(a1, b1, c, out_dtype=ACC, input_precision=PRECISION)", instead="c = c",
        why="logits of head dims 72, 80, 88, 96 would miss their last columns",
        killed_by="test_attention.py::test_attention", quick=True,
    ),
    Bug(
        "log-sum-exp in two bases", "attention_tiles.py", within="def _fwd_finish(",
        text="row_max + tl.log2(row_sum * LSE_UNIT)", instead="row_max + tl.log(row_sum * LSE_UNIT)",
        why="the output is right and every gradient is wrong",
        killed_by="test_attention.py::test_attention", quick=True,
    ),
    Bug(
        "double store", "attention_tiles.py", within="def _fwd_finish(",
        text="mask=rows < row_end)", instead="mask=rows <= row_end)",
        why="the last row of a head is stored by two programs: a race, and the end of the buffer is overrun",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "output stored beyond its last row", "attention_tiles.py", within="def _fwd_finish(",
        text="stride_on, stride_od, MASK, D, D0", instead="stride_on, stride_od, False, D, D0",
        why="the queries that fill up a tail would overwrite the next image",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "all keys at once: mask dropped", "attention_short.py", within="def _short_tile(",
        text=" + _key_mask(KEYS_C, key_end, ACC)[None, :]", instead="",
        why="keys that are not there get a weight of exp(0)",
        killed_by="test_attention.py::test_all_keys_at_once", quick=True,
    ),
    Bug(
        "all keys at once: mask of the last queries dropped", "attention_short.py", within="def _short_rest(",
        text=" + _key_mask(KEYS_C, key_end, ACC)[:, None]", instead="",
        why="right but for up to 8 queries, at N = 257 the last",
        killed_by="test_attention.py::test_all_keys_at_once",
    ),
    Bug(
        "all keys at once: maximum of the first keys", "attention_short.py", within="def _short_tile(",
        text="        row_max = tl.maximum(row_max, tl.max(_columns(b, 8), 1))\n", instead="",
        why="right until a later key's score is so much higher that exp2 of the difference overflows",
        killed_by="test_attention.py::test_all_keys_at_once",
    ),
    Bug(
        "all keys at once: sum of the last keys forgotten", "attention_short.py", within="def _short_rest(",
        text="        row_sum += tl.sum(p, 0)\n        acc0, acc1 = _add_dot_trans(acc0, acc1, p, vc0",
        instead="        acc0, acc1 = _add_dot_trans(acc0, acc1, p, vc0",
        why="the weights of a query no longer add up to 1",
        killed_by="test_attention.py::test_all_keys_at_once",
    ),
    Bug(
        "all keys at once: the last keys' weights in turns with zeros", "attention_short.py", within="def _short_tile(",
        text="tl.permute(p, (0, 2, 1))", instead="p",
        why="right for up to one key more than whole tiles",
        killed_by="test_attention.py::test_all_keys_at_once",
    ),
    Bug(
        "all keys at once: the first keys twice", "attention_short.py", within="def _fwd_short(",
        text="kb0, kb1 = _short_load(k_ptr, stride_kn, stride_kd, NK, KEYS_A, KEYS_B,",
        instead="kb0, kb1 = _short_load(k_ptr, stride_kn, stride_kd, NK, 0, KEYS_B,",
        why="right for 64, 128 and 256 keys and a few more",
        killed_by="test_attention.py::test_all_keys_at_once",
    ),
    Bug(
        "all keys at once: the last queries left out", "attention_short.py", within="def _fwd_short(",
        text="if NQ <= TILES * M + LAST_M:", instead="if NQ <= 0:",
        why="they would keep what was in memory",
        killed_by="test_attention.py::test_all_keys_at_once",
    ),
    Bug(
        "all keys at once: too few programs", "configs.py", within="def short_tiles(",
        text="cdiv(whole + (left > 0), 2)", instead="max(1, whole // 2)",
        why="right where whole tiles of queries come in pairs",
        killed_by="test_attention.py::test_all_keys_at_once",
    ),
    Bug(
        "strides of two dims swapped", "attention.py", within="def _attention_fwd_kernel(",
        text="row_offset(row_start, stride_on, ALIGN)", instead="row_offset(row_start, stride_oh, ALIGN)",
        why="right for the first tile of queries, so for every short sequence",
        killed_by="test_attacks.py::test_several_images_heads_and_tiles",
    ),
    Bug(
        "strides of batch and head swapped", "attention_tiles.py", within="def _head_offset(",
        text="b * stride_b + h * stride_h", instead="b * stride_h + h * stride_b",
        why="right for one image, and for as many images as heads it only mixes them up",
        killed_by="test_attention.py::test_qkv_attention", quick=True,
    ),
    Bug(
        "padding of the head dim not masked", "attention_tiles.py", within="def _load_parts(",
        text="stride_n, stride_d, MASK, D < D0, ALIGN", instead="stride_n, stride_d, MASK, False, ALIGN",
        why="the next head's columns, or memory beyond the end, would enter every logit",
        killed_by="test_attention.py::test_attention",
    ),
)  # fmt: skip


BACKWARD = (
    Bug(
        "dq: scale forgotten", "attention_backward.py", within="def _attention_bwd_dq_kernel(",
        text="dq_ptr, dq0 * scale, dq1 * scale", instead="dq_ptr, dq0, dq1",
        why="dq is off by a factor that no loss curve shows at once",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "dk: scale forgotten", "attention_backward.py", within="def _attention_bwd_dkdv_kernel(",
        text="dk_ptr, dk0 * scale, dk1 * scale", instead="dk_ptr, dk0, dk1",
        why="dk is off by a factor that no loss curve shows at once",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "dq: delta forgotten", "attention_backward.py", within="def _bwd_dq_keys(",
        text="ds = p * (dp - delta[:, None])", instead="ds = p * dp",
        why="the softmax's weights would no longer move against each other",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "delta of half the head dim", "attention_backward.py", within="def _attention_bwd_dq_kernel(",
        text="delta += tl.sum(do1.to(ACC) * out1.to(ACC), 1)", instead="delta += 0.0",
        why="only head dims of two parts, such as 72 and 80, would be wrong",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "dq: keys that are not there", "attention_backward.py", within="def _bwd_dq_keys(",
        text="p = tl.where(keys[None, :] < key_end, p, 0.0)", instead="p = p",
        why="their p is exp2(-lse), which is inf where all logits are low, and inf times 0 is NaN",
        killed_by="test_attacks.py::test_gradients_of_logits_far_from_zero",
    ),
    Bug(
        "dk, dv: last queries left out", "attention_backward.py", within="def _attention_bwd_dkdv_kernel(",
        text="if TAIL_M > 0:", instead="if False:",
        why="dk and dv would miss what the last, partly filled tile of queries adds",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "dv: p of all queries of a row", "attention_backward_head.py", within="def _bwd_tile(",
        text="scale_log2e, lse[None, :])", instead="scale_log2e, tl.max(lse, 0))",
        why="each query has its own sum",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "dk: delta not divided by the sum of p", "attention_backward.py", within="def _bwd_dkdv_queries(",
        text="        delta *= share\n", instead="",
        why="in fp32 p is divided by its own sum, and so must be all that stands beside it",
        killed_by="test_attention.py::test_scale",
    ),
    Bug(
        "lse not advanced", "attention_backward.py", within="def _attention_bwd_dkdv_kernel(",
        text="        lse_ptr += BLOCK_M\n", instead="        lse_ptr += 0\n",
        why="every tile of queries would use the sums of the first",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "one key too many", "attention_backward.py", within="def _attention_bwd_dkdv_kernel(",
        text="key_end = NK - key_start", instead="key_end = NK - key_start + 1",
        why="dk and dv are stored past the last key: into the next image",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "keys that no program takes", "attention_backward.py", within="def attention_backward(",
        text="(b, cdiv(nk, tiles.BLOCK_N), h)", instead="(b, max(1, nk // tiles.BLOCK_N), h)",
        why="dk and dv of the last keys stay what memory held",
        killed_by="test_attention.py::test_attention",
    ),
)  # fmt: skip

BACKWARD_OF_A_HEAD = (
    Bug(
        "sums of the last keys only", "attention_backward_head.py", within="def _add_to_sums(",
        text="tl.load(ptrs) + _to_sums(x, ROWS, COLS)", instead="_to_sums(x, ROWS, COLS)",
        why="right for sequences of up to 64 tokens",
        killed_by="test_attention.py::test_one_and_two_backward_kernels", quick=True,
    ),
    Bug(
        "sums read in another order", "attention_backward_head.py", within="def _from_sums(",
        text="(2, 1, 3, 0, 5, 4, 6)", instead="(2, 1, 3, 0, 4, 5, 6)",
        why="dq has the right values at the wrong places",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "second part's sums looked for behind the tail", "attention_backward_head.py", within="def _bwd_finish(",
        text="(2 + D0) * BLOCK_M, ROWS, D1", instead="2 * BLOCK_M + D0 * ROWS, ROWS, D1",
        why="right for whole tiles of queries, and for head dims of one part",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "one head's scratch for all images", "attention_backward_head.py", within="def _attention_bwd_kernel(",
        text="record_ptr += (b * H + h) *", instead="record_ptr += h *",
        why="right for one image: a race for more",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "one record for all queries", "attention_backward_head.py", within="def _bwd_keys(",
        text="record_ptr += BLOCK_M * (2 + D0 + D1)", instead="record_ptr += 0",
        why="lse and delta of the first 64 queries for all, and one sum of all dq",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "dq of the last queries left out", "attention_backward_head.py", within="def _attention_bwd_kernel(",
        text="if TAIL_M > 0:", instead="if False:",
        why="it would be what memory held",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "last queries left out", "attention_backward_head.py", within="def _bwd_keys(",
        text="if TAIL_M > 0:", instead="if False:",
        why="dk and dv would miss what the last, partly filled tile of queries adds",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "last keys left out", "attention_backward_head.py", within="def _attention_bwd_kernel(",
        text="if TAIL_N > 0:", instead="if False:",
        why="their dk and dv would be what memory held, and dq would miss them",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "keys that are not there", "attention_backward_head.py", within="def _bwd_tile(",
        text="p = tl.where(tl.arange(0, k0.shape[0])[:, None] < key_end, p, 0.0)", instead="p = p",
        why="their p is exp2(-lse), which is inf where all logits are low, and inf times 0 is NaN",
        killed_by="test_attacks.py::test_gradients_of_logits_far_from_zero",
    ),
    Bug(
        "dq of a head: scale forgotten", "attention_backward_head.py", within="def _bwd_finish(",
        text="BLOCK_M, ROWS, D0)), ROWS, D0) * scale", instead="BLOCK_M, ROWS, D0)), ROWS, D0)",
        why="dq is off by a factor that no loss curve shows at once",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "delta of the first part", "attention_backward_head.py", within="def _bwd_start(",
        text="delta += tl.sum(do1.to(ACC) * out1.to(ACC), 1)", instead="delta += 0.0",
        why="only head dims of two parts, such as 40, would be wrong",
        killed_by="test_attention.py::test_one_and_two_backward_kernels",
    ),
    Bug(
        "one kernel for few heads", "configs.py", within="def one_backward_kernel(",
        text="7 * heads >= 5 * places * cdiv(heads, places)", instead="heads > 0",
        why="one image would run on 12 of 132 multiprocessors",
        killed_by="test_attention.py::test_which_backward_kernels",
    ),
)  # fmt: skip

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

SHARED = (
    Bug(
        "`other` dropped", "tiles.py", within="def load_tile(",
        text="mask=(rows[:, None] < row_end) & (cols[None, :] < col_end), other=0.0)",
        instead="mask=(rows[:, None] < row_end) & (cols[None, :] < col_end))",
        why="masked lanes hold 0 in the interpreter and anything on a GPU",
        killed_by="test_layer_norm_linear.py::test_grid", quick=True,
    ),
    Bug(
        "`other` of padded columns dropped", "tiles.py", within="def load_tile(",
        text="mask=cols[None, :] < col_end, other=0.0)", instead="mask=cols[None, :] < col_end)",
        why="masked lanes hold 0 in the interpreter and anything on a GPU",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "rows stored beyond the last", "tiles.py", within="def store_tile(",
        text="tl.store(ptrs, x, mask=(rows[:, None] < row_end) & (cols[None, :] < col_end))",
        instead="tl.store(ptrs, x, mask=cols[None, :] < col_end)",
        why="what lies behind a tensor would be overwritten",
        killed_by="test_layer_norm_linear.py::test_grid",
    ),
    Bug(
        "rows and columns swapped", "tiles.py", within="def _offsets(",
        text="cols[None, :].to(OFFSET) * stride_col", instead="cols[None, :].to(OFFSET)",
        why="right where the last stride is 1",
        killed_by="test_attention.py::test_layouts test_layer_norm_linear.py::test_layouts",
    ),
    Bug(
        "32-bit offset of a tile", "tiles.py", within="def row_offset(",
        text="tl.cast(row, tl.int64) * stride_row", instead="row * stride_row",
        why="right until a tensor has 2³¹ elements",
        killed_by="test_attacks.py::test_offsets_beyond_2_to_31",
    ),
    Bug(
        "32-bit offsets within a tile", "launch.py", within="def layout(",
        text="triton.language.int64 if wide else triton.language.int32", instead="triton.language.int32",
        why="right until one tile spans 2³¹ elements",
        killed_by="test_attacks.py::test_offsets_beyond_2_to_31",
    ),
    Bug(
        "an alignment that is not there", "launch.py", within="def alignment(",
        text="align = math.gcd(align, stride)", instead="align = max(align, 1)",
        why="the compiler would load 16 bytes at odd addresses: a fault on a GPU",
        killed_by="test_attention.py::test_layouts test_layer_norm_linear.py::test_layouts",
    ),
    Bug(
        "a width that is not aligned", "launch.py", within="def layout(",
        text="math.gcd(alignment(*tensors), *widths)", instead="alignment(*tensors)",
        why="features beyond the last multiple of 8 would be left out where rows lie apart",
        killed_by="test_layer_norm_linear_cost.py::test_widths_beside_the_alignment",
    ),
    Bug(
        "a tail too narrow", "launch.py", within="def tail(",
        text="max(16, next_power_of_2(left))", instead="max(16, next_power_of_2(left) // 2)",
        why="tokens that no tile takes",
        killed_by="test_attention.py::test_attention",
    ),
    Bug(
        "statistics in half precision", "launch.py", within="def accumulator(",
        text="torch.promote_types(dtype, torch.float32)", instead="dtype",
        why="a log-sum-exp of 10 would be kept in steps of 1/128: every p made from it again is off by up to 0.3%",
        killed_by="test_attention.py::test_memory_kept_for_backward",
    ),
    Bug(
        "heads before q, k, v", "ops.py", within="def _split(",
        text="qkv.view(b, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)",
        instead="qkv.view(b, n, heads, 3, width // (3 * heads)).permute(3, 0, 2, 1, 4)",
        why="as other libraries pack it: checkpoints of a ViT would load and mean something else",
        killed_by="test_attention.py::test_qkv_attention",
    ),
    Bug(
        "scale forgotten between the passes", "ops.py", within="def _qkv_attention_grad(",
        text="ctx.scale", instead="1.0",
        why="the output is right and every gradient is wrong",
        killed_by="test_attention.py::test_qkv_attention",
    ),
    Bug(
        "wrong default of scale", "functions.py", within="def _check_scale(",
        text="head_dim**-0.5", instead="head_dim**-1.0",
        why="attention that is too soft",
        killed_by="test_attention.py::test_attention",
    ),
)  # fmt: skip

BUGS = FORWARD + BACKWARD + BACKWARD_OF_A_HEAD + LAYER_NORM_LINEAR + SHARED
