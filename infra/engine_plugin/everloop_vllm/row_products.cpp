// SPDX-License-Identifier: Apache-2.0
// What adapters add to the rows of a step: one call for a layer, in which each thread takes blocks of rows.
//
// A decode step has few rows, so a layer's LoRA is a few microseconds of arithmetic; as tensor operations it is ten
// times that of dispatch, of waiting for other threads, and of reading zeros that fill up tiles. Here the weights are
// read in the order in which they lie, and nothing else is. What a row gets does not depend on the rows beside it.
//
// Weights and activations are bfloat16, sums float32. Panels are as wide as the vectors of this processor:
//   A of a slot: for each slice, for each panel of the rank, [inputs][lanes]
//   B of a slot: for each slice, for each panel of its width, [rank][lanes]

#include <cstdint>
#include <cstring>
#include <omp.h>

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr long kBlock = 16;     // rows that a thread adds to at once
constexpr long kMaxRank = 512;  // of all slices, each filled up to whole panels
constexpr long kChunk = 512;    // inputs that are widened at once: 16 rows of them stay in the first cache

struct Layer {
  const uint16_t *a, *b;
  long inputs, rank, num_slices;
  const int64_t* widths;
  float scale;
};

struct Rows {
  const uint16_t* x;
  long x_stride;
  uint16_t* y;
  long y_stride;
};

// Spelled out: a width that depends on a template's parameter is not taken for a vector by every compiler.
template <int L>
struct Types;

#define TYPES(lanes)                                              \
  template <>                                                     \
  struct Types<lanes> {                                           \
    typedef float Floats __attribute__((vector_size(4 * lanes))); \
    typedef uint32_t Bits __attribute__((vector_size(4 * lanes))); \
    typedef uint16_t Halves __attribute__((vector_size(2 * lanes))); \
  }
TYPES(4);
TYPES(8);
TYPES(16);

template <int L>
struct Vector {
  using Floats = typename Types<L>::Floats;
  using Bits = typename Types<L>::Bits;
  using Halves = typename Types<L>::Halves;

  INLINE Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }

  INLINE void store(Floats values, float* to) { std::memcpy(to, &values, sizeof values); }

  INLINE Floats widen(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Bits) << 16);
  }

  // Rounds to the nearest, ties to even; what is not a number stays none.
  INLINE void narrow(Floats values, uint16_t* to) {
    const Bits bits = (Bits)values;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector(values != values ? (bits >> 16) | 0x40 : rounded, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }
};

// Sets `hidden` to scale * x A^T of N rows.
template <int L, int N>
INLINE void shrink(const Layer& layer, const Rows& rows, const int64_t* row, float (*hidden)[kMaxRank]) {
  using V = Vector<L>;
  alignas(64) float wide[N][kChunk];
  const long panels = (layer.rank + L - 1) / L * layer.num_slices;
  for (long from = 0; from < layer.inputs; from += kChunk) {
    const long count = layer.inputs - from < kChunk ? layer.inputs - from : kChunk;
    for (int n = 0; n < N; n++)
      for (long i = 0; i < count; i += L) V::store(V::widen(rows.x + row[n] * rows.x_stride + from + i), wide[n] + i);
    for (long panel = 0; panel < panels; panel++) {
      typename V::Floats sum[N];
      for (int n = 0; n < N; n++) sum[n] = from ? V::load(hidden[n] + panel * L) : typename V::Floats{};
      const uint16_t* a = layer.a + (panel * layer.inputs + from) * L;
      for (long i = 0; i < count; i++, a += L) {
        const typename V::Floats weights = V::widen(a);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) sum[n] += weights * wide[n][i];
      }
      const bool is_last = from + count == layer.inputs;
      for (int n = 0; n < N; n++) V::store(is_last ? sum[n] * layer.scale : sum[n], hidden[n] + panel * L);
    }
  }
}

