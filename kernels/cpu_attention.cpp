// Attention on a CPU: what compiled_attention.py compiles where a g++ is at hand. No header but the standard's.
//
// A thread takes one head and up to 64 queries at a time, and with C vectors of L queries (or of columns) and R rows in
// registers computes
//     sᵀ = k qᵀ (keys x queries),  m = max s,  p = 2^(factor (s - m)),  out = (p v) / (Σ p),  lse = ln 2 (factor m + log2 Σ p)
// so that softmax needs no sum across a vector, and neither k nor v is transposed. All is in fp32; bf16 is rounded when
// it is stored. Sums over keys are made of sums over KEYS of them, so that their rounding errors do not grow with N.

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
constexpr int64_t KEYS = 64;

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
static inline void tile(const float* a, int64_t row_step, int64_t step, const float* b, int64_t ldb, int64_t n, float* c,
                        int64_t ldc, bool add) {
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
                    int64_t ldb, int64_t n, float* c, int64_t ldc, bool add) {
  const int64_t parts = (vectors + C - 1) / C;
  for (int64_t r = 0; r < rows; r += R)
    for (int64_t part = 0; part < parts; part++) {
      const int64_t first = vectors * part / parts, last = vectors * (part + 1) / parts;
      tile_of<R, C>(std::min<int64_t>(R, rows - r), last - first, a + r * row_step, row_step, step, b + first * L, ldb, n,
                    c + r * ldc + first * L, ldc, add);
    }
}

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
}

template <class T>
static void pack(const Tensor& from, int64_t b, int64_t h, int64_t rows, int64_t dim, int64_t width, float* to) {
  for (int64_t i = 0; i < rows; i++) {
    const T* row = static_cast<const T*>(from.data) + b * from.batch + h * from.head + i * from.row;
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
static int forward(const Forward& f) {
  const int64_t dim = f.dim, vectors = (dim + L - 1) / L, width = vectors * L;
  const int64_t all_vectors = (f.queries + L - 1) / L, parts = (all_vectors + C - 1) / C;
  const float factor = std::fabs(f.factor), sign = f.factor < 0 ? -1.0f : 1.0f;
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(f.threads)
  {
    const int64_t floats = 2 * f.keys * width + C * L * (dim + f.keys + width);
    float* memory = static_cast<float*>(std::malloc(sizeof(float) * (floats + L)));
    if (memory == nullptr) failed = 1;
    float* k = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63));
    float *v = k + f.keys * width, *q = v + f.keys * width, *p = q + C * L * dim, *out = p + C * L * f.keys;
    int64_t packed = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < f.batches * f.heads * parts; task++) {
      const int64_t head = task / parts, part = task % parts, b = head / f.heads, h = head % f.heads;
      if (memory == nullptr) continue;
      if (head != packed) {
        pack<T>(f.k, b, h, f.keys, dim, width, k);
        pack<T>(f.v, b, h, f.keys, dim, width, v);
        packed = head;
      }
      const int64_t first = all_vectors * part / parts * L, last = all_vectors * (part + 1) / parts * L;
      const int64_t wide = last - first, count = std::min(last, f.queries) - first;
      pack_transposed<T>(f.q, b, h, first, count, dim, wide, sign, q);
      product(f.keys, wide / L, k, width, 1, q, wide, dim, p, wide, false);
      float sums[C * L];
      for (int64_t i = 0; i < wide; i += L) {
        vec m = load(p + i);
        for (int64_t j = 1; j < f.keys; j++) {
          const vec s = load(p + j * wide + i);
          m = s > m ? s : m;
        }
        const vec shift = -factor * m;
        vec total = {};
        for (int64_t j = 0; j < f.keys; j += KEYS) {
          vec some = {};
          for (int64_t l = j; l < std::min(j + KEYS, f.keys); l++) {
            const vec e = power_of_2(factor * load(p + l * wide + i) + shift);
            store(p + l * wide + i, e);
            some += e;
          }
          total += some;
        }
        store(sums + i, total);
        if (f.lse != nullptr)
          for (int64_t r = 0; r < L && i + r < count; r++)
            f.lse[head * f.queries + first + i + r] = float(0.6931471805599453 * (std::log2(double(total[r])) - shift[r]));
      }
      for (int64_t j = 0; j < f.keys; j += KEYS)
        product(count, vectors, p + j * wide, 1, wide, v + j * width, width, std::min(KEYS, f.keys - j), out, width, j > 0);
      for (int64_t i = 0; i < count; i++) {
        T* row = static_cast<T*>(f.out.data) + b * f.out.batch + h * f.out.head + (first + i) * f.out.row;
        for (int64_t d = 0; d < dim; d++) narrow(out[i * width + d] / sums[i], row + d);
      }
    }
    std::free(memory);
  }
  return failed;
}

extern "C" int attention_forward_fp32(const Forward* f) { return forward<float>(*f); }
extern "C" int attention_forward_bf16(const Forward* f) { return forward<uint16_t>(*f); }
