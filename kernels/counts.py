"""Count a kernel's machine code: loops, tensor instructions, issue slots and pipe cycles.

Machine code is the same on every machine and in every run, so these figures carry no noise. They are counts and
predictions, never timings.

What the figures of a loop mean
- Counted is the body of a natural loop that holds multiply-adds of its own (of nested loops, the innermost), once
  through, as ONE warp (wave) executes it. A predicated-off instruction still takes its slot. Branches inside the body
  count as if always entered (`conditional` says how many instructions that concerns), with two exceptions: a block that
  issues tcgen05 or TMA operations is entered by one warp of the program, so it counts 1 / num_warps; a polling loop
  around an mbarrier counts one try where it is in the way and nothing where it is out of line.
- `macs` are the multiply-adds of this warp's share of the loop's tensor instructions, padding and work that warps
  repeat included; in a kernel without tensor instructions one FFMA is 32 (softmax's own FFMAs too: 1-2% too many).
- `per_1024` divides by macs / macs_per_pair / 1024, with macs_per_pair the multiply-adds per (query, key) pair of the
  tile as computed: 2 D in attention forward, 5 D in a one-kernel backward (D padded as the kernel pads it). With
  macs_per_pair=1 the figures are per 1024 multiply-adds, the unit for a GEMM.
- The cycles of a pipe are those that one sub-partition (SIMD) needs for one warp's instructions; pipes shared by the
  multiprocessor (shared memory, shuffles, TMA's consumers) are charged at this sub-partition's share. The largest is a
  lower bound of the loop's time, so the pipe that binds is the largest; occupancy and latency are not modelled.
- `around` follows every way from the kernel's entry through this loop to its end, other loops once through, and none of
  the other multiply-adding loops, which belong to other variants of the same kernel. None: no such way, or a jump into
  the middle of a loop.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from .sass import dominators, natural_loops, reachable

__all__ = ["Loop", "Program", "count", "lane_bytes"]


@dataclass
class Loop:
    """One loop's counts, per warp and iteration, and what binds it; see the module's docstring for the meaning."""

    header: int  # index of the block that is entered first
    instructions: float
    conditional: int
    opcodes: dict[str, float]
    tensor: dict[str, float]
    macs: int | None  # None: a tensor instruction's shape could not be read
    cycles: dict[str, float]
    per_1024: dict[str, float] | None  # None where macs is None or 0
    bound: str
    loads: dict[str, float]  # loads from global memory
    wide_fraction: (
        float | None
    )  # part of the bytes loaded that comes 16 bytes a lane or more, or by TMA; None: no loads
    address64: float  # 64-bit integer instructions
    atomics: dict[str, float]
    around: tuple[float, float] | None  # instructions of a warp that passes this loop, outside it: (fewest, most)
    around_macs: float | None  # multiply-adds on the longest of these ways


@dataclass
class Program:
    """The counts of a whole kernel. `loops`: the hottest first: innermost, most multiply-adds, of equals fewest
    instructions.

    `prologue` are the instructions outside every loop from which the hot loop can be reached, `epilogue` those outside
    every loop that the hot loop reaches and that reach no multiply-adding loop, `instructions` all that can be reached.
    """

    instructions: int
    prologue: int
    epilogue: int
    loops: list[Loop]
    tensor: dict[str, int]
    atomics: dict[str, int]
    address64: int
    spill_bytes: int  # stores to local memory (NVIDIA; 0 elsewhere), bytes a thread
    complete: bool  # False: an indirect jump hides part of the control flow


# The bitwise ATOMS.OR and ATOMS.AND are left out: tcgen05's allocator uses them, and their order changes no result.
_ATOMIC = re.compile(r"(ATOMG?|ATOMS(?!\.(OR|AND))|REDG?|UTMAREDG)(\.|$)|\w+_atomic|ds_(add|sub|min|max|cmpst)_")
_LOAD = re.compile(r"LDG|LDGSTS|LD|UTMALDG|UBLKCP|(global|buffer|flat)_load_\w+")
_ADDRESS64 = re.compile(
    r"(U?IMAD\.WIDE|U?I(ADD|MAD)\d?\.(64|X)|U?LEA\.(HI\.)?X|U?LEA\.HI\.X|U?SHF\.\w\.[US]64|U?MOV\.64|"
    r"v_(lshl_add_u64|mad_[iu]64|add_co_ci|addc_co|add_nc_u64|lshl\w+_b64)|s_(addc_u32|add_u64|lshl_b64))"
)
_TENSOR = re.compile(r"[A-Z]*MMA|v_\w*(mfma|wmma|smfmac|swmmac)\w*")
_ONE_WARP = re.compile(r"UTC[A-Z]*MMA|UTMALDG|UBLKCP")
_XU = re.compile(r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV")
_TRANSCENDENTAL = re.compile(r"v_(s_)?(exp|log|rcp|rsq|sqrt|sin|cos)_")
_FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2", "FFMA32I", "FMUL32I"}
_ALU = re.compile(
    r"(V?IADD\w*|LOP3|SHF|I?SETP|[IF]SETP|F?SEL|[FVI]+MNMX\w*|PRMT|P?LOP3|MOV\w*|LEA|SGXT|F2FP|I2FP|IABS|BMSK|[PR]2[RP]|HMNMX2|HSETP2|HSET2)$"
)


def lane_bytes(ins):
    """Bytes that a memory instruction moves per lane; of LDSM, what each lane receives. A TMA load counts as 16."""
    name = ins.opcode
    if ins.base in ("UTMALDG", "UBLKCP"):
        return 16
    if name[0].islower():  # AMD
        if pair := re.match(r"ds_(read|write|load|store)_?2\w*_b(32|64)", name):
            return int(pair[2]) // 4
        if size := re.search(r"_(?:dwordx|b)(\d+)", name):
            return int(size[1]) * 4 if "dwordx" in name else int(size[1]) // 8
        return 4 if "dword" in name else 1 if re.search(r"byte|[iu]8", name) else 2
    mods = name.split(".")[1:]
    if ins.base in ("LDSM", "STSM"):
        return {"4": 16, "2": 8}.get(mods[-1], 4)
    for mod, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if mod in mods:
            return size
    return 4


def _pipe(ins, chip, warps):
    """(pipe, cycles of one sub-partition) of one warp instruction; pipe None where only its issue slot counts."""
    base = ins.base
    if ins.shape:
        m, n, k = ins.shape
        rate = chip.tensor / 2 if "TF32" in ins.opcode or "xf32" in ins.opcode else chip.tensor
        rate = chip.tensor / 8 if re.search(r"x\d+_?f32$", ins.opcode) else rate
        return "tensor", m * n * k / (ins.sharers or warps) / rate
    if chip.backend == "hip":
        share = chip.subpartitions * chip.warp_size / 128  # LDS moves 128 bytes a clock for all sub-partitions
        if base.startswith("ds_"):
            return "lsu", max(1, lane_bytes(ins)) * share
        if re.match(r"(global|buffer|flat|scratch)_(load|store|atomic)", base):
            return "lsu", max(1, lane_bytes(ins)) * share
        if _TRANSCENDENTAL.match(base):
            return "mufu", chip.mufu
        return ("valu", chip.fma) if base.startswith("v_") else (None, 0)
    if _XU.fullmatch(base):
        return "mufu", chip.mufu
    if base in _FMA:
        return "fma", chip.fma * (2 if base in ("FFMA2", "FMUL2", "FADD2") else 1)
    if base == "IMAD":
        return "fma", 2  # 64 lanes a clock and multiprocessor on every chip of the table
    if _ALU.fullmatch(base):
        return "alu", chip.alu
    if base in ("LDTM", "STTM"):
        registers = re.search(r"x(\d+)", ins.opcode)
        return "tmem", int(registers[1]) if registers else 1  # 128 bytes a clock and sub-partition
    if re.fullmatch(r"LDSM|STSM|LDS|STS|LDG|STG|LDGSTS|LD|ST|LDL|STL|ATOM[GS]?|RED[G]?|SHFL", base):
        return "lsu", 4 * max(1.0, lane_bytes(ins) * 32 / 128)  # one 128-byte transfer a clock for four sub-partitions
    return None, 0


def _weights(blocks, body, latches, doms, warps):
    """{block: how often one warp executes it per iteration} and the blocks that not every iteration passes."""
    always = set.intersection(*(doms[latch] for latch in latches)) & body
    weights = dict.fromkeys(body, 1.0)
    for index in sorted(body - always):
        block = blocks[index]
        names = [ins.base for ins in block.instructions]
        if any(_ONE_WARP.fullmatch(name) for name in names):
            weights[index] = 1 / warps
        elif "SYNCS" in names and index in block.successors:
            weights[index] = 0.0  # polls out of line, entered only if the first try failed
    waiting = {index for index, weight in weights.items() if weight == 0}
    for index in body - always:
        if set(blocks[index].predecessors) <= waiting:
            weights[index] = 0.0
    return weights, {index for index in body - always if weights[index] == 1}


def _tally(pairs):
    counts = defaultdict(float)
    for name, weight in pairs:
        counts[name] += weight
    return {
        name: int(n) if n == int(n) else round(n, 3) for name, n in sorted(counts.items(), key=lambda x: -x[1]) if n
    }


def _macs(weighted, warps, use_ffma):
    total = 0.0
    for ins, weight in weighted:
        if ins.shape:
            m, n, k = ins.shape
            # All warps together do a program-wide instruction; its block already counts 1 / warps per warp.
            total += m * n * k / (ins.sharers or 1) * weight
        elif _TENSOR.fullmatch(ins.base):
            return None
        elif use_ffma and ins.base in ("FFMA", "FFMA2", "v_fma_f32", "v_fmac_f32", "v_pk_fma_f32"):
            total += (64 if ins.base in ("FFMA2", "v_pk_fma_f32") else 32) * weight
    return total


def _around(header, blocks, bodies, doms, warps, use_ffma):
    """(fewest, most) instructions on a way through one of the loops `bodies`, outside it, and most's multiply-adds."""
    body = bodies[header][0]
    others = {i for other, (blocked, _) in bodies.items() if other != header for i in blocked} - body
    cost = {}
    for block in blocks:
        one_warp = any(_ONE_WARP.fullmatch(ins.base) for ins in block.instructions)
        weight = 0.0 if block.index in body else 1 / warps if one_warp else 1.0
        macs = _macs([(ins, weight) for ins in block.instructions], warps, use_ffma)
        if macs is None:
            return None, None
        cost[block.index] = len(block.instructions) * weight, macs

    def ways(start, end):
        """From a block to `end` (None: the kernel's end), both included -> {block: (fewest, (most, its macs))}."""
        found, opened, todo = {}, set(), [start]
        while todo:
            index = todo[-1]
            onward = [s for s in blocks[index].successors if s not in doms[index] and s not in others]
            if index in found:
                todo.pop()
            elif index == end or (end is None and not blocks[index].successors):
                found[index] = cost[index][0], cost[index]
            elif index not in opened:
                opened.add(index)
                todo += [s for s in onward if s not in found]
                if any(s in opened and s not in found for s in onward):
                    return None  # a cycle without a header
            else:
                rest = [found[s] for s in onward if found[s]]
                if end is None and blocks[index].instructions and blocks[index].instructions[-1].flow == "end?":
                    rest.append((0.0, (0.0, 0.0)))
                own, macs = cost[index]
                most = max((way[1] for way in rest), default=None)
                found[index] = (own + min(way[0] for way in rest), (own + most[0], macs + most[1])) if rest else None
        return found[start]

    before, after = ways(0, header), ways(header, None)
    if not before or not after:
        return None, None
    fewest, most, macs = before[0] + after[0], before[1][0] + after[1][0], before[1][1] + after[1][1]
    return (round(fewest, 3), round(most, 3)), round(macs, 3)


