"""`vitriton check`: every function and module, in every implementation that can run here, against the plain formulas.

`python -m vitriton.vit.check SEED` checks the kernels in Triton's interpreter alone and prints a JSON record a line: it
is the process that `vitriton check` starts with TRITON_INTERPRET=1, which counts only if set before the import.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback

import torch

from ..kernels import use_backend
from ..kernels.backend import why_not_triton
from ..kernels.launch import INTERPRET, triton
from ..kernels.reference import compare
from .cases import cases
from .check_model import check_model
from .console import Console, Problem
from .measure import describe, gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTERPRETER = "Triton, in its interpreter on the CPU"
ALL = ("native", "gpu", "interpreter")


def check(args):
    """Run the checks with the arguments of cli.add_check; returns the exit code."""
    if args.model:
        return check_model(args)
    started = time.perf_counter()
    console = Console(args.json)
    records, skipped = [], []
    for where, results in places(args.only or ALL, args.seed):
        console.say(f"{where}:")
        for record in results:
            record = {"where": where} | record
            if "why_not" in record:
                skipped.append(record)
                console.say(f"  not checked{in_dtype(record)}: {record['why_not']}")
            else:
                records.append(record)
                console.say(sentence(record))
    if not records:
        raise Problem("nothing was checked: " + "; ".join(record["why_not"] for record in skipped))
    failed = sum(not record["ok"] for record in records)
    compared = sum(len(record["compared"]) for record in records)
    seconds = time.perf_counter() - started
    verdict = (
        f"FAILED: {failed} of {len(records)} cases are wrong" if failed else f"OK: {len(records)} cases, none wrong"
    )
    console.say(f"\n{verdict}; {compared} outputs and gradients compared in {seconds:.0f} s")
    return console.finish(
        "check", not failed, seconds, torch=torch.__version__, seed=args.seed, results=records, not_checked=skipped
    )


def places(only, seed):
    """(where in words, its records) for each implementation; a record with "why_not" is of what cannot run here."""
    cpu, a_gpu = torch.device("cpu"), gpu()
    if "native" in only:
        yield f"native, on {describe(cpu)}", run_cases("native", cpu, seed)
        if a_gpu is not None:
            yield f"native, on {describe(a_gpu)}", run_cases("native", a_gpu, seed)
    if "gpu" in only:
        if a_gpu is None:
            yield "Triton, on a GPU", [{"why_not": "PyTorch finds no GPU here"}]
        else:
            yield f"Triton, on {describe(a_gpu)}", run_cases("triton", a_gpu, seed)
    if "interpreter" in only:
        if triton is None:
            yield INTERPRETER, [{"why_not": why_not_triton(cpu, torch.float32)}]
        elif INTERPRET:
            yield INTERPRETER, run_cases("triton", cpu, seed)
        else:
            yield f"{INTERPRETER} (TRITON_INTERPRET=1, in a process of its own)", run_interpreter(seed)


def run_cases(backend, device, seed):
    """Yield a record for each dtype and case."""
    for dtype in DTYPES:
        why_not = why_not_triton(device, dtype) if backend == "triton" else None
        if why_not is not None:
            yield {"dtype": str(dtype)[6:], "why_not": why_not}
            continue
        for case in cases(seed):
            yield judge(case, backend, device, dtype)


def judge(case, backend, device, dtype):
    """Compare the output and the gradient of each tensor of `case`."""
    record = {"case": case.name, "dtype": str(dtype)[6:], "ok": False, "compared": []}
    record["shapes"] = {name: list(tensor.shape) for name, tensor in case.tensors.items()}
    # rounded to dtype first: what is judged is the arithmetic, not the rounding of the input
    tensors = {name: tensor.to(device, dtype) for name, tensor in case.tensors.items()}
    exact = {name: tensor.double().cpu() for name, tensor in tensors.items()}
    try:
        grad = torch.randn(case.plain(**exact).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        grad = grad.to(device, dtype)
        gold = run(case.plain, exact, grad.double().cpu())
        base = run(case.plain, tensors, grad)
        with use_backend(backend):
            result = run(case.fused, tensors, grad)
        errors = [compare(name, result[name], base[name], gold[name], k=2 if name == "output" else 3) for name in gold]
    except Exception as error:
        return record | {"raised": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    for error in errors:
        share = max(_share(error.max, error.max_allowed), _share(error.rms, error.rms_allowed))
        record["compared"].append(vars(error) | {"ok": bool(error), "share_of_limit": share})
    return record | {"ok": all(errors)}


def run(function, tensors, grad):
    """The output, and the gradient of each tensor, by name."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = function(**tensors)
    grads = torch.autograd.grad(output, list(tensors.values()), grad)
    return {"output": output.detach()} | {f"gradient of {name}": g for name, g in zip(tensors, grads, strict=True)}


def _share(error, allowed):
    """How much of what is allowed an error takes up: at most 1 if it is right."""
    return error / allowed if allowed else float(error > 0)


# ---------------------------------------------------------------------------------------------------------------------
# In words


def sentence(record):
    """The line of a record, and below it, where it fails, a line for all that is wrong."""
    head = f"  {'ok  ' if record['ok'] else 'FAIL'}  {record['case']}{in_dtype(record)}"
    if "raised" in record:
        return f"{head}: raised {record['raised']}"
    errors = record["compared"]
    worst = max(errors, key=lambda error: error["share_of_limit"] if error["same_nonfinite"] else float("inf"))
    what = "output, gradient" + (f"s of {len(errors) - 1} tensors" if len(errors) > 2 else "")
    kind = "max" if _share(worst["max"], worst["max_allowed"]) == worst["share_of_limit"] else "rms"
    error, allowed = worst[kind], worst[f"{kind}_allowed"]
    lines = [f"{head}: {what}; worst: {worst['name']}, {kind} error {error:.1e}, allowed {allowed:.1e}"]
    lines += [f"        wrong: {_in_words(error)}" for error in errors if not error["ok"]]
    return "\n".join(lines)


def _in_words(error):
    words = "{name}: max error {max:.3g} ({max_allowed:.3g} allowed), rms {rms:.3g} ({rms_allowed:.3g} allowed)"
    return words.format(**error) + ("" if error["same_nonfinite"] else "; NaN or Inf in the wrong places")


def in_dtype(record):
    return f", {record['dtype']}" if "dtype" in record else ""


# ---------------------------------------------------------------------------------------------------------------------
# The interpreter


def run_interpreter(seed):
    """Yield the records of the process described at the top of this file."""
    command = [sys.executable, "-m", __name__, str(seed)]
    # one thread: the interpreter takes small steps, for which threads wait longer than they compute
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"TRITON_INTERPRET": "1", "VITRITON_BACKEND": "auto"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            for text in process.stdout:
                yield json.loads(text)
        finally:
            process.kill()  # of no effect once it has ended by itself
        if process.wait() != 0:
            stderr.seek(0)
            last = stderr.read().strip().splitlines()[-1:] or ["no message"]
            raised = f"the process ended with exit code {process.returncode}: {last[0]}"
            yield {"case": "the process of the interpreter", "ok": False, "compared": [], "raised": raised}


if __name__ == "__main__":
    for _record in run_cases("triton", torch.device("cpu"), int(sys.argv[1])):
        print(json.dumps(_record), flush=True)
