// Attention on a CPU: what compiled.py compiles where a g++ is at hand. No header but the standard's.
//
// A thread takes one head and up to 64 queries at a time, and with C vectors of L queries (or of columns) and R rows in
// registers computes
//     sᵀ = k qᵀ (keys x queries),  m = max s,  p = 2^(factor (s - m)),
//     out = (p v) / (Σ p),  lse = ln 2 (factor m + log2 Σ p)
// so that softmax needs no sum across a vector, and neither k nor v is transposed; and backward, after p again, with its
// own sums,
//     dpᵀ = v doutᵀ,  ds = p (dp - Σ p dp),  dq = scale ds k,  dk = scale dsᵀ q,  dv = pᵀ dout
// All is in fp32; bf16 is rounded when it is stored. Sums are made of sums over CHUNK terms, so that their rounding
// errors do not grow with N. The bits depend neither on the number of threads nor on the other heads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
constexpr int L = 16, R = 6, C = 4;
#elif defined(__AVX__)
constexpr int L = 8, R = 6, C = 2;
#else
constexpr int L = 4, R = 6, C = 4;
#endif
constexpr int64_t CHUNK = 64;
static int64_t chunk_of_scores(int64_t dim) { return dim < 64 ? 8 : 16; }  // shorter: errors of scores are exponents'

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));

static inline vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec all(float x) { return x - vec{}; }

// 2^x of x <= 0, or of NaN: 2^n times a polynomial in x - n, right to 2e-9 before its own rounding; 0 below 2^-126
static inline vec power_of_2(vec x) {
  const vec bounded = x < -126.0f ? all(-126.0f) : x;
  const vec shifted = bounded + 12582912.0f;  // 1.5 * 2^23: n is in the last bits
  const vec f = bounded - (shifted - 12582912.0f);
  vec y = 0.00015353361959569156f * f + 0.0013398873852565885f;
  y = y * f + 0.00961843691766262f;
  y = y * f + 0.055503323674201965f;
  y = y * f + 0.24022647738456726f;
  y = y * f + 0.6931471824645996f;
  y = y * f + 1.0f;
  y = (vec)((ivec)y + ((ivec)shifted << 23));
  y = x < -126.0f ? vec{} : y;
  return x == x ? y : x;
}

static inline float widen(float x) { return x; }
static inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
static inline void narrow(float x, float* to) { *to = x; }
static inline void narrow(float x, uint16_t* to) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  *to = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// c (rows, ldc), of `columns` vectors, = or += Σ_i a[row * row_step + i * step] b[i] for i < n
template <int rows, int columns>
static inline void tile(const float* a, int64_t row_step, int64_t step, const float* b, int64_t ldb, int64_t n,
                        float* c, int64_t ldc, bool add) {
  vec sums[rows][columns] = {};
  for (int64_t i = 0; i < n; i++) {
    vec x[columns];
    for (int j = 0; j < columns; j++) x[j] = load(b + i * ldb + j * L);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < columns; j++) sums[r][j] += a[r * row_step + i * step] * x[j];
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < columns; j++) {
      float* to = c + r * ldc + j * L;
      store(to, add ? load(to) + sums[r][j] : sums[r][j]);
    }
}

template <int rows, int columns>
static inline void tile_of(int r, int j, const float* a, int64_t row_step, int64_t step, const float* b, int64_t ldb,
                           int64_t n, float* c, int64_t ldc, bool add) {
  if (j < columns) {
    if constexpr (columns > 1) tile_of<rows, columns - 1>(r, j, a, row_step, step, b, ldb, n, c, ldc, add);
  } else if (r < rows) {
    if constexpr (rows > 1) tile_of<rows - 1, columns>(r, j, a, row_step, step, b, ldb, n, c, ldc, add);
  } else {
    tile<rows, columns>(a, row_step, step, b, ldb, n, c, ldc, add);
  }
}

