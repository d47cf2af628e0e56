"""Gates on machine code: every kernel, compiled for every chip as its launcher would launch it, must pass.

The compiler runs in processes of its own, without the TRITON_INTERPRET=1 of the other tests. By default a part of the
table is compiled, two to three minutes of one core the first time; `-m slow` compiles all of it. Nothing here is
timed: machine code is the same in every run. Figures that are kept (aot_exceptions.json, budget.json) hold for the
version of Triton that they name.
"""

import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
from vitriton.kernels import budget
from vitriton.kernels.aot import Record
from vitriton.kernels.counts import Loop

pytest.importorskip("triton", reason="the compiler is Triton's")

HERE = Path(__file__).parent
TRITON = metadata.version("triton")
EXCEPTIONS = json.loads((HERE / "aot_exceptions.json").read_text())
ATTENTION = ("attention_fwd", "attention_bwd", "attention_bwd_dq", "attention_bwd_dkdv")
PRODUCTS = (*ATTENTION, "layer_norm_linear_fwd", "layer_norm_linear_dx", "layer_norm_linear_dw")

# Arguments of `survey.table`: what is compiled by default, and with `-m slow`
PART = [
    {"archs": ["sm_90"], "dtypes": ["bf16"], "head_dims": [64, 72]},
    {"archs": ["sm_80", "sm_100", "gfx942"], "dtypes": ["bf16"], "head_dims": [64]},
    {"archs": ["sm_80"], "dtypes": ["fp32"], "head_dims": [64]},
    {"archs": ["sm_90"], "dtypes": ["fp16"], "operations": ["layer_norm_linear"]},
]
WHOLE = [{}]
COMPILE = """
import json, sys
from vitriton.kernels.survey import survey, table
cases = [case for arguments in json.loads(sys.argv[1]) for case in table(**arguments)]
for result in survey(cases, jobs=2):
    failure = [f"{result.kernel} {result.case.arch}", f"{result.case}: {result.error}"]
    print(json.dumps(result.record.to_dict() if result.record else failure))
"""

Survey = namedtuple("Survey", "records failures")


