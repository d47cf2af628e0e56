"""Every kernel as its launcher would launch it: on each chip, for each dtype and head dim, compiled and counted.

    for result in survey(table(archs=["sm_90"], dtypes=["bf16"]), jobs=2):
        print(result.record.summary() if result.record else result.error)

A `Case` is one call of the launchers with tensors on the `meta` device; what it launches is compiled by aot.py, in
processes of their own. Triton keeps what it compiled in its cache folder; the records are kept there too, by the hash
of the machine code and of the code that counts it, so that a second run only reads.

Sequence lengths are chosen for their tails: 257 and 1025 leave one token over whole tiles (whole tiles and the
narrowest tail in one kernel), 197 and 577 leave 69 and 65 over tiles of 128 queries, 256 leaves nothing.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from . import aot, counts, launch, sass
from .executed import executed_per_pair
from .targets import WIDE

__all__ = ["DTYPES", "HEAD_DIMS", "OPERATIONS", "Case", "Result", "survey", "table"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (32, 64, 72, 80, 88, 96, 128, 256)
OPERATIONS = ("attention", "layer_norm_linear")
KERNELS = (
    "attention_fwd", "attention_bwd", "attention_bwd_dq", "attention_bwd_dkdv",
    "row_statistics", "fold", "layer_norm_linear_fwd", "bwd_rows", "layer_norm_linear_dx", "layer_norm_linear_dw",
    "sum_splits", "layer_norm", "plain_product",
)  # fmt: skip

# name: rows, features in, features out, activation, pre-activation kept, x in fp32 beside half weights
_SHAPES = {
    "qkv": (1576, 768, 2304, None, False, False),
    "gelu": (1576, 768, 3072, "gelu", True, False),
    "gelu inference": (1576, 768, 3072, "gelu", False, False),
    "gelu_tanh": (1576, 768, 3072, "gelu_tanh", True, False),
    "narrow": (12608, 384, 384, None, False, False),  # its weight gradient is split over the rows
    "fp32 residual": (1576, 768, 2304, None, False, True),
    "wide": (*WIDE, None, False, False),  # forward only, and beside it the split form
    "tails": (1573, 776, 2312, None, False, False),
    "odd": (1573, 771, 2307, None, False, False),
}


@dataclass(frozen=True)
class Case:
    """One call of an operation's launchers, forward and backward, for one chip.

    `variants` are attention's sequence lengths, or names of LayerNorm + Linear's shapes; what two of them launch alike
    is compiled once. aligned: every pointer and stride is a multiple of 16 bytes.
    """

    operation: str
    arch: str
    dtype: str
    head_dim: int | None
    aligned: bool
    variants: tuple


@dataclass(frozen=True)
class Result:
    """A kernel's record, or why it could not be compiled."""

    case: Case
    kernel: str
    record: aot.Record | None
    error: str | None = None


def table(archs=(), dtypes=(), head_dims=(), operations=(), full=False):
    """The default table, of which the arguments keep a part (none: everything) -> list of Cases.

    bf16 stands for both half types where these differ in nothing but the names of instructions: unaligned tensors, and
    the lesser shapes. full=True compiles every variant for every dtype.
    """
    cases = []
    for arch in archs or aot.CHIPS:
        for dtype in dtypes or DTYPES:
            thorough = full or dtype == "bf16"
            for head_dim in head_dims or HEAD_DIMS:
                cases.append(
                    Case("attention", arch, dtype, head_dim, True, (257, 1025, 197, 577, 256) if thorough else (257,))
                )
                if thorough:
                    cases.append(Case("attention", arch, dtype, head_dim, False, (257,)))
            if not head_dims:
                names = tuple(name for name in _SHAPES if name != "odd") if thorough else ("qkv", "gelu", "wide")
                names = tuple(name for name in names if dtype != "fp32" or name != "fp32 residual")
                cases.append(Case("layer_norm_linear", arch, dtype, None, True, names))
                if thorough:
                    cases.append(Case("layer_norm_linear", arch, dtype, None, False, ("odd",)))
    return [case for case in cases if not operations or case.operation in operations]


def survey(cases, *, jobs=2, kernels=(), dump=None) -> Iterator[Result]:
    """Compile and count the cases in `jobs` processes; yields Results as they come, in no order.

    kernels: keep those of these names (of KERNELS). dump: a folder for ptx, machine code and cubin or hsaco.
    Needs Triton, and no TRITON_INTERPRET=1 in the environment.
    """
    context = multiprocessing.get_context("spawn")  # no state of this process: not its threads, nor its patches
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(compile_case, case, kernels, dump) for case in cases]
        try:
            for future in as_completed(futures):
                yield from future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def compile_case(case, kernels=(), dump=None):
    """The Results of one case, compiled in this process."""
    return [
        _compile(case, one, variants, dump)
        for one, variants in launches(case)
        if not kernels or kernel_name(one) in kernels
    ]


def kernel_name(one):
    return one.kernel.__name__.strip("_").removesuffix("_kernel")


def launches(case):
    """What the case launches -> [(launch.Launch, the variants that launch it)]."""
    run = _attention if case.operation == "attention" else _layer_norm_linear
    found = {}
    for variant in case.variants:
        with launch.record(case.arch) as recorded:
            run(case, variant)
        for one in recorded:
            _, variants = found.setdefault(_specialization(one), (one, []))
            if variant not in variants:
                variants.append(variant)
    return list(found.values())


