"""GELU and its derivative inside a kernel: Hendrycks and Gimpel 2016, with erf or with tanh.

Results that are stored in fp32 or fp64 come from the formulas themselves. For fp16 and bf16 (HALF) they come from forms
of a fraction of the instructions, whose error is far below the rounding of the result. With a = |z|, Φ the normal
distribution function and φ its density:

    gelu(z)  = max(z, 0) - a Φ(-a)               Φ(-a)          = exp2(p(a))
    gelu'(z) = r, or 1 - r where z > 0           r = Φ(-a) - a φ(a) = (a₀ - a) exp2(q(a)),  r(a₀) = 0

p and q are polynomials of least maximal error against log2 of what they stand for (linear programming over several
hundred points; every value of fp16 for p). Logarithms keep the error relative where 1 + erf in fp32 has nothing left
(z below -5), and a₀ keeps it at the zero of gelu'. The largest distance from the true value before the result is
rounded, in halves of the step (ulp) of the dtype that it will be rounded to:

    gelu     fp16 0.28, bf16 0.035. In bf16 below z = -4.6 it is 0.28 of half of fp16's smallest step, or 8e-9, where
             erf in fp32 gives 1e-7; the result goes to 0
    gelu'    fp16 0.29, bf16 0.13, down to 2⁻²⁵ and 2⁻¹²⁶; below that absolute
    tanh     the formula but for the rounding of fp32: gelu 0.003, gelu' 0.011, at its zero in fp16 0.43

The tanh form is z / (1 + e) with e = exp2(-z (k₀ + k₁ z²)); a reciprocal square root, squared, takes fewer instructions
than a division. Infinities give their limits in the erf form (gelu ∞ and 0, gelu' 1 and 0), and what PyTorch gives in
the tanh form (gelu ∞ and NaN, gelu' NaN); NaN gives NaN.
"""

import triton
import triton.language as tl


@triton.jit
def gelu(z, TANH: tl.constexpr, HALF: tl.constexpr):
    """gelu(z), z in fp32 (fp64). HALF: the result will be rounded to fp16 or bf16."""
    if TANH and HALF:
        r = tl.rsqrt(1.0 + tl.exp2(z * (-2.3022081985 - 0.1029432397 * z * z)))  # 2 sqrt(2 / π) log2(e), times 0.044715
        return z * r * r
    elif TANH:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 2 sqrt(2 / π)
    elif HALF:
        # from 16 on exp2(p) is 0; a bound, so that inf times 0 does not arise
        a = tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)
        p = -0.00033071518 * a + 0.0059260083
        p = p * a - 0.048572171
        p = p * a - 0.46364439
        p = p * a - 1.1494374
        p = p * a - 1.0000964
        return tl.maximum(z, 0.0) - a * tl.exp2(p)
    else:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_derivative(z, TANH: tl.constexpr, HALF: tl.constexpr):
    """gelu'(z), z in fp32 (fp64). HALF: the result will be rounded to fp16 or bf16."""
    if TANH:
        if HALF:
            r = tl.rsqrt(1.0 + tl.exp2(z * (-2.3022081985 - 0.1029432397 * z * z)))
            s = r * r
        else:
            s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))
    elif HALF:
        a = tl.minimum(tl.abs(z), 13.5, propagate_nan=tl.PropagateNan.ALL)
        q = -5.6252785e-09 * a + 3.6948862e-07
        q = q * a - 1.0396025e-05
        q = q * a + 0.00016464011
        q = q * a - 0.001628394
        q = q * a + 0.010628553
        q = q * a - 0.04775092
        q = q * a - 0.56658816
        q = q * a - 0.38130713
        q = q * a - 0.58850294
        r = (0.7517915246935645 - a) * tl.exp2(q)
        return tl.where(z > 0.0, 1.0 - r, r)
    else:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
