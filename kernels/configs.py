"""Which tile sizes, warps and stages each kernel runs with: one table, with the reason for each row.

Counts and spills are those of kernels compiled ahead of time by aot.py; nothing here was measured on a GPU.
"""

from dataclasses import dataclass, replace

from .launch import BEFORE_3_7, Chip, cdiv, next_power_of_2, tail


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a kernel, warps and pipeline stages.

    Attention: BLOCK_M queries and BLOCK_N keys. LayerNorm + Linear: an output of (BLOCK_M, BLOCK_N), summed in steps of
    BLOCK_K. Kernels that walk along rows: BLOCK_M rows, BLOCK_N of each at a time.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    BLOCK_K: int = 0


@dataclass(frozen=True)
class Row:
    """One row of the table; the first that matches a launch holds."""

    kernel: str
    chips: str  # names of chips, or "any"
    dtypes: str  # "half" for fp16 and bf16, or "any"
    most: int  # attention: the largest head dim; otherwise 0
    tiles: Tiles
    why: str


_HOPPER = "sm_90 sm_100"
_MMA_SYNC = "sm_80 sm_86 sm_89 sm_120"
_GEFORCE = "sm_86 sm_89 sm_120"  # tensor cores bind by far there: smaller tiles cost nothing
_AMD = "gfx942 gfx1100"

