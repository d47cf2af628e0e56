"""Bugs to plant in what all kernels share: see planted_bugs.py."""

from planted_bugs import Bug

__all__ = ["SHARED"]

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
