"""Read a kernel's machine code into basic blocks, and find its loops. counts.py counts them.

The text comes from `nvdisasm -c` (NVIDIA) or from the compiler's assembly (AMD).
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

__all__ = ["Block", "Instruction", "dominators", "natural_loops", "reachable", "read_amd", "read_nvidia"]


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
    reached = reachable(blocks, [0])
    new = {old: i for i, old in enumerate(sorted(reached))}
    kept = [blocks[old] for old in sorted(reached)]
    for block in kept:
        block.index = new[block.index]
        block.successors = sorted({new[s] for s in block.successors})
    for block in kept:
        for s in block.successors:
            kept[s].predecessors.append(block.index)
    return kept


def reachable(blocks, seeds, back=False):
    seen, todo = set(seeds), list(seeds)
    while todo:
        block = blocks[todo.pop()]
        for other in block.predecessors if back else block.successors:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def dominators(blocks):
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