def _specialization(one):
    """Two launches with the same one run the same binary (Triton: pointers' types, ints of 1, multiples of 16)."""
    kinds = tuple(
        a.dtype if isinstance(a, torch.Tensor)
        else (a == 1, a % 16 == 0, a >= 2**31) if isinstance(a, int)
        else type(a)
        for a in one.args
    )  # fmt: skip
    return one.kernel.__name__, kinds, tuple(map(str, one.constexprs.items())), one.num_warps, one.num_stages


def _attention(case, n):
    """`qkv_attention` of 12 heads; unaligned: a row of qkv has an odd length."""
    from .attention import attention_forward
    from .attention_backward import attention_backward

    heads, d = 12, case.head_dim
    width = 3 * heads * d
    for images in (1, 1024):  # one backward kernel needs many; what both launch alike is compiled once
        qkv = torch.empty(images, n, width if case.aligned else width + 1, dtype=DTYPES[case.dtype], device="meta")
        q, k, v = qkv[..., :width].unflatten(2, (3, heads, d)).permute(2, 0, 3, 1, 4)
        grads = torch.empty_like(qkv)[..., :width].unflatten(2, (3, heads, d)).permute(2, 0, 3, 1, 4)
        out, lse = attention_forward(q, k, v, d**-0.5)
        if n == case.variants[0]:  # the backward pass has no tiles of another height
            attention_backward(torch.empty_like(out), q, k, v, out, lse, d**-0.5, *grads)


def _layer_norm_linear(case, name):
    from .prenorm import layer_norm_linear_forward
    from .prenorm_backward import layer_norm_linear_backward
    from .split import layer_norm_then_linear

    m, k, n, activation, save, mixed = _SHAPES[name]
    dtype = DTYPES[case.dtype]
    x = torch.empty(m, k, dtype=torch.float32 if mixed else dtype, device="meta")
    gamma, beta = x.new_empty(k), x.new_empty(k)
    weight, bias = x.new_empty(n, k, dtype=dtype), x.new_empty(n, dtype=dtype)
    y, z, mean, rstd = layer_norm_linear_forward(x, gamma, beta, weight, bias, 1e-5, activation, save)
    if name == "wide":
        layer_norm_then_linear(x, gamma, beta, weight, 1e-5)
    elif save or activation is None:
        z = y if z is None else z
        layer_norm_linear_backward(y.clone(), x, gamma, beta, weight, bias, z, mean, rstd, 1e-5, activation, True, True)


_MATRIX_PRODUCTS = {"attention_fwd": 2, "attention_bwd": 5, "attention_bwd_dq": 3, "attention_bwd_dkdv": 4}


def _macs_per_pair(one):
    """Multiply-adds per (query, key) pair as the kernel computes it; None for other kernels than attention's."""
    c, name = one.constexprs, kernel_name(one)
    if name not in _MATRIX_PRODUCTS:
        return None
    # DV: the columns of v's second part, which may be fewer than those of k's
    return _MATRIX_PRODUCTS[name] * (c["D0"] + c["D1"]) - (c["D1"] - c["DV"] if "DV" in c else 0)


def _compile(case, one, variants, dump):
    name = kernel_name(one)
    args = dict(zip(one.kernel.arg_names, one.args, strict=False)) | one.constexprs
    config = one.constexprs | {"num_warps": one.num_warps, "num_stages": one.num_stages}
    try:
        compiled = aot.compile_kernel(
            one.kernel, args, arch=case.arch, num_warps=one.num_warps, num_stages=one.num_stages, aligned=case.aligned,
        )  # fmt: skip
    except Exception as error:  # whatever the compiler raises is this kernel's result
        return Result(case, name, None, f"{type(error).__name__}: {error}")
    record = _record(compiled, case, config, _macs_per_pair(one))
    record.variants = list(variants)
    if name == "attention_fwd":
        record.executed = {str(n): executed_per_pair(record, n) for n in variants}
    if dump is not None:
        _dump(compiled, record, Path(dump))
    return Result(case, name, record)


def _record(compiled, case, config, macs_per_pair):
    """aot.analyse, kept in Triton's cache folder."""
    from triton.runtime.cache import get_cache_manager

    binary = compiled.asm["cubin" if "cubin" in compiled.asm else "hsaco"]
    labels = repr((case.arch, case.dtype, case.head_dim, case.aligned, sorted(map(str, config.items())), macs_per_pair))
    key = hashlib.sha256(binary + labels.encode() + _counting_code()).hexdigest()
    manager = get_cache_manager(key)
    kept = manager.get_file("record.json")
    if kept is not None:
        return aot.Record.from_dict(json.loads(Path(kept).read_text()))
    record = aot.analyse(
        compiled, case.arch, config, macs_per_pair=macs_per_pair, dtype=case.dtype, head_dim=case.head_dim,
        aligned=case.aligned,
    )  # fmt: skip
    manager.put(json.dumps(record.to_dict()), "record.json", binary=False)
    return record


@cache
def _counting_code():
    return b"".join(Path(module.__file__).read_bytes() for module in (aot, counts, sass))


def _dump(compiled, record, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("ptx", "cubin", "amdgcn", "hsaco"):
        if kind in compiled.asm:
            content = compiled.asm[kind]
            (folder / f"{record.name}.{kind}").write_bytes(content if isinstance(content, bytes) else content.encode())
    if "cubin" in compiled.asm:
        (folder / f"{record.name}.sass").write_text(aot.disassemble(compiled.asm["cubin"]))
