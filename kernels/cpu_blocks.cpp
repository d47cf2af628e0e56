// A ViT's pre-norm blocks in inference on a CPU, any number of them in one call: what compiled.py compiles.
//
//     attention      y = Linear(attention(Linear(LayerNorm(x)))) [+ x]
//     feed forward   y = Linear(GELU(Linear(LayerNorm(x)))) [+ x]
//
// and what they are made of, act(norm(x) wᵀ + b) and one more Linear of that; and a b and aᵀ b, which are the
// gradients of a Linear's x and weight. A product reads a weight (N,K) where it lies: a chunk of K and a panel of
// WIDE of its rows at a time are transposed into the nearest cache, and used for a group of rows, up to MOST_ROWS,
// by tiles of R rows. So there is no copy of a weight that a change of it would make stale. A thread has a group for
// itself, and what lies between two products stays in its cache; or, where it would transpose too much for too few
// rows, it shares one with others. Both are taken as Units of 32 bits: one fp32, which bf16 and fp16 are widened to
// on the way, or a pair of bf16. Sums are in fp32, and rounded where a block would store them. The bits do not
// depend on the number of threads, and on the number of rows only in whether these are FEW_ROWS.

#include <omp.h>

#include <atomic>
#include <type_traits>

#include "cpu_attention.h"
#include "cpu_vectors.h"

constexpr int64_t MOST_CHUNK = 128, SPAN = 768, MOST_ROWS = 402, FEW_ROWS = 512, WIDE = C * L, EXCHANGE = 2;

extern "C" {

struct Linear {  // weight (n, k), its last stride 1, bias (n) or null; without it weight is null
  const void *weight, *bias;
  int64_t n, k, row;
};

struct Linears {  // norm_weight, norm_bias (first.k) or null; second may be without weight
  const void *norm_weight, *norm_bias;
  Linear first, second;
  float *mean, *rstd;  // of the norm's rows (rows), or null
  void *z, *hidden;    // (rows, first.n), in whole panels, aligned to a line of cache, what stands before and behind
                       // the activation, or null
  float eps;
  int activation;
};

struct Block {  // heads is 0 in feed forward
  Linears linears;
  int64_t heads;
  float factor;  // scale / ln 2
};

struct Blocks {  // x, y (batches, tokens, their last dims), between (batches * tokens, 4 * heads * dim), all contiguous
  const void* x;
  void *y, *between;
  const Block* blocks;
  int64_t count, batches, tokens;
  int residual, pairs, threads;  // pairs of bf16 are multiplied as such
  int first;  // of the last two blocks, attention and feed forward, y's first rows are (batches, last dim), the first
};            // token of each batch, and nothing else is made that only other tokens take

struct Product {  // c (rows, n) = a b, or aᵀ b: a (rows, depth) or (depth, rows), b (depth, n), contiguous but for b's row
  const void *a, *b;
  void* c;
  int64_t rows, depth, n, row;
  int transposed, pairs, threads;
};
}

enum { NONE, GELU, GELU_TANH };

// what a weight in T is read as, and what stands on its left is held as
template <class T, class Unit>
using Word = std::conditional_t<Unit::elements == 2, float, T>;
template <class T, class Unit>
using Held = std::conditional_t<Unit::elements == 2, T, float>;

// to (units, wide): `count` numbers of each row from on, in Units of rows that stand beside each other, and 0: in pairs
// also where there is no second row, rows being those there are
template <class T, class Unit>
static inline void lay(const T* from, int64_t row, int64_t rows, int64_t count, int64_t units, int64_t wide, float* to) {
  for (int64_t i = 0; i < units; i++, from += Unit::elements * row, to += wide) {
    if constexpr (Unit::elements == 2) {
      const T* second = 2 * i + 1 < rows ? from + row : nullptr;
      for (int64_t j = 0; j < count; j++) {
        const uint32_t pair = from[j] | (second ? uint32_t(second[j]) << 16 : 0);
        memcpy(to + j, &pair, sizeof pair);
      }
    } else {
      for (int64_t j = 0; j < count; j++) to[j] = widen(from[j]);
    }
    for (int64_t j = count; j < wide; j++) to[j] = 0;
  }
}

