"""Compile any Triton kernel for any chip without owning it, and report its resources and its machine code's counts.

    record = report(kernel, args, arch="sm_90", num_warps=4, num_stages=3, macs_per_pair=2 * 64)
    print(record.summary())

    with launch.record("sm_90") as launches:  # what a launcher would run, on meta tensors
        qkv_attention(qkv, 12)
    records = [report_launch(one, arch="sm_90", macs_per_pair=2 * 64) for one in launches]

`kernel` is a `triton.jit` function; `args` maps every parameter's name to a value: a tensor (any device; `meta` costs
nothing), an int, float or bool, or for compile-time parameters their value. Types, divisibility by 16, ints equal to 1
and 64-bit ints are derived by Triton's own launcher code, so the binary is the one that this launch would run. A type
string stands for a typical value: "*bf16" is a pointer divisible by 16, "i32" and "i64" an int divisible by 16,
"fp32" a float. `aligned=False` drops every divisibility.

Nothing here touches a GPU. What is reported is compiled and counted, never timed. `counts.py` says what each figure of
a loop means. Needs Triton; NVIDIA's figures also need the `cuobjdump` and `nvdisasm` that Triton's wheel carries.
Not in a process with TRITON_INTERPRET=1, where `triton.jit` makes no compilable kernels.
"""

import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field

from . import counts, sass
from .executed import Executed
from .launch import compiling

__all__ = ["CHIPS", "Chip", "Record", "analyse", "compile_kernel", "report", "report_launch"]


@dataclass(frozen=True)
class Chip:
    """Limits (bytes, counts) of one multiprocessor (SM, CU; WGP on gfx11), and its cycles per warp instruction.

    Sources: CUDA programming guide (arithmetic throughput and technical specifications per compute capability), the
    vendors' architecture papers for tensor rates, AMD's CDNA3 and RDNA3 ISA guides. `tensor` is multiply-adds per clock
    and sub-partition for fp16/bf16 operands with fp32 sums; tf32 halves it. GeForce parts (sm_86, sm_89, sm_120) run
    fp32 sums at half the rate of their professional twins, and this table holds the GeForce rate. On sm_90 the table
    holds HGMMA's rate; mma.sync (HMMA) is known to reach about 0.6 of it.
    """

    backend: str
    shared_limit: int  # largest allocation of one program
    shared_total: int  # of the multiprocessor
    shared_reserved: int  # taken by the system from each program
    warps: int  # resident, whole multiprocessor
    programs: int  # resident
    registers: int  # 32-bit, per sub-partition and lane
    register_step: int  # allocation granule, registers a lane
    tensor: float
    fma: float  # FFMA, FMUL, FADD; on AMD every vector instruction that is in no other pipe
    alu: float = 2  # integer, logic, compare, min/max, select, convert-and-pack
    mufu: float = 8
    subpartitions: int = 4
    warp_size: int = 32


CHIPS = {
    "sm_80": Chip("cuda", 166912, 167936, 1024, 64, 32, 512, 8, tensor=256, fma=2),
    "sm_86": Chip("cuda", 101376, 102400, 1024, 48, 16, 512, 8, tensor=64, fma=1),
    "sm_89": Chip("cuda", 101376, 102400, 1024, 48, 24, 512, 8, tensor=64, fma=1),
    "sm_90": Chip("cuda", 232448, 233472, 1024, 64, 32, 512, 8, tensor=512, fma=1),
    "sm_100": Chip("cuda", 232448, 233472, 1024, 64, 32, 512, 8, tensor=1024, fma=1),
    "sm_120": Chip("cuda", 101376, 102400, 1024, 48, 24, 512, 8, tensor=64, fma=1),
    "gfx942": Chip("hip", 65536, 65536, 0, 32, 32, 512, 8, tensor=256, fma=4, alu=4, mufu=16, warp_size=64),
    "gfx1100": Chip("hip", 65536, 131072, 0, 64, 64, 1536, 24, tensor=128, fma=1, alu=1, mufu=4),
}