TABLE = (
    Row("attention_fwd", "interpreter", "any", 256, Tiles(64, 64, 4, 1), "several tiles and tails even at N = 197"),
    Row("attention_fwd", "gfx1100", "half", 64, Tiles(128, 64, 8, 2), "4 warps spill"),
    Row("attention_fwd", "gfx1100", "half", 96, Tiles(64, 16, 4, 2), "32 keys spill; reads of shared memory bind"),
    Row("attention_fwd", "gfx1100", "half", 128, Tiles(64, 32, 4, 1), "a second stage spills"),
    Row("attention_fwd", "gfx1100", "half", 256, Tiles(32, 16, 4, 1), "what spills least"),
    Row("attention_fwd", "sm_120", "half", 128, Tiles(64, 64, 4, 2), "128 queries spill; tensor cores bind anyway"),
    Row("attention_fwd", "any", "half", 64, Tiles(128, 64, 4, 2), "32 rows a warp share each read of the keys"),
    Row("attention_fwd", _HOPPER, "half", 96, Tiles(128, 64, 4, 2), "the same, as q stays in shared memory there"),
    Row("attention_fwd", "sm_80", "half", 80, Tiles(128, 64, 4, 3), "the same; with 2 stages addresses spill"),
    Row("attention_fwd", "sm_80", "half", 88, Tiles(128, 64, 4, 3), "see `three_parts`; with 2 stages addresses spill"),
    Row("attention_fwd", _MMA_SYNC, "half", 96, Tiles(128, 32, 4, 2), "the same; 64 keys spill"),
    Row("attention_fwd", _GEFORCE, "half", 128, Tiles(64, 64, 4, 2), "128 queries spill"),
    Row("attention_fwd", "gfx942", "half", 128, Tiles(128, 32, 4, 2), "8 waves repeat products"),
    Row("attention_fwd", "any", "half", 128, Tiles(128, 64, 8, 2), "16 rows a warp, or the output spills"),
    Row("attention_fwd", _HOPPER, "half", 256, Tiles(128, 64, 8, 2), "208 of 227 KB of shared memory"),
    Row("attention_fwd", "gfx942", "half", 256, Tiles(64, 32, 4, 1), "what fits into 64 KB of shared memory"),
    Row("attention_fwd", "sm_86 sm_89", "half", 256, Tiles(128, 16, 8, 2), "with 1 stage an address spills"),
    Row("attention_fwd", _MMA_SYNC, "half", 256, Tiles(128, 16, 8, 1), "wider tiles of keys spill"),
    Row("attention_fwd", "any", "half", 256, Tiles(128, 32, 8, 1), "a second stage spills"),
    Row("attention_fwd", "gfx1100", "any", 32, Tiles(32, 32, 8, 1), "64 queries spill"),
    Row("attention_fwd", "gfx1100", "any", 128, Tiles(16, 16, 8, 1), "32 queries spill"),
    Row("attention_fwd", "sm_90", "any", 64, Tiles(64, 32, 8, 3), "with 2 stages an address spills"),
    Row("attention_fwd", "any", "any", 128, Tiles(64, 32, 8, 2), "operands of FMA products take many registers"),
    Row("attention_fwd", _AMD, "any", 256, Tiles(16, 16, 8, 1), "what fits into 64 KB of shared memory"),
    Row("attention_fwd", _GEFORCE, "any", 256, Tiles(32, 32, 8, 1), "what fits into 99 KB of shared memory"),
    Row("attention_fwd", "any", "any", 256, Tiles(32, 32, 8, 2), "the same"),
    Row("attention_fwd_short", "interpreter sm_90", "half", 32, Tiles(64, 256, 4, 2), "see `short_tiles`"),
    Row("attention_fwd_short", "interpreter sm_90", "half", 48, Tiles(64, 128, 4, 2), "256 keys spill, in two parts"),
    Row("attention_fwd_short", "interpreter sm_90", "half", 64, Tiles(64, 256, 4, 2), "see `short_tiles`"),
    Row("attention_fwd_short", "interpreter sm_90", "half", 96, Tiles(64, 128, 4, 2), "256 keys spill, in two parts"),
    Row("attention_fwd_unaligned", "gfx1100", "half", 128, Tiles(64, 16, 4, 2), "32 keys spill"),
    Row("attention_fwd_unaligned", _MMA_SYNC, "half", 64, Tiles(128, 32, 4, 2), "64 keys spill"),
    Row("attention_fwd_unaligned", _MMA_SYNC, "half", 128, Tiles(128, 32, 8, 2), "4 warps spill"),
    Row("attention_fwd_unaligned", _MMA_SYNC, "half", 256, Tiles(128, 16, 8, 2), "what spills least"),
    Row("attention_fwd_unaligned", "sm_90", "half", 32, Tiles(128, 64, 4, 2), "as aligned"),
    Row("attention_fwd_unaligned", "sm_90", "half", 128, Tiles(128, 64, 8, 2), "4 warps spill"),
    Row("attention_bwd", "interpreter", "half", 64, Tiles(64, 64, 4, 1), "as forward; beyond, two kernels"),
    Row("attention_bwd", "sm_80 sm_89 sm_90 sm_120", "half", 64, Tiles(64, 64, 4, 2), "see `one_backward_kernel`"),
    Row("attention_bwd_dq_unaligned", _MMA_SYNC, "half", 64, Tiles(128, 32, 8, 2), "64 keys spill"),
    Row("attention_bwd_dq_unaligned", _MMA_SYNC, "half", 96, Tiles(128, 32, 8, 2), "4 warps spill"),
    Row("attention_bwd_dq_unaligned", "sm_90", "half", 80, Tiles(128, 32, 8, 2), "4 warps spill"),
    Row("attention_bwd_dq_unaligned", "sm_100", "half", 96, Tiles(128, 64, 8, 2), "8 warps share them: half the slots"),
    Row("attention_bwd_dq_unaligned", "sm_100", "half", 256, Tiles(64, 32, 8, 2), "128 queries spill"),
    Row("attention_bwd_dq_unaligned", "sm_90", "half", 256, Tiles(64, 32, 4, 1), "what spills least, none repeating"),
    Row("attention_bwd_dq", "interpreter", "any", 256, Tiles(64, 64, 4, 1), "as forward"),
    Row("attention_bwd_dq", "gfx1100", "half", 80, Tiles(64, 16, 4, 2), "32 keys spill, from head dim 72 on more"),
    Row("attention_bwd_dq", "gfx1100", "half", 128, Tiles(64, 16, 4, 1), "what spills least"),
    Row("attention_bwd_dq", "gfx1100", "half", 256, Tiles(32, 16, 8, 1), "the same"),
    Row("attention_bwd_dq", "gfx942", "half", 64, Tiles(128, 32, 4, 2), "with 64 queries waves repeat products"),
    Row("attention_bwd_dq", "any", "half", 64, Tiles(64, 64, 4, 2), "128 rows on 8 warps count the same"),
    Row("attention_bwd_dq", "any", "half", 80, Tiles(64, 32, 4, 2), "64 keys spill on sm_80"),
    Row("attention_bwd_dq", "sm_120", "half", 96, Tiles(128, 32, 8, 2), "4 warps spill"),
    Row("attention_bwd_dq", "sm_100", "half", 128, Tiles(128, 32, 8, 2), "4 warps share less, and spill at 128"),
    Row("attention_bwd_dq", "any", "half", 128, Tiles(64, 32, 4, 2), "64 keys spill on sm_80"),
    Row("attention_bwd_dq", _HOPPER, "half", 256, Tiles(128, 32, 8, 1), "64 queries let warps repeat products"),
    Row("attention_bwd_dq", _MMA_SYNC, "half", 256, Tiles(16, 32, 4, 2), "what spills least"),
    Row("attention_bwd_dq", "any", "half", 256, Tiles(64, 16, 4, 1), "what fits into 64 KB of shared memory"),
    Row("attention_bwd_dq", "gfx1100", "any", 128, Tiles(16, 16, 8, 1), "what spills least; nothing to head dim 64"),
    Row("attention_bwd_dq", "gfx942", "any", 128, Tiles(32, 32, 4, 1), "8 warps spill"),
    Row("attention_bwd_dq", "gfx942", "any", 256, Tiles(16, 16, 4, 1), "the same"),
    Row("attention_bwd_dq", "any", "any", 128, Tiles(32, 32, 8, 1), "operands of FMA products take many registers"),
    Row("attention_bwd_dq", "gfx1100", "any", 256, Tiles(16, 16, 8, 1), "what fits into 64 KB of shared memory"),
    Row("attention_bwd_dq", _GEFORCE, "any", 256, Tiles(16, 32, 8, 1), "what fits into 99 KB of shared memory"),
    Row("attention_bwd_dq", "any", "any", 256, Tiles(32, 32, 8, 1), "as to 128"),
    Row("attention_bwd_dkdv_unaligned", "sm_120", "half", 64, Tiles(32, 128, 8, 1), "a second stage spills"),
    Row("attention_bwd_dkdv_unaligned", "sm_120", "half", 80, Tiles(16, 64, 4, 2), "32 queries spill"),
    Row("attention_bwd_dkdv_unaligned", "sm_100", "half", 80, Tiles(64, 128, 8, 1), "a second stage spills"),
    Row("attention_bwd_dkdv_unaligned", _MMA_SYNC, "half", 64, Tiles(32, 128, 8, 2), "an address for each element"),
    Row("attention_bwd_dkdv_unaligned", "sm_80", "half", 96, Tiles(16, 128, 8, 1), "what spills least"),
    Row("attention_bwd_dkdv_unaligned", "sm_90", "half", 64, Tiles(64, 128, 8, 2), "8 warps share them: fewer slots"),
    Row("attention_bwd_dkdv_unaligned", "sm_90", "half", 128, Tiles(32, 128, 8, 2), "4 warps spill"),
    Row("attention_bwd_dkdv", "sm_120", "half", 64, Tiles(32, 64, 4, 2), "64 queries spill; tensor cores bind anyway"),
    Row("attention_bwd_dkdv", "gfx1100", "half", 128, Tiles(16, 64, 4, 1), "what spills least, none repeating"),
    Row("attention_bwd_dkdv", "gfx1100", "half", 256, Tiles(16, 16, 8, 1), "what spills least"),
    Row("attention_bwd_dkdv", "interpreter", "any", 256, Tiles(64, 64, 4, 1), "as forward"),
    Row("attention_bwd_dkdv", "gfx942", "half", 64, Tiles(32, 128, 4, 1), "with 64 keys waves repeat products"),
    Row("attention_bwd_dkdv", "any", "half", 64, Tiles(64, 64, 4, 2), "the largest that does not spill"),
    Row("attention_bwd_dkdv", _HOPPER, "half", 80, Tiles(64, 64, 4, 2), "the same"),
    Row("attention_bwd_dkdv", _HOPPER, "half", 128, Tiles(32, 64, 4, 2), "the same"),
    Row("attention_bwd_dkdv", "sm_80 gfx942", "half", 80, Tiles(32, 64, 4, 2), "the same"),
    Row("attention_bwd_dkdv", "sm_120", "half", 96, Tiles(16, 64, 4, 1), "a second stage spills"),
    Row("attention_bwd_dkdv", "any", "half", 128, Tiles(16, 64, 4, 2), "32 queries spill"),
    Row("attention_bwd_dkdv", "sm_90", "half", 256, Tiles(32, 64, 8, 1), "what spills least in the loop"),
    Row("attention_bwd_dkdv", _MMA_SYNC, "half", 256, Tiles(16, 16, 4, 2), "what spills least"),
    Row("attention_bwd_dkdv", "any", "half", 256, Tiles(16, 64, 8, 1), "the same"),
    Row("attention_bwd_dkdv", "gfx1100", "any", 128, Tiles(16, 16, 8, 1), "what spills least; nothing to head dim 64"),
    Row("attention_bwd_dkdv", "gfx942", "any", 128, Tiles(16, 32, 4, 1), "the same"),
    Row("attention_bwd_dkdv", "gfx942", "any", 256, Tiles(16, 16, 4, 1), "8 warps spill"),
    Row("attention_bwd_dkdv", "sm_80", "any", 96, Tiles(32, 32, 4, 1), "8 warps spill"),
    Row("attention_bwd_dkdv", "any", "any", 64, Tiles(32, 32, 8, 1), "operands of FMA products take many registers"),
    Row("attention_bwd_dkdv", _GEFORCE, "any", 80, Tiles(32, 32, 4, 1), "8 warps spill"),
    Row("attention_bwd_dkdv", "any", "any", 96, Tiles(32, 32, 8, 1), "4 warps spill"),
    Row("attention_bwd_dkdv", "sm_90 sm_100 sm_120", "any", 128, Tiles(32, 32, 8, 2), "with 1 stage it spills"),
    Row("attention_bwd_dkdv", "any", "any", 128, Tiles(32, 32, 8, 1), "operands of FMA products take many registers"),
    Row("attention_bwd_dkdv", "gfx1100", "any", 256, Tiles(16, 16, 8, 1), "what fits into 64 KB of shared memory"),
    Row("attention_bwd_dkdv", _GEFORCE, "any", 256, Tiles(16, 16, 8, 1), "what fits into 99 KB of shared memory"),
    Row("attention_bwd_dkdv", "any", "any", 256, Tiles(32, 32, 8, 1), "operands of FMA products take many registers"),
    Row("prenorm", "interpreter", "any", 0, Tiles(128, 64, 4, 1, 128), "few, large steps of NumPy"),
    Row("prenorm", _HOPPER, "half", 0, Tiles(128, 128, 8, 3, 64), "a step of 64 halves the waits and the bookkeeping"),
    Row("prenorm", "gfx1100", "half", 0, Tiles(128, 64, 8, 2, 32), "128 columns spill in the weight gradient"),
    Row("prenorm", "gfx1100", "any", 0, Tiles(64, 64, 8, 2, 16), "4 warps spill"),
    Row("prenorm", "any", "half", 0, Tiles(128, 128, 8, 3, 32), "three stages of 64 leave room for one program only"),
    Row("prenorm", "any", "any", 0, Tiles(64, 64, 4, 2, 16), "fewer reads of shared memory; 8 warps spill"),
    Row("prenorm_unaligned", "interpreter", "any", 0, Tiles(128, 64, 4, 1, 128), "as prenorm"),
    Row("prenorm_unaligned", "any", "half", 0, Tiles(128, 64, 8, 2, 32), "loads of one element each: more spills"),
    Row("prenorm_unaligned", "any", "any", 0, Tiles(64, 64, 8, 2, 16), "as prenorm"),
)  # fmt: skip


