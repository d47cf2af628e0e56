"""Bugs to plant in the kernels of attention: see planted_bugs.py."""

from planted_bugs import Bug

__all__ = ["BACKWARD", "BACKWARD_OF_A_HEAD", "FORWARD"]

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
