"""The guards of guards.py that watch Triton's interpreter: bounds, races, `other`, atomics, overflow, hints, traffic.

Written against the interpreter of Triton 3.5 to 3.9; fails loudly where a version lacks what is patched here.
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from memory_guards import POISON, GuardError, extent, once, patch

try:
    import triton
except ImportError:  # Windows, macOS
    triton = None

# kernel -> pointer arguments behind which each program stores and loads repeatedly, in a part of its own
SCRATCH: dict[str, set[str]] = {"_attention_bwd_kernel": {"record_ptr"}}

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA's


@dataclass
class Launch:
    """What one launch did. Bytes are those of unmasked lanes; an address counts each time that it is used."""

    kernel: str
    grid: tuple = ()  # of three
    loaded: dict[str, int] = field(default_factory=dict)  # argument -> bytes; a tensor passed twice is "q_ptr|k_ptr"
    stored: dict[str, int] = field(default_factory=dict)

    @property
    def programs(self):
        return math.prod(self.grid)

    @property
    def bytes_loaded(self):
        return sum(self.loaded.values())

    @property
    def bytes_stored(self):
        return sum(self.stored.values())


class _Argument:
    """A tensor argument: where its elements are, and the ledger of that memory."""

    def __init__(self, name, tensor):
        self.name, self.itemsize = name, tensor.element_size()
        size, stride = once(tensor.shape, tensor.stride()), tensor.stride()
        span = extent(size, stride)
        self.start = tensor.data_ptr()
        self.end = self.start + span * self.itemsize
        self.ledger = None
        self.is_element = None  # (span,) if there are gaps
        if span > math.prod(size):
            self.is_element = np.zeros(span, dtype=bool)
            np.lib.stride_tricks.as_strided(self.is_element, size, stride)[...] = True

    def stray(self, addresses, itemsize):
        """Where the first address that is not of an element points, in elements from the first one; None if all are."""
        offsets = addresses - np.uint64(self.start)  # before the start they wrap to beyond every end
        elements = offsets.view(np.int64) // self.itemsize
        bad = offsets >= np.uint64(self.end - self.start)
        if not bad.any():
            if itemsize > self.itemsize:
                bad = addresses > np.uint64(self.end - itemsize)
            elif self.is_element is not None:
                bad = ~self.is_element[elements]
        return elements[bad][0] if bad.any() else None


class _Ledger:
    """Which program, counted from 1, touched which unit of a stretch of memory during one launch."""

    MANY = np.int32(-1)

    def __init__(self, start, end, unit):
        self.start, self.unit, self.size = start, unit, (end - start) // unit
        self.reader = self.writer = self.lane = None  # made when needed: (size,) int32, 0 for nobody

    def units(self, addresses, itemsize):
        units = (addresses - np.uint64(self.start)).view(np.int64) // self.unit
        return units if itemsize <= self.unit else (units[:, None] + np.arange(itemsize // self.unit)).ravel()

    def load(self, units, program, scratch):
        """Enter a load. Says what is wrong with it, or returns None."""
        if self.writer is not None:
            writer = self.writer[units]
            other = writer[(writer != 0) & (writer != program)]
            if other.size:
                return f"what was stored by program {other[0] - 1}: a race"
            if not scratch and writer.any():
                return (
                    "what it has stored itself, which its other threads may not see yet; SCRATCH in guards.py allows it"
                )
        if self.reader is None:
            self.reader = np.zeros(self.size, dtype=np.int32)
        reader = self.reader[units]
        self.reader[units] = np.where((reader == 0) | (reader == program), program, self.MANY)
        return None

    def store(self, units, program, scratch):
        """Enter a store. Says what is wrong with it, or returns None."""
        if self.writer is None:
            self.writer, self.lane = np.zeros(self.size, dtype=np.int32), np.empty(self.size, dtype=np.int32)
        writer = self.writer[units]
        other = writer[(writer != 0) & (writer != program)]
        if other.size:
            return f"where memory was stored by program {other[0] - 1}: a race"
        if not scratch and writer.any():
            return "where it has stored before; SCRATCH in guards.py allows it"
        if self.reader is not None:
            reader = self.reader[units]
            if ((reader != 0) & (reader != program)).any():
                return "where another program has loaded: a race"
        lanes = np.arange(units.size, dtype=np.int32)
        self.lane[units] = lanes
        if (self.lane[units] != lanes).any():
            return "from two lanes to one address"
        self.writer[units] = program
        return None


class _Watch:
    """The launch in progress: knows its arguments, and is told of every load and store."""

    def __init__(self, kernel, named_tensors):
        self.launch = Launch(kernel)
        self.scratch = SCRATCH.get(kernel, set())
        self.program = (0, 0, 0)
        self.patched = set()  # see patch_lang_once
        self.storages = {tensor.untyped_storage().data_ptr() for _, tensor in named_tensors}
        self.arguments = {}
        for name, tensor in named_tensors:
            known = self.argument(tensor)
            if known:
                known.name += f"|{name}"
            else:
                self.arguments[_key(tensor)] = _Argument(name, tensor)
        # arguments whose memory overlaps, as q, k and v of one projection do, share a ledger
        group = []
        for argument in sorted(self.arguments.values(), key=lambda argument: argument.start):
            if group and argument.start >= max(other.end for other in group):
                _share_ledger(group)
                group = []
            group.append(argument)
        _share_ledger(group)

    def argument(self, tensor):
        return self.arguments.get(_key(tensor))

    def access(self, verb, ptrs, mask):
        """Check and count the lanes in `mask` of a load or a store (verb: "loads" or "stores")."""
        addresses, itemsize = ptrs.data, max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        addresses = addresses.ravel() if mask.all() else addresses[np.broadcast_to(mask, addresses.shape)]
        if addresses.size == 0:
            return
        argument = getattr(ptrs.dtype.scalar, "argument", None) or self._argument_at(addresses[0], verb)
        stray = argument.stray(addresses, itemsize)
        if stray is not None:
            self.fail(f"{verb} through {argument.name} outside its elements, {stray} elements from its first")
        x, y, z = self.program
        program = np.int32(1 + (x * self.launch.grid[1] + y) * self.launch.grid[2] + z)
        ledger, scratch = argument.ledger, not self.scratch.isdisjoint(argument.name.split("|"))
        enter, count = (ledger.load, self.launch.loaded) if verb == "loads" else (ledger.store, self.launch.stored)
        wrong = enter(ledger.units(addresses, itemsize), program, scratch)
        if wrong:
            self.fail(f"{verb} through {argument.name} {wrong}")
        count[argument.name] = count.get(argument.name, 0) + addresses.size * itemsize

    def _argument_at(self, address, verb):
        """For a pointer whose origin was lost in a cast."""
        for argument in self.arguments.values():
            if argument.start <= address < argument.end:
                return argument
        return self.fail(f"{verb} outside every argument")

    def fail(self, what):
        raise GuardError(f"kernel {self.launch.kernel}, program {self.program} of {self.launch.grid}: {what}")


def _key(tensor):
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _share_ledger(arguments):
    if arguments:
        start, end = min(a.start for a in arguments), max(a.end for a in arguments)
        ledger = _Ledger(start, end, min(a.itemsize for a in arguments))
        for argument in arguments:
            argument.ledger = ledger


def _named_tensors(name, value):
    """The (name, tensor) in an argument: a tensor, a tuple, a descriptor, a tensor under another dtype."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _named_tensors(f"{name}[{i}]", item)
    elif isinstance(value, torch.Tensor):
        yield name, value
    elif hasattr(value, "base"):
        yield from _named_tensors(name, value.base)


