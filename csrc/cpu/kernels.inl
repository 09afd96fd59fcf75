// Everything that is compiled once per instruction set. A stub defines BR_ISA_NAMESPACE and includes this file.
#include "balanced_rep/kernels.h"
#include "simd.inl"
#include "walk.inl"
#include "moments.inl"
#include "energy_entropy.inl"
#include "log_histogram.inl"
#include "krylov_product.inl"
#include "survey.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

float read_test(const float* x, int64_t n) {
  constexpr int kStreams = 8;
  constexpr int kLanes = Simd<float>::kLanes;
  VecF sums[kStreams] = {};
  int64_t i = 0;
  for (; i + kStreams * kLanes <= n; i += kStreams * kLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < kStreams; ++k) sums[k] += load(x + i + k * kLanes);
  }
  VecF total{};
  for (int k = 0; k < kStreams; ++k) total += sums[k];
  float sum = sum_lanes(total);
  for (; i < n; ++i) sum += x[i];
  return sum;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    BR_VECTOR_BYTES,
    {moments_items<float>, moments_items<Half>, moments_items<BFloat>, moments_items<double>},
    merge_segments,
    {log_histogram_items<float>, log_histogram_items<Half>, log_histogram_items<BFloat>, log_histogram_items<double>},
    {energy_entropy_items<float>, energy_entropy_items<Half>, energy_entropy_items<BFloat>,
     energy_entropy_items<double>},
    krylov_block,
    krylov_workspace,
    krylov_pack,
    krylov_items,
    krylov_join,
    double_products,
    survey_items,
    read_test,
};

}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
