"""The operators `torch.ops.vitriton.*`: schemas, shapes, autograd and flop formulas.

The operators are what autograd, torch.compile and torch.export see. Each carries the caller's choice of backend, so
that a backward pass runs where its forward pass ran.
"""

import math
from functools import wraps

import torch
from torch.utils.flop_counter import register_flop_formula

from . import native, reference
from .backend import takes_triton
from .configs import splits
from .direct import mode, watched
from .launch import accumulator, chip_of, triton

if triton is not None:
    from .attention import attention_forward as triton_attention_forward
    from .attention_backward import attention_backward as triton_attention_backward
    from .prenorm import layer_norm_linear_forward as triton_layer_norm_linear_forward
    from .prenorm_backward import layer_norm_linear_backward as triton_layer_norm_linear_backward

# ---------------------------------------------------------------------------------------------------------------------
# The operators

library = torch.library.Library("vitriton", "DEF")


def _operator(schema, implementation, fake):
    """Define an operator that takes tensors of any strides, with one implementation for every device."""

    @wraps(implementation)
    def without_autocast(*args):  # which is done with, and would cast what the implementation keeps in fp32
        device_type = args[0].device.type
        if not torch.is_autocast_enabled(device_type):
            return implementation(*args)
        with torch.autocast(device_type, enabled=False):
            return implementation(*args)

    name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    library.impl(name, without_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vitriton::{name}", fake, lib=library)
    return getattr(torch.ops.vitriton, name)


def _new_heads(x, b, h, n, d):
    """An uninitialised (B,H,N,D) laid out in memory as (B,N,H,D)."""
    return x.new_empty(b, n, h, d).transpose(1, 2)


def _as_own(x, shape):
    """x in another shape, its memory shared, but no view to autograd: a result that users may change in place."""
    return torch.ops.aten._unsafe_view.default(x, shape)


def _split(qkv, heads):
    """(B,N,3*H*D) -> its q, k and v as views (B,H,N,D)."""
    b, n, width = qkv.shape
    return qkv.view(b, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind()


def _attention(q, k, v, scale, backend, *, with_lse=True):
    """out and, for the backward pass of the same implementation only, the log-sum-exp of each query."""
    if q.numel() and k.numel():
        if takes_triton(backend, q):
            return triton_attention_forward(q, k, v, scale)
        return native.attention_forward(q, k, v, scale, with_lse=with_lse)
    takes_triton(backend, q)  # which raises if the backend cannot run
    # no query or no key: nothing to launch, and PyTorch's fused operator fails there
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype))
    return _new_heads(q, *q.shape).zero_(), lse


def _attention_into(grad, q, k, v, out, lse, scale, backend, grads):
    backward = triton_attention_backward if takes_triton(backend, q) else native.attention_backward
    if q.numel() and k.numel():
        backward(grad, q, k, v, out, lse, scale, *grads)
        if k.shape[2] == 1:  # a softmax over one key is constant; ds = p (dp - delta) is 0 but for rounding
            grads[0].mul_(0)
            grads[1].mul_(0)
    else:
        for g in grads:
            g.zero_()


def _attention_fake(q, k, v, scale, backend):
    return _new_heads(q, *q.shape), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _attention_backward(grad, q, k, v, out, lse, scale, backend):
    grads = _attention_backward_fake(grad, q, k, v, out, lse, scale, backend)
    _attention_into(grad, q, k, v, out, lse, scale, backend, grads)
    return grads


def _attention_backward_fake(grad, q, k, v, out, lse, scale, backend):
    return tuple(_new_heads(t, *t.shape) for t in (q, k, v))


def _qkv_attention(qkv, heads, scale, backend, *, with_lse=True):
    out, lse = _attention(*_split(qkv, heads), scale, backend, with_lse=with_lse)
    return _as_own(out.transpose(1, 2), (qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)), lse


def _qkv_attention_fake(qkv, heads, scale, backend):
    b, n, width = qkv.shape
    return qkv.new_empty(b, n, width // 3), qkv.new_empty(b, heads, n, dtype=accumulator(qkv.dtype))


def _qkv_attention_backward(grad, qkv, out, lse, heads, scale, backend):
    b, n, width = qkv.shape
    natively = b and n > 1 and width and not takes_triton(backend, qkv)
    if natively and native.images_by_products(qkv, heads * n * n):
        return native.qkv_attention_backward(grad, native.heads_apart(qkv, heads), scale)
    dqkv = qkv.new_empty(qkv.shape)
    grad, out = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (grad, out))
    _attention_into(grad, *_split(qkv, heads), out, lse, scale, backend, _split(dqkv, heads))
    return dqkv


def _qkv_attention_backward_fake(grad, qkv, out, lse, heads, scale, backend):
    return qkv.new_empty(qkv.shape)


def _layer_norm_linear_takes_triton(x, weight, backend):
    both = takes_triton(backend, x) and (x.dtype == weight.dtype or takes_triton(backend, weight))
    if not both or x.numel() == 0 or weight.numel() == 0:  # PyTorch knows what to do with nothing
        return False
    return backend == "triton" or not splits(chip_of(x.device), weight)


def _layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation, save, backend, *, may_pack=True):
    if not _layer_norm_linear_takes_triton(x, weight, backend):
        return native.layer_norm_linear_forward(
            x, norm_weight, norm_bias, weight, bias, eps, activation, save, may_pack=may_pack
        )
    rows = x.reshape(-1, x.shape[-1])
    y, z, mean, rstd = triton_layer_norm_linear_forward(
        rows, norm_weight, norm_bias, weight, bias, eps, activation, save
    )
    shape = (*x.shape[:-1], weight.shape[0])
    return _as_own(y, shape), None if z is None else z.view(shape), mean, rstd


def _layer_norm_linear_all(x, norm_weight, norm_bias, weight, *args):
    y, z, mean, rstd = _layer_norm_linear(x, norm_weight, norm_bias, weight, *args)
    return y, weight.new_empty(0) if z is None else z, mean.view(-1), rstd.view(-1)


def _layer_norm_linear_fake(x, norm_weight, norm_bias, weight, bias, eps, activation, save, backend):
    shape = (*x.shape[:-1], weight.shape[0])
    statistics = x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype)).view(-1)
    z = weight.new_empty(shape) if save else weight.new_empty(0)
    return weight.new_empty(shape), z, statistics, torch.empty_like(statistics)


def _layer_norm_linear_backward(
    grad, x, norm_weight, norm_bias, weight, bias, z, mean, rstd, eps, activation, need_dx, need_dw, backend
):
    parameters, how = (norm_weight, norm_bias, weight, bias), (eps, activation, need_dx, need_dw)
    if _layer_norm_linear_takes_triton(x, weight, backend):
        (n, k), m = weight.shape, mean.numel()
        rows, z = x.reshape(m, k), z.reshape(m, n)
        dx, dw = triton_layer_norm_linear_backward(grad.reshape(m, n), rows, *parameters, z, mean, rstd, *how)
        dx = dx if dx is None else dx.view(x.shape)
    else:
        dx, dw = native.layer_norm_linear_backward(grad, x, *parameters, z, mean, rstd, *how)
    if need_dx and x.shape[-1] == 1:  # x̂ of one feature is 0 whatever x is; dz W' - s1 is 0 but for rounding
        dx.mul_(0)
    return dx, *(dw or (None,) * 4)


def _layer_norm_linear_backward_all(grad, x, *args):
    grads = _layer_norm_linear_backward(grad, x, *args)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _layer_norm_linear_backward_fake(
    grad, x, norm_weight, norm_bias, weight, bias, z, mean, rstd, eps, activation, need_dx, need_dw, backend
):
    parameters = (norm_weight, norm_bias, weight, bias)
    dx = x.new_empty(x.shape if need_dx else 0)
    return dx, *(x.new_empty(0) if t is None or not need_dw else t.new_empty(t.shape) for t in parameters)


attention = _operator(
    "attention(Tensor q, Tensor k, Tensor v, float scale, str backend) -> (Tensor out, Tensor lse)",
    _attention,
    _attention_fake,
)
attention_backward = _operator(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    _attention_backward,
    _attention_backward_fake,
)
qkv_attention = _operator(
    "qkv_attention(Tensor qkv, SymInt heads, float scale, str backend) -> (Tensor out, Tensor lse)",
    _qkv_attention,
    _qkv_attention_fake,
)
qkv_attention_backward = _operator(
    "qkv_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, SymInt heads, float scale, str backend)"
    " -> Tensor dqkv",
    _qkv_attention_backward,
    _qkv_attention_backward_fake,
)
layer_norm_linear = _operator(
    "layer_norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, float eps,"
    " str? activation, bool save_preactivation, str backend)"
    " -> (Tensor y, Tensor preactivation, Tensor mean, Tensor rstd)",
    _layer_norm_linear_all,
    _layer_norm_linear_fake,
)
layer_norm_linear_backward = _operator(
    "layer_norm_linear_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight,"
    " Tensor? bias, Tensor preactivation, Tensor mean, Tensor rstd, float eps, str? activation, bool need_dx,"
    " bool need_dw, str backend)"
    " -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight, Tensor dbias)",
    _layer_norm_linear_backward_all,
    _layer_norm_linear_backward_fake,
)

