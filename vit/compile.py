"""`vitriton compile`: every kernel, compiled for every chip as its launcher would launch it, and counted."""

import importlib.util
import os
import time
from importlib import metadata
from pathlib import Path

from ..kernels.budget import accept, read
from ..kernels.targets import WIDE, forms, lines
from .console import Console, Problem, check_writable

HEADER = ("kernel", "regs", "spill", "stack", "shared", "progs", "slots", "binds", "cycles", "per pair")


def compile_kernels(args):
    """Compile with the arguments of cli.add_compile; returns the exit code."""
    started = time.perf_counter()
    if importlib.util.find_spec("triton") is None:
        raise Problem("needs Triton, which cannot be imported here: pip install triton (Linux)")
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise Problem("TRITON_INTERPRET is set, so that kernels are interpreted and cannot be compiled: unset it")
    from ..kernels.aot import CHIPS
    from ..kernels.survey import DTYPES, KERNELS, survey, table

    for option, given, allowed in (
        ("--arch", args.arch, CHIPS),
        ("--dtype", args.dtype, DTYPES),
        ("--kernel", args.kernel, KERNELS),
    ):
        for value in given:
            if value not in allowed:
                raise Problem(f"{option} is {value!r}; allowed are {', '.join(allowed)}")
    for head_dim in args.head_dim:
        if not 8 <= head_dim <= 256:
            raise Problem(f"--head-dim is {head_dim}; allowed are 8 to 256")

    console = Console(args.json)
    if args.accept is not None:
        check_writable(args.accept, "--accept")
        try:
            read(args.accept)
        except (ValueError, KeyError, TypeError) as error:
            raise Problem(f"--accept {args.accept} is no file of costs: remove it, or give another") from error
    if args.dump is not None:
        try:
            Path(args.dump).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Problem(f"cannot make the folder --dump {args.dump}: {error.strerror}; give another one") from error
        check_writable(Path(args.dump, "vitriton"), "--dump")
    cases = table(args.arch, args.dtype, args.head_dim, full=args.full)
    if args.kernel:  # no case is compiled for nothing
        operations = {"attention" if name.startswith("attention") else "layer_norm_linear" for name in args.kernel}
        cases = [case for case in cases if case.operation in operations]
    if not cases:
        raise Problem("nothing to compile: --head-dim is for the kernels of attention, and --kernel names others")
    results = []
    for result in survey(cases, jobs=args.jobs, kernels=args.kernel, dump=args.dump):
        results.append(result)
        if console.stream.isatty():
            print(f"\r{len(results)} kernels compiled", end="", file=console.stream, flush=True)
    if console.stream.isatty():
        print("\r\033[K", end="", file=console.stream)

    failures = [result for result in results if result.record is None]
    records = sorted((result.record for result in results if result.record is not None), key=_badness)
    console.table(HEADER, [_row(record) for record in records[: args.rows or None]])
    if args.rows and len(records) > args.rows:
        console.say(f"  and {len(records) - args.rows} more (--rows 0 shows all)")
    for failure in failures:
        case = failure.case
        console.say(
            f"FAIL {failure.kernel} {case.arch} {case.dtype} hd{case.head_dim} {'' if case.aligned else 'un'}aligned: "
            f"{failure.error}"
        )
    targets = lines(records)
    if targets:
        console.say()
        console.table(("figure", "now", "target", "", "others"), [_target(line) for line in targets])
    beside = forms(records)
    if beside:
        _, k, n = WIDE
        console.say(
            f"\nLayerNorm + Linear of {k} to {n} features, fused and one by one (a card has to say which is faster)"
        )
        console.table(
            ("figure", "fused", "split"), [(form.what, f"{form.fused:.4g}", f"{form.split:.4g}") for form in beside]
        )
    unfit = [record for record in records if record.programs == 0]
    spilling = [record for record in records if record.spill_bytes or record.stack_bytes]
    seconds = time.perf_counter() - started
    console.say(
        f"\n{len(records)} kernels compiled for {len({record.arch for record in records})} chips in {seconds:.0f} s; "
        f"{len(failures)} do not compile, {len(unfit)} do not fit, {len(spilling)} spill or need a stack"
    )
    if args.accept is not None:
        accept(args.accept, records, metadata.version("triton"))
        console.say(f"wrote the figures of {len(records)} kernels to {args.accept}")
    return console.finish(
        "compile",
        not failures and not unfit,
        seconds,
        triton=metadata.version("triton"),
        records=[record.to_dict() | {"name": record.name} for record in records],
        forms=[vars(form) for form in beside],
        targets=[vars(line) | {"met": line.met} for line in targets],
        failures=[vars(failure.case) | {"kernel": failure.kernel, "error": failure.error} for failure in failures],
    )


def _target(line):
    return line.what, f"{line.now:.4g}", f"{line.most:.4g}", "" if line.met else "MISSED", line.peers


def _badness(record):
    """Sorts what cannot run first, then what spills most, then what costs most beside its pairs or products."""
    cost = max(record.hot.per_1024.values()) if record.hot and record.hot.per_1024 else 0
    return record.programs > 0, -record.spill_bytes - record.stack_bytes, record.unit, -cost


def _row(record):
    hot = record.hot
    figures = (hot.per_1024 or hot.cycles) if hot else {}
    per_pair = [
        f"{n}: {'-' if executed.per_pair is None else format(executed.per_pair, '.3f')}"
        for n, executed in record.executed.items()
    ]
    return (
        record.name,
        str(record.registers),
        str(record.spill_bytes),
        str(record.stack_bytes),
        f"{record.shared_bytes / record.shared_limit:.0%}",
        f"{record.programs}",
        f"{figures['issue']:.4g}" if hot else "-",
        hot.bound if hot else "-",
        f"{max(figures.values()):.4g}" if hot else "-",
        " ".join(per_pair),
    )