// Adds hidden B^T to N rows of y.
template <int L, int N>
INLINE void expand(const Layer& layer, const Rows& rows, const int64_t* row, float (*hidden)[kMaxRank]) {
  using V = Vector<L>;
  const uint16_t* b = layer.b;
  long column = 0, offset = 0;
  for (long slice = 0; slice < layer.num_slices; slice++, offset += (layer.rank + L - 1) / L * L)
    for (long end = column + layer.widths[slice]; column < end; column += L) {
      typename V::Floats sum[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sum[n] = V::widen(rows.y + row[n] * rows.y_stride + column);
      for (long k = 0; k < layer.rank; k++, b += L) {
        const typename V::Floats weights = V::widen(b);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) sum[n] += weights * hidden[n][offset + k];
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) V::narrow(sum[n], rows.y + row[n] * rows.y_stride + column);
    }
}

template <int L, int N>
INLINE void add_some(const Layer& layer, const Rows& rows, const int64_t*& row, long& left) {
  for (; left >= N; left -= N, row += N) {
    alignas(64) float hidden[N][kMaxRank];
    shrink<L, N>(layer, rows, row, hidden);
    expand<L, N>(layer, rows, row, hidden);
  }
}

// N sums stay in registers, of which there are 32 with 512 bits, else 16.
template <int L, int N>
INLINE void add_rows(const Layer& layer, const Rows& rows, const int64_t* row, long count) {
  add_some<L, N>(layer, rows, row, count);
  add_some<L, N / 2>(layer, rows, row, count);
  add_some<L, N / 4>(layer, rows, row, count);
  add_some<L, 1>(layer, rows, row, count);
}

using AddRows = void(const Layer&, const Rows&, const int64_t*, long);

#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void add_rows_v4(
    const Layer& layer, const Rows& rows, const int64_t* row, long count) {
  add_rows<16, 16>(layer, rows, row, count);
}

__attribute__((target("arch=x86-64-v3"))) void add_rows_v3(
    const Layer& layer, const Rows& rows, const int64_t* row, long count) {
  add_rows<8, 8>(layer, rows, row, count);
}
#endif

void add_rows_any(const Layer& layer, const Rows& rows, const int64_t* row, long count) {
  add_rows<4, 8>(layer, rows, row, count);
}

AddRows* add_rows_of(long lanes) {
#if defined(__x86_64__)
  if (lanes == 16) return add_rows_v4;
  if (lanes == 8) return add_rows_v3;
#endif
  return add_rows_any;
}

}  // namespace

extern "C" {

// Returns the width of the panels that are best here.
__attribute__((visibility("default"))) long everloop_lanes() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    return 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 8;
#endif
  return 4;
}

// Adds to the rows of y. Groups are (slot, start, stop): positions in `row`, which holds row numbers.
__attribute__((visibility("default"))) void everloop_add_rows(
    const uint16_t* x, long x_stride, uint16_t* y, long y_stride, const int64_t* row, const int64_t* groups,
    long num_groups, const uint16_t* a, long a_stride, const uint16_t* b, long b_stride, long inputs, long rank,
    long num_slices, const int64_t* widths, float scale, long lanes) {
  if (num_groups == 0) return;
  const Rows rows{x, x_stride, y, y_stride};
  AddRows* add = add_rows_of(lanes);
  const long num_rows = groups[3 * num_groups - 1];
  const long most = num_rows <= kBlock ? kBlock / 2 : kBlock;  // so that a few rows are work for two threads
#pragma omp parallel if (num_rows > 1)
  {
    long block = 0;
    for (const int64_t* group = groups; group < groups + 3 * num_groups; group += 3) {
      const Layer layer{a + group[0] * a_stride, b + group[0] * b_stride, inputs, rank, num_slices, widths, scale};
      for (long start = group[1]; start < group[2]; start += most)
        if (block++ % omp_get_num_threads() == omp_get_thread_num())
          add(layer, rows, row + start, group[2] - start < most ? group[2] - start : most);
    }
  }
}
}
