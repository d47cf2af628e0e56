// The backward passes of LayerNorm and of GELU, with the gradient of the bias before it, on a CPU: what compiled.py
// compiles beside cpu_attention.cpp. With g = dy gamma and x̂ = (x - mean) rstd, in rows of k columns,
//     dx = rstd (g - Σ g / k - x̂ Σ (g x̂) / k),   dgamma = Σ_rows dy x̂,   dbeta = Σ_rows dy,   normed = x̂ gamma + beta
// The statistics are computed again, from x less its mean, so that they are right where the mean is large beside the
// spread. All is in fp32; bf16 is rounded when it is stored. Sums over rows are made of sums over blocks of rows, whose
// sizes depend on the number of rows only: so the bits do not depend on the number of threads.

#include <type_traits>

#include "cpu_vectors.h"

constexpr int64_t ROWS = 8, MOST_BLOCKS = 512;  // of rows: the least in a block, and the most blocks
constexpr int64_t LEAST = 1 << 14;              // numbers, below which one thread is as fast as several

extern "C" {

struct NormBackward {  // x, dx (rows, k) in X, dy, normed (rows, k) in Y, the others (k) in P; results may be null
  const void *x, *dy, *gamma, *beta;
  void *dx, *dgamma, *dbeta, *normed;
  int64_t rows, k;
  float eps;
  int threads;
};

struct GeluBackward {  // z, grad, dz (rows, n) in bf16; sums of dz over rows (n), in P, or null
  const void *z, *grad;
  void *dz, *sums;
  int64_t rows, n;
  int tanh, threads;
};
}

// vectors at the end of a row, of `count` numbers; where count is less than L the others are `rest`, and not stored
template <class T>
static inline vec load(const T* p, int64_t count, float rest = 0) {
  if (count >= L) return load(p);
  vec v = all(rest);
  for (int64_t i = 0; i < count; i++) v[i] = widen(p[i]);
  return v;
}
template <class T>
static inline void store(T* p, vec v, int64_t count) {
  if (count >= L) return store(p, v);
  for (int64_t i = 0; i < count; i++) narrow(v[i], p + i);
}

// some(j, count) for each vector of n numbers, that of `count` from j on, which only the last one need not fill
template <class F>
static inline void in_vectors(int64_t n, F some) {
  int64_t j = 0;
  for (; j + L <= n; j += L) some(j, std::integral_constant<int64_t, L>());
  if (j < n) some(j, n - j);
}

// block(first, last, sums) adds rows first to last up in `width` floats; their sum over all rows is given to
// result(i, sum) for each i. Not 0 where there is no memory.
template <class Block, class Result>
static int by_blocks(int64_t rows, int64_t width, int threads, Block block, Result result) {
  const int64_t size = std::max(ROWS, (rows + MOST_BLOCKS - 1) / MOST_BLOCKS), blocks = (rows + size - 1) / size;
  float* sums = static_cast<float*>(std::malloc(sizeof(float) * (blocks + 1) * width));
  if (sums == nullptr) return 1;
#pragma omp parallel num_threads(rows* width < LEAST ? 1 : threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; i++) block(i * size, std::min(rows, (i + 1) * size), sums + i * width);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < width; part += 64) {
      const int64_t end = std::min(part + 64, width);
      float of_part[64] = {};
      for (int64_t i = 0; i < blocks; i++)
        for (int64_t j = part; j < end; j++) of_part[j - part] += sums[i * width + j];
      for (int64_t j = part; j < end; j++) result(j, of_part[j - part]);
    }
  }
  std::free(sums);
  return 0;
}

template <class X, class Y, class P>
static int norm_backward(const NormBackward& f) {
  const int64_t k = f.k;
  const X* const x = static_cast<const X*>(f.x);
  const Y* const dy = static_cast<const Y*>(f.dy);
  const P *const gamma = static_cast<const P*>(f.gamma), *const beta = static_cast<const P*>(f.beta);
  X* const dx = static_cast<X*>(f.dx);
  Y* const normed = static_cast<Y*>(f.normed);

  auto some_rows = [=](int64_t first, int64_t last, float* sums) {
    for (int64_t top = first; top < last; top += ROWS) {
      const int64_t count = std::min(ROWS, last - top);
      float mean[ROWS], shift[ROWS], rstd[ROWS], of_g[ROWS], of_gx[ROWS];  // x̂ = ((x - mean) - shift) rstd
      for (int64_t r = 0; r < count; r++) {
        const X* row = x + (top + r) * k;
        const Y* dy_row = dy + (top + r) * k;
        vec s = {};
        in_vectors(k, [&](int64_t j, auto count) { s += load(row + j, count); });
        mean[r] = total(s) / k;
        vec d1 = {}, d2 = {}, g1 = {}, gd = {};
        in_vectors(k, [&](int64_t j, auto count) {
          const vec d = load(row + j, count, mean[r]) - mean[r], g = load(dy_row + j, count) * load(gamma + j, count);
          d1 += d;
          d2 += d * d;
          g1 += g;
          gd += g * d;
        });
        shift[r] = total(d1) / k;
        rstd[r] = 1 / std::sqrt(std::max(total(d2) / k - shift[r] * shift[r], 0.0f) + f.eps);
        of_g[r] = total(g1) / k;
        of_gx[r] = (total(gd) / k - shift[r] * of_g[r]) * rstd[r];
      }
      in_vectors(k, [&](int64_t j, auto width) {
        const vec weight = load(gamma + j, width), bias = load(beta + j, width);
        vec dgamma = {}, dbeta = {};
        for (int64_t r = 0; r < count; r++) {
          const int64_t at = (top + r) * k + j;
          const vec y = load(dy + at, width), xhat = (load(x + at, width) - mean[r] - shift[r]) * rstd[r];
          if (dx) store(dx + at, rstd[r] * (y * weight - of_g[r] - xhat * of_gx[r]), width);
          if (normed) store(normed + at, xhat * weight + bias, width);
          dgamma += y * xhat;
          dbeta += y;
        }
        store(sums + j, top > first ? load(sums + j, width) + dgamma : dgamma, width);
        store(sums + k + j, top > first ? load(sums + k + j, width) + dbeta : dbeta, width);
      });
    }
  };
  auto results = [=](int64_t i, float sum) {
    void* to = i < k ? f.dgamma : f.dbeta;
    if (to) narrow(sum, static_cast<P*>(to) + i % k);
  };
  return by_blocks(f.rows, 2 * k, f.threads, some_rows, results);
}

