"""Hypothesis strategies for what the kernels take: shapes, dtypes, and every way that a tensor can lie in memory.

    @given(attention_cases())
    def test_attention(device, case):
        q, k, v = case.tensors(device)
        out = attention(q, k, v, scale=case.scale)
        grads = torch.autograd.grad(out, ..., case.grad(device))

    @given(layer_norm_cases(dtypes=[torch.float32]))
    def test_layer_norm_linear(device, case):
        x, norm_weight, norm_bias, weight, bias = case.tensors(device)

Sizes suit the interpreter, at some 10 ms a program. A case prints as what it is made of and gives the same values each
time. Memory that belongs to no element is NaN, and watched while the guards are on.
"""

from dataclasses import dataclass

import torch
from guards import guarded
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float16, torch.float64)  # bf16 is wrong in the interpreter

# how a tensor can lie in memory
LAYOUTS = {
    "contiguous": "as torch.empty gives it",
    "permuted": "dims 1 and 2 swapped in memory, so (B,H,N,D) lies as (B,N,H,D); rank 3 or more",
    "chunk": "the middle third of a packed last dim: (B,H,N,D) lies in (B,N,3*H*D), other ranks (...,D) in (...,3*D)",
    "offset": "one element past an aligned address",
    "gaps": "a slice, in every dim, of something larger",
    "expanded": "stride 0 in the first dim, with the values of its index 0 throughout",
    "constant": "stride 0 in every dim, as the gradient of sum(), with the value of the first element throughout",
    "strided": "the last stride is 2",
}


def place(values, layout):
    """A tensor of the shape and dtype of `values`, laid out as LAYOUTS[layout] says, with its values.

    "expanded" and "constant" repeat values: compute references from the result, not from `values`.
    """
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "permuted":
        return values.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    if layout == "chunk" and values.dim() == 4:
        packed = values.new_full((values.shape[0], values.shape[2], 3, values.shape[1], values.shape[3]), torch.nan)
        return packed[:, :, 1].transpose(1, 2).copy_(values)
    if layout == "chunk":
        return values.new_full((*values.shape[:-1], 3, values.shape[-1]), torch.nan)[..., 1, :].copy_(values)
    if layout == "offset":
        return values.new_full((values.numel() + 1,), torch.nan)[1:].view(values.shape).copy_(values)
    if layout == "gaps":
        larger = values.new_full([n + 3 for n in values.shape], torch.nan)
        return larger[tuple(slice(1, n + 1) for n in values.shape)].copy_(values)
    if layout == "expanded":
        return values[:1].clone().expand(values.shape)
    if layout == "constant":
        return values.new_ones(()).copy_(values.flatten()[0] if values.numel() else torch.ones(())).expand(values.shape)
    if layout == "strided":
        return values.new_full((*values.shape, 2), torch.nan)[..., 0].copy_(values)
    raise ValueError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")


def layouts(rank, *, last_stride_1=False):
    """Strategy: a key of LAYOUTS for this rank; `last_stride_1` leaves out those whose last stride is another."""
    impossible = {"permuted"} if rank < 3 or (rank == 3 and last_stride_1) else set()
    unwanted = {"constant", "strided"} if last_stride_1 else set()
    return st.sampled_from([name for name in LAYOUTS if name not in impossible | unwanted])