@dataclass
class Record:
    """One kernel, compiled for one chip: what it takes of the chip, and its machine code's counts."""

    kernel: str
    arch: str
    dtype: str | None  # the caller's label
    head_dim: int | None  # the caller's label
    aligned: bool
    config: dict  # compile-time parameters, num_warps, num_stages
    registers: int  # per thread
    spill_bytes: int  # stored to local memory, bytes per thread
    stack_bytes: int  # bytes per thread
    shared_bytes: int  # per program
    shared_limit: int  # the chip's largest allocation per program
    programs: int  # resident per multiprocessor; 0: it cannot run
    programs_bound: str  # what limits them: "registers", "shared", "warps" or "programs"
    tensor: dict[str, int]  # tensor instructions in the whole kernel
    instructions: int  # of the whole kernel
    prologue: int
    epilogue: int
    loops: list[counts.Loop]  # the hottest first
    unit: str  # of loops' per_1024: "pairs" or "multiply-adds"
    atomics: dict[str, int]
    address64: int  # 64-bit integer instructions
    complete: bool  # False: an indirect jump hides part of the control flow
    code_hash: str  # of the cubin or hsaco
    variants: list = field(default_factory=list)  # sequence lengths or shapes that run this binary
    executed: dict[str, Executed] = field(default_factory=dict)  # sequence length: Executed

    @property
    def name(self):
        """A name for files and tables, the same from run to run."""
        head_dim = [] if self.head_dim is None else [f"hd{self.head_dim}"]
        variant = f"n{self.variants[0]}" if self.variants and head_dim else "-".join(map(str, self.variants[:1]))
        aligned = "aligned" if self.aligned else "unaligned"
        return "-".join([self.kernel, self.arch, self.dtype, *head_dim, aligned, variant.replace(" ", "_")])

    @property
    def hot(self):
        """The innermost loop with the most multiply-adds; None if the kernel has no loop."""
        return self.loops[0] if self.loops else None

    @classmethod
    def from_dict(cls, plain):
        """The Record of what `to_dict` returned, or what JSON made of that."""
        loops = [counts.Loop(**loop | {"around": loop["around"] and tuple(loop["around"])}) for loop in plain["loops"]]
        executed = {n: Executed(**found) for n, found in plain["executed"].items()}
        return cls(**plain | {"loops": loops, "executed": executed})

    def to_dict(self):
        """Plain dicts, lists, numbers and strings, for JSON."""
        config = {name: v if isinstance(v, int | float | str | None) else str(v) for name, v in self.config.items()}
        return asdict(self) | {"config": config}

    def summary(self):
        """The record as a few lines of text."""
        config = " ".join(f"{name}={value}" for name, value in self.config.items())
        variant = "aligned" if self.aligned else "unaligned"
        lines = [
            f"{self.kernel} {self.arch} {self.dtype} hd{self.head_dim} {variant}: {config}",
            f"  registers {self.registers}, spill {self.spill_bytes} B, stack {self.stack_bytes} B, shared "
            f"{self.shared_bytes} of {self.shared_limit} B, {self.programs} programs a multiprocessor "
            f"({self.programs_bound})",
            f"  instructions {self.instructions} (prologue {self.prologue}, epilogue {self.epilogue}), 64-bit "
            f"{self.address64}, atomics {sum(self.atomics.values())}, tensor {self.tensor}",
        ]
        for loop in self.loops:
            figures = loop.cycles if loop.per_1024 is None else loop.per_1024
            unit = "iteration" if loop.per_1024 is None else f"1024 {self.unit}"
            cycles = ", ".join(f"{pipe} {n:.4g}" for pipe, n in figures.items())
            wide = "no loads" if loop.wide_fraction is None else f"wide loads {loop.wide_fraction:.0%}"
            lines += [
                f"  loop at block {loop.header}: {loop.instructions:g} instructions ({loop.conditional} conditional), "
                f"{loop.macs} multiply-adds a warp, {wide} {loop.loads}, 64-bit {loop.address64:g}",
                f"    cycles per {unit}: {cycles}; binds: {loop.bound}",
                f"    {' '.join(f'{name}:{n:g}' for name, n in loop.opcodes.items())}",
            ]
        return "\n".join(lines)


def report(
    kernel,
    args,
    *,
    arch,
    num_warps=4,
    num_stages=3,
    macs_per_pair=None,
    dtype=None,
    head_dim=None,
    aligned=True,
    **options,
):
    """Compile `kernel` for `arch` (a key of `CHIPS`) and count its machine code -> Record.

    macs_per_pair: multiply-adds per (query, key) pair of a tile as the kernel computes it (attention forward 2 D,
    one-kernel backward 5 D, D padded as the kernel pads it); None gives figures per 1024 multiply-adds (a GEMM).
    dtype, head_dim: labels for the record. options: further compile options of Triton's backend.
    Raises what `compile_kernel` raises.
    """
    compiled = compile_kernel(
        kernel, args, arch=arch, num_warps=num_warps, num_stages=num_stages, aligned=aligned, **options
    )
    names = {p.name for p in kernel.params if p.is_constexpr}
    config = {name: value for name, value in args.items() if name in names}
    config |= {"num_warps": num_warps, "num_stages": num_stages, **options}
    return analyse(compiled, arch, config, macs_per_pair=macs_per_pair, dtype=dtype, head_dim=head_dim, aligned=aligned)


def report_launch(launch, *, arch, macs_per_pair=None, dtype=None, head_dim=None, aligned=True):
    """`report` of a `launch.Launch`, which `launch.record` keeps."""
    return report(
        launch.kernel,
        dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constexprs,
        arch=arch,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        macs_per_pair=macs_per_pair,
        dtype=dtype,
        head_dim=head_dim,
        aligned=aligned,
    )


