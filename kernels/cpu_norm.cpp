// The backward pass of LayerNorm on a CPU: what compiled.py compiles beside cpu_attention.cpp. With g = dy gamma and x̂ = (x - mean) rstd, in rows of k columns,
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

extern "C" int norm_backward_fp32_fp32(const NormBackward* f) { return norm_backward<float, float, float>(*f); }
extern "C" int norm_backward_fp32_bf16(const NormBackward* f) { return norm_backward<float, uint16_t, float>(*f); }
extern "C" int norm_backward_bf16_bf16(const NormBackward* f) { return norm_backward<uint16_t, uint16_t, uint16_t>(*f); }
