// The ops that are read on request: log-histogram and energy entropy. Samples are shared among threads, not cut.
#include <cstring>

#include "balanced_rep/isa.h"
#include "reduction.h"

namespace balanced_rep {

void log_histogram(const View& view, const int64_t* top, int64_t* out, int n_threads) {
  const Plan plan = plan_reduction(view, false);
  const int64_t field_stride = plan.n_kept * kHistogramBins;
  if (plan.n_elements == 0) {
    std::memset(out, 0, 3 * field_stride * sizeof(int64_t));
    return;
  }
  const HistogramTask task = {plan.r, plan.repeated, top, out, field_stride};
  in_parallel(plan.n_kept, useful_threads(plan.n_elements, plan.n_kept, n_threads),
              [&](int64_t first, int64_t last) { kernels().log_histogram[plan.r.dtype](task, first, last); });
}

void energy_entropy(const View& view, double* out, int n_threads) {
  const Plan plan = plan_reduction(view, false);
  if (plan.n_elements == 0) {
    std::memset(out, 0, plan.n_kept * sizeof(double));
    return;
  }
  const EntropyTask task = {plan.r, plan.repeated, out};
  in_parallel(plan.n_kept, useful_threads(plan.n_elements, plan.n_kept, n_threads),
              [&](int64_t first, int64_t last) { kernels().energy_entropy[plan.r.dtype](task, first, last); });
}

}  // namespace balanced_rep
