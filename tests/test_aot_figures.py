"""The figures of compiled kernels, made from records written by hand: the budget, the targets, what a head executes."""

import pytest
from vitriton.kernels import budget
from vitriton.kernels.aot import Record
from vitriton.kernels.counts import Loop
from vitriton.kernels.executed import Executed, executed_per_pair
from vitriton.kernels.targets import WIDE, Form, forms, lines


def test_dearer_means_over_two_percent():
    kept = {"slots": 300, "bound": 512, "registers": 100, "per_pair": {"197": 0.5, "257": 0.4}}
    assert budget.dearer(kept, kept) == []
    assert budget.dearer(kept, kept | {"slots": 305, "registers": 255}) == []
    assert budget.dearer(kept, kept | {"slots": 307}) == ["slots: 300 kept, 307 now (+2.3%)"]
    assert budget.dearer(kept, kept | {"per_pair": {"197": 0.52, "257": 0.4}}) == [
        "per_pair at N = 197: 0.5 kept, 0.52 now (+4.0%)"
    ]
    assert budget.dearer(kept, {"slots": 1, "bound": 1}) == [
        "per_pair at N = 197: 0.5 kept, not known now", "per_pair at N = 257: 0.4 kept, not known now",
    ]  # fmt: skip


def test_targets_stand_beside_figures():
    """Lines for what is there; none for a kernel that is missing, that has no figure, or that is half of a pass."""

    def record(kernel, arch, variants, slots=0.0, **figures):
        rest = dict.fromkeys(Loop.__dataclass_fields__) | {"macs": 1, "per_1024": {"issue": slots, "tensor": 2 * slots}}
        labels = {"kernel": kernel, "arch": arch, "dtype": "bf16", "head_dim": 64, "aligned": True}
        plain = dict.fromkeys(Record.__dataclass_fields__) | labels
        return Record(**plain | {"variants": variants, "loops": [Loop(**rest)], "executed": {}} | figures)

    executed = {"256": Executed(0.4), "257": Executed(0.5), "197": Executed(None, "why")}
    records = [
        record("attention_fwd", "sm_90", [257, 256, 197], 250.0, executed=executed),
        record("attention_bwd_dq", "sm_90", [257], 200.0),
        record("attention_bwd_dkdv", "sm_90", [257], 300.0),
        record("attention_bwd_dq", "sm_80", [257], 200.0),
        record("attention_bwd", "sm_80", [257], 640.0),
        record("attention_bwd_dkdv", "sm_80", [257], 300.0),
        record(
            "layer_norm_linear_fwd", "sm_90", ["qkv"], head_dim=None, epilogue=350,
            config={"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8},
        ),
    ]  # fmt: skip
    found = {line.what: (line.now, line.met) for line in lines(records)}
    assert found == {
        "attention forward, sm_90: slots per 1024 pairs": (250.0, False),
        "attention forward, sm_90, N = 257: executed per pair": (0.5, False),
        "attention forward, sm_90: N = 257 beside 256": (pytest.approx(1.25 * (257 / 256) ** 2), False),
        "attention backward, sm_90: slots per 1024 pairs": (500.0, True),  # two kernels
        "attention backward, sm_80: slots per 1024 pairs": (640.0, True),  # one, where it is there
        "attention backward, sm_80: tensor cycles per 1024 pairs": (1280.0, True),
        "LayerNorm + Linear, sm_90, qkv: epilogue's slots per 1024 outputs": (175.0, True),
    }


def test_both_forms_of_layer_norm_and_linear_stand_beside_each_other():
    """Instructions of a warp over what its program makes: steps of the loop for all of K, and what stands around it."""
    rows, k, _ = WIDE

    def record(kernel, hot, arch="sm_90", **config):
        rest = dict.fromkeys(Record.__dataclass_fields__)
        loops = [Loop(**dict.fromkeys(Loop.__dataclass_fields__) | {"instructions": hot})] if hot else []
        labels = {"kernel": kernel, "arch": arch, "dtype": "bf16", "aligned": True, "variants": ["qkv", "wide"]}
        counts = {"prologue": 200, "epilogue": 100, "instructions": 999, "loops": loops, "config": config}
        return Record(**rest | labels | counts)

    product = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}  # 26 steps, 2048 outputs a warp
    records = [
        record("layer_norm_linear_fwd", 80.0, **product),
        record("plain_product", 90.0, **product),
        record("row_statistics", 500.0, BLOCK_M=4, BLOCK_K=1024, num_warps=4),  # 2 steps, a row a warp
        record("layer_norm", None, BLOCK_M=2, BLOCK_K=2048, num_warps=4),  # no loop, half a row a warp
        record("plain_product", 90.0, arch="sm_80", **product),
    ]
    assert forms(records) == [
        Form("sm_90: product, slots per 1024 outputs", (300 + 26 * 80) / 2, (300 + 26 * 90) / 2),
        Form("sm_90: pass over x, slots per 1024 elements", 1300 * 1024 / k, 999 * 1024 * 2 / k),
        Form(f"MB moved, {rows} rows", *(pytest.approx(mb, rel=1e-3) for mb in (76.065, 48.083))),
        Form(f"MB moved, {8 * rows} rows", *(pytest.approx(mb, rel=1e-3) for mb in (259.64, 268.37))),
    ]
    assert forms(records[:3] + records[4:]) == []


