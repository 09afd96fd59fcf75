#include <cmath>
#include <limits>
#include <memory>

#include "balanced_rep/isa.h"
#include "reduction.h"

namespace balanced_rep {
namespace {

// Field by field: counts and sums grow by the factor, mean and extremes stay.
void repeat(int64_t factor, int64_t n_kept, double* out) {
  for (int f : {0, 2, 3, 4, 5, 8, 9}) {
    for (int64_t i = 0; i < n_kept; ++i) out[f * n_kept + i] *= static_cast<double>(factor);
  }
}

void fill_neutral(int64_t n_kept, double* out) {
  std::fill_n(out, kFields * n_kept, 0.0);
  std::fill_n(out + 6 * n_kept, n_kept, std::numeric_limits<double>::infinity());
  std::fill_n(out + 7 * n_kept, n_kept, -std::numeric_limits<double>::infinity());
}

// The largest float that is not above the threshold: for a float x, x > threshold exactly if x > round_down(threshold).
float round_down(double threshold) {
  const float nearest = static_cast<float>(threshold);
  return nearest > threshold ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}

}  // namespace

void moments(const View& view, double threshold, double* out, int n_threads) {
  const Plan plan = plan_reduction(view, true);
  if (plan.n_elements == 0) return fill_neutral(plan.n_kept, out);
  const Kernels& k = kernels();
  const int threads = useful_threads(plan.n_elements, plan.r.n_items, n_threads);
  const int64_t n_partial = plan.n_kept * plan.r.n_segments;
  std::unique_ptr<double[]> partial;
  if (plan.r.n_segments > 1) partial.reset(new double[kFields * n_partial]);
  const MomentsTask task = {plan.r, threshold, round_down(threshold), partial ? partial.get() : out, n_partial};
  in_parallel(plan.r.n_items, threads,
              [&](int64_t first, int64_t last) { k.moments[plan.r.dtype](task, first, last); });
  if (partial) {
    const int mergers = useful_threads(n_partial * 16, plan.n_kept, n_threads);
    in_parallel(plan.n_kept, mergers, [&](int64_t first, int64_t last) { k.merge_segments(task, out, first, last); });
  }
  if (plan.repeated > 1) repeat(plan.repeated, plan.n_kept, out);
}

float read_test(const float* x, int64_t n, int n_threads) {
  const int threads = std::max(1, n_threads);
  std::unique_ptr<float[]> sums(new float[threads]);
  in_parallel(threads, threads, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      sums[t] = kernels().read_test(x + n / threads * t, t + 1 < threads ? n / threads : n - n / threads * t);
    }
  });
  float sum = 0;
  for (int t = 0; t < threads; ++t) sum += sums[t];
  return sum;
}

}  // namespace balanced_rep
