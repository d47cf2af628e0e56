"""Read a kernel's machine code and count it: basic blocks, loops, tensor instructions, issue slots and pipe cycles.

Machine code is the same on every machine and in every run, so these figures carry no noise. They are counts and
predictions, never timings. The text comes from `nvdisasm -c` (NVIDIA) or from the compiler's assembly (AMD).

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
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

__all__ = ["Block", "Instruction", "Loop", "Program", "count", "read_amd", "read_nvidia"]


@dataclass(slots=True)
class Instruction:
    opcode: str  # with its modifiers, without guard: "HMMA.16816.F32.BF16"
    operands: str
    flow: str = ""  # "": falls through; "jump", "branch" (conditional jump), "end", "end?" (conditional end)
    target: str = ""
    shape: tuple[int, int, int] | None = None  # M, N, K of a tensor instruction
    sharers: int = 1  # warps that perform it together; 0: the whole program does

    @property
    def base(self):
        return self.opcode.split(".")[0]


@dataclass(eq=False)
class Block:
    """A basic block: straight code, entered at its first instruction only."""

    index: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)


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
    )  # of the bytes loaded, the part that comes 16 bytes a lane or more, or by TMA; None: no loads
    address64: float  # 64-bit integer instructions
    atomics: dict[str, float]


@dataclass
class Program:
    """The counts of a whole kernel. `loops`: the hottest (most multiply-adds, then most instructions) first.

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


# ---- reading ----

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def read_nvidia(text, kernel):
    """`nvdisasm -c` text -> the kernel's basic blocks. ValueError if the kernel is not in it."""
    start = text.find(f"\n.text.{kernel}:")
    if start < 0:
        raise ValueError(f"kernel {kernel!r} has no code section in this disassembly")
    items, constants = [], {}
    for line in text[start:].splitlines()[2:]:
        if line.startswith("//---"):
            break
        label = re.match(r"([.$\w]+):", line)
        if label:
            items.append(label[1])
        elif found := _LINE.search(line):
            items.append(_nvidia_instruction(*found.groups(), constants))
    return _blocks(items)


def _nvidia_instruction(guard, opcode, operands, constants):
    ins = Instruction(opcode, operands.strip())
    base, *rest = opcode.split(".")
    conditional = guard not in (None, "@PT", "@UPT")
    jump = re.search(r"`\(([^)]+)\)", operands)
    # ptxas writes some jumps to a label of the same function as CALL.REL.NOINC; a call of another function returns.
    if jump and (base == "BRA" or (base == "CALL" and jump[1].startswith(".L_"))):
        conditional |= bool(operands[: jump.start()].strip())  # BRA.U UP0, `(label)
        ins.flow, ins.target = "branch" if conditional else "jump", jump[1]
    elif base in ("EXIT", "RET", "KILL", "BRX", "JMX", "JMP"):
        ins.flow = "end?" if conditional else "end"
    elif written := re.match(r"(UR\d+),", ins.operands):
        value = re.fullmatch(r"UR\d+, 0x([0-9a-f]+)", ins.operands)
        constants[written[1]] = int(value[1], 16) if base == "UMOV" and value else None
    elif base == "HGMMA" and (shape := re.fullmatch(r"(\d+)x(\d+)x(\d+)", rest[0])):
        ins.shape, ins.sharers = tuple(map(int, shape.groups())), 4
    elif base == "UTCHMMA":
        ins.sharers = 0
        register = re.search(r"idesc\[(UR\d+)\]", operands)
        word = constants.get(register[1]) if register else None
        if word is not None:  # PTX ISA, tcgen05 instruction descriptor: N / 8, M / 16, type of A (2 is tf32)
            ins.shape = (word >> 24 & 31) * 16, (word >> 17 & 63) * 8, 8 if word >> 7 & 7 == 2 else 16
    elif base.endswith("MMA") and (shape := re.fullmatch(r"(16|8)(8|16)(\d+)", rest[0] if rest else "")):
        ins.shape = tuple(map(int, shape.groups()))
    return ins


