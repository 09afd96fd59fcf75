// Sum of squares and largest magnitude of matrices of floats: what one read tells before anything is multiplied.
#pragma once

#include "balanced_rep/kernels.h"
#include "lanes.inl"
#include "simd.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

// A sum that is not finite says that an entry is not: squares of floats, and sums of them, are far within a double.
void survey_items(const SurveyTask& t, int64_t first, int64_t last) {
  constexpr int64_t kLanes = Simd<float>::kLanes, kHalf = kLanes / 2;
  for (int64_t item = first; item < last; ++item) {
    const int64_t b = item / t.n_chunks, begin = item % t.n_chunks * t.chunk;
    const int64_t end = begin + t.chunk < t.rows ? begin + t.chunk : t.rows;
    VecD low = {}, high = {};
    VecF largest = {};
    double sum = 0;
    float most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float* row = t.m + b * t.batch_stride + i * t.row_stride;
      int64_t j = 0;
      for (; j + kLanes <= t.columns; j += kLanes) {
        const VecF v = load(row + j);
        const VecF size = v < 0 ? -v : v;
        largest = size > largest ? size : largest;
        const VecD x = __builtin_convertvector(load_bytes<HalfVecF>(row + j), VecD);
        const VecD y = __builtin_convertvector(load_bytes<HalfVecF>(row + j + kHalf), VecD);
        low += x * x;
        high += y * y;
      }
      for (; j < t.columns; ++j) {
        const float size = row[j] < 0 ? -row[j] : row[j];
        most = size > most ? size : most;
        sum += static_cast<double>(size) * size;
      }
    }
    const float lanes = max_lane(largest);
    t.partial[2 * item] = sum + sum_lanes(low + high);
    t.partial[2 * item + 1] = lanes > most ? lanes : most;
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