def compile_kernel(kernel, args, *, arch, num_warps=4, num_stages=3, aligned=True, **options):
    """Compile as the launch `kernel[grid](**args)` on a chip `arch` would -> Triton's CompiledKernel.

    Its `asm` holds ttir, ttgir, llir, ptx and cubin (NVIDIA) or amdgcn and hsaco (AMD), its `metadata.shared` the bytes
    of shared memory. Floating-point fusion is on unless `enable_fp_fusion=False` is passed.
    Raises RuntimeError under TRITON_INTERPRET=1, TypeError where `kernel` is no triton.jit function, ValueError for an
    unknown arch, and whatever the compiler raises.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        raise RuntimeError(
            "TRITON_INTERPRET is set, so triton.jit made interpreted functions that cannot be compiled: "
            "compile in a process of its own without TRITON_INTERPRET"
        )
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"kernel is a {type(kernel).__name__}, must be a triton.jit function (unwrap autotune, heuristics)"
        )
    target = gpu_target(arch)
    backend = make_backend(target)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **options}
    values = {name: _stand_in(value) for name, value in args.items()}
    with compiling(target.backend):
        bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(
            **values, **options
        )
        _, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, None)
        if not aligned:
            attrs = {path: [a for a in found if a[0] != "tt.divisibility"] for path, found in attrs.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        return triton_compile(source, target=target, options=options)


def gpu_target(arch):
    """Triton's target of a chip's name, "sm_90" or "gfx942"; ValueError for a chip that is not in `CHIPS`."""
    from triton.backends.compiler import GPUTarget

    if arch not in CHIPS:
        raise ValueError(f"arch={arch!r} is unknown, must be one of {', '.join(CHIPS)}")
    chip = CHIPS[arch]
    return GPUTarget(chip.backend, int(arch[3:]) if chip.backend == "cuda" else arch, chip.warp_size)


class _Pointer:
    """What Triton's launcher asks of a tensor: dtype, address, and that it ends within 2 GiB (AMD's buffer loads)."""

    def __init__(self, dtype):
        self.dtype = dtype

    def data_ptr(self):
        return 0

    def ptr_range(self):
        return 0


def _stand_in(value):
    """A type string -> a value that Triton's launcher gives this type; other values as they are."""
    if not isinstance(value, str):
        return value
    if value.startswith("*"):
        import torch

        names = {
            "fp16": "float16",
            "bf16": "bfloat16",
            "fp32": "float32",
            "fp64": "float64",
            "i32": "int32",
            "i64": "int64",
        }
        return _Pointer(getattr(torch, names.get(value[1:], value[1:])))
    return {"i32": 16, "i64": 2**40, "fp32": 1.0, "i1": True}.get(value, value)


def analyse(compiled, arch, config, *, macs_per_pair=None, dtype=None, head_dim=None, aligned=True):
    """The Record of what `compile_kernel` returned for `arch`; config: compile-time parameters and options."""
    chip, name, num_warps = CHIPS[arch], compiled.metadata.name, compiled.metadata.num_warps
    if chip.backend == "cuda":
        binary = compiled.asm["cubin"]
        registers, stack, disassembly = _read_cubin(binary, name)
        blocks = sass.read_nvidia(disassembly, name)
    else:
        binary, assembly = compiled.asm["hsaco"], compiled.asm["amdgcn"]
        registers, stack, spilled = (
            int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])
            for key in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        blocks = sass.read_amd(assembly, name)
    found = counts.count(blocks, chip, num_warps, macs_per_pair or 1)
    programs, bound = occupancy(arch, registers, compiled.metadata.shared, num_warps)
    return Record(
        kernel=name.strip("_").removesuffix("_kernel"),
        arch=arch,
        dtype=dtype,
        head_dim=head_dim,
        aligned=aligned,
        config=config,
        registers=registers,
        spill_bytes=found.spill_bytes if chip.backend == "cuda" else 4 * spilled,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        shared_limit=chip.shared_limit,
        programs=programs,
        programs_bound=bound,
        tensor=found.tensor,
        instructions=found.instructions,
        prologue=found.prologue,
        epilogue=found.epilogue,
        loops=found.loops,
        unit="pairs" if macs_per_pair else "multiply-adds",
        atomics=found.atomics,
        address64=found.address64,
        complete=found.complete,
        code_hash=hashlib.sha256(binary).hexdigest(),
    )


def occupancy(arch, registers, shared, num_warps):
    """(programs resident on a multiprocessor, what limits them), for registers a thread and shared bytes a program."""
    chip = CHIPS[arch]
    if shared > chip.shared_limit:
        return 0, "shared"
    step = chip.register_step
    warps = chip.registers // max(step, -(-registers // step) * step) * chip.subpartitions
    taken = -(-(shared + chip.shared_reserved) // 128) * 128
    limits = {
        "registers": warps // num_warps,
        "shared": chip.shared_total // taken if taken else chip.programs,
        "warps": chip.warps // num_warps,
        "programs": chip.programs,
    }
    bound = min(limits, key=limits.get)
    return limits[bound], bound


def _read_cubin(cubin, kernel):
    """(registers a thread, stack bytes a thread, `nvdisasm -c` text) of a kernel in a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    disassembly = disassemble(cubin)
    found = re.search(rf"Function {re.escape(kernel)}:\s+REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise ValueError(f"cuobjdump reports no resources for kernel {kernel!r}:\n{usage}")
    return int(found[1]), int(found[2]), disassembly


def disassemble(cubin):
    """The text of `nvdisasm -c`. Its dataflow analysis, a quarter of its time, adds no word to it and is off (-ndf)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{os.path.basename(command[0])} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout
