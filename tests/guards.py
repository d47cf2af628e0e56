"""Guards around every test: what Triton's interpreter and PyTorch's allocator would let pass in silence, fails.

`conftest.py` turns them on for every test; a test that asks for the fixture `unguarded` does without. Where triton is
missing, or on a GPU, only the allocations are guarded, and `launch_log` stays empty.

In a launch under the interpreter, `GuardError`, naming kernel, program and argument, is raised by
- a load or store outside the elements of the tensor that the pointer came from, the gaps between strides included;
- two programs storing to one address, or one loading what another stores, in either order: a race on a GPU;
- two lanes of one store, or two stores of one program, to one address, and a program loading what it has stored itself;
  memory in which each program has a part of its own may be named in `SCRATCH`, which allows the last two;
- an atomic; an int8, int16 or int32 sum, difference or product that overflows; a grid that CUDA refuses;
- `tl.multiple_of` of what is none: the compiler would load wide at addresses that are not aligned.
A masked load without `other` returns NaN (integers: a large wrong value) in its masked lanes, not 0.

What the library allocates with torch.empty, empty_like, empty_strided, new_empty or new_empty_strided is full of NaN
(integers: 0x7ffd repeated). It and what torch.zeros and its kin give lie between canaries, verified after each launch
that they take part in and after the test. Strides, offset 0 and alignment are the allocator's.

    def test_row_sum(device, launch_log):
        x = guarded(torch.randn(5, 20, device=device)[:, 3:17])  # the same strides; NaN in the gaps and around it
        torch.testing.assert_close(row_sum(x), x.sum(1))
        assert launch_log[-1].kernel == "_row_sum_kernel" and launch_log[-1].grid == (5, 1, 1)
        assert launch_log[-1].loaded == {"x_ptr": 5 * 14 * 4}  # bytes of unmasked lanes, by argument
        assert launch_log[-1].bytes_stored == 5 * 4

    def test_race(device):
        with pytest.raises(GuardError, match="y_ptr .*stored by program"):
            racing_launcher(torch.ones(8, device=device))

`launch_log` holds the launches of the whole test (under hypothesis: of all examples so far; `launch_log.clear()`).
Products and fused multiply-adds are rounded as a GPU rounds them, not as the BLAS of this machine does.
The pieces are in memory_guards.py, interpreter_guards.py and interpreter_arithmetic.py.
"""

import os
from contextlib import ExitStack, contextmanager

from interpreter_arithmetic import gpu_arithmetic
from interpreter_guards import SCRATCH, Launch, guard_interpreter, triton
from memory_guards import LIBRARY, GuardError, Heap, guard_allocations

__all__ = ["LIBRARY", "SCRATCH", "GuardError", "Launch", "guard", "guarded", "interpreting"]

_heaps = []  # of the guards that are on, the innermost last


def interpreting():
    """True if the kernels of this process run in Triton's interpreter."""
    return triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@contextmanager
def guard():
    """Turn the guards on; yields the list to which each launch under the interpreter adds its `Launch`.

    Within another guard(), launch no kernel.
    """
    log, heap = [], Heap()
    with ExitStack() as patches:
        _heaps.append(heap)
        patches.callback(_heaps.pop)
        guard_allocations(patches, heap)
        if interpreting():
            guard_interpreter(patches, heap, log)
            gpu_arithmetic(patches)
        yield log
        heap.verify("by the end of the test")


def guarded(tensor):
    """A copy of `tensor` with its values, strides, alignment and requires_grad; canaries around it and in its gaps.

    In an `unguarded` test, `tensor` itself.
    """
    return _heaps[-1].guarded(tensor) if _heaps else tensor
