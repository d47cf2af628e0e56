// Attention on a CPU: what compiled.py compiles where a g++ is at hand.
//
// A thread takes one head and up to 64 queries at a time, and with C vectors of L queries (or of columns) and R rows in
// registers computes
//     sᵀ = k qᵀ (keys x queries),  m = max s,  p = 2^(factor (s - m)),
//     out = (p v) / (Σ p),  lse = ln 2 (factor m + log2 Σ p)
// so that softmax needs no sum across a vector, and neither k nor v is transposed; and backward, after p again, with its
// own sums,
//     dpᵀ = v doutᵀ,  ds = p (dp - Σ p dp),  dq = scale ds k,  dk = scale dsᵀ q,  dv = pᵀ dout
// All is in fp32; bf16 and fp16 are rounded when they are stored, and so are p and ds where pairs of bf16 are multiplied: if
// asked for, the processor has that and dim is even. Sums are made of sums over CHUNK terms, so that their rounding errors
// do not grow with N. The bits depend neither on the number of threads nor on the other heads.

#include <atomic>

#include "cpu_attention.h"
#include "cpu_vectors.h"

// shorter, as errors of scores are those of exponents; but for those of bf16
template <class Unit>
static int64_t chunk_of_scores(int64_t dim) {
  return Unit::elements == 2 ? CHUNK : dim < 64 ? 8 : 32;
}


// p (keys, wide): s -> 2^(factor (s - m)), in one vector of queries; its sum over keys, and shift = -factor m
static inline vec powers(float* p, int64_t keys, int64_t wide, float factor, vec& shift) {
  vec m = load(p);
  for (int64_t j = 1; j < keys; j++) {
    const vec s = load(p + j * wide);
    m = s > m ? s : m;
  }
  shift = -factor * m;
  vec total = {};
  for (int64_t j = 0; j < keys; j += CHUNK) {
    vec some = {};
    for (int64_t l = j; l < std::min(j + CHUNK, keys); l++) {
      const vec e = power_of_2(factor * load(p + l * wide) + shift);
      store(p + l * wide, e);
      some += e;
    }
    total += some;
  }
  return total;
}

// p, dp (keys, wide): powers and dp -> p / total and ds = p (dp - Σ p dp), in one vector of queries
static inline void softmax_backward(float* p, float* dp, int64_t keys, int64_t wide, vec total) {
  const vec inverse = 1.0f / total;
  vec delta = {};
  for (int64_t j = 0; j < keys; j += CHUNK) {
    vec some = {};
    for (int64_t l = j; l < std::min(j + CHUNK, keys); l++) {
      const vec x = load(p + l * wide) * inverse;
      store(p + l * wide, x);
      some += x * load(dp + l * wide);
    }
    delta += some;
  }
  for (int64_t j = 0; j < keys; j++) store(dp + j * wide, load(p + j * wide) * (load(dp + j * wide) - delta));
}

extern "C" {

struct Backward {  // each gradient has the shape of what it is the gradient of
  Tensor grad, q, k, v, dq, dk, dv;
  int64_t batches, heads, queries, keys, dim;
  float scale, factor;
  int pairs, threads;
};
}

// each element's sign changed
template <class Unit>
static void negate(float* units, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, units + i, sizeof bits);
    bits ^= Unit::elements == 2 ? 0x80008000 : 0x80000000;
    memcpy(units + i, &bits, sizeof bits);
  }
}

// to: rows of T as rows of `width` Units, the first of a head's `dim` elements, the others 0
template <class T, class Unit>
static void pack(const Tensor& from, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dim, int64_t width,
                 float* to) {
  for (int64_t i = 0; i < rows; i++, to += width) {
    const T* row = static_cast<const T*>(from.data) + b * from.batch + h * from.head + (first + i) * from.row;
    if constexpr (Unit::elements == 2)
      memcpy(to, row, dim * sizeof(T));
    else
      for (int64_t d = 0; d < dim; d++) to[d] = widen(row[d]);
    for (int64_t d = dim / Unit::elements; d < width; d++) to[d] = 0;
  }
}

template <class T>
static void unpack(const float* from, int64_t width, int64_t rows, int64_t dim, float factor, const Tensor& to,
                   int64_t b, int64_t h, int64_t first) {
  for (int64_t i = 0; i < rows; i++) {
    T* row = static_cast<T*>(to.data) + b * to.batch + h * to.head + (first + i) * to.row;
    for (int64_t d = 0; d < dim; d++) narrow(from[i * width + d] * factor, row + d);
  }
}