// The right side of a product: `fill` makes a panel of it, Units i to i + some of columns n to n + WIDE, and `fetch` has
// rows r to r + R of `rows` parts of that brought nearer; g++ drops it unless it is inlined at once.
template <class T, class Unit>
struct Transposed {  // a weight's
  const Word<T, Unit>* weight;
  int64_t row, n;
  explicit Transposed(const Linear& w)
      : weight(static_cast<const Word<T, Unit>*>(w.weight)), row(w.row / Unit::elements), n(w.n) {}
  void fill(int64_t j, int64_t i, int64_t some, float* panel) const {
    transpose(weight + j * row + i, row, std::min(WIDE, n - j), some, WIDE, panel);
  }
  [[gnu::always_inline]] void fetch(int64_t j, int64_t i, int64_t some, int64_t r, int64_t rows) const {
    const int64_t count = std::min(WIDE, n - j);
    for (int64_t l = count * r / rows; l < count * (r + R) / rows; l++)
      for (int64_t u = 0; u < some; u += 64 / sizeof *weight) __builtin_prefetch(weight + (j + l) * row + i + u, 0, 3);
  }
};
template <class T, class Unit>
struct AsItLies {  // (depth, n), its last stride 1
  const T* b;
  int64_t row, depth, n;
  void fill(int64_t j, int64_t i, int64_t some, float* panel) const {
    const int64_t first = i * Unit::elements;
    lay<T, Unit>(b + first * row + j, row, depth - first, std::min(WIDE, n - j), some, WIDE, panel);
  }
  [[gnu::always_inline]] void fetch(int64_t j, int64_t i, int64_t some, int64_t r, int64_t rows) const {
    if (j >= n) return;
    const int64_t first = i * Unit::elements, count = std::min(some * Unit::elements, depth - first);
    for (int64_t l = count * r / rows; l < count * (r + R) / rows; l++)
      for (int64_t u = 0; u < WIDE; u += 64 / sizeof *b) __builtin_prefetch(b + (first + l) * row + j + u, 0, 3);
  }
};

static int64_t tiles_of(int64_t rows) { return (rows + R - 1) / R; }

// Tiles `first` to `last` of a b, R rows from r and WIDE columns from n on each, in order of n, then of r
struct Run {
  int64_t first, last, rows;
  bool shared;  // other threads wrote some of its rows
};

// brings `some` Units of rows nearer, which stand beside each other
[[gnu::always_inline]] static inline void fetch_rows(const float* a, int64_t row_step, One, int64_t rows, int64_t some) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < some; i += 64 / sizeof *a) __builtin_prefetch(a + r * row_step + i, 0, 3);
}
static inline void fetch_rows(const float*, int64_t, int64_t, int64_t, int64_t) {}

