// All rounds of the block Krylov iteration for one matrix after the other, each while it lies in the cache.
#include <cstring>
#include <stdexcept>
#include <vector>

#include "balanced_rep/ops.h"
#include "reduction.h"

namespace balanced_rep {
namespace {

class Rounds {
 public:
  Rounds(const KrylovSpaceTask& task, int n_threads)
      : t_(task),
        threads_(n_threads),
        v_(t_.width * t_.columns),
        w_(v_.size()),
        padded_(t_.width * t_.basis_row_stride) {}

  // Whether all blocks of matrix b came out.
  bool run(int64_t b) {
    double* const basis = t_.basis + b * t_.basis_batch_stride;
    for (int64_t r = 0; r < t_.rounds; ++r) {
      const bool last = r + 1 == t_.rounds;
      double* const block = basis + r * t_.width * t_.basis_row_stride;
      copy(block, t_.basis_row_stride, v_.data(), t_.columns);
      multiply(b, t_.images + b * t_.images_batch_stride + r * t_.width * t_.images_row_stride, !last);
      if (!last && !next(basis, r + 1)) return false;
    }
    return true;
  }

 private:
  void copy(const double* from, int64_t from_row, double* to, int64_t to_row) const {
    for (int64_t i = 0; i < t_.width; ++i) {
      memcpy(to + i * to_row, from + i * from_row, t_.columns * sizeof(double));
    }
  }

  void multiply(int64_t b, double* images, bool adjoint) {
    KrylovTask task = {};
    task.m = t_.m + b * t_.batch_stride;
    task.batch = 1, task.rows = t_.rows, task.columns = t_.columns;
    task.row_stride = t_.row_stride, task.column_stride = t_.column_stride;
    task.width = t_.width, task.v = v_.data();
    task.z = images, task.z_row_stride = t_.images_row_stride;
    task.adjoint = adjoint, task.w = w_.data();
    krylov_product(task, threads_);
  }

  // Block r of the basis: what the last product adds to the blocks before it.
  bool next(double* basis, int64_t r) {
    copy(w_.data(), t_.columns, padded_.data(), t_.basis_row_stride);
    bool done = false;
    OrthonormaliseTask task = {};
    task.w = padded_.data(), task.basis = basis;
    task.basis_row_stride = t_.basis_row_stride;
    task.batch = 1, task.width = t_.width, task.held = r * t_.width, task.n = t_.basis_row_stride;
    task.out = basis + r * t_.width * t_.basis_row_stride, task.done = &done;
    orthonormalise(task, threads_);
    return done;
  }

  const KrylovSpaceTask& t_;
  const int threads_;
  std::vector<double> v_, w_, padded_;  // zeros behind the columns of padded_ stay
};

}  // namespace

void krylov_space(const KrylovSpaceTask& task, int n_threads) {
  if (task.basis_row_stride < task.columns || task.basis_row_stride % 8 != 0) {
    throw std::invalid_argument("krylov_space: rows of the basis must be padded to a multiple of 8");
  }
  const int outer = task.batch < n_threads ? 1 : n_threads;
  in_parallel(task.batch, outer, [&](int64_t first, int64_t last) {
    Rounds rounds(task, outer > 1 ? 1 : n_threads);
    for (int64_t b = first; b < last; ++b) task.done[b] = rounds.run(b);
  });
}

}  // namespace balanced_rep