// to (rows / 2, width): pairs of rows of bf16, the one below the last and columns from dim being 0
static void pack_pairs_of_rows(const Tensor& from, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dim,
                               int64_t width, float* to) {
  const uint16_t* head = static_cast<const uint16_t*>(from.data) + b * from.batch + h * from.head + first * from.row;
  for (int64_t i = 0; i < rows; i += 2, to += width) {
    const uint16_t* row = head + i * from.row;
    for (int64_t d = 0; d < width; d++) {
      const uint32_t pair = d < dim ? row[d] | (i + 1 < rows ? uint32_t(row[from.row + d]) << 16 : 0) : 0;
      memcpy(to + d, &pair, sizeof pair);
    }
  }
}

// p (keys, wide) -> (keys / 2, wide): pairs of rows, in place
template <class Unit>
static inline void pair_up(float* p, int64_t keys, int64_t wide) {
  for (int64_t i = 0; i < keys; i += 2)
    for (int64_t j = 0; j < wide; j += L)
      store(p + i / 2 * wide + j, Unit::of(load(p + i * wide + j), i + 1 < keys ? load(p + (i + 1) * wide + j) : vec{}));
}

template <class T, class Unit>
static int forward(const Forward& f) {
  const int64_t dim = f.dim, vectors = (dim + L - 1) / L, width = vectors * L, units = dim / Unit::elements;
  const int64_t all_vectors = (f.queries + L - 1) / L, parts = (all_vectors + C - 1) / C;
  const float factor = std::fabs(f.factor);
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(f.threads)
  {
    Scratch scratch(kept, 2 * f.keys * width + C * L * (2 * width + f.keys));
    if (scratch.memory == nullptr) failed = 1;
    float *k = scratch.take(f.keys * width), *v = scratch.take(f.keys * width);
    float *p = scratch.take(C * L * f.keys), *out = scratch.take(C * L * width), *q = scratch.take(C * L * width);
    int64_t packed = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < f.batches * f.heads * parts; task++) {
      const int64_t head = task / parts, part = task % parts, b = head / f.heads, h = head % f.heads;
      if (scratch.memory == nullptr) continue;
      if (head != packed) {
        pack<T, Unit>(f.k, b, h, 0, f.keys, dim, units, k);
        if constexpr (Unit::elements == 2)
          pack_pairs_of_rows(f.v, b, h, 0, f.keys, dim, width, v);
        else
          pack<T, Unit>(f.v, b, h, 0, f.keys, dim, width, v);
        packed = head;
      }
      const int64_t first = all_vectors * part / parts * L, wide = all_vectors * (part + 1) / parts * L - first;
      const int64_t count = std::min(wide, f.queries - first);
      pack<T, Unit>(f.q, b, h, first, count, dim, units, out);
      transpose(out, units, count, units, wide, q);
      if (f.factor < 0) negate<Unit>(q, units * wide);
      product<Unit>(f.keys, wide / L, k, units, 1, q, wide, units, p, wide, false, chunk_of_scores<Unit>(dim));
      float sums[C * L];
      for (int64_t i = 0; i < wide; i += L) {
        vec shift;
        const vec total = powers(p + i, f.keys, wide, factor, shift);
        store(sums + i, total);
        if (f.lse == nullptr) continue;
        float* lse = f.lse + head * f.queries + first + i;
        for (int64_t r = 0; r < L && i + r < count; r++)
          lse[r] = float(0.6931471805599453 * (std::log2(double(total[r])) - shift[r]));
      }
      if constexpr (Unit::elements == 2) pair_up<Unit>(p, f.keys, wide);
      product<Unit>(count, vectors, p, 1, wide, v, width, (f.keys + Unit::elements - 1) / Unit::elements, out, width);
      for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d++) out[i * width + d] /= sums[i];
      unpack<T>(out, width, count, dim, 1.0f, f.out, b, h, first);
    }
  }
  return failed;
}

// from (rows, wide) -> to (rows, wide / 2): pairs of what stands beside each other, rounded
static inline void round_rows(const float* from, int64_t rows, int64_t wide, float* to) {
  uint16_t* half = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < rows * wide; i += L) store(half + i, load(from + i));
}

