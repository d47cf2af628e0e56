"""The strategies draw what they promise: layouts with the strides that they are named for, cases that fit together."""

import pytest
import torch
from hypothesis import given
from strategies import LAYOUTS, attention_cases, layer_norm_cases, layouts, place


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 5, 6), (3, 9), (0, 3, 5, 7), (2, 0, 6)])
def test_layouts_are_what_they_say(shape):
    values = torch.randn(shape)
    placed = {name: place(values, name) for name in LAYOUTS if len(shape) > 2 or name != "permuted"}
    for name, tensor in placed.items():
        assert tensor.shape == values.shape and tensor.dtype == values.dtype
        if name == "expanded":
            assert torch.equal(tensor, values[:1].expand(shape)) and (shape[0] < 2 or tensor.stride(0) == 0)
        elif name == "constant":
            assert set(tensor.stride()) == {0} and (values.numel() == 0 or (tensor == values.flatten()[0]).all())
        else:
            assert torch.equal(tensor, values)
    if values.numel():
        assert placed["contiguous"].is_contiguous() and placed["strided"].stride(-1) == 2
        assert placed["offset"].storage_offset() == 1 and placed["offset"].data_ptr() % 8 == 4
        assert not placed["gaps"].is_contiguous() and placed["gaps"].stride(-1) == 1
        assert not placed["chunk"].is_contiguous() and placed["chunk"].storage_offset() > 0
        if len(shape) == 4:
            _, h, n, d = shape
            assert placed["permuted"].stride() == (n * h * d, d, h * d, 1)
            assert placed["chunk"].stride() == (n * 3 * h * d, d, 3 * h * d, 1)


@given(layouts(3, last_stride_1=True))
def test_last_stride_1_is_kept(layout):
    assert place(torch.randn(2, 3, 4), layout).stride(-1) == 1


@given(attention_cases())
def test_attention_cases(case):
    q, k, v = case.tensors()
    assert q.shape == case.grad().shape == (case.batch, case.heads, case.n_q, case.head_dim)
    assert k.shape == v.shape == (case.batch, case.heads, case.n_k, case.head_dim)
    assert {t.dtype for t in (q, k, v, case.grad(), case.qkv())} == {case.dtype}
    assert all(torch.equal(one, other) for one, other in zip(case.tensors(), (q, k, v), strict=True))
    assert all(t.isfinite().all() for t in (q, k, v, case.grad()))
    assert case.qkv().shape == (case.batch, case.n_q, 3 * case.heads * case.head_dim)
    if case.packed and q.numel():
        assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@given(layer_norm_cases())
def test_layer_norm_cases(case):
    x, norm_weight, norm_bias, weight, bias = case.tensors()
    y = torch.nn.functional.linear(x * norm_weight + norm_bias, weight, bias)
    assert y.shape == case.grad().shape and y.dtype == case.dtype and x.dim() == len(case.rows) + 1
    assert (bias is not None) == case.has_bias
    assert x.numel() < 500 or x.double().mean().sub(case.mean).abs() < 5 + abs(case.mean) * 1e-3
