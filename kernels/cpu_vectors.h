// What cpu_attention.cpp and cpu_blocks.cpp, which compiled.py compiles, share: vectors of fp32, and products of matrices.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int L = 16, R = 6, C = 4;
#elif defined(__AVX__)
constexpr int L = 8, R = 6, C = 2;
#else
constexpr int L = 4, R = 6, C = 4;
#endif
constexpr int64_t CHUNK = 64;

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef uint32_t uvec __attribute__((vector_size(4 * L)));
typedef uint16_t hvec __attribute__((vector_size(2 * L)));

static inline vec all(float x) { return x - vec{}; }
static inline vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline vec load(const uint16_t* p) {
  hvec v;
  memcpy(&v, p, sizeof v);
  return (vec)(__builtin_convertvector(v, uvec) << 16);
}
#if defined(__F16C__)
#define HAS_FP16
struct fp16 {  // _Float16 is not in every g++, and 12 converts vectors of it one by one
  uint16_t bits;
};
static inline vec load(const fp16* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}
static inline void store(fp16* p, vec v) {  // to the nearest, ties to even
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
}
static inline float widen(fp16 x) { return _cvtsh_ss(x.bits); }
static inline void narrow(float x, fp16* to) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#endif
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline void store(uint16_t* p, vec v) {  // to the nearest, ties to even
#if defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
#else
  const uvec bits = (uvec)v;
  const uvec rounded = v == v ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : uvec{} + 0x7FC0;
  const hvec narrow = __builtin_convertvector(rounded, hvec);
#endif
  memcpy(p, &narrow, sizeof narrow);
}

// store past the caches what is not read soon, to p aligned to a line: none is fetched for it, and none gives way
template <class T>
static inline void stream(T* p, vec v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<T, float>::value) return _mm512_stream_ps(p, (__m512)v);
#endif
  store(p, v);
}
// before another thread reads it
static inline void end_of_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// 2^x of x <= 0, or of NaN: 2^n times a polynomial in x - n, right to 2e-9 before its own rounding; 0 below 2^-126.
// Of several vectors, step by step, so that a processor need not look far ahead for what it can do meanwhile.
template <int U>
static inline void powers_of_2(vec (&x)[U]) {
  vec f[U], shifted[U], y[U];
  for (int u = 0; u < U; u++) {
    const vec bounded = x[u] < -126.0f ? all(-126.0f) : x[u];
    shifted[u] = bounded + 12582912.0f;  // 1.5 * 2^23: n is in the last bits
    f[u] = bounded - (shifted[u] - 12582912.0f);
    y[u] = all(0.00015353361959569156f);
  }
  for (const float c : {0.0013398873852565885f, 0.00961843691766262f, 0.055503323674201965f, 0.24022647738456726f,
                        0.6931471824645996f, 1.0f})
    for (int u = 0; u < U; u++) y[u] = y[u] * f[u] + c;
  for (int u = 0; u < U; u++) {
    y[u] = (vec)((ivec)y[u] + ((ivec)shifted[u] << 23));
    y[u] = x[u] < -126.0f ? vec{} : y[u];
    x[u] = x[u] == x[u] ? y[u] : x[u];
  }
}
static inline vec power_of_2(vec x) {
  vec y[1] = {x};
  powers_of_2(y);
  return y[0];
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

// What products of matrices are made of: 32 bits of the left one and a vector of the right one, each an fp32 or a pair of
// bf16 that stand beside each other along the sum
struct Floats {
  static constexpr int elements = 1;
  static inline vec add(vec sum, float a, vec b) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int elements = 2;
  static inline vec add(vec sum, float a, vec b) {
    int32_t pair;
    memcpy(&pair, &a, sizeof pair);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
  // the pairs (x, y), rounded
  static inline vec of(vec x, vec y) {
    typedef int16_t lanes __attribute__((vector_size(64)));
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
    const lanes order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vec)_mm512_permutexvar_epi16((__m512i)order, both);
  }
};
#endif

// a step that the compiler knows
typedef std::integral_constant<int64_t, 1> One;

// c (rows, ldc), of `columns` vectors, = or += Σ_i a[row * row_step + i * step] b[i] for i < n
template <class Unit, int rows, int columns, class Step>
[[gnu::noinline]] static void tile(const float* a, int64_t row_step, Step step, const float* b, int64_t ldb, int64_t n,
                                   float* c, int64_t ldc, bool add) {
  vec sums[rows][columns] = {};
  for (int64_t i = 0; i < n; i++) {
    vec x[columns];
    for (int j = 0; j < columns; j++) x[j] = load(b + i * ldb + j * L);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < columns; j++) sums[r][j] = Unit::add(sums[r][j], a[r * row_step + i * step], x[j]);
  }
#pragma GCC unroll 8  // or the compiler takes the sums through memory
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++) {
      float* to = c + r * ldc + j * L;
      store(to, add ? load(to) + sums[r][j] : sums[r][j]);
    }
}

template <class Unit, int rows, int columns, class Step>
static inline void tile_of(int r, int j, const float* a, int64_t row_step, Step step, const float* b, int64_t ldb,
                           int64_t n, float* c, int64_t ldc, bool add) {
  if (j < columns) {
    if constexpr (columns > 1) tile_of<Unit, rows, columns - 1>(r, j, a, row_step, step, b, ldb, n, c, ldc, add);
  } else if (r < rows) {
    if constexpr (rows > 1) tile_of<Unit, rows - 1, columns>(r, j, a, row_step, step, b, ldb, n, c, ldc, add);
  } else {
    tile<Unit, rows, columns>(a, row_step, step, b, ldb, n, c, ldc, add);
  }
}