def _overflow(op, a, b, scalar):
    """The first sum, difference or product of two integer arrays that does not fit the type `scalar`, or None."""
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[op]
    low, high = scalar.get_int_min_value(), scalar.get_int_max_value()
    ends = [function(float(x), float(y)) for x in (a.min(), a.max()) for y in (b.min(), b.max())]
    if low <= min(ends) and max(ends) <= high:
        return None
    exact = function(a.astype(np.float64), b.astype(np.float64))  # up to 2^53, where it matters
    wrong = exact[(exact < low) | (exact > high)]
    return int(wrong[0]) if wrong.size else None


@functools.cache
def _langs_in(fn):
    """Under which names of triton.language the function's module knows it."""
    tl = triton.language
    return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)


def guard_interpreter(patches, heap, log):
    """Watch every launch until `patches` closes; verify `heap` after each, and append its Launch to `log`."""
    from triton.runtime import interpreter

    watch = None  # the launch in progress

    def run(original):
        def __call__(executor, *args, **kwargs):
            nonlocal watch
            named = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
            watch = _Watch(executor.fn.__name__, [pair for item in named for pair in _named_tensors(*item)])
            try:
                result = original(executor, *args, **kwargs)
                heap.verify(f"after kernel {watch.launch.kernel}", watch.storages)
                log.append(watch.launch)
                return result
            except Exception as error:
                cause = error
                while cause is not None:  # the interpreter wraps what a kernel raises
                    if isinstance(cause, GuardError):
                        raise cause from None
                    cause = cause.__cause__
                raise
            finally:
                watch = None

        return __call__

    def set_grid_dim(original):
        def set_grid_dim(self, *grid):
            if watch is not None:
                watch.launch.grid = grid
                if any(n > limit for n, limit in zip(grid, GRID_LIMITS, strict=True)):
                    watch.fail(f"CUDA takes a grid of at most {GRID_LIMITS}")
            return original(self, *grid)

        return set_grid_dim

    def set_grid_idx(original):
        def set_grid_idx(self, *program):
            if watch is not None:
                watch.program = program
            return original(self, *program)

        return set_grid_idx

    def convert(original):
        def _implicit_cvt(arg):
            value = original(arg)
            if watch is not None and hasattr(arg, "data_ptr"):
                # the interpreter hands a pointer's type object on through all arithmetic, and the origin with it
                ((_, tensor),) = _named_tensors("", arg)
                value.handle.dtype.argument = watch.argument(tensor)
            return value

        return _implicit_cvt

    def load(original):
        def create_masked_load(self, ptrs, mask, other, *rest, **options):
            if watch is not None:
                watch.access("loads", ptrs, mask.data)
            if other is None and not mask.data.all():
                element = ptrs.get_element_ty()
                dtype = interpreter._get_np_dtype(element)
                wrong = True if dtype.kind == "b" else np.full(4, POISON, dtype=np.uint16).view(dtype)[0]
                other = interpreter.TensorHandle(np.full(ptrs.data.shape, wrong, dtype=dtype), element)
            return original(self, ptrs, mask, other, *rest, **options)

        return create_masked_load

    def store(original):
        def create_masked_store(self, ptrs, value, mask, *rest, **options):
            if watch is not None:
                watch.access("stores", ptrs, mask.data)
            return original(self, ptrs, value, mask, *rest, **options)

        return create_masked_store

    def forbid(original):
        def atomic(*args, **kwargs):
            watch.fail(f"{original.__name__}: atomics are forbidden, results must not depend on timing")

        return atomic

    def check_overflow(original):
        # the interpreter computes as much, slowly, and drops the result
        def binary_op_sanitize_overflow_impl(self, lhs, rhs, op):
            a, b, scalar = lhs.handle.data, rhs.handle.data, lhs.type.scalar
            if watch is not None and 1 < scalar.int_bitwidth < 64 and a.size and b.size:
                wrong = _overflow(op.__name__, a, b, scalar)
                if wrong is not None:
                    watch.fail(f"{op.__name__} of {scalar} gives {wrong}, which overflows it")

        return binary_op_sanitize_overflow_impl

    def check_hint(original):
        def set_attr(self, name, values):
            # of each dim, the compiler takes the first value of a run of consecutive ones to be such a multiple
            if watch is not None and name == "tt.divisibility" and self.data.size:
                for dim, value in enumerate(values):
                    first = self.data.take(0, axis=dim) if self.data.ndim == len(values) else self.data
                    if (first % value).any():
                        watch.fail(f"multiple_of({values}) of {first[first % value != 0].flat[0]}")
            return original(self, name, values)

        return set_attr

    def patch_lang_once(original):
        # the interpreter repeats this at every call of a device function, for half of its time
        def _patch_lang(fn):
            if watch is None:
                return original(fn)
            if _langs_in(fn) in watch.patched:
                return None
            watch.patched.add(_langs_in(fn))
            return original(fn)

        return _patch_lang

    builder, semantic = interpreter.InterpreterBuilder, triton.language.semantic.TritonSemantic
    patch(patches, interpreter.GridExecutor, "__call__", run)
    patch(patches, interpreter, "_implicit_cvt", convert)
    patch(patches, interpreter.TensorHandle, "set_attr", check_hint)
    patch(patches, interpreter, "_patch_lang", patch_lang_once)
    patch(patches, builder, "set_grid_dim", set_grid_dim)
    patch(patches, builder, "set_grid_idx", set_grid_idx)
    patch(patches, builder, "create_masked_load", load)
    patch(patches, builder, "create_masked_store", store)
    patch(patches, builder, "create_atomic_rmw", forbid)
    patch(patches, builder, "create_atomic_cas", forbid)
    for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll"):
        if hasattr(builder, name):  # since Triton 3.9
            patch(patches, builder, name, forbid)
    patch(patches, semantic, "binary_op_sanitize_overflow_impl", check_overflow)