// the same for any number of rows and of vectors of columns, which are shared out evenly
static void product(int64_t rows, int64_t vectors, const float* a, int64_t row_step, int64_t step, const float* b,
                    int64_t ldb, int64_t n, float* c, int64_t ldc, bool add = false, int64_t chunk = CHUNK) {
  const int64_t parts = (vectors + C - 1) / C;
  for (int64_t i = 0; i < n; i += chunk)
    for (int64_t r = 0; r < rows; r += R)
      for (int64_t part = 0; part < parts; part++) {
        const int64_t first = vectors * part / parts, last = vectors * (part + 1) / parts;
        tile_of<R, C>(std::min<int64_t>(R, rows - r), last - first, a + r * row_step + i * step, row_step, step,
                      b + i * ldb + first * L, ldb, std::min(chunk, n - i), c + r * ldc + first * L, ldc, add || i > 0);
      }
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

// memory for floats, aligned to a vector; null where there is none
struct Scratch {
  float *memory, *next;
  explicit Scratch(int64_t floats)
      : memory(static_cast<float*>(std::malloc(sizeof(float) * (floats + L)))),
        next(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 4 * L - 1) & ~uintptr_t(4 * L - 1))) {}
  ~Scratch() { std::free(memory); }
  float* take(int64_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  }
};

extern "C" {

struct Tensor {  // its strides, in elements; the last one is 1
  void* data;
  int64_t batch, head, row;
};

struct Forward {  // q, out (batches, heads, queries, dim), k, v (batches, heads, keys, dim), lse or null, contiguous
  Tensor q, k, v, out;
  float* lse;
  int64_t batches, heads, queries, keys, dim;
  float factor;  // scale / ln 2
  int threads;
};

struct Backward {  // each gradient has the shape of what it is the gradient of
  Tensor grad, q, k, v, dq, dk, dv;
  int64_t batches, heads, queries, keys, dim;
  float scale, factor;
  int threads;
};
}

template <class T>
static void pack(const Tensor& from, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dim, int64_t width,
                 float* to) {
  for (int64_t i = 0; i < rows; i++) {
    const T* row = static_cast<const T*>(from.data) + b * from.batch + h * from.head + (first + i) * from.row;
    for (int64_t d = 0; d < dim; d++) to[i * width + d] = widen(row[d]);
    for (int64_t d = dim; d < width; d++) to[i * width + d] = 0;
  }
}

// rows (dim, width) of `count` queries, the others being 0, each times sign
template <class T>
static void pack_transposed(const Tensor& from, int64_t b, int64_t h, int64_t first, int64_t count, int64_t dim,
                            int64_t width, float sign, float* to) {
  const T* rows = static_cast<const T*>(from.data) + b * from.batch + h * from.head + first * from.row;
  for (int64_t d = 0; d < dim; d++)
    for (int64_t i = 0; i < width; i++) to[d * width + i] = i < count ? sign * widen(rows[i * from.row + d]) : 0;
}

template <class T>
static void unpack(const float* from, int64_t width, int64_t rows, int64_t dim, float factor, const Tensor& to,
                   int64_t b, int64_t h, int64_t first) {
  for (int64_t i = 0; i < rows; i++) {
    T* row = static_cast<T*>(to.data) + b * to.batch + h * to.head + (first + i) * to.row;
    for (int64_t d = 0; d < dim; d++) narrow(from[i * width + d] * factor, row + d);
  }
}

template <class T>
static int forward(const Forward& f) {
  const int64_t dim = f.dim, vectors = (dim + L - 1) / L, width = vectors * L;
  const int64_t all_vectors = (f.queries + L - 1) / L, parts = (all_vectors + C - 1) / C;
  const float factor = std::fabs(f.factor), sign = f.factor < 0 ? -1.0f : 1.0f;
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(f.threads)
  {
    Scratch scratch(2 * f.keys * width + C * L * (dim + f.keys + width));
    if (scratch.memory == nullptr) failed = 1;
    float *k = scratch.take(f.keys * width), *v = scratch.take(f.keys * width);
    float *p = scratch.take(C * L * f.keys), *out = scratch.take(C * L * width), *q = scratch.take(C * L * dim);
    int64_t packed = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < f.batches * f.heads * parts; task++) {
      const int64_t head = task / parts, part = task % parts, b = head / f.heads, h = head % f.heads;
      if (scratch.memory == nullptr) continue;
      if (head != packed) {
        pack<T>(f.k, b, h, 0, f.keys, dim, width, k);
        pack<T>(f.v, b, h, 0, f.keys, dim, width, v);
        packed = head;
      }
      const int64_t first = all_vectors * part / parts * L, wide = all_vectors * (part + 1) / parts * L - first;
      const int64_t count = std::min(wide, f.queries - first);
      pack_transposed<T>(f.q, b, h, first, count, dim, wide, sign, q);
      product(f.keys, wide / L, k, width, 1, q, wide, dim, p, wide, false, chunk_of_scores(dim));
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
      product(count, vectors, p, 1, wide, v, width, f.keys, out, width);
      for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d++) out[i * width + d] /= sums[i];
      unpack<T>(out, width, count, dim, 1.0f, f.out, b, h, first);
    }
  }
  return failed;
}

