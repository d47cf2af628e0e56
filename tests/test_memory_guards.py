"""Each guard on allocations against a write that it forbids; and guarded tensors."""

import ctypes

import guards
import pytest
import torch
from guards import GuardError, guard, guarded
from memory_guards import POISON
from strategies import LAYOUTS, place

pytestmark = pytest.mark.skipif(not guards.interpreting(), reason="kernels do not run in the interpreter here")


def overwrite(address):
    ctypes.memset(address, 0, 2)


ALLOCATE = {
    "empty": lambda: torch.empty(3, 5),
    "empty_like": lambda: torch.empty_like(torch.ones(5, 3).t()),
    "empty_strided": lambda: torch.empty_strided((3, 5), (8, 1)),
    "new_empty": lambda: torch.ones(1).new_empty(3, 5),
    "new_empty_strided": lambda: torch.ones(1).new_empty_strided((3, 5), (1, 4)),
}


@pytest.mark.parametrize("name", ALLOCATE)
def test_empty_is_as_torch_gives_it_but_nan(name, as_library):
    tensor = ALLOCATE[name]()
    guards.LIBRARY.remove(__name__)
    plain = ALLOCATE[name]()
    guards.LIBRARY.add(__name__)
    assert tensor.isnan().all()
    assert tensor.stride() == plain.stride() and tensor.storage_offset() == 0 and tensor.data_ptr() % 64 == 0
    assert tensor.untyped_storage().nbytes() == plain.untyped_storage().nbytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_empty_is_nan_in_every_dtype(dtype, as_library):
    assert torch.empty(7, dtype=dtype).isnan().all()


def test_empty_of_integers_is_recognisable(as_library):
    assert (torch.empty(4, dtype=torch.int16) == POISON).all()
    assert (torch.empty(4, dtype=torch.int32) == POISON * 0x10001).all()
    assert (torch.empty(4, dtype=torch.bool).view(torch.uint8) == 1).all()


@pytest.mark.parametrize("make", [lambda: torch.zeros(9), lambda: torch.ones(1).new_zeros(9)])
def test_zeros_are_zeros_between_canaries(make, as_library):
    with pytest.raises(GuardError, match=r"float32 tensor of shape \(9,\)"), guard():
        tensor = make()
        assert (tensor == 0).all()
        overwrite(tensor.data_ptr() + tensor.nbytes)


def test_only_the_library_is_guarded():
    tensor = torch.empty(64)
    assert guards._heaps[-1].blocks == {}
    assert tensor.untyped_storage().nbytes() == 256


def test_fake_and_meta_tensors_pass(as_library):
    assert torch.empty(3, device="meta").is_meta
    with torch._subclasses.FakeTensorMode():
        assert type(torch.empty(3)) is torch._subclasses.FakeTensor
    assert guards._heaps[-1].blocks == {}


@pytest.mark.parametrize("byte", [-1, -4096 + 64, 60, 62])
def test_canaries_see_a_write_beside_a_tensor(byte, as_library):
    with pytest.raises(GuardError, match=r"by the end of the test.*float32 tensor of shape \(3, 5\)"), guard():
        overwrite(torch.empty(3, 5).data_ptr() + byte)
    with guard():
        torch.empty(3, 5).zero_()


def test_canaries_are_verified_before_they_are_let_go(as_library, monkeypatch):
    monkeypatch.setattr("memory_guards.HELD", 20_000)
    with pytest.raises(GuardError, match="before another allocation"), guard():
        overwrite(torch.empty(10).data_ptr() - 2)
        for _ in range(20):
            torch.empty(10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_guarded_keeps_values_strides_and_alignment(layout, dtype):
    tensor = place(torch.randn(2, 3, 5, 7).to(dtype), layout).requires_grad_()
    copy = guarded(tensor)
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride() and copy.requires_grad and copy.is_leaf
    assert copy.data_ptr() % 64 == tensor.data_ptr() % 64 and copy.data_ptr() != tensor.data_ptr()
    assert guarded(tensor[:0]).shape == (0, 3, 5, 7)


def test_guarded_is_nan_in_its_gaps_and_watches_them():
    tensor = guarded(torch.ones(3, 8)[:, 1:5])
    memory = tensor.as_strided((20,), (1,))
    assert memory.isnan().sum() == 20 - 12
    memory[0] = 2.0  # an element
    with pytest.raises(GuardError, match="in a gap of"), guard():
        guarded(torch.ones(3, 8)[:, 1:5]).as_strided((20,), (1,))[5] = 2.0
