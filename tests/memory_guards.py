"""The guards of guards.py that watch memory from outside: NaN-filled `empty`, and canaries around tensors."""

import functools
import math
import sys
from dataclasses import dataclass

import torch

# modules, and packages with all that is in them, whose allocations are guarded
LIBRARY = {"vitriton.kernels"}

POISON = 0x7FFD  # repeated, a quiet NaN in fp16, bf16, fp32 and fp64 alike
MARGIN = 4096  # bytes of canaries on each side; a multiple of every alignment that an allocator gives
HELD = 1 << 28  # bytes: larger tensors get no guard; when the guarded ones exceed it, they are verified and let go


class GuardError(AssertionError):
    """A kernel or a launcher did what a guard forbids."""


def patch(patches, owner, name, wrap):
    """Set owner.name to wrap(owner.name) until `patches` closes."""
    if not hasattr(owner, name):
        raise RuntimeError(f"{owner.__name__}.{name} is gone: teach the guards in tests/ how this version does it")
    own, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, wrap(original))
    patches.callback(*((setattr, owner, name, original) if own else (delattr, owner, name)))


def extent(size, stride):
    """How many elements of memory a tensor spans, from its first to its last."""
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def once(size, stride):
    """`size` with expanded dims (stride 0) reduced to one, so that each element is met once."""
    return [1 if step == 0 else n for n, step in zip(size, stride, strict=True)]


@dataclass
class _Block:
    words: torch.Tensor  # int16, canaries included
    inside: slice  # of words: from the tensor's first to its last
    in_gap: torch.Tensor | None  # bool, of words[inside]; None if there are no gaps
    label: str

    def intact(self):
        parts = [self.words[: self.inside.start], self.words[self.inside.stop :]]
        if self.in_gap is not None:
            parts.append(self.words[self.inside][self.in_gap])
        return all((part == POISON).all() for part in parts)


class Heap:
    """The tensors of one test that have canaries around them."""

    def __init__(self):
        self.blocks = {}  # address of the tensor's storage -> _Block
        self.held = 0

    def verify(self, when, storages=None):
        """Raise GuardError if a canary around the tensors in these storages (None: all) is dead."""
        for address in self.blocks.keys() if storages is None else self.blocks.keys() & storages:
            if not self.blocks[address].intact():
                label = self.blocks[address].label
                raise GuardError(f"{when}: memory around, or in a gap of, {label} was overwritten")

    def carve(self, like, label, skew=0):
        """A poisoned tensor of the same dtype, shape and strides, `skew` bytes past an aligned address."""
        size, stride, itemsize = once(like.shape, like.stride()), like.stride(), like.element_size()
        span = extent(size, stride)
        start, stop = MARGIN + skew, MARGIN + skew + span * itemsize
        if self.held > HELD:
            self.verify("before another allocation")
            self.blocks.clear()
            self.held = 0
        words = torch.full(((stop + MARGIN) // 2,), POISON, dtype=torch.int16, device=like.device)
        inside, in_gap = slice(start // 2, (stop + 1) // 2), None
        if span > math.prod(size) and itemsize > 1:
            is_element = torch.zeros(span, dtype=torch.bool, device=like.device)
            is_element.as_strided(size, stride).fill_(True)
            in_gap = ~is_element.repeat_interleave(itemsize // 2)
        # a slice of a storage is a storage: the tensor's offset is 0, as in one from the allocator
        storage = words.untyped_storage()[start:stop]
        self.blocks[storage.data_ptr()] = _Block(words, inside, in_gap, label)
        self.held += words.nbytes
        return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, like.shape, stride)

    def guarded(self, tensor):
        """See guards.guarded."""
        source = tensor.detach()
        if tensor.numel() == 0:
            return source.clone().requires_grad_(tensor.requires_grad)
        copy = self.carve(source, f"the guarded {_describe(source)}", skew=source.data_ptr() % 64)
        size, stride = once(source.shape, source.stride()), source.stride()
        copy.as_strided(size, stride).copy_(source.as_strided(size, stride))
        return copy.requires_grad_(tensor.requires_grad)


_ALLOCATORS = (
    *((torch, name) for name in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")),
    *((torch.Tensor, name) for name in ("new_empty", "new_empty_strided", "new_zeros")),
)


def guard_allocations(patches, heap):
    """Give what the LIBRARY allocates canaries from `heap`, and NaN where it has no value yet."""

    def wrap(original):
        zeros = "zeros" in original.__name__

        @functools.wraps(original)
        def allocate(*args, **kwargs):
            tensor = original(*args, **kwargs)
            if torch.compiler.is_compiling():
                return tensor
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not any(caller == name or caller.startswith(name + ".") for name in LIBRARY):
                return tensor
            # fake, functional and meta tensors have no memory to guard
            if type(tensor) is not torch.Tensor or tensor.is_meta or not 0 < tensor.nbytes <= HELD:
                return tensor
            home = heap.carve(tensor, f"the {_describe(tensor)} that {caller} allocated")
            if zeros:
                home.zero_()
            elif tensor.dtype is torch.bool:
                home.fill_(True)  # the poison's bytes are no booleans
            return home.requires_grad_(tensor.requires_grad)

        return allocate

    for owner, name in _ALLOCATORS:
        patch(patches, owner, name, wrap)


def _describe(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)}"