// finish(n, r, some, c) of each tile c (some, WIDE) of a run, some <= R. a (rows, units), of which Units start to
// end are given here, those before being in c already: where rows of all of them do not stay in cache, all panels
// get the sum over a SPAN of them before the next, c having room for them
template <class Unit, class B, class Step, class Finish>
static void span(const float* a, int64_t row_step, Step step, Run run, const B& b, int64_t start, int64_t units,
                 int64_t chunk, float* panel, float* c, Finish finish) {
  const int64_t end = std::min(start + SPAN, units), tiles = tiles_of(run.rows);
  for (int64_t t = run.first; t < run.last;) {
    const int64_t n = t / tiles * WIDE, r_first = t % tiles * R, some_tiles = std::min(run.last - t, tiles - t % tiles);
    const int64_t r_last = std::min(r_first + some_tiles * R, run.rows);
    float* sums = units > SPAN ? c + (t - run.first) * R * WIDE : c;
    for (int64_t i = start; i < end; i += chunk) {
      const int64_t some = std::min(chunk, end - i);
      b.fill(n, i, some, panel);
      for (int64_t r = r_first; r < r_last; r += R) {
        const int64_t count = std::min<int64_t>(R, r_last - r);
        float* to = sums + (r - r_first) * WIDE;
        if (i + some < end)
          b.fetch(n, i + some, std::min(chunk, end - i - some), r - r_first, r_last - r_first);
        else
          b.fetch(n + WIDE, start, std::min(chunk, end - start), r - r_first, r_last - r_first);
        const float* left = a + r * row_step + (i - start) * step;
        if (run.shared && t == run.first) {  // they come from another core's cache
          if (r + R < r_last)
            fetch_rows(left + R * row_step, row_step, step, std::min<int64_t>(R, r_last - r - R), some);
          else if (i + some < end)
            fetch_rows(left + (r_first - r) * row_step + some * step, row_step, step, R, some);
        }
        tile_of<Unit, R, C>(count, C, left, row_step, step, panel, WIDE, some, to, WIDE, i > 0);
        if (i + some == units) finish(n, r, count, to);
      }
    }
    t += some_tiles;
  }
}

// the same of a wᵀ, a (rows, k), whose row_step is in Units
template <class T, class Unit, class Finish>
static void panels(const float* a, int64_t row_step, Run run, const Linear& w, int64_t chunk, float* panel, float* c,
                   Finish finish) {
  const int64_t units = w.k / Unit::elements;
  const Transposed<T, Unit> b(w);
  for (int64_t start = 0; start < units; start += SPAN)
    span<Unit>(a + start, row_step, One(), run, b, start, units, chunk, panel, c, finish);
}