def tiles(kernel, chip, dtype, head_dim=0):
    """What `vitriton tune` found best on this card; else the first row of the table for this launch."""
    if isinstance(chip, Chip) and (tuned := chip.winners.get((kernel, dtype, head_dim))):
        return tuned
    found = _find(kernel, chip, dtype, head_dim)
    if found is None:
        raise LookupError(f"no tiles for {kernel} on {chip} with {dtype} and head dim {head_dim}")
    return found


def _find(kernel, chip, dtype, head_dim):
    for row in TABLE:
        if (
            row.kernel == kernel
            and (row.chips == "any" or chip in row.chips.split())
            and (row.dtypes == "any" or dtype.itemsize == 2)
            and head_dim <= row.most
        ):
            return row.tiles
    return None


def splits(chip, weight):
    """Whether `vitriton tune` found that LayerNorm and a Linear of this weight are faster one by one on this card."""
    return (
        isinstance(chip, Chip) and bool(chip.winners) and ("split", weight.dtype, tuple(weight.shape)) in chip.winners
    )


def attention_tiles(kernel, chip, dtype, head_dim, align):
    """`tiles` of one of attention's kernels: those for unaligned tensors, where there is such a row."""
    unaligned = _find(kernel + "_unaligned", chip, dtype, head_dim) if align == 1 else None
    return unaligned or tiles(kernel, chip, dtype, head_dim)