def _randn(shape, dtype, seed, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


@dataclass(frozen=True)
class AttentionCase:
    """q (B,H,Nq,D), k and v (B,H,Nk,D). `layouts`: those of q, k, v, unless `packed`, and of the output's gradient."""

    batch: int
    heads: int
    n_q: int
    n_k: int
    head_dim: int
    dtype: torch.dtype
    scale: float | None
    packed: bool  # q, k and v are views of one projection (B,N,3*H*D)
    layouts: tuple[str, str, str, str]
    seed: int

    def tensors(self, device="cpu"):
        """q, k, v."""
        if self.packed:
            packed = self.qkv(device).view(self.batch, self.n_q, 3, self.heads, self.head_dim)
            return tuple(t.transpose(1, 2) for t in packed.unbind(2))
        shapes = [(self.batch, self.heads, n, self.head_dim) for n in (self.n_q, self.n_k, self.n_k)]
        values = [_randn(shape, self.dtype, self.seed + i) for i, shape in enumerate(shapes)]
        return tuple(guarded(place(x.to(device), how)) for x, how in zip(values, self.layouts[:3], strict=True))

    def qkv(self, device="cpu"):
        """The projection (B,Nq,3*H*D) that `qkv_attention` takes, contiguous."""
        shape = (self.batch, self.n_q, 3 * self.heads * self.head_dim)
        return guarded(_randn(shape, self.dtype, self.seed).to(device))

    def grad(self, device="cpu"):
        """A gradient of the output, (B,H,Nq,D)."""
        values = _randn((self.batch, self.heads, self.n_q, self.head_dim), self.dtype, self.seed + 3)
        return guarded(place(values.to(device), self.layouts[3]))


@st.composite
def attention_cases(draw, *, dtypes=DTYPES, last_stride_1=False):
    """Strategy: an AttentionCase; `last_stride_1` for callers that raise on another last stride of q, k and v."""
    lengths = st.sampled_from([1, 2, 16, 17, 33, 50, 64, 65, 97, 15, 31, 63, 129, 0])
    n_q, packed = draw(lengths), draw(st.booleans())
    inputs = layouts(4, last_stride_1=last_stride_1)
    return AttentionCase(
        batch=draw(st.sampled_from([1, 2, 3, 0])),
        heads=draw(st.integers(1, 3)),
        n_q=n_q,
        n_k=n_q if packed else draw(lengths),
        head_dim=draw(st.sampled_from([16, 8, 24, 32, 40, 59, 64, 72, 80, 96, 111, 128])),
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.sampled_from([None, 0.3, -0.5, 4.0, 0.0])),
        packed=packed,
        layouts=(draw(inputs), draw(inputs), draw(inputs), draw(layouts(4))),
        seed=draw(st.integers(0, 999)),
    )


@dataclass(frozen=True)
class LayerNormCase:
    """x (*rows, K) with this mean and std 1, norm_weight and norm_bias (K,), weight (N,K), bias (N,) or None."""

    rows: tuple[int, ...]
    k: int
    n: int
    dtype: torch.dtype
    mean: float
    has_bias: bool
    activation: str | None
    layouts: tuple[str, str, str]  # of x, weight and the output's gradient
    seed: int

    def tensors(self, device="cpu"):
        """x, norm_weight, norm_bias, weight, bias."""
        x = place(_randn((*self.rows, self.k), self.dtype, self.seed, self.mean).to(device), self.layouts[0])
        norm_weight = _randn((self.k,), self.dtype, self.seed + 1).to(device)
        norm_bias = _randn((self.k,), self.dtype, self.seed + 2).to(device)
        weight = _randn((self.n, self.k), torch.float64, self.seed + 3).div(self.k**0.5).to(device, self.dtype)
        bias = _randn((self.n,), self.dtype, self.seed + 4).to(device) if self.has_bias else None
        tensors = (x, norm_weight, norm_bias, place(weight, self.layouts[1]), bias)
        return tuple(None if t is None else guarded(t) for t in tensors)

    def grad(self, device="cpu"):
        """A gradient of the output, (*rows, N)."""
        values = _randn((*self.rows, self.n), self.dtype, self.seed + 5)
        return guarded(place(values.to(device), self.layouts[2]))


@st.composite
def layer_norm_cases(draw, *, dtypes=DTYPES, last_stride_1=False):
    """Strategy: a LayerNormCase of rank 2 to 4; `last_stride_1` for callers that raise on another last stride."""
    rank = draw(st.integers(2, 4))
    sizes = {2: [1, 17, 64, 65, 130, 0], 3: [1, 5, 11, 0], 4: [1, 2, 4, 0]}[rank]
    return LayerNormCase(
        rows=tuple(draw(st.sampled_from(sizes)) for _ in range(rank - 1)),
        k=draw(st.sampled_from([16, 1, 8, 63, 64, 65, 100, 192])),
        n=draw(st.sampled_from([16, 1, 10, 64, 65, 77])),
        dtype=draw(st.sampled_from(dtypes)),
        mean=draw(st.sampled_from([0.0, 1.0, 1e2, -1e4])),
        has_bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "gelu", "gelu_tanh"])),
        layouts=(
            draw(layouts(rank, last_stride_1=last_stride_1)),
            draw(layouts(2, last_stride_1=last_stride_1)),
            draw(layouts(rank)),
        ),
        seed=draw(st.integers(0, 999)),
    )