def _loop(header, blocks, bodies, doms, chip, warps, macs_per_pair, use_ffma):
    body, latches = bodies[header]
    weights, conditional = _weights(blocks, body, latches, doms, warps)
    code = [(ins, weights[index]) for index in sorted(body) for ins in blocks[index].instructions]
    macs = _macs(code, warps, use_ffma)
    cycles = defaultdict(float, issue=sum(weight for _, weight in code))
    for ins, weight in code:
        pipe, cost = _pipe(ins, chip, 1 if ins.sharers == 0 else warps)
        if pipe:
            cycles[pipe] += cost * weight
    cycles = {pipe: round(n, 3) for pipe, n in sorted(cycles.items(), key=lambda x: -x[1])}
    scale = 1024 * macs_per_pair / macs if macs else None
    loads = [(ins, weight) for ins, weight in code if _LOAD.fullmatch(ins.base)]
    bytes_all = sum(lane_bytes(ins) * weight for ins, weight in loads)
    bytes_wide = sum(lane_bytes(ins) * weight for ins, weight in loads if lane_bytes(ins) >= 16)
    around, around_macs = _around(header, blocks, bodies, doms, warps, use_ffma)
    return Loop(
        header=header,
        instructions=round(cycles["issue"], 3),
        conditional=sum(len(blocks[index].instructions) for index in conditional),
        opcodes=_tally((ins.base, weight) for ins, weight in code),
        tensor=_tally((ins.opcode, weight) for ins, weight in code if _TENSOR.fullmatch(ins.base)),
        macs=None if macs is None else round(macs),
        cycles=cycles,
        per_1024={pipe: round(n * scale, 4) for pipe, n in cycles.items()} if scale else None,
        bound=max(cycles, key=cycles.get),
        loads=_tally((ins.opcode, weight) for ins, weight in loads),
        wide_fraction=bytes_wide / bytes_all if bytes_all else None,
        address64=sum(weight for ins, weight in code if _ADDRESS64.match(ins.opcode)),
        atomics=_tally((ins.opcode, weight) for ins, weight in code if _ATOMIC.match(ins.opcode)),
        around=around,
        around_macs=around_macs,
    )


