"""Each guard against toy kernels: one that commits exactly the sin which the guard forbids, and its clean twin."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import guards
import pytest
import torch
from guards import GuardError, guard, guarded

triton = pytest.importorskip("triton", reason="triton is not installed: there is no interpreter to guard")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(not guards.interpreting(), reason="kernels do not run in the interpreter here")


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, shift, MASK: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, one block a program. shift moves the load; MASK leaves the mask out, OTHER the value of masked lanes."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if not MASK:
        x = tl.load(x_ptr + offs + shift)
    elif OTHER:
        x = tl.load(x_ptr + offs + shift, mask=offs < n, other=0)
    else:
        x = tl.load(x_ptr + offs + shift, mask=offs < n)
    tl.store(y_ptr + offs, x, mask=offs < n)


def copy(x, y, *, shift=0, mask=True, other=True, block=8):
    copy_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), shift, mask, other, block)
    return y


def test_the_clean_kernel_passes_and_is_counted(launch_log, as_library):
    x = guarded(torch.randn(21, dtype=torch.float64))
    assert torch.equal(copy(x, torch.empty_like(x)), x)
    (launch,) = launch_log
    assert (launch.kernel, launch.grid, launch.programs) == ("copy_kernel", (3, 1, 1), 3)
    assert launch.loaded == {"x_ptr": 21 * 8} and launch.stored == {"y_ptr": 21 * 8}
    assert launch.bytes_loaded == launch.bytes_stored == 21 * 8


def test_canaries_are_verified_after_each_launch(unguarded, as_library):
    with pytest.raises(GuardError, match=r"^after kernel copy_kernel: .*float32 tensor"), guard():
        y = torch.empty(21)
        ctypes.memset(y.data_ptr() - 4, 0, 2)
        copy(torch.ones(21), y)


def test_bytes_are_told_apart_where_arguments_share_memory(launch_log):
    x, y = torch.zeros(10, 2).unbind(1)
    copy_strided_kernel[(1,)](x, y, 10, 2, 16)
    assert launch_log[-1].loaded == {"x_ptr": 40} and launch_log[-1].stored == {"y_ptr": 40}


@triton.jit
def copy_strided_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs * stride, tl.load(x_ptr + offs * stride, mask=offs < n, other=0), mask=offs < n)


@pytest.mark.parametrize("mask, shift, far", [(False, 0, 21), (True, 1, 21), (True, -1, -1), (True, 10**6, 10**6)])
def test_load_out_of_bounds(mask, shift, far):
    x = torch.ones(21)
    with pytest.raises(GuardError, match=f"copy_kernel.*loads through x_ptr outside its elements, {far} elements"):
        copy(x, torch.ones(21), mask=mask, shift=shift)


def test_store_out_of_bounds_is_not_carried_out():
    memory = torch.zeros(64)
    with pytest.raises(GuardError, match=r"program \(2, 0, 0\) of \(3, 1, 1\): stores through y_ptr outside.* 20 "):
        copy(torch.ones(21), memory[:20])
    assert (memory[16:] == 0).all()


def test_load_from_a_gap():
    x, y = torch.ones(10, 3)[:, :2].unbind(1)
    copy_strided_kernel[(1,)](x, y, 10, 3, 16)
    with pytest.raises(GuardError, match="loads through x_ptr outside its elements, 1 elements"):
        copy_strided_kernel[(1,)](x, y, 10, 1, 16)


def test_an_empty_tensor_may_not_be_read():
    copy(torch.ones(0), torch.ones(0))
    with pytest.raises(GuardError, match="x_ptr outside"):
        copy_kernel[(1,)](torch.ones(0), torch.ones(8), 8, 0, True, True, 8)


@triton.jit
def sum_kernel(x_ptr, y_ptr, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if OTHER:
        x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    else:
        x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr, tl.sum(x, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32, torch.int64])
def test_missing_other_poisons(dtype):
    x, y = torch.ones(7, dtype=dtype), torch.zeros(1, dtype=dtype)
    sum_kernel[(1,)](x, y, 7, True, 8)
    assert y.item() == 7
    sum_kernel[(1,)](x, y, 7, False, 8)
    assert y.isnan().item() if dtype.is_floating_point else abs(y.item()) > 1e6


@triton.jit
def overlap_kernel(y_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.program_id(0) * STEP + tl.arange(0, BLOCK), tl.full((BLOCK,), 1.0, tl.float32))


def test_two_programs_store_to_one_address():
    overlap_kernel[(3,)](torch.ones(24), 8, 8)
    with pytest.raises(GuardError, match=r"program \(1, 0, 0\).*stores through y_ptr.*stored by program 0: a race"):
        overlap_kernel[(3,)](torch.ones(24), 7, 8)


@triton.jit
def shift_kernel(x_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = offs + SHIFT
    x = tl.load(x_ptr + source, mask=(source >= 0) & (source < n), other=0)
    tl.store(x_ptr + offs, x, mask=offs < n)


def test_two_programs_race_between_load_and_store():
    shift_kernel[(4,)](torch.ones(32), 32, 0, 8)
    with pytest.raises(GuardError, match=r"program \(1, 0, 0\).*loads.*stored by program 0: a race"):
        shift_kernel[(4,)](torch.ones(32), 32, -1, 8)
    with pytest.raises(GuardError, match=r"program \(1, 0, 0\).*stores.*where another program has loaded: a race"):
        shift_kernel[(4,)](torch.ones(32), 32, 1, 8)


def test_a_race_through_two_views_of_one_memory():
    memory = torch.ones(16)
    with pytest.raises(GuardError, match="stores through y_ptr where another program has loaded: a race"):
        copy(memory[4:], memory[:12], block=4)


@triton.jit
def lanes_kernel(y_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK) * STRIDE, tl.full((BLOCK,), 1.0, tl.float32))


def test_two_lanes_store_to_one_address():
    lanes_kernel[(1,)](torch.ones(8), 1, 8)
    with pytest.raises(GuardError, match="from two lanes to one address"):
        lanes_kernel[(1,)](torch.ones(8), 0, 8)


@triton.jit
def accumulate_kernel(y_ptr, STEPS: tl.constexpr, LOAD: tl.constexpr, BLOCK: tl.constexpr):
    ptrs = y_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(STEPS):
        if LOAD:
            total = tl.load(ptrs)
        tl.store(ptrs, total + 1.0)


def test_one_program_stores_twice_only_in_scratch(monkeypatch):
    y = torch.zeros(16)
    accumulate_kernel[(2,)](y, 1, True, 8)
    with pytest.raises(GuardError, match="stores through y_ptr where it has stored before"):
        accumulate_kernel[(2,)](y, 2, False, 8)
    with pytest.raises(GuardError, match="loads through y_ptr what it has stored itself"):
        accumulate_kernel[(2,)](y, 2, True, 8)
    monkeypatch.setitem(guards.SCRATCH, "accumulate_kernel", {"y_ptr"})
    y.zero_()
    accumulate_kernel[(2,)](y, 3, True, 8)
    assert (y == 3).all()


def test_scratch_is_no_licence_to_race(monkeypatch):
    monkeypatch.setitem(guards.SCRATCH, "shift_kernel", {"x_ptr"})
    with pytest.raises(GuardError, match="stored by program 0: a race"):
        shift_kernel[(4,)](torch.ones(32), 32, -1, 8)


@triton.jit
def atomic_kernel(y_ptr, CAS: tl.constexpr):
    if CAS:
        tl.atomic_cas(y_ptr, 0, 1)
    else:
        tl.atomic_add(y_ptr, 1)


@pytest.mark.parametrize("cas, name", [(True, "create_atomic_cas"), (False, "create_atomic_rmw")])
def test_atomics_are_forbidden(cas, name):
    y = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(GuardError, match=f"atomic_kernel.*{name}: atomics are forbidden"):
        atomic_kernel[(1,)](y, cas)
    assert y.item() == 0


@triton.jit
def offset_kernel(y_ptr, stride, OP: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0) + 1
    if WIDE:
        row = row.to(tl.int64)
    if OP == "mul":
        offset = row * stride * 2
    elif OP == "add":
        offset = row + stride + stride
    else:
        offset = -row - stride - stride
    tl.store(y_ptr, offset)


@pytest.mark.parametrize("op", ["mul", "add", "sub"])
def test_int32_overflow(op):
    y = torch.zeros(1, dtype=torch.int64)
    offset_kernel[(1,)](y, 2**30 - 1, op, False)
    offset_kernel[(1,)](y, 2**30 + 1, op, True)
    assert abs(y.item()) > 2**31
    with pytest.raises(GuardError, match=f"offset_kernel.*{op} of int32 gives .*214748365.*, which overflows"):
        offset_kernel[(1,)](y, 2**30 + 1, op, False)


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr):
    tl.store(z_ptr, tl.fma(tl.load(x_ptr), tl.load(y_ptr), tl.load(z_ptr)))


def test_fma_is_rounded_once():
    x, z = torch.tensor([1 + 2.0**-12]), torch.tensor([-1 - 2.0**-11])
    fma_kernel[(1,)](x, x.clone(), z)
    assert z.item() == 2.0**-24  # of two roundings, the first would leave 0


@triton.jit
def product_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    z = tl.dot(tl.load(x_ptr + i * BLOCK + j), tl.load(y_ptr + i * BLOCK + j), input_precision="ieee")
    tl.store(z_ptr + i * BLOCK + j, z)


def test_a_row_has_the_same_product_wherever_it_stands():
    x, y = torch.randn(2, 64, 64)
    z, turned, across = torch.empty(3, 64, 64)
    for result, (a, b) in (
        (z, (x, y)),
        (turned, (x.roll(5, 0), y)),
        (across, (y.t().contiguous(), x.t().contiguous())),
    ):
        product_kernel[(1,)](a, b, result, 64)
    assert torch.equal(turned, z.roll(5, 0)) and torch.equal(across, z.t())


@triton.jit
def tree_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, AXIS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, 2)[None, :]
    x = tl.load(x_ptr + i * 2 + j)
    tl.store(y_ptr + tl.arange(0, 2), tl.sum(x if AXIS == 0 else tl.trans(x), AXIS))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_sum_is_a_tree(axis):
    x, y = torch.ones(128, 2), torch.empty(2)
    x[0] = 2.0**24  # one after the other would leave this, as 2²⁴ + 1 is rounded
    tree_kernel[(1,)](x, y, 128, axis)
    assert y.tolist() == [2.0**24 + 126] * 2


@triton.jit
def hint_kernel(x_ptr, y_ptr, stride, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.multiple_of(tl.program_id(0) * stride, ALIGN)
    rows = tl.multiple_of(tl.arange(0, 2)[:, None] * stride, [1, ALIGN]) + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + row + rows, tl.load(x_ptr + row + rows))


def test_a_hint_that_lies():
    x = torch.randn(2, 12)
    hint_kernel[(1,)](x, torch.empty_like(x), 12, 4, 8)
    hint_kernel[(1,)](x, torch.empty_like(x), 11, 1, 8)
    with pytest.raises(GuardError, match=r"hint_kernel.*multiple_of\(\[1, 8\]\) of 12"):
        hint_kernel[(1,)](x, torch.empty_like(x), 12, 8, 8)
    with pytest.raises(GuardError, match=r"program \(1, 0, 0\).*multiple_of\(\[16\]\) of 24"):
        scalar_hint_kernel[(2,)](x, 24, 16)


@triton.jit
def scalar_hint_kernel(x_ptr, stride, ALIGN: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0), tl.multiple_of(tl.program_id(0) * stride, ALIGN))


def test_a_grid_that_cuda_refuses():
    with pytest.raises(GuardError, match="CUDA takes a grid of at most"):
        overlap_kernel[(1, 65536)](torch.ones(8), 8, 8)


@triton.jit
def load_helper(x_ptr, offs):
    return tl.load(x_ptr + offs)


@triton.jit
def nested_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, load_helper(x_ptr, offs) + tl.max(load_helper(x_ptr, offs), 0) + tl.cdiv(BLOCK, 3))


def test_device_functions_are_guarded_too(launch_log):
    x, y = torch.arange(8.0), torch.empty(8)
    for _ in range(2):  # the second launch finds the patches of the first undone
        nested_kernel[(1,)](x, y, 8)
        assert torch.equal(y, x + 7 + 3)
    assert launch_log[-1].loaded == {"x_ptr": 64}
    with pytest.raises(GuardError, match=r"nested_kernel.*loads through x_ptr outside"):
        nested_kernel[(1,)](x[:7], y, 8)


@triton.jit
def cast_kernel(x_ptr, y_ptr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr.to(tl.pointer_type(TYPE)) + offs))


def test_a_pointer_cast_to_a_narrower_type(launch_log):
    x, y = torch.arange(8), torch.empty(16, dtype=torch.int32)
    cast_kernel[(1,)](x, y, tl.int32, 16)
    assert torch.equal(y, x.view(torch.int32)) and launch_log[-1].loaded == {"x_ptr": 64}
    with pytest.raises(GuardError, match="outside"):
        cast_kernel[(1,)](x[:7], y, tl.int32, 16)


def test_a_pointer_cast_to_a_wider_type():
    x, y = torch.arange(8, dtype=torch.int32), torch.empty(4, dtype=torch.int64)
    cast_kernel[(1,)](x, y, tl.int64, 4)
    with pytest.raises(GuardError, match="outside"):
        cast_kernel[(1,)](x[:7], y, tl.int64, 4)


@triton.jit
def cast_race_kernel(y_ptr, FIRST: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(y_ptr.to(tl.pointer_type(tl.int64)), tl.full((), 0, tl.int64))
    else:
        tl.store(y_ptr + FIRST, tl.full((), 0, tl.int32))


def test_a_race_between_stores_of_unequal_width():
    y = torch.zeros(8, dtype=torch.int32)
    cast_race_kernel[(2,)](y, 2)
    with pytest.raises(GuardError, match="stored by program 0: a race"):
        cast_race_kernel[(2,)](y, 1)


def test_errors_of_a_kernel_that_are_not_guards_pass(launch_log):
    with pytest.raises(triton.runtime.errors.InterpreterError, match="boom"):
        failing_kernel[(1,)](torch.ones(1))
    assert launch_log == []


@triton.jit
def failing_kernel(x_ptr):
    tl.static_assert(False, "boom")


# ---- the guards themselves


def test_unguarded_is_unguarded(unguarded, launch_log):
    x = torch.ones(5)
    assert guarded(x) is x
    copy(x, torch.empty(5))
    atomic_kernel[(1,)](torch.zeros(1, dtype=torch.int32), False)
    assert launch_log == []


def test_guards_leave_no_trace(unguarded):
    from triton.runtime import interpreter

    owners = (torch, torch.Tensor, interpreter, interpreter.InterpreterBuilder, interpreter.GridExecutor)
    before = [dict(vars(owner)) for owner in owners]
    with guard():
        assert dict(vars(torch)) != before[0]
    assert [dict(vars(owner)) for owner in owners] == before


def test_a_version_that_lacks_what_is_patched_fails_loudly(unguarded, monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_masked_load")
    with pytest.raises(RuntimeError, match=r"InterpreterBuilder.create_masked_load is gone"), guard():
        pass


def run(code, **env):
    """What `code` prints in a fresh process."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | env
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_without_triton_only_allocations_are_guarded():
    code = """
import sys
sys.modules["triton"] = None
import guards, torch
guards.LIBRARY.add("__main__")
with guards.guard() as log:
    print(guards.interpreting(), torch.empty(2).isnan().all().item(), log)
"""
    assert run(code) == ["False", "True", "[]"]


def test_memory_beyond_2_to_31_is_guarded_sparsely():
    x = torch.empty(1).new_empty(2**31 + 64, dtype=torch.int8)  # untouched, it takes address space only
    y = x.as_strided((2, 8), (2**31, 1))
    far_kernel[(2,)](y, 2**31, 8)
    assert y[1].tolist() == [2] * 8
    with pytest.raises(GuardError, match="y_ptr outside"):
        far_kernel[(2,)](y, 2**31 - 1, 8)


@triton.jit
def far_kernel(y_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(y_ptr + row * stride + tl.arange(0, BLOCK), tl.full((BLOCK,), 2, tl.int8))