def loop(instructions, macs, around, around_macs):
    """A Loop of which only these are set."""
    rest = dict.fromkeys(Loop.__dataclass_fields__)
    return Loop(**rest | {"instructions": instructions, "macs": macs, "around": around, "around_macs": around_macs})


def forward(loops, block_m=128, last_m=16, side_m=0, block_n=64, tail_n=16):
    """A Record of an attention forward kernel of head dim 64 and 4 warps, of which only its loops are set."""
    rest = dict.fromkeys(Record.__dataclass_fields__)
    tiles = {"BLOCK_M": block_m, "LAST_M": last_m, "SIDE_M": side_m, "BLOCK_N": block_n, "TAIL_N": tail_n, "TILES": 0}
    config = tiles | {"D0": 64, "D1": 0, "DV": 0, "num_warps": 4}
    return Record(**rest | {"config": config, "loops": loops, "complete": True})


WHOLE, TAIL = 128 * 64 * 128 // 4, 128 * 16 * 128 // 4  # multiply-adds of a warp


def test_executed_instructions_are_summed_over_the_programs_of_a_head():
    record = forward([loop(600, WHOLE, (800, 850), TAIL), loop(170, WHOLE / 8, (500, 510), TAIL / 8)])
    two_whole = 2 * 4 * (850 + 4 * 600)
    narrow = 4 * (510 + 4 * 170)
    assert executed_per_pair(record, 257).per_pair == pytest.approx((two_whole + narrow) / 257**2, abs=1e-4)


def test_rows_beside_a_tile_are_counted_with_their_program():
    """257 queries: one whole tile, and one with a tile of 16 beside it; 197: a whole tile, and one of 64 + 16."""
    wider = loop(680, WHOLE * 9 / 8, (1000, 1010), TAIL * 9 / 8)
    record = forward([wider, loop(600, WHOLE, (800, 850), TAIL)], last_m=128, side_m=16)
    expected = 4 * (1010 + 4 * 680) + 4 * (850 + 4 * 600)
    assert executed_per_pair(record, 257).per_pair == pytest.approx(expected / 257**2, abs=1e-4)
    narrower = loop(400, WHOLE * 5 / 8, (700, 710), TAIL * 5 / 8)
    record = forward([loop(600, WHOLE, (800, 850), TAIL), narrower], last_m=64, side_m=16)
    expected = 4 * (850 + 3 * 600) + 4 * (710 + 3 * 400)
    assert executed_per_pair(record, 197).per_pair == pytest.approx(expected / 197**2, abs=1e-4)


def test_an_iteration_moved_out_of_the_loop_is_not_counted_twice():
    record = forward([loop(600, WHOLE, (1400, 1450), WHOLE)], last_m=0, tail_n=0)
    assert executed_per_pair(record, 256).per_pair == pytest.approx(2 * 4 * (1450 + 3 * 600) / 256**2, abs=1e-4)


ALL_KEYS, FEW = 64 * 272 * 128 // 4, 8 * 272 * 128 // 4  # of a tile of 64 queries with 272 keys, and of 8 queries


def all_keys_at_once(one, last_m=8):
    """257 tokens in one tile of 256 keys and one of 16; two tiles of queries a program."""
    record = forward([one], block_m=64, last_m=last_m, block_n=256)
    record.config |= {"TILES": 2, "NEXT_N": 0}
    return record


def test_tiles_of_queries_are_summed_over_the_programs_of_a_head():
    """257 queries: two programs of two tiles of 64, and the last has the one left over behind its loop."""
    rest = loop(800, ALL_KEYS, (300, 850), 1.1 * FEW)
    expected = 4 * (4 * 800 + 300 + 850) / 257**2
    assert executed_per_pair(all_keys_at_once(rest), 257).per_pair == pytest.approx(expected, abs=1e-4)
    masked = loop(800, ALL_KEYS, (300, 310), 0.0)  # 201: four tiles, the last of them with a mask
    expected = 4 * (4 * 800 + 2 * 310) / 201**2
    assert executed_per_pair(all_keys_at_once(masked, 64), 201).per_pair == pytest.approx(expected, abs=1e-4)
    few = loop(800, ALL_KEYS, (300, 850), FEW)
    assert executed_per_pair(all_keys_at_once(few), 5).per_pair == pytest.approx(4 * 850 / 25, abs=1e-4)


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (loop(800, 2 * ALL_KEYS, (300, 850), FEW), "2 times"),
        (loop(800, ALL_KEYS, (300, 850), 0.0), "0 multiply-adds around"),
        (loop(800, ALL_KEYS, (300, 850), ALL_KEYS), "multiply-adds around"),
        (loop(800, ALL_KEYS, None, None), "can be followed"),
    ],
)
def test_what_does_not_add_up_of_all_keys_at_once(one, why):
    executed = executed_per_pair(all_keys_at_once(one), 257)
    assert executed.per_pair is None
    assert why in executed.why


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([loop(600, WHOLE, (800, 850), 0), loop(600, WHOLE, (800, 850), 0)], "2 loops"),
        ([loop(600, 2 * WHOLE, (800, 850), 0)], "2 times"),
        ([loop(600, WHOLE, (800, 850), WHOLE * 1.5)], "1.5 tiles of keys"),
        ([loop(600, WHOLE, None, None)], "cannot be followed"),
    ],
)
def test_what_does_not_add_up_has_a_reason_and_no_figure(found, why):
    executed = executed_per_pair(forward(found, last_m=0, tail_n=0), 256)
    assert executed.per_pair is None
    assert why in executed.why