def count(blocks, chip, num_warps, macs_per_pair=1):
    """Count a kernel's blocks at the rates of `chip` (aot.Chip) -> Program; see the module's docstring."""
    doms = dominators(blocks)
    code = [ins for block in blocks for ins in block.instructions]
    use_ffma = not any(_TENSOR.fullmatch(ins.base) for ins in code)
    loops = natural_loops(blocks, doms)

    def own_macs(header):
        nested = {
            i for other, (body, _) in loops.items() if other != header and other in loops[header][0] for i in body
        }
        own = [(ins, 1.0) for i in loops[header][0] - nested for ins in blocks[i].instructions]
        return _macs(own, num_warps, use_ffma) != 0

    bodies = {h: loop for h, loop in loops.items() if own_macs(h)}
    if not bodies:  # a kernel that only moves and reduces: its innermost loops, polling loops aside
        inner = {h for h in loops if not any(other in loops[h][0] for other in loops if other != h)}
        polls = {h for h in inner if any(ins.base == "SYNCS" for i in loops[h][0] for ins in blocks[i].instructions)}
        bodies = {h: loops[h] for h in inner - polls}
    counted = [_loop(h, blocks, bodies, doms, chip, num_warps, macs_per_pair, use_ffma) for h in bodies]
    # of equal loops the leaner is the usual way, which the budget is to guard; without products the longer is hotter
    outer = {h for h in bodies if any(other in bodies[h][0] for other in bodies if other != h)}
    counted.sort(
        key=lambda it: (
            it.header in outer,
            -(it.macs or 0),
            it.instructions if it.macs else -it.instructions,
            it.header,
        )
    )

    straight = set(range(len(blocks))) - {i for body, _ in loops.values() for i in body}
    before = after = set()
    if counted:
        before = straight & reachable(blocks, [counted[0].header], back=True)
        after = straight & reachable(blocks, [counted[0].header]) - reachable(blocks, list(bodies), back=True)
    size = {block.index: len(block.instructions) for block in blocks}
    return Program(
        instructions=len(code),
        prologue=sum(size[i] for i in before),
        epilogue=sum(size[i] for i in after),
        loops=counted,
        tensor=dict(Counter(ins.opcode for ins in code if _TENSOR.fullmatch(ins.base))),
        atomics=dict(Counter(ins.opcode for ins in code if _ATOMIC.match(ins.opcode))),
        address64=sum(bool(_ADDRESS64.match(ins.opcode)) for ins in code),
        spill_bytes=sum(lane_bytes(ins) for ins in code if ins.base == "STL"),
        complete=not any(ins.base in ("BRX", "JMX", "JMP") or ins.opcode == "s_setpc_b64" for ins in code),
    )
