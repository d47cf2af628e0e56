"""Arguments that the functions do not take: each error names the argument, its value and what is allowed."""

import pytest
import torch
from parity import F32, OperatorLog
from vitriton.kernels import attention, layer_norm_linear, qkv_attention


def t(*shape, dtype=F32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def lnl(x=(3, 8), norm_weight=(8,), norm_bias=(8,), weight=(4, 8), bias=(4,), **keywords):
    args = (a if isinstance(a, torch.Tensor) else t(*a) for a in (x, norm_weight, norm_bias, weight, bias))
    return lambda: layer_norm_linear(*args, **keywords)


Q = t(1, 2, 5, 16)
ERRORS = {
    "q of rank 3": (lambda: attention(Q[0], Q, Q), ValueError, r"q has shape \(2, 5, 16\).* 4 dims"),
    "v of rank 5": (lambda: attention(Q, Q, Q[None]), ValueError, r"v has shape \(1, 1, 2, 5, 16\).* 4 dims"),
    "other keys than values": (
        lambda: attention(Q, Q, Q[:, :, :4]),
        ValueError,
        r"\(1, 2, 4, 16\); k and v must be alike",
    ),
    "other heads": (lambda: attention(Q[:, :1], Q, Q), ValueError, r"\(1, 1, 5, 16\).*have q's batch, heads"),
    "other batch": (lambda: attention(Q[:0], Q, Q), ValueError, r"\(0, 2, 5, 16\).*have q's batch"),
    "other head dim": (lambda: attention(Q[..., :9], Q, Q), ValueError, r"\(1, 2, 5, 9\).*and head dim"),
    "head dim 300": (lambda: attention(*[t(1, 1, 2, 300)] * 3), ValueError, "head dim is 300; allowed are 8 to 256"),
    "head dim 7": (lambda: attention(*[t(1, 1, 2, 7)] * 3), ValueError, "head dim is 7; allowed are 8 to 256"),
    "heads beyond a grid": (lambda: attention(*[t(1, 70_000, 2, 8)] * 3), ValueError, r"70000.*65535"),
    "integers": (lambda: attention(*[Q.long()] * 3), TypeError, "q has dtype torch.int64; allowed are torch.float16"),
    "complex": (lambda: attention(*[Q.cfloat()] * 3), TypeError, "q has dtype torch.complex64; allowed are"),
    "mixed dtypes": (lambda: attention(Q, Q.half(), Q), TypeError, "k has dtype torch.float16 and q has torch.float32"),
    "mixed devices": (lambda: attention(Q, Q, Q.to("meta")), ValueError, "v is on meta and q on cpu: move one"),
    "scale nan": (lambda: attention(Q, Q, Q, scale=float("nan")), ValueError, "scale is nan; a finite number"),
    "scale inf": (lambda: attention(Q, Q, Q, scale=float("inf")), ValueError, "scale is inf; a finite number"),
    "scale a tensor": (lambda: attention(Q, Q, Q, scale=t()), ValueError, r"scale is tensor.*finite number"),
    "qkv of rank 2": (lambda: qkv_attention(t(5, 48), 2), ValueError, r"qkv has shape \(5, 48\).* 3 dims"),
    "heads that do not divide": (lambda: qkv_attention(t(1, 5, 48), 5), ValueError, "heads is 5 and qkv's last dim 48"),
    "no heads": (lambda: qkv_attention(t(1, 5, 48), 0), ValueError, "heads is 0.* must be positive"),
    "qkv with head dim 300": (
        lambda: qkv_attention(t(1, 5, 900), 1),
        ValueError,
        "head dim is 300; allowed are 8 to 256",
    ),
    "qkv of integers": (
        lambda: qkv_attention(t(1, 5, 48).int(), 2),
        TypeError,
        "qkv has dtype torch.int32; allowed are",
    ),
    "qkv scale": (lambda: qkv_attention(t(1, 5, 48), 2, scale=-float("inf")), ValueError, "scale is -inf"),
    "x without dims": (lnl(x=()), ValueError, r"x has shape \(\) and weight \(4, 8\)"),
    "other features": (lnl(x=(3, 7)), ValueError, r"x has shape \(3, 7\) and weight \(4, 8\); weight must be \(N,K\)"),
    "no features": (lnl((3, 0), (0,), (0,), (4, 0)), ValueError, r"weight \(4, 0\).* at least 1"),
    "weight of rank 3": (lnl(weight=(1, 4, 8)), ValueError, r"weight \(1, 4, 8\); weight must be \(N,K\)"),
    "norm_weight": (lnl(norm_weight=(1,)), ValueError, r"norm_weight has shape \(1,\).* must be \(8,\)"),
    "norm_bias": (lnl(norm_bias=(8, 1)), ValueError, r"norm_bias has shape \(8, 1\).* must be \(8,\)"),
    "bias": (lnl(bias=(8,)), ValueError, r"bias has shape \(8,\).* must be \(4,\)"),
    "activation": (lnl(activation="relu"), ValueError, "activation is 'relu'; allowed are None, 'gelu', 'gelu_tanh'"),
    "eps negative": (lnl(eps=-1e-5), ValueError, "eps is -1e-05; a number of at least 0"),
    "eps nan": (lnl(eps=float("nan")), ValueError, "eps is nan; a number of at least 0"),
    "x of integers": (lnl(x=t(3, 8).int()), TypeError, "x has dtype torch.int32; allowed are torch.float16"),
    "x half, weight not": (lnl(x=t(3, 8).half()), TypeError, "x has dtype torch.float16 and weight has torch.float32"),
    "x double": (lnl(x=t(3, 8).double()), TypeError, "x has dtype torch.float64 and weight has torch.float32"),
    "bias double": (lnl(bias=t(4).double()), TypeError, "bias has dtype torch.float64 and weight has torch.float32"),
    "norm half, x not": (lnl(norm_weight=t(8).half()), TypeError, "norm_weight has dtype torch.float16 and x has"),
    "norms that differ": (
        lnl(norm_bias=t(8).half()),
        TypeError,
        "norm_bias has dtype torch.float16 and norm_weight has",
    ),
    "weight elsewhere": (lnl(weight=t(4, 8, device="meta")), ValueError, "x is on cpu and weight on meta: move one"),
    "bias elsewhere": (lnl(bias=t(4, device="meta")), ValueError, "bias is on meta and weight on cpu: move one"),
    "norm_bias elsewhere": (
        lnl(norm_bias=t(8, device="meta")),
        ValueError,
        "norm_bias is on meta and norm_weight on cpu",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case, launch_log):
    """The error says which argument, its value and what is allowed, and comes before anything is computed."""
    call, error, message = ERRORS[case]
    with OperatorLog() as called, pytest.raises(error, match=message):
        call()
    assert called.names == [] and launch_log == []