template <class T>
static int backward(const Backward& f) {
  const int64_t dim = f.dim, vectors = (dim + L - 1) / L, width = vectors * L;
  const int64_t all_vectors = (f.queries + L - 1) / L, parts = (all_vectors + C - 1) / C;
  const float factor = std::fabs(f.factor), sign = f.factor < 0 ? -1.0f : 1.0f;
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(f.threads)
  {
    Scratch scratch(4 * f.keys * width + C * L * (2 * f.keys + 3 * width + 2 * dim));
    if (scratch.memory == nullptr) failed = 1;
    float *k = scratch.take(f.keys * width), *v = scratch.take(f.keys * width);
    float *dk = scratch.take(f.keys * width), *dv = scratch.take(f.keys * width);
    float *p = scratch.take(C * L * f.keys), *ds = scratch.take(C * L * f.keys);
    float *q = scratch.take(C * L * width), *grad = scratch.take(C * L * width), *dq = scratch.take(C * L * width);
    float *q_transposed = scratch.take(C * L * dim), *grad_transposed = scratch.take(C * L * dim);
#pragma omp for schedule(static)
    for (int64_t head = 0; head < f.batches * f.heads; head++) {
      const int64_t b = head / f.heads, h = head % f.heads;
      if (scratch.memory == nullptr) continue;
      pack<T>(f.k, b, h, 0, f.keys, dim, width, k);
      pack<T>(f.v, b, h, 0, f.keys, dim, width, v);
      for (int64_t part = 0; part < parts; part++) {
        const int64_t first = all_vectors * part / parts * L, wide = all_vectors * (part + 1) / parts * L - first;
        const int64_t count = std::min(wide, f.queries - first);
        pack<T>(f.q, b, h, first, count, dim, width, q);
        pack<T>(f.grad, b, h, first, count, dim, width, grad);
        pack_transposed<T>(f.q, b, h, first, count, dim, wide, sign, q_transposed);
        pack_transposed<T>(f.grad, b, h, first, count, dim, wide, 1.0f, grad_transposed);
        product(f.keys, wide / L, k, width, 1, q_transposed, wide, dim, p, wide, false, chunk_of_scores(dim));
        product(f.keys, wide / L, v, width, 1, grad_transposed, wide, dim, ds, wide);
        for (int64_t i = 0; i < wide; i += L) {
          vec shift;
          const vec total = powers(p + i, f.keys, wide, factor, shift);
          softmax_backward(p + i, ds + i, f.keys, wide, total);
        }
        product(f.keys, vectors, p, wide, 1, grad, width, count, dv, width, part > 0);
        product(f.keys, vectors, ds, wide, 1, q, width, count, dk, width, part > 0);
        product(count, vectors, ds, 1, wide, k, width, f.keys, dq, width);
        unpack<T>(dq, width, count, dim, f.scale, f.dq, b, h, first);
      }
      unpack<T>(dk, width, f.keys, dim, f.scale, f.dk, b, h, 0);
      unpack<T>(dv, width, f.keys, dim, 1.0f, f.dv, b, h, 0);
    }
  }
  return failed;
}

extern "C" int attention_forward_fp32(const Forward* f) { return forward<float>(*f); }
extern "C" int attention_forward_bf16(const Forward* f) { return forward<uint16_t>(*f); }
extern "C" int attention_backward_fp32(const Backward* f) { return backward<float>(*f); }
extern "C" int attention_backward_bf16(const Backward* f) { return backward<uint16_t>(*f); }