static int64_t in_panels(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

// x Φ(x), Φ right to 3e-8 before rounding; beyond 5.4 Φ is 0 or 1
static inline vec gelu(vec x) {
  vec t = x < -5.4f ? all(-5.4f) : x;
  t = t > 5.4f ? all(5.4f) : t;
  const vec s = t * t * float(2 / (5.4 * 5.4)) - 1.0f, u = s * s;
  vec even = 0.00040082164923660457f * u + 0.00085197709267959f;
  even = even * u + 0.0036843707785010338f;
  even = even * u + 0.009637583047151566f;
  even = even * u + 0.019648751243948936f;
  even = even * u + 0.03211616352200508f;
  even = even * u + 0.048499610275030136f;
  even = even * u + 0.13092811405658722f;
  vec odd = -0.0010353573597967625f * u - 0.0011668179649859667f;
  odd = odd * u - 0.00673622265458107f;
  odd = odd * u - 0.013952777720987797f;
  odd = odd * u - 0.025749003514647484f;
  odd = odd * u - 0.039206553250551224f;
  odd = odd * u - 0.06532806158065796f;
  const vec y = odd * s + even;
  return x * (t * y + 0.5f);
}

// x sigmoid(2 sqrt(2 / π) (x + 0.044715 x³))
static inline vec gelu_tanh(vec x) {
  const vec power = x * (x * x * float(-2.302208198144325 * 0.044715) - 2.302208198144325f);
  return x / (1.0f + power_of_2(power > 126.0f ? all(126.0f) : power));
}

template <class T>
static inline vec rounded(vec x) {
  T y[L];
  store(y, x);
  return load(y);
}
// x rounded to T
template <class T, class To>
static inline void store_rounded(To* p, vec x) {
  store(p, std::is_same<T, To>::value ? x : rounded<T>(x));
}

// to (rows, wide) = act(c + bias) [+ residual (rows, wide)], rounded to T, in columns n to n + WIDE; bias has room for
// them. z and copy (rows, wide), or null, take c + bias, and to once more. The step of to's rows is its own
template <class T, class To, class Act>
static inline void finish_tile(const float* bias, int64_t wide, int64_t n, const float* c, int64_t rows,
                               const To* residual, To* to, int64_t to_step, T* z, T* copy, Act act) {
  const int64_t columns = std::min(WIDE, wide - n);
  for (int64_t r = 0; r < rows; r++) {
    To some[WIDE] = {};
    To* y = columns == WIDE ? to + r * to_step + n : some;
    const To* x = residual == nullptr ? nullptr : residual + r * wide + n;
    if (x != nullptr && y == some) x = static_cast<To*>(memcpy(some, x, columns * sizeof(To)));
    for (int64_t j = 0; j < WIDE; j += L) {
      const vec before = load(c + r * WIDE + j) + load(bias + n + j), v = act(before);
      if (z != nullptr) stream(z + r * wide + n + j, before);
      if (copy != nullptr) stream(copy + r * wide + n + j, v);
      store_rounded<T>(y + j, x == nullptr ? v : rounded<T>(v) + load(x + j));
    }
    if (y == some) memcpy(to + r * to_step + n, some, columns * sizeof(To));
  }
}

template <class T, class To>  // by itself the compiler finds registers for it, as for tile and transpose
[[gnu::noinline]] static void finish(int activation, const float* bias, int64_t wide, int64_t n, const float* c,
                                     int64_t rows, const To* residual, To* to, int64_t to_step, T* z = nullptr,
                                     T* copy = nullptr) {
  if (activation == GELU)
    finish_tile<T>(bias, wide, n, c, rows, residual, to, to_step, z, copy, [](vec x) { return gelu(rounded<T>(x)); });
  else if (activation == GELU_TANH)
    finish_tile<T>(bias, wide, n, c, rows, residual, to, to_step, z, copy,
                   [](vec x) { return gelu_tanh(rounded<T>(x)); });
  else
    finish_tile<T>(bias, wide, n, c, rows, residual, to, to_step, z, copy, [](vec x) { return x; });
}

// to (room): v (n), or 0
template <class T>
static void widen_all(const void* v, int64_t n, int64_t room, float* to) {
  for (int64_t i = 0; i < room; i++) to[i] = v != nullptr && i < n ? widen(static_cast<const T*>(v)[i]) : 0;
}

// to = LayerNorm of x (k), rounded to T. gamma, beta and row have room for k in whole vectors, gamma and beta are 0
// there
template <class T, class To>
static void layer_norm(const T* x, int64_t k, const float* gamma, const float* beta, float eps, float* row, To* to,
                       float* mean_of_row, float* rstd_of_row) {
  const int64_t whole = k / L * L, width = (k + L - 1) / L * L;
  vec rest = {}, sum = {}, squares = {};
  for (int64_t l = 0; l < k - whole; l++) rest[l] = 1.0f;
  for (int64_t j = 0; j < whole; j += L) {
    const vec v = load(x + j);
    store(row + j, v);
    sum += v;
  }
  for (int64_t j = whole; j < width; j++) row[j] = j < k ? widen(x[j]) : 0;
  if (whole < width) sum += load(row + whole);
  const float mean = total(sum) / k;
  sum = vec{};
  for (int64_t j = 0; j < width; j += L) {  // of x - mean, which takes away what rounding of a large mean leaves
    const vec v = (load(row + j) - mean) * (j < whole ? all(1.0f) : rest);
    store(row + j, v);
    sum += v;
    squares += v * v;
  }
  const float deviation = total(sum) / k;
  const float rstd = 1.0f / std::sqrt(std::max(total(squares) / k - deviation * deviation, 0.0f) + eps);
  if (mean_of_row != nullptr) *mean_of_row = mean + deviation, *rstd_of_row = rstd;
  for (int64_t j = 0; j < width; j += L) {
    const vec v = (load(row + j) - deviation) * rstd * load(gamma + j) + load(beta + j);
    To some[L];
    store_rounded<T>(j < whole ? to + j : some, v);
    if (j == whole) memcpy(to + j, some, (k - whole) * sizeof(To));
  }
}

// a step for rows of so many Units: an odd number of lines of cache, as rows at steps of a large power of 2 would
// take each other's place there
static int64_t padded(int64_t units) { return ((units + 15) / 16 | 1) * 16; }

// How threads share out rows: in groups of MOST_ROWS at most, in rounds of one for each thread, or of fewer
struct Groups {
  int64_t rows, threads, tiles, count;
  // A group has each weight transposed once, by its threads together, each of which reads what the others made of its
  // rows: `read` numbers a row, which take EXCHANGE times as long as those of `weights`
  Groups(int64_t rows, int64_t threads, int64_t weights, int64_t read)
      : rows(rows), threads(threads), tiles(tiles_of(rows)), count((tiles + MOST_ROWS / R - 1) / (MOST_ROWS / R)) {
    while (count < threads && count * (count + 1) * weights < EXCHANGE * threads * rows * read) count++;
    if (count > threads) count = (count + threads - 1) / threads * threads;
    count = std::min(count, tiles);
  }
  int64_t of_round() const { return std::min(count, threads); }
  int64_t rounds() const { return (count + threads - 1) / threads; }
  bool apart() const { return count % threads == 0; }  // each group is one thread's
  int64_t start(int64_t group) const { return rows * group / count; }
  int64_t most_rows() const { return tiles_of((rows + count - 1) / count) * R; }  // of a group, in whole tiles
  // numbers that a thread holds of sums for (rows, n)
  int64_t most_sums(int64_t n, int64_t units) const {
    const int64_t panel = most_rows() * WIDE;
    return units > SPAN ? (in_panels(n) / WIDE * panel * of_round() + threads) / threads + R * WIDE : panel;
  }

  // work(first row, place in its round, run) for each group that a thread has a run of, which is its even share of all
  // tiles of `panels`
  template <class Work>
  void share(int64_t round, int64_t thread, int64_t panels, Work work) const {
    const int64_t from = thread * of_round(), to = from + of_round();  // `threads` of this unit are a group
    for (int64_t g = from / threads; g * threads < to; g++) {
      const int64_t group = g * rounds() + round;  // so that a thread's groups stand beside each other
      const int64_t first = start(group), some = start(group + 1) - first;
      const int64_t all = panels * tiles_of(some);
      const auto at = [&](int64_t x) { return all * std::clamp<int64_t>(x - g * threads, 0, threads) / threads; };
      if (at(from) < at(to)) work(first, g, Run{at(from), at(to), some, !apart()});
    }
  }
};

// of K at a time, for so many rows: of few, more of a is then near, too
static int64_t chunk_for(int64_t rows) { return rows < FEW_ROWS ? MOST_CHUNK / 2 : MOST_CHUNK; }

// y = the linears of x [+ residual]; residual, and x with a norm before it, may be y
template <class T, class Unit>
static int linears(const Linears& f, const T* x, const T* residual, T* y, int64_t rows, int64_t chunk, int threads) {
  using H = Held<T, Unit>;
  constexpr int64_t E = Unit::elements;
  const bool norm = f.norm_weight != nullptr, held = norm || !std::is_same<T, H>::value;
  const bool two = f.second.weight != nullptr;
  const Linear& last = two ? f.second : f.first;
  const int64_t k = f.first.k, n = f.first.n, width = (k + L - 1) / L * L;
  const Groups groups(rows, threads, k * n + two * n * last.n, k + two * 2 * n + last.n);
  const int64_t sums = std::max(groups.most_sums(n, k / E), groups.most_sums(last.n, last.k / E));
  const int64_t left_step = held ? padded(k / E) : k / E, hidden_step = two * padded(n / E);
  const int64_t left_group = held * groups.most_rows() * left_step, hidden_group = groups.most_rows() * hidden_step;
  Scratch shared(kept_for_all, groups.of_round() * (left_group + hidden_group), threads);
  float *left = shared.take(groups.of_round() * left_group), *hidden = shared.take(groups.of_round() * hidden_group);
  if (shared.memory == nullptr) return 1;
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(kept, MOST_CHUNK * WIDE + sums + 3 * width + in_panels(n) + in_panels(last.n));
    float *panel = scratch.take(MOST_CHUNK * WIDE), *c = scratch.take(sums);
    float *gamma = scratch.take(width), *beta = scratch.take(width), *row = scratch.take(width);
    float *bias = scratch.take(in_panels(n)), *last_bias = scratch.take(in_panels(last.n));
    if (scratch.memory != nullptr) {
      if (norm) widen_all<T>(f.norm_weight, k, width, gamma), widen_all<T>(f.norm_bias, k, width, beta);
      if (two) widen_all<T>(f.first.bias, n, in_panels(n), bias);
      widen_all<T>(last.bias, last.n, in_panels(last.n), last_bias);
    } else {
      failed = 1;
    }
    const auto wait = [&] {
      if (!groups.apart()) {
#pragma omp barrier
      }
    };
    const auto share = [&](int64_t round, int64_t columns, auto work) {
      for (int64_t thread = omp_get_thread_num(); thread < threads; thread += omp_get_num_threads())
        groups.share(round, thread, in_panels(columns) / WIDE, work);
      wait();
    };
    wait();
    for (int64_t round = 0; round < groups.rounds() && !failed; round++) {
      if (held)
        share(round, 1, [&](int64_t first, int64_t group, Run run) {
          H* to = reinterpret_cast<H*>(left + group * left_group);
          const int64_t end = std::min(run.last * R, run.rows), step = left_step * E;
          for (int64_t r = run.first * R; r < end; r++) {
            const int64_t at = first + r;
            if (norm)
              layer_norm(x + at * k, k, gamma, beta, f.eps, row, to + r * step, f.mean ? f.mean + at : nullptr,
                         f.rstd + at);
            else
              for (int64_t i = 0; i < k; i++) narrow(widen(x[at * k + i]), to + r * step + i);
          }
        });
      const auto left_of = [&](int64_t first, int64_t group) {
        return held ? left + group * left_group : reinterpret_cast<const float*>(x + first * k);
      };
      if (two)
        share(round, n, [&](int64_t first, int64_t group, Run run) {
          H* to = reinterpret_cast<H*>(hidden + group * hidden_group);
          T *z = static_cast<T*>(f.z), *copy = static_cast<T*>(f.hidden);
          const int64_t step = hidden_step * E;
          panels<T, Unit>(left_of(first, group), left_step, run, f.first, chunk, panel, c,
                          [&](int64_t j, int64_t r, int64_t some, const float* c) {
            const int64_t at = (first + r) * n;
            finish<T, H>(f.activation, bias, n, j, c, some, nullptr, to + r * step, step, z ? z + at : z,
                         copy ? copy + at : copy);
          });
        });
      share(round, last.n, [&](int64_t first, int64_t group, Run run) {
        const float* a = two ? hidden + group * hidden_group : left_of(first, group);
        panels<T, Unit>(a, two ? hidden_step : left_step, run, last, chunk, panel, c,
                        [&](int64_t j, int64_t r, int64_t some, const float* c) {
          const int64_t at = (first + r) * last.n;
          finish<T>(two ? int(NONE) : f.activation, last_bias, last.n, j, c, some, residual ? residual + at : nullptr,
                    y + at, last.n);
        });
      });
    }
    if (f.z != nullptr) end_of_streams();
  }
  return failed;
}