template <class T, class Unit>
static int backward(const Backward& f) {
  constexpr int E = Unit::elements;
  const int64_t dim = f.dim, vectors = (dim + L - 1) / L, width = vectors * L, units = E == 2 ? dim / 2 : width;
  const int64_t depth = dim / E;  // of the scores' sums, in Units
  const int64_t all_vectors = (f.queries + L - 1) / L, parts = (all_vectors + C - 1) / C;
  const float factor = std::fabs(f.factor);
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(f.threads)
  {
    Scratch scratch(kept, (E == 2 ? 5 : 4) * f.keys * width + C * L * ((E == 2 ? 3 : 2) * f.keys + 5 * width));
    if (scratch.memory == nullptr) failed = 1;
    float *k = scratch.take(f.keys * width), *v = scratch.take(f.keys * width);
    float* k_rows = E == 2 ? scratch.take(f.keys * width) : k;
    float *dk = scratch.take(f.keys * width), *dv = scratch.take(f.keys * width);
    float *p = scratch.take(C * L * f.keys), *ds = scratch.take(C * L * f.keys);
    float* half = E == 2 ? scratch.take(C * L * f.keys) : nullptr;
    float *q = scratch.take(C * L * width), *grad = scratch.take(C * L * width), *dq = scratch.take(C * L * width);
    float *q_transposed = scratch.take(C * L * width), *grad_transposed = scratch.take(C * L * width);
#pragma omp for schedule(static)
    for (int64_t head = 0; head < f.batches * f.heads; head++) {
      const int64_t b = head / f.heads, h = head % f.heads;
      if (scratch.memory == nullptr) continue;
      pack<T, Unit>(f.k, b, h, 0, f.keys, dim, units, k);
      pack<T, Unit>(f.v, b, h, 0, f.keys, dim, units, v);
      if constexpr (E == 2) pack_pairs_of_rows(f.k, b, h, 0, f.keys, dim, width, k_rows);
      for (int64_t part = 0; part < parts; part++) {
        const int64_t first = all_vectors * part / parts * L, wide = all_vectors * (part + 1) / parts * L - first;
        const int64_t count = std::min(wide, f.queries - first), sums = (count + E - 1) / E;
        pack<T, Unit>(f.q, b, h, first, count, dim, units, q);
        pack<T, Unit>(f.grad, b, h, first, count, dim, units, grad);
        transpose(q, units, count, depth, wide, q_transposed);
        transpose(grad, units, count, depth, wide, grad_transposed);
        if (f.factor < 0) negate<Unit>(q_transposed, depth * wide);
        const int64_t chunk = chunk_of_scores<Unit>(dim);
        product<Unit>(f.keys, wide / L, k, units, 1, q_transposed, wide, depth, p, wide, false, chunk);
        product<Unit>(f.keys, wide / L, v, units, 1, grad_transposed, wide, depth, ds, wide);
        for (int64_t i = 0; i < wide; i += L) {
          vec shift;
          const vec total = powers(p + i, f.keys, wide, factor, shift);
          softmax_backward(p + i, ds + i, f.keys, wide, total);
        }
        if constexpr (E == 2) {
          if (count % 2)  // beside the last query there is none: 0, as NaN times 0 would be NaN
            for (int64_t j = 0; j < f.keys; j++) p[j * wide + count] = ds[j * wide + count] = 0;
          pack_pairs_of_rows(f.q, b, h, first, count, dim, width, q);
          pack_pairs_of_rows(f.grad, b, h, first, count, dim, width, grad);
          round_rows(p, f.keys, wide, half);
          product<Unit>(f.keys, vectors, half, wide / 2, 1, grad, width, sums, dv, width, part > 0);
          round_rows(ds, f.keys, wide, half);
          product<Unit>(f.keys, vectors, half, wide / 2, 1, q, width, sums, dk, width, part > 0);
          pair_up<Unit>(ds, f.keys, wide);
        } else {
          product(f.keys, vectors, p, wide, 1, grad, width, count, dv, width, part > 0);
          product(f.keys, vectors, ds, wide, 1, q, width, count, dk, width, part > 0);
        }
        product<Unit>(count, vectors, ds, 1, wide, k_rows, width, (f.keys + E - 1) / E, dq, width);
        unpack<T>(dq, width, count, dim, f.scale, f.dq, b, h, first);
      }
      unpack<T>(dk, width, f.keys, dim, f.scale, f.dk, b, h, 0);
      unpack<T>(dv, width, f.keys, dim, 1.0f, f.dv, b, h, 0);
    }
  }
  return failed;
}

static int forward_bf16(const Forward& f) {
#if defined(__AVX512BF16__)
  if (f.pairs && f.dim % 2 == 0) return forward<uint16_t, Pairs>(f);
#endif
  return forward<uint16_t, Floats>(f);
}

static int backward_bf16(const Backward& f) {
#if defined(__AVX512BF16__)
  if (f.pairs && f.dim % 2 == 0) return backward<uint16_t, Pairs>(f);
#endif
  return backward<uint16_t, Floats>(f);
}

extern "C" int attention_forward_fp32(const Forward* f) { return forward<float, Floats>(*f); }
extern "C" int attention_forward_bf16(const Forward* f) { return forward_bf16(*f); }
#if defined(HAS_FP16)
extern "C" int attention_forward_fp16(const Forward* f) { return forward<fp16, Floats>(*f); }
extern "C" int attention_backward_fp16(const Backward* f) { return backward<fp16, Floats>(*f); }
#endif
extern "C" int attention_backward_fp32(const Backward* f) { return backward<float, Floats>(*f); }
extern "C" int attention_backward_bf16(const Backward* f) { return backward_bf16(*f); }
