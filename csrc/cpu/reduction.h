// From a view to a Reduction: which dims walk how, and how the work is cut.
#pragma once

#include <algorithm>
#include <exception>

#include "balanced_rep/ops.h"

namespace balanced_rep {

struct Plan {
  Reduction r;
  int64_t n_kept;      // outputs
  int64_t n_reduced;   // values per output, repeated ones included; 0 gives the neutral element
  int64_t repeated;    // factor that stride-0 reduced dims put on every count and sum
  int64_t n_elements;  // elements that are read
};

Plan plan_reduction(const View& view, bool allow_columns);

// Threads worth starting: none for work that takes less time than waking them.
inline int useful_threads(int64_t n_elements, int64_t n_items, int n_threads) {
  constexpr int64_t kElementsPerThread = 1 << 15;
  return static_cast<int>(
      std::max<int64_t>(1, std::min({int64_t{n_threads}, n_items, n_elements / kElementsPerThread})));
}

// run(first, last) over [0, n) in contiguous shares. What it throws, which may be that memory is out, is thrown here:
// it must not leave the threads.
template <class Run>
void in_parallel(int64_t n, int threads, Run run) {
  if (threads <= 1) {
    run(int64_t{0}, n);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    try {
      run(n / threads * t + std::min<int64_t>(t, n % threads),
          n / threads * (t + 1) + std::min<int64_t>(t + 1, n % threads));
    } catch (...) {
#pragma omp critical(balanced_rep_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace balanced_rep