// the same for any number of rows and of vectors of columns, which are shared out evenly, as are terms to chunks
template <class Unit = Floats>
static void product(int64_t rows, int64_t vectors, const float* a, int64_t row_step, int64_t step, const float* b,
                    int64_t ldb, int64_t n, float* c, int64_t ldc, bool add = false, int64_t chunk = CHUNK) {
  const int64_t parts = (vectors + C - 1) / C, chunks = std::max<int64_t>(1, n / chunk);
  chunk = (n + chunks - 1) / chunks;
  for (int64_t i = 0; i < n; i += chunk)
    for (int64_t r = 0; r < rows; r += R)
      for (int64_t part = 0; part < parts; part++) {
        const int64_t first = vectors * part / parts, last = vectors * (part + 1) / parts;
        tile_of<Unit, R, C>(std::min<int64_t>(R, rows - r), last - first, a + r * row_step + i * step, row_step, step,
                            b + i * ldb + first * L, ldb, std::min(chunk, n - i), c + r * ldc + first * L, ldc,
                            add || i > 0);
      }
}

template <int step, int... lane>
static inline vec swapped(vec a, std::integer_sequence<int, lane...>) {
  return __builtin_shuffle(a, ivec{(lane ^ step)...});
}
// Σ of all lanes
template <int step = L / 2>
static inline float total(vec a) {
  const vec b = a + swapped<step>(a, std::make_integer_sequence<int, L>{});
  if constexpr (step > 1)
    return total<step / 2>(b);
  else
    return b[0];
}

template <int step, int... lane>
static inline vec low(vec a, vec b, std::integer_sequence<int, lane...>) {
  return __builtin_shuffle(a, b, ivec{(lane & step ? L + lane - step : lane)...});
}
template <int step, int... lane>
static inline vec high(vec a, vec b, std::integer_sequence<int, lane...>) {
  return __builtin_shuffle(a, b, ivec{(lane & step ? L + lane : lane + step)...});
}
// exchange what lies off the diagonal in squares of 2 * step; then in smaller ones
template <int step>
static inline void exchange(vec (&rows)[L]) {
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 16
  for (int i = 0; i < L; i++)
    if (!(i & step)) {
      const vec a = rows[i], b = rows[i + step];
      rows[i] = low<step>(a, b, lanes);
      rows[i + step] = high<step>(a, b, lanes);
    }
  if constexpr (step > 1) exchange<step / 2>(rows);
}

// to (units, wide), wide in whole vectors: the transpose of from (count, units), and columns of 0. bf16 is transposed in
// pairs, and these are widened: half as many exchanges
template <class T>
[[gnu::noinline]] static void transpose(const T* from, int64_t row, int64_t count, int64_t units, int64_t wide,
                                        float* to) {
  constexpr int64_t E = std::is_same<T, uint16_t>::value ? 2 : 1;
  for (int64_t j = 0; j < wide; j += L)
    for (int64_t i = 0; i < units; i += E * L) {
      if (j + L <= count && i + E * L <= units) {
        vec square[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; l++) {
          const T* p = from + (j + l) * row + i;
          square[l] = load(reinterpret_cast<const std::conditional_t<E == 2, float, T>*>(p));
        }
        exchange<L / 2>(square);
#pragma GCC unroll 16
        for (int l = 0; l < L; l++) {
          float* rows = to + (i + E * l) * wide + j;
          if constexpr (E == 2) {
            store(rows, (vec)((uvec)square[l] << 16));
            store(rows + wide, (vec)((uvec)square[l] & 0xFFFF0000));
          } else {
            store(rows, square[l]);
          }
        }
      } else {
        for (int64_t l = i; l < std::min(i + E * L, units); l++)
          for (int64_t m = j; m < j + L; m++) to[l * wide + m] = m < count ? widen(from[m * row + l]) : 0;
      }
    }
}

// memory that a thread keeps for its next call, as memory that is new is slow
struct Kept {
  void* memory = nullptr;
  size_t bytes = 0;
  void resize(size_t to) {
    std::free(memory);
    memory = to ? std::malloc(to) : nullptr;
    bytes = memory ? to : 0;
  }
  ~Kept() { std::free(memory); }
};
inline thread_local Kept kept, kept_for_all;  // for this thread, and for those that it has work
constexpr size_t MOST_KEPT = size_t(8) << 20;  // for each thread

// memory for floats, aligned to a vector; null where there is none. A thread has one of a `kept` at a time
struct Scratch {
  Kept& kept;
  size_t most;
  float *memory, *next;
  Scratch(Kept& kept, int64_t floats, int threads = 1) : kept(kept), most(threads * MOST_KEPT) {
    const size_t bytes = sizeof(float) * (floats + 16 * L);  // room for `take` to align
    if (bytes > kept.bytes) kept.resize(bytes);
    memory = static_cast<float*>(kept.memory);
    next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 4 * L - 1) & ~uintptr_t(4 * L - 1));
  }
  ~Scratch() {
    if (kept.bytes > most) kept.resize(0);
  }
  float* take(int64_t floats) {
    float* taken = next;
    next += (floats + L - 1) / L * L;
    return taken;
  }
};