# ---------------------------------------------------------------------------------------------------------------------
# Gradients. The backward operators are differentiable too, through the plain formulas (which do make an N x N map).


def _differentiate_twice(function, grad, inputs, grads_of_gradients):
    """The gradients, with respect to grad and each input, of sum(grads_of_gradients * gradients of `function`)."""
    with torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_() for t in (grad, *inputs)]
        asked = [
            (t, gg) for t, gg in zip(leaves[1:], grads_of_gradients, strict=True) if t is not None and gg is not None
        ]
        first = torch.autograd.grad(function(*leaves[1:]), [t for t, _ in asked], leaves[0], create_graph=True)
        wrt = [t for t in leaves if t is not None]
        second = iter(torch.autograd.grad(first, wrt, [gg for _, gg in asked], allow_unused=True))
    return [None if t is None else next(second) for t in leaves]


def _attention_setup(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _attention_grad(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    return *_call(attention_backward, _attention_backward, grad, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None


def _attention_backward_setup(ctx, inputs, output):
    grad, q, k, v, _, _, ctx.scale, _ = inputs
    ctx.save_for_backward(grad, q, k, v)


def _attention_backward_grad(ctx, *grads_of_gradients):
    grad, *inputs = ctx.saved_tensors

    def function(q, k, v):
        return reference.attention(q, k, v, scale=ctx.scale)

    return *_differentiate_twice(function, grad, inputs, grads_of_gradients), None, None, None, None


def _qkv_attention_setup(ctx, inputs, output):
    qkv, ctx.heads, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)


def _qkv_attention_grad(ctx, grad, *_):
    if grad is None:
        return (None,) * 4
    args = grad, *ctx.saved_tensors, ctx.heads, ctx.scale, ctx.backend
    return _call(qkv_attention_backward, _qkv_attention_backward, *args), None, None, None


def _qkv_attention_backward_setup(ctx, inputs, output):
    grad, qkv, _, _, ctx.heads, ctx.scale, _ = inputs
    ctx.save_for_backward(grad, qkv)


def _qkv_attention_backward_grad(ctx, grad_of_gradient):
    grad, qkv = ctx.saved_tensors

    def function(qkv):
        return reference.qkv_attention(qkv, ctx.heads, scale=ctx.scale)

    return *_differentiate_twice(function, grad, [qkv], [grad_of_gradient]), None, None, None, None, None


def _layer_norm_linear_setup(ctx, inputs, output):
    x, norm_weight, norm_bias, weight, bias, ctx.eps, ctx.activation, save, ctx.backend = inputs
    y, z, mean, rstd = output
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, z if save else y, mean, rstd)
    ctx.set_materialize_grads(False)


def _layer_norm_linear_grad(ctx, grad, *_):
    need_dx, *need_dw = ctx.needs_input_grad[:5]
    if grad is None:
        return (None,) * 9
    args = grad, *ctx.saved_tensors, ctx.eps, ctx.activation, need_dx, any(need_dw), ctx.backend
    grads = _call(layer_norm_linear_backward, _layer_norm_linear_backward, *args)
    needed = zip(grads, ctx.needs_input_grad[:5], strict=True)
    return *(g if need else None for g, need in needed), None, None, None, None


def _layer_norm_linear_backward_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.eps, ctx.activation, ctx.need_dx, ctx.need_dw, _ = inputs[9:]


def _layer_norm_linear_backward_grad(ctx, *grads_of_gradients):
    grad, *inputs = ctx.saved_tensors

    def function(*inputs):
        return reference.layer_norm_linear(*inputs, eps=ctx.eps, activation=ctx.activation)

    needed = (ctx.need_dx, *(ctx.need_dw,) * 4)
    grads_of_gradients = [gg if need else None for gg, need in zip(grads_of_gradients, needed, strict=True)]
    return *_differentiate_twice(function, grad, inputs, grads_of_gradients), *(None,) * 8


def _differentiable(op, setup, grad):
    """Register the gradient of `op`, whose first result is the only one to be differentiated."""

    def setup_context(ctx, inputs, output):
        setup(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    torch.library.register_autograd(op.default, grad, setup_context=setup_context, lib=library)


_differentiable(attention, _attention_setup, _attention_grad)
_differentiable(qkv_attention, _qkv_attention_setup, _qkv_attention_grad)
_differentiable(layer_norm_linear, _layer_norm_linear_setup, _layer_norm_linear_grad)
for _op, _setup, _grad in (
    (attention_backward, _attention_backward_setup, _attention_backward_grad),
    (qkv_attention_backward, _qkv_attention_backward_setup, _qkv_attention_backward_grad),
    (layer_norm_linear_backward, _layer_norm_linear_backward_setup, _layer_norm_linear_backward_grad),
):
    torch.library.register_autograd(_op.default, _grad, setup_context=_setup, lib=library)

# ---------------------------------------------------------------------------------------------------------------------
# The way past PyTorch's dispatcher, where nobody looks at operators. An operator that is written in Python takes
# hundreds of microseconds a call with its caches cold, as long as LayerNorm + Linear of a small ViT takes on a CPU;
# torch.autograd.Function, in its older form, takes no more than PyTorch's own functions.


def _call(op, implementation, *args):
    if torch.is_grad_enabled() or mode():  # a backward pass of what was not watched has no subclasses either
        return op(*args)
    return implementation(*args)


def _callable(op, implementation, setup, grad, *, in_training=None, in_inference=None):
    """`op` or what comes to the same, but for its first result only.

    `in_training` and `in_inference` are keyword arguments of `implementation` where there is a backward pass to come,
    and where there is none.
    """
    in_training, in_inference = in_training or {}, in_inference or {}

    def forward(ctx, *args):
        output = implementation(*args, **in_training)
        setup(ctx, args, output)
        return output[0]

    members = {"forward": staticmethod(forward), "backward": staticmethod(grad)}
    function = type(implementation.__name__, (torch.autograd.Function,), members)

    def call(*args, needs_grad):
        if watched(args):
            return op(*args)[0]
        return function.apply(*args) if needs_grad else implementation(*args, **in_inference)[0]

    return call


call_attention = _callable(attention, _attention, _attention_setup, _attention_grad, in_inference={"with_lse": False})
call_qkv_attention = _callable(
    qkv_attention, _qkv_attention, _qkv_attention_setup, _qkv_attention_grad, in_inference={"with_lse": False}
)
call_layer_norm_linear = _callable(
    layer_norm_linear,
    _layer_norm_linear,
    _layer_norm_linear_setup,
    _layer_norm_linear_grad,
    in_training={"may_pack": False},
)


# ---------------------------------------------------------------------------------------------------------------------
# Floating-point operations of the matrix products, for torch.utils.flop_counter (2 per multiply-add); what a backward
# pass recomputes counts, as it does for PyTorch's own fused attention.


@register_flop_formula(attention)
def _attention_flops(q, k, *args, **kwargs):
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


@register_flop_formula(attention_backward)
def _attention_backward_flops(grad, q, k, *args, **kwargs):
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3]


@register_flop_formula(qkv_attention)
def _qkv_attention_flops(qkv, *args, **kwargs):
    return 4 * qkv[0] * qkv[1] ** 2 * (qkv[2] // 3)


@register_flop_formula(qkv_attention_backward)
def _qkv_attention_backward_flops(grad, qkv, *args, **kwargs):
    return 10 * qkv[0] * qkv[1] ** 2 * (qkv[2] // 3)


@register_flop_formula(layer_norm_linear)
def _layer_norm_linear_flops(x, norm_weight, norm_bias, weight, *args, **kwargs):
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(layer_norm_linear_backward)
def _layer_norm_linear_backward_flops(grad, x, norm_weight, norm_bias, weight, *args, **kwargs):
    need_dx, need_dw = args[6:8]  # after bias, preactivation, mean, rstd, eps and activation
    return 2 * math.prod(x) * weight[0] * (need_dx + need_dw)