template <class T, class Unit>
static int multiply(const Product& f) {
  constexpr int E = Unit::elements;
  const int64_t units = (f.depth + E - 1) / E;
  const Groups groups(f.rows, f.threads, 0, 1);  // b is only copied: a thread has rows for itself
  const int64_t rows = groups.most_rows(), sums = rows * (units > SPAN ? in_panels(f.n) : WIDE);
  const bool held = f.transposed || !std::is_same<T, Held<T, Unit>>::value;
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(f.threads)
  {
    const int64_t of_a = held ? rows * std::min(SPAN, units) : 0;
    Scratch scratch(kept, MOST_CHUNK * WIDE + sums + of_a + in_panels(f.n));
    if (scratch.memory == nullptr) failed = 1;
    float *panel = scratch.take(MOST_CHUNK * WIDE), *c = scratch.take(sums), *left = scratch.take(of_a);
    float* zeros = scratch.take(in_panels(f.n));
    if (scratch.memory != nullptr) std::fill_n(zeros, in_panels(f.n), 0.0f);
    const AsItLies<T, Unit> b{static_cast<const T*>(f.b), f.row, f.depth, f.n};
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups.count; group++) {
      if (scratch.memory == nullptr) continue;
      const int64_t first = groups.start(group), count = groups.start(group + 1) - first;
      const T* a = static_cast<const T*>(f.a) + first * (f.transposed ? 1 : f.depth);
      T* y = static_cast<T*>(f.c) + first * f.n;
      const Run run{0, in_panels(f.n) / WIDE * tiles_of(count), count, false};
      const auto finish_rows = [&](int64_t n, int64_t r, int64_t some, const float* c) {
        finish<T, T>(NONE, zeros, f.n, n, c, some, nullptr, y + r * f.n, f.n);
      };
      for (int64_t start = 0; start < units; start += SPAN) {
        const int64_t some = std::min(SPAN, units - start);
        if (f.transposed)
          lay<T, Unit>(a + start * E * f.rows, f.rows, f.depth - start * E, count, some, count, left);
        else if (held)
          for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < some; i++) left[r * some + i] = widen(a[r * f.depth + start + i]);
        const float* from = held ? left : reinterpret_cast<const float*>(a) + start;
        if (f.transposed)
          span<Unit>(from, 1, count, run, b, start, units, MOST_CHUNK, panel, c, finish_rows);
        else
          span<Unit>(from, held ? some : units, One(), run, b, start, units, MOST_CHUNK, panel, c, finish_rows);
      }
    }
  }
  return failed;
}

