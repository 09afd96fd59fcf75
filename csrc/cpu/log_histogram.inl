// The log-histogram of balanced_rep/ops/log_histogram.py: integers, so the order of the values does not matter.
//
// A value counts by the bits of its float64 form: the exponent gives the octave, the 5 leading bits of the mantissa the
// bin, the next 18 bits the rest r. Count, sum r and sum r^2 of a bin lie side by side while a sample is read.
#pragma once

#include "walk.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int kOctaves = 32, kBinsPerOctave = 32, kRestBits = 18;
constexpr int kCentre = kOctaves * kBinsPerOctave;

struct Bin {
  int64_t count, rest;
  uint64_t rest_squares;  // may wrap, above 2^27 values: the reader knows
};

template <class Real>
BR_INLINE void count_values(const Real* p, int64_t n, int64_t lowest, Bin* bins) {
  for (int64_t i = 0; i < n; ++i) {
    double v = static_cast<double>(p[i]);
    uint64_t bits = bit_cast<uint64_t>(v) & ~(uint64_t{1} << 63);
    int64_t exponent = static_cast<int64_t>(bits >> 52);
    if (exponent == 0 && bits != 0) {  // a float64 subnormal: brought into the normal range
      bits = bit_cast<uint64_t>(__builtin_fabs(v) * 0x1p64);
      exponent = static_cast<int64_t>(bits >> 52) - 64;
    }
    const int64_t octave = exponent - 1023 - lowest;
    const bool inside = octave >= 0 && octave < kOctaves && exponent != 0x7ff && bits != 0;
    const int64_t q = static_cast<int64_t>(bits >> 29 & 0x7fffff);
    const int64_t offset = 1 + octave * kBinsPerOctave + (q >> kRestBits);
    const int64_t r = inside ? q & ((1 << kRestBits) - 1) : 0;
    Bin& bin = bins[inside ? kCentre + (v < 0 ? -offset : offset) : kCentre];
    bin.count += 1;
    bin.rest += r;
    bin.rest_squares += static_cast<uint64_t>(r * r);
  }
}

template <class T, Pool kPool>
inline void histogram_items(const HistogramTask& task, int64_t first_kept, int64_t last_kept) {
  const Reduction& r = task.r;
  Walker in(r.kept, 0, first_kept), out(r.kept, r.kept_out, 0, first_kept);
  for (int64_t i = first_kept; i < last_kept; ++i, in.next(), out.next()) {
    Bin bins[kHistogramBins];
    memset(bins, 0, sizeof(bins));
    const int64_t lowest = task.top[out.offset] - kOctaves;
    for_each_chunk<T, kPool>(static_cast<const T*>(r.x) + in.offset, r, 0, r.n_reduced, [&](const auto* p, int64_t n) {
      if constexpr (sizeof(*p) == 2) {
        RealOf<T> wide[kChunk];
        gather_run(p, n, 1, wide);
        count_values(wide, n, lowest, bins);
      } else {
        count_values(p, n, lowest, bins);
      }
    });
    int64_t* const table = task.out + out.offset * kHistogramBins;
    for (int b = 0; b < kHistogramBins; ++b) {
      table[b] = bins[b].count * task.repeated;
      table[task.field_stride + b] = bins[b].rest * task.repeated;
      table[2 * task.field_stride + b] =
          static_cast<int64_t>(bins[b].rest_squares * static_cast<uint64_t>(task.repeated));
    }
  }
}

template <class T>
void log_histogram_items(const HistogramTask& task, int64_t first_kept, int64_t last_kept) {
  switch (task.r.pool) {
    case kPoolNone:
      return histogram_items<T, kPoolNone>(task, first_kept, last_kept);
    case kPoolMax:
      return histogram_items<T, kPoolMax>(task, first_kept, last_kept);
    case kPoolMean:
      return histogram_items<T, kPoolMean>(task, first_kept, last_kept);
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