def read_amd(text, kernel):
    """The compiler's amdgcn assembly -> the kernel's basic blocks. ValueError if the kernel is not in it."""
    start = text.find(f"\n{kernel}:")
    if start < 0:
        raise ValueError(f"kernel {kernel!r} is not in this assembly")
    items = []
    for line in text[start:].splitlines()[2:]:
        if line.startswith(".Lfunc_end"):
            break
        if label := re.match(r"(\.L\w+):", line):
            items.append(label[1])
        elif found := re.match(r"\t([a-z]\w+)\s*([^;]*)", line):
            opcode = re.sub(r"_e(32|64)$", "", found[1])
            ins = Instruction(opcode, found[2].strip())
            if opcode.startswith(("s_cbranch", "s_branch")):
                ins.flow, ins.target = "jump" if opcode == "s_branch" else "branch", ins.operands
            elif opcode in ("s_endpgm", "s_setpc_b64"):
                ins.flow = "end"
            elif shape := re.match(r"v_(?:s?w?mfma|s?wmmac?|smfmac)_[a-z]+\d+_(\d+)x(\d+)x(\d+)", opcode):
                ins.shape = tuple(map(int, shape.groups()))
            items.append(ins)
    return _blocks(items)


def _blocks(items):
    """Labels and instructions in order -> the basic blocks that can be reached, the entry first."""
    blocks, starts = [Block(0, [])], {}
    for item in items:
        last = blocks[-1]
        if last.instructions and (isinstance(item, str) or last.instructions[-1].flow):
            last = Block(len(blocks), [])
            blocks.append(last)
        if isinstance(item, str):
            starts[item] = last.index
        else:
            last.instructions.append(item)
    for block in blocks:
        end = block.instructions[-1] if block.instructions else Instruction("", "")
        if end.target in starts:
            block.successors.append(starts[end.target])
        if end.flow not in ("jump", "end") and block.index + 1 < len(blocks):
            block.successors.append(block.index + 1)
    reached = _reachable(blocks, [0])
    new = {old: i for i, old in enumerate(sorted(reached))}
    kept = [blocks[old] for old in sorted(reached)]
    for block in kept:
        block.index = new[block.index]
        block.successors = sorted({new[s] for s in block.successors})
    for block in kept:
        for s in block.successors:
            kept[s].predecessors.append(block.index)
    return kept


def _reachable(blocks, seeds, back=False):
    seen, todo = set(seeds), list(seeds)
    while todo:
        block = blocks[todo.pop()]
        for other in block.predecessors if back else block.successors:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def _dominators(blocks):
    """For each block the set of blocks on every path to it from the entry, itself included."""
    doms = [set(range(len(blocks))) for _ in blocks]
    doms[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in blocks[1:]:
            new = set.intersection(*(doms[p] for p in block.predecessors)) | {block.index}
            if new != doms[block.index]:
                doms[block.index], changed = new, True
    return doms


def natural_loops(blocks, doms):
    """{header: (blocks of the loop, latches)}: back edges to a header that dominates their source, merged by header."""
    found = defaultdict(lambda: (set(), set()))
    for block in blocks:
        for header in block.successors:
            if header in doms[block.index]:
                body, latches = found[header]
                latches.add(block.index)
                body.add(header)
                todo = [block.index]
                while todo:
                    index = todo.pop()
                    if index not in body:
                        body.add(index)
                        todo.extend(blocks[index].predecessors)
    return dict(found)


# ---- counting ----

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


def _loop(header, blocks, body, latches, doms, chip, warps, macs_per_pair, use_ffma):
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
    )


def count(blocks, chip, num_warps, macs_per_pair=1):
    """Count a kernel's blocks at the rates of `chip` (aot.Chip) -> Program; see the module's docstring."""
    doms = _dominators(blocks)
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
    counted = [_loop(h, blocks, *loop, doms, chip, num_warps, macs_per_pair, use_ffma) for h, loop in bodies.items()]
    counted.sort(key=lambda loop: (-(loop.macs or 0), -loop.instructions, loop.header))

    straight = set(range(len(blocks))) - {i for body, _ in loops.values() for i in body}
    before = after = set()
    if counted:
        before = straight & _reachable(blocks, [counted[0].header], back=True)
        after = straight & _reachable(blocks, [counted[0].header]) - _reachable(blocks, list(bodies), back=True)
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