def compiler(*arguments):
    """What Python prints in a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=[PART, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["part", "whole"])
def survey(request):
    """What was compiled: its records, and what does not compile."""
    found = [json.loads(line) for line in compiler("-c", COMPILE, json.dumps(request.param)).splitlines()]
    return Survey(
        [Record.from_dict(plain) for plain in found if isinstance(plain, dict)],
        [failure for failure in found if isinstance(failure, list)],
    )


def test_every_kernel_compiles(survey):
    known = {name for group in EXCEPTIONS["does not compile"].get(TRITON, []) for name in group["kernels"]}
    assert [failure for failure in survey.failures if failure[0] not in known] == []
    assert {record.kernel for record in survey.records} >= {*PRODUCTS, "layer_norm", "plain_product"}
    assert len({record.name for record in survey.records}) == len(survey.records)


def test_every_kernel_fits_into_its_chip(survey):
    assert [record.name for record in survey.records if record.shared_bytes > record.shared_limit] == []
    assert [record.name for record in survey.records if record.programs < 1] == []


def assert_only_known(survey, kind, violating, remedy):
    """Both ways: a kernel that violates must stand in the file with a reason, and one that no longer does must not."""
    if EXCEPTIONS["triton"] != TRITON:
        pytest.skip(f"tests/aot_exceptions.json holds for Triton {EXCEPTIONS['triton']}, this is {TRITON}")
    known = {name for group in EXCEPTIONS[kind] for name in group["kernels"]}
    compiled = {record.name for record in survey.records}
    violating = {record.name: why for record, why in violating}
    assert {name: why for name, why in violating.items() if name not in known} == {}, remedy
    assert known & compiled - violating.keys() == set(), (
        "these no longer do: take them out of tests/aot_exceptions.json"
    )


def test_nothing_spills_but_known_exceptions(survey):
    spilling = [
        (record, f"spill {record.spill_bytes} B, stack {record.stack_bytes} B")
        for record in survey.records
        if record.spill_bytes or record.stack_bytes
    ]
    assert_only_known(survey, "spills", spilling, "these spill: choose other tiles in kernels/configs.py")


TENSOR = {
    "sm_80": r"HMMA\.16816\.", "sm_86": r"HMMA\.16816\.", "sm_89": r"HMMA\.16816\.", "sm_120": r"HMMA\.16816\.",
    "sm_90": r"HGMMA\.", "sm_100": r"UTCHMMA", "gfx942": r"v_mfma_", "gfx1100": r"v_wmma_",
}  # fmt: skip


def test_half_precision_multiplies_with_the_chips_best_instruction(survey):
    """All products of the hot loop; but on sm_90, whose best takes no fewer than 64 rows, up to 16 beside a tile, and
    with Triton 3.6, which has it take no fewer than 16 columns, the 8 keys at the end."""
    narrow = (8,) if TRITON.startswith("3.6.") else ()
    wrong = []
    for record in survey.records:
        if record.kernel in PRODUCTS and record.dtype != "fp32":
            others = [name for name in record.hot.tensor if not re.match(TENSOR[record.arch], name)]
            beside = record.config.get("SIDE_M") or record.config.get("TAIL_N") in narrow
            known = beside and all(name.startswith("HMMA.16816.") for name in others)
            if len(others) == len(record.hot.tensor) or (others and not known):
                wrong.append((record.name, record.hot.tensor))
    assert wrong == []


def streamed(survey):
    """Kernels whose loops load aligned tiles of half precision in the background, and those loops."""
    for record in survey.records:
        if record.kernel in PRODUCTS and record.aligned and record.dtype != "fp32" and record.arch.startswith("sm_"):
            yield record, record.hot


def test_aligned_loads_are_asynchronous(survey):
    wrong = [
        (record.name, hot.loads)
        for record, hot in streamed(survey)
        if record.config["num_stages"] > 1 and not any(re.match("LDGSTS|UTMALDG", name) for name in hot.loads)
    ]
    assert wrong == []


# one number a row: lse and delta, mean and rstd
ROW_LOADS = ("LDG.E", "LDG.E.CONSTANT", "LDGSTS.E")


def test_aligned_loads_are_wide(survey):
    """At least 8 bytes a lane, which a part of 16 columns comes to; all 16 where there is but one part."""
    narrow = []
    for record, hot in streamed(survey):
        by_rows = record.kernel in ("attention_bwd", "attention_bwd_dkdv", "layer_norm_linear_dw")
        tiles = [name for name in hot.loads if not (by_rows and name in ROW_LOADS)]
        wanted = (
            r"\.128$|^UTMALDG" if record.kernel in ATTENTION and not record.config["D1"] else r"\.(64|128)$|^UTMALDG"
        )
        if not tiles or not all(re.search(wanted, name) for name in tiles):
            narrow.append((record, str(hot.loads)))
    assert_only_known(survey, "narrow loads", narrow, "these load too little at once: give a divisibility")


# what takes an address in a loop
ACCESS = re.compile(r"LDG|STG|LDGSTS|LD|ST|UTMALDG|(global|buffer|flat)_(load|store)\w*")


def surplus_of_64_bit_arithmetic(record):
    """64-bit integer instructions in the hot loop, beside those that make its addresses, one each (two where nothing
    is aligned and ptxas adds a second time), and sixteen that move pointers on."""
    if not record.hot:
        return 0
    addresses = sum(n for name, n in record.hot.opcodes.items() if ACCESS.fullmatch(name))
    return record.hot.address64 - addresses * (1 if record.aligned else 2) - 16


def test_64_bit_arithmetic_is_for_addresses_only(survey):
    """No tensor of the table has 2³¹ elements: offsets within a tile are int32, and no product in a loop is 64-bit."""
    wide = [record.name for record in survey.records if "64" in record.config.get("OFFSET", "int32")]
    assert wide == []
    if EXCEPTIONS["triton"] != TRITON:  # how many instructions move the pointers on is the version's
        pytest.skip(f"what moves pointers on is counted with Triton {EXCEPTIONS['triton']}, this is {TRITON}")
    surplus = {record.name: n for record in survey.records if (n := surplus_of_64_bit_arithmetic(record)) > 0}
    assert surplus == {}


def test_the_main_loop_is_that_of_a_plain_product(survey):
    """LayerNorm costs the loop nothing: at most 1.05 times the instructions of x Wᵀ in the same tiles. The other loop,
    for rows with a large mean, is the dearer one."""
    plain = {(r.arch, r.dtype): r for r in survey.records if r.kernel == "plain_product"}
    compared = 0
    for record in survey.records:
        if record.kernel == "layer_norm_linear_fwd" and record.arch in ("sm_80", "sm_90", "sm_100"):
            if record.dtype == "fp32" or "qkv" not in record.variants:
                continue
            product = plain[record.arch, record.dtype]
            tile = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
            assert [product.config[name] for name in tile] == [record.config[name] for name in tile]
            usual, rare = record.loops
            assert usual.instructions <= 1.05 * product.hot.instructions, record.name
            assert usual.macs == rare.macs and usual.instructions < rare.instructions
            compared += 1
    assert compared


EPILOGUE = {"qkv": 200, "gelu": 420, "gelu inference": 420, "gelu_tanh": 420}  # two of which store z too


def test_the_epilogue_is_short(survey):
    """Issue slots per 1024 outputs of a warp, from the main loop of LayerNorm + Linear to the end, on sm_90.

    GELU in half precision only: fp32 takes polynomials of more terms.
    """
    found = {}
    for record in survey.records:
        shape = record.variants[0]
        if (record.kernel, record.arch) == ("layer_norm_linear_fwd", "sm_90") and shape in EPILOGUE:
            if record.dtype == "fp32" and shape != "qkv":
                continue
            outputs = record.config["BLOCK_M"] * record.config["BLOCK_N"] / record.config["num_warps"]
            found[shape] = max(found.get(shape, 0), record.epilogue * 1024 / outputs)
    assert found.keys() >= {"qkv", "gelu"}  # all four with `-m slow`
    assert {shape: slots for shape, slots in found.items() if slots > EPILOGUE[shape]} == {}


def test_nothing_is_atomic(survey):
    assert [record.name for record in survey.records if record.atomics] == []


def test_executed_instructions_are_known_where_issue_binds(survey):
    """On sm_80 and sm_90 the ways through the forward kernel are followed, and its products add up."""
    unknown = [
        (record.name, record.executed)
        for record in survey.records
        if record.kernel == "attention_fwd"
        and record.arch in ("sm_80", "sm_90")
        and record.dtype != "fp32"
        and record.head_dim <= 128  # beyond, warps repeat products in the tails
        if not record.executed or any(found.per_pair is None for found in record.executed.values())
    ]
    assert unknown == []


def test_one_token_over_whole_tiles_costs_little(survey):
    """N = 257 executes at most 1.45 times what N = 256 does."""
    per_pair = {
        (record.arch, n): found.per_pair
        for record in survey.records
        for n, found in record.executed.items()
        if record.head_dim == 64 and record.dtype == "bf16" and record.aligned
    }
    for arch in ("sm_80", "sm_90"):
        assert per_pair[arch, "257"] * 257**2 <= 1.45 * per_pair[arch, "256"] * 256**2


SCRATCH = """
import re, sys
from vitriton.kernels import aot, survey
case = survey.Case("attention", sys.argv[1], "bf16", 64, True, (257,))
(one,) = (one for one, _ in survey.launches(case) if survey.kernel_name(one) == "attention_bwd")
compiled = aot.compile_kernel(
    one.kernel, dict(zip(one.kernel.arg_names, one.args)) | one.constexprs, arch=sys.argv[1],
    num_warps=one.num_warps, num_stages=one.num_stages,
)
print(compiled.asm["ttgir"])
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_sums_in_memory_are_seen_by_all_threads(arch):
    """The kernel that makes all gradients of a head loads what it has stored: behind a barrier, in the program's order,
    and each thread what it has stored itself."""
    order, layouts = "", set()
    for line in compiler("-c", SCRATCH, arch).splitlines():
        sums = re.search(r"(tt\.load|tt\.store|async_copy\w*) .*: tensor<\d+x128x!tt\.ptr<f32>, (#\w+)>", line)
        if sums:
            order += {"tt.load": "L", "tt.store": "S"}.get(sums[1], "?")
            layouts.add(sums[2])
        elif "ttg.barrier" in line or "gpu.barrier" in line:
            order += "B"
    # zeros; a tile of keys with tiles of queries, and with those left over; the keys left over; dq
    assert re.fullmatch("SB(LS)+B(LS)+BL+", order), order
    assert len(layouts) == 1