def product_tiles(chip, dtype, align):
    """For LayerNorm + Linear's matrix products, of tensors whose `launch.layout` is aligned to `align` elements."""
    return tiles("prenorm" if align > 1 else "prenorm_unaligned", chip, dtype)


def row_tiles(width):
    """For kernels that walk along rows of `width`: about 4096 elements a program, and at most 32 rows."""
    block_n = min(next_power_of_2(width), 1024)
    return Tiles(min(32, 4096 // block_n), block_n, 4, 1)


def head_dim_parts(head_dim, most):
    """Powers of two, D0 + D1 >= head_dim, that pad it least: D0 is at least 16 (tl.dot's least), D1 too, or 0.

    D0 is at most `most` if two parts can do that: Triton lets warps share rows where a part is wider than its tile is
    high, which costs registers.
    """
    d0 = max(16, next_power_of_2(head_dim))
    half = d0 // 2
    if half < 16:
        return d0, 0
    d1 = max(16, next_power_of_2(head_dim - half))
    return (half, d1) if half + d1 < d0 or d0 > most else (d0, 0)


def query_tiles(chip, dtype, head_dim, n, align=8):
    """How the forward kernel cuts n queries, of tensors aligned to `align` elements -> (Tiles, programs a head, its
    LAST_M, its SIDE_M).

    What whole tiles leave over goes into one as narrow as 16. Where that wastes much, there are two other ways:
    - with mma.sync, tiles of half the height on half the warps, if they pad an eighth less;
    - on sm_90, whose HGMMA takes no fewer than 64 rows, up to 16 rows in a tile beside another of the same program,
      which has the keys at hand. The interpreter does it too, so that tests run it.
    """
    chosen = attention_tiles("attention_fwd", chip, dtype, head_dim, align)
    half = chosen.BLOCK_M // 2
    less = half >= 16 and head_dim <= 128 and 8 * _padded(n, half) <= 7 * _padded(n, 2 * half)  # beyond, it spills
    if less and chip in _MMA_SYNC.split() and dtype.itemsize == 2:
        chosen = replace(chosen, BLOCK_M=half, num_warps=chosen.num_warps // 2)
        if three_parts(chip, dtype, head_dim, align):  # 64 keys spill
            chosen = replace(chosen, BLOCK_N=32, num_stages=2)
        half //= 2
    whole, left = divmod(n, chosen.BLOCK_M)
    last = tail(n, chosen.BLOCK_M)
    beside = chip == "interpreter" or (chip == "sm_90" and dtype.itemsize == 2)
    if beside and half >= 16 and head_dim <= 64:  # beyond, it spills
        if whole and 0 < left <= 16:
            return chosen, whole, chosen.BLOCK_M, 16
        if half < left <= half + 16:
            return chosen, whole + 1, half, 16
    return chosen, whole + (left > 0), last, 0


def _padded(n, block):
    return n - n % block + tail(n, block)


def three_parts(chip, dtype, head_dim, align):
    """Whether the forward kernel takes v and out in 64 + 16 + 8 columns. On sm_80 that is 1/24 of its products less for
    head dims 81 to 88, where tensor cores bind, and 64 keys a tile do not spill. On sm_90 it spills; on sm_86 and sm_89
    the third stage that 64 keys take there leaves room for one program only. The interpreter does it for the tests."""
    return chip in ("interpreter", "sm_80") and dtype.itemsize == 2 and 80 < head_dim <= 88 and align > 1


def sums_of_a_row(chip):
    """How many sums the forward kernel keeps of each row of a tile: so many that each is of one thread's columns. On
    gfx1100 that would be 16; but they take 32 registers more, and only Triton before 3.7 has no layout for 8 there."""
    return 16 if chip == "gfx1100" and BEFORE_3_7 else 8


def short_tiles(chip, dtype, head_dim, nq, nk, align):
    """How the forward kernel cuts nq queries and nk keys where it takes all keys at once -> (Tiles, programs a head,
    its LAST_M, its SIDE_M, BLOCK_N, NEXT_N, TAIL_N and TILES by name). None where it walks over tiles of keys:

    - where there is no row: with mma.sync 64 queries would read shared memory twice as often as 128, and it binds;
    - below 64 keys, which are one tile anyway, and beyond 272: registers hold the scores of no more;
    - beyond 208 for head dims 33 to 48, which spill;
    - beyond 264 from head dim 81 on, whose keys would leave room for one program only. From 209 on they have room for
      two with one stage of queries: it waits for each tile of them, but the other program has work meanwhile.

    Keys are cut into two powers of two, BLOCK_N being the most, and a tail, as narrow as 8. A program makes two tiles
    of queries, so that it reads the keys as often as one with a tile of 128. Up to 8 queries left over cost less in a
    tile of their own than 64 do, if the head dim fills the 64 rows of HGMMA, whose columns they are.
    """
    chosen = _find("attention_fwd_short", chip, dtype, head_dim)
    most = 208 if 32 < head_dim <= 48 else 264 if head_dim > 80 else 272
    if chosen is None or align == 1 or not 64 <= nk <= most:
        return None
    chosen = tiles("attention_fwd_short", chip, dtype, head_dim)
    if head_dim > 80 and nk > 208:
        chosen = replace(chosen, num_stages=1)
    block_n = min(chosen.BLOCK_N, next_power_of_2(nk + 1) // 2)
    left = nk - block_n
    next_n = min(block_n, next_power_of_2(left + 1) // 2) if left >= 16 else 0
    left -= next_n
    tail_n = 8 if 0 < left <= 8 else tail(left, 256)
    cut = {"SIDE_M": 0, "BLOCK_N": block_n, "NEXT_N": next_n, "TAIL_N": tail_n, "TILES": 2}
    whole, left = divmod(nq, chosen.BLOCK_M)
    if 0 < left <= 8 and head_dim_parts(head_dim, 64)[0] == 64:
        return chosen, max(1, cdiv(whole, 2)), 8, cut
    return chosen, cdiv(whole + (left > 0), 2), chosen.BLOCK_M if left else 0, cut


def one_backward_kernel(chip, dtype, head_dim, align, heads, n):
    """Tiles of attention's backward kernel that makes all gradients of a head, for batch times `heads` of n tokens;
    None where the two kernels, with seven products of matrices instead of five, are better:

    - where there is no row: it spills (head dims beyond 64, unaligned tensors), fp32 would lose digits, the pipe that
      binds is far busier than in both together (sm_100: shared memory), or L2 is too small for its sums (sm_86: 6 MB);
    - beyond 320 tokens: the sums of two programs a multiprocessor, 22 MB on sm_90, would no longer stay in L2 beside
      the tensors, and each tile of keys reads and writes all of a head;
    - where heads fill less than 5/7 of the chip's rounds, at two programs a multiprocessor: what the two spare products
      cost, idle multiprocessors cost too. But one tile of queries and keys is one program in either form.
    """
    chosen = _find("attention_bwd", chip, dtype, head_dim)
    if chosen is None or align == 1 or n > 320:
        return None
    places = 2 * SM_COUNT.get(chip, 1)
    if n <= chosen.BLOCK_N or 7 * heads >= 5 * places * cdiv(heads, places):
        return tiles("attention_bwd", chip, dtype, head_dim)
    return None


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