// z -> gelu'(z), of several vectors; gelu.py's forms for half precision, to a seventh of half of bf16's step: see there
template <int U>
static inline void gelu_derivative(vec (&z)[U]) {
  vec a[U], q[U];
  for (int u = 0; u < U; u++) {
    a[u] = z[u] < 0.0f ? -z[u] : z[u];
    a[u] = a[u] > 13.5f ? all(13.5f) : a[u];
    q[u] = all(-5.6252785e-09f);
  }
  for (const float c : {3.6948862e-07f, -1.0396025e-05f, 0.00016464011f, -0.001628394f, 0.010628553f, -0.04775092f,
                        -0.56658816f, -0.38130713f, -0.58850294f})
    for (int u = 0; u < U; u++) q[u] = q[u] * a[u] + c;
  powers_of_2(q);
  for (int u = 0; u < U; u++) {
    const vec r = (0.7517915246935645f - a[u]) * q[u];
    z[u] = z[u] > 0.0f ? 1.0f - r : r;
  }
}

template <int U>
static inline void gelu_tanh_derivative(vec (&z)[U]) {
  vec a[U], e[U];
  for (int u = 0; u < U; u++) {
    a[u] = z[u] < 0.0f ? -z[u] : z[u];
    a[u] = a[u] > 13.5f ? all(13.5f) : a[u];
    e[u] = -a[u] * (2.3022081985f + 0.1029432397f * a[u] * a[u]);
  }
  powers_of_2(e);  // e^-2t, where the formula has tanh t
  for (int u = 0; u < U; u++) {
    const vec s = 1.0f / (1.0f + e[u]), rest = e[u] * s;
    const vec slope = z[u] * s * rest * (1.5957691216057308f * (1.0f + 0.134145f * a[u] * a[u]));
    z[u] = (z[u] > 0.0f ? s : rest) + slope;
  }
}

template <class P, bool tanh>
static int gelu_backward(const GeluBackward& f) {
  const uint16_t *const z = static_cast<const uint16_t*>(f.z), *const grad = static_cast<const uint16_t*>(f.grad);
  uint16_t* const dz = static_cast<uint16_t*>(f.dz);
  const int64_t n = f.n;

  auto some_rows = [=](int64_t first, int64_t last, float* sums) {
    in_vectors(n, [&](int64_t j, auto count) {
      vec sum = {};
      auto rows = [&](int64_t top, auto number) {
        vec slope[number];
        for (int u = 0; u < number; u++) slope[u] = load(z + (top + u) * n + j, count);
        if constexpr (tanh) gelu_tanh_derivative(slope);
        else gelu_derivative(slope);
        for (int u = 0; u < number; u++) {
          const int64_t at = (top + u) * n + j;
          const vec d = load(grad + at, count) * slope[u];
          store(dz + at, d, count);
          sum += d;
        }
      };
      int64_t top = first;
      for (; top + 4 <= last; top += 4) rows(top, std::integral_constant<int, 4>());
      for (; top < last; top++) rows(top, std::integral_constant<int, 1>());
      store(sums + j, sum, count);
    });
  };
  P* const sums = static_cast<P*>(f.sums);
  return by_blocks(f.rows, n, f.threads, some_rows, [=](int64_t i, float sum) {
    if (sums) narrow(sum, sums + i);
  });
}

extern "C" int norm_backward_fp32_fp32(const NormBackward* f) { return norm_backward<float, float, float>(*f); }
#if defined(HAS_FP16)
extern "C" int norm_backward_fp16_fp16(const NormBackward* f) { return norm_backward<fp16, fp16, fp16>(*f); }
#endif
extern "C" int norm_backward_fp32_bf16(const NormBackward* f) { return norm_backward<float, uint16_t, float>(*f); }
extern "C" int norm_backward_bf16_bf16(const NormBackward* f) { return norm_backward<uint16_t, uint16_t, uint16_t>(*f); }
extern "C" int gelu_backward_fp32(const GeluBackward* f) {
  return f->tanh ? gelu_backward<float, true>(*f) : gelu_backward<float, false>(*f);
}
extern "C" int gelu_backward_bf16(const GeluBackward* f) {
  return f->tanh ? gelu_backward<uint16_t, true>(*f) : gelu_backward<uint16_t, false>(*f);
}