def test_attention_multiplies_no_more_than_its_tiles(survey):
    """No warp repeats another's products in the hot loop, but for known exceptions: `per_1024` would hide it."""
    known = {name for group in EXCEPTIONS["repeats"] for name in group["kernels"]}
    wasted = []
    for record in survey.records:
        products = {"attention_fwd": 2, "attention_bwd": 5, "attention_bwd_dq": 3, "attention_bwd_dkdv": 4}
        if record.kernel in products and record.arch.startswith("sm_") and record.dtype != "fp32":
            c = record.config
            rows = c["BLOCK_M"] + c.get("SIDE_M", 0)
            keys = c["BLOCK_N"] + (c["NEXT_N"] + c["TAIL_N"] + 8 * (c["TAIL_N"] == 8) if c.get("TILES") else 0)
            columns = products[record.kernel] * (c["D0"] + c["D1"]) - c["D1"] + c.get("DV", c["D1"])
            needed = rows * keys * columns / c["num_warps"]
            if record.hot.macs > needed and record.name not in known:
                wasted.append((record.name, record.hot.macs / needed))
    assert wasted == []


def test_no_kernel_becomes_dearer(survey):
    version, kept = budget.read(HERE / "budget.json")
    if version != TRITON:
        pytest.skip(f"tests/budget.json holds for Triton {version}, this is {TRITON}")
    dearer = {
        record.name: lines
        for record in survey.records
        if record.name in kept and (lines := budget.dearer(kept[record.name], budget.figures(record)))
    }
    assert any(record.name in kept for record in survey.records)
    assert dearer == {}, (
        "dearer by over 2%:\n"
        + "\n".join(f"{name}\n  " + "\n  ".join(lines) for name, lines in dearer.items())
        + "\nIf it is worth it: vitriton compile --accept tests/budget.json"
    )


@pytest.mark.parametrize(
    "opcodes, address64, aligned, surplus",
    [
        ({"LDGSTS": 8, "STG": 2, "FFMA": 99}, 26, True, 0),
        ({"LDGSTS": 8, "STG": 2, "FFMA": 99}, 30, True, 4),
        ({"LDG": 64}, 144, False, 0),
        ({"buffer_load_dwordx4": 4, "global_store_short": 4}, 25, True, 1),
    ],
)
def test_surplus_of_64_bit_arithmetic(opcodes, address64, aligned, surplus):
    rest = dict.fromkeys(Loop.__dataclass_fields__)
    hot = Loop(**rest | {"opcodes": opcodes, "address64": address64})
    record = Record(**dict.fromkeys(Record.__dataclass_fields__) | {"aligned": aligned, "loops": [hot]})
    assert surplus_of_64_bit_arithmetic(record) == surplus