// outputs `from` to `to` of a Linear
template <class T>
static Linear part(const Linear& w, int64_t from, int64_t to) {
  const auto of = [&](const void* p, int64_t step) { return p ? static_cast<const T*>(p) + from * step : nullptr; };
  return {of(w.weight, w.row), of(w.bias, 1), to - from, w.k, w.row};
}

template <class T>
static int attend(const Forward* f) {
  if constexpr (std::is_same<T, float>::value) return attention_forward_fp32(f);
#if defined(HAS_FP16)
  if constexpr (std::is_same<T, fp16>::value) return attention_forward_fp16(f);
#endif
  return attention_forward_bf16(f);
}

// of the first token of each batch only, if so: the keys and values are of all
template <class T, class Unit>
static int attention(const Block& block, const T* x, const T* residual, T* y, const Blocks& f, bool first) {
  const Linears& l = block.linears;
  Linears project{l.norm_weight, l.norm_bias, l.first}, last{nullptr, nullptr, l.second};  // the rest is 0
  project.eps = l.eps;
  const int64_t rows = f.batches * f.tokens, k = l.first.k, inner = l.first.n / 3, dim = inner / block.heads;
  const int64_t chunk = chunk_for(rows), queries = first ? 1 : f.tokens;
  T *between = static_cast<T*>(f.between), *q = between, *kv = between + inner, *out = between + 3 * rows * inner;
  int64_t of_q = 3 * inner, of_kv = 3 * inner;  // widths of rows
  if (first) {
    Linears keys = project;
    keys.first = part<T>(l.first, inner, 3 * inner), project.first = part<T>(l.first, 0, inner);
    of_q = inner, of_kv = 2 * inner, kv = between, q = between + rows * of_kv;
    if (linears<T, Unit>(keys, x, nullptr, kv, rows, chunk, f.threads)) return 1;
    for (int64_t b = 0; b < f.batches; b++) memmove(y + b * k, x + b * f.tokens * k, k * sizeof(T));
    x = y, residual = residual ? y : nullptr;
  }
  if (linears<T, Unit>(project, x, nullptr, q, f.batches * queries, chunk, f.threads)) return 1;
  const auto of_heads = [&](T* t, int64_t tokens, int64_t width) { return Tensor{t, tokens * width, dim, width}; };
  Forward forward{of_heads(q, queries, of_q), of_heads(kv, f.tokens, of_kv), of_heads(kv + inner, f.tokens, of_kv),
                  of_heads(out, queries, inner), nullptr, f.batches, block.heads, queries, f.tokens, dim, block.factor,
                  f.pairs, f.threads};
  return attend<T>(&forward) || linears<T, Unit>(last, out, residual, y, f.batches * queries, chunk, f.threads);
}

template <class T, class Unit>
static int blocks(const Blocks& f) {
  const T* x = static_cast<const T*>(f.x);
  T* y = static_cast<T*>(f.y);
  const int64_t rows = f.batches * f.tokens;
  for (int64_t i = 0; i < f.count; i++, x = y) {
    const Block& block = f.blocks[i];
    const T* residual = f.residual ? x : nullptr;
    const bool first = f.first && i >= f.count - 2;
    if (block.heads > 0 ? attention<T, Unit>(block, x, residual, y, f, first)
                        : linears<T, Unit>(block.linears, x, residual, y, first ? f.batches : rows, chunk_for(rows),
                                           f.threads))
      return 1;
  }
  return 0;
}

// y (n) = GELU(z (n)), as between two Linears
template <class T>
static void activate(const T* z, T* y, int64_t n, bool tanh, int threads) {
  const int64_t vectors = n / L;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i <= vectors; i++) {
    T some[L] = {};
    const bool last = i == vectors;
    const size_t bytes = last ? (n - vectors * L) * sizeof(T) : sizeof some;
    memcpy(some, z + i * L, bytes);
    store(some, tanh ? gelu_tanh(load(some)) : gelu(load(some)));
    memcpy(y + i * L, some, bytes);
  }
}

extern "C" void gelu_fp32(const void* z, void* y, int64_t n, int tanh, int threads) {
  activate(static_cast<const float*>(z), static_cast<float*>(y), n, tanh, threads);
}
extern "C" void gelu_bf16(const void* z, void* y, int64_t n, int tanh, int threads) {
  activate(static_cast<const uint16_t*>(z), static_cast<uint16_t*>(y), n, tanh, threads);
}
#if defined(__AVX512BF16__)
extern "C" const int multiplies_pairs = 1;
#else
extern "C" const int multiplies_pairs = 0;
#endif
extern "C" int blocks_fp32(const Blocks* f) { return blocks<float, Floats>(*f); }
extern "C" int blocks_bf16(const Blocks* f) {
#if defined(__AVX512BF16__)
  if (f->pairs) return blocks<uint16_t, Pairs>(*f);
#endif
  return blocks<uint16_t, Floats>(*f);
}
extern "C" int product_fp32(const Product* f) { return multiply<float, Floats>(*f); }
extern "C" int product_bf16(const Product* f) {
#if defined(__AVX512BF16__)
  if (f->pairs) return multiply<uint16_t, Pairs>(*f);
#endif
  return multiply<uint16_t, Floats>(*f);
}
#if defined(HAS_FP16)
extern "C" void gelu_fp16(const void* z, void* y, int64_t n, int tanh, int threads) {
  activate(static_cast<const fp16*>(z), static_cast<fp16*>(y), n, tanh, threads);
}
extern "C" int blocks_fp16(const Blocks* f) { return blocks<fp16, Floats>(*f); }
extern "C" int product_fp16(const Product* f) { return multiply<fp16, Floats>(*f); }
#endif
