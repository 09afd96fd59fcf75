// Orthonormal rows by Cholesky factors of Gram matrices, in double precision.
#include <cmath>
#include <stdexcept>
#include <vector>

#include "balanced_rep/ops.h"
#include "reduction.h"

namespace balanced_rep {
namespace {

// Squares of lengths, of rows that had length 1: what is left of one beside the basis, and of that beside the rows
// before it. Below them a row may be rounding, and its factor too inexact for the second time to mend.
constexpr double kLeftBesideBasis = 1e-12, kLeftBesideRows = 1e-10;

class Rows {
 public:
  Rows(const OrthonormaliseTask& task, int n_threads)
      : t_(task),
        threads_(n_threads),
        other_(t_.width * t_.n),
        inside_(t_.width * t_.held),
        gram_(t_.width * t_.width) {}

  // Whether the rows of matrix b came out.
  bool run(int64_t b) {
    double* const out = t_.out + b * t_.width * t_.n;
    for (int64_t i = 0; i < t_.width; ++i) {
      if (!unit(t_.w + (b * t_.width + i) * t_.n, out + i * t_.n)) return false;
    }
    const double* const basis = t_.basis + b * t_.basis_batch_stride;
    project_out(basis, out);
    if (!whiten(out, other_.data(), kLeftBesideBasis)) return false;
    project_out(basis, other_.data());
    return whiten(other_.data(), out, kLeftBesideRows);
  }

 private:
  bool unit(const double* row, double* out) const {
    double sums[8] = {};  // independent, so that they need not wait for each other
    for (int64_t j = 0; j < t_.n; j += 8) {
      for (int64_t k = 0; k < 8; ++k) sums[k] += row[j + k] * row[j + k];
    }
    const double length =
        std::sqrt(((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])));
    if (!(length > 0) || !std::isfinite(length)) return false;
    for (int64_t j = 0; j < t_.n; ++j) out[j] = row[j] / length;
    return true;
  }

  void project_out(const double* basis, double* rows) {
    if (t_.held == 0) return;
    multiply(rows, t_.n, basis, t_.basis_row_stride, inside_.data(), t_.held, t_.n, t_.held, true, false);
    for (double& value : inside_) value = -value;
    multiply(inside_.data(), t_.held, basis, t_.basis_row_stride, rows, t_.n, t_.held, t_.n, false, true);
  }

  // to = L^-1 rows, where L L^T is the Gram matrix of the rows.
  bool whiten(const double* rows, double* to, double least) {
    const int64_t w = t_.width;
    double* const g = gram_.data();
    multiply(rows, t_.n, rows, t_.n, g, w, t_.n, w, true, false);
    for (int64_t j = 0; j < w; ++j) {  // L, in the lower half
      const double whole = g[j * w + j];
      double pivot = whole;
      for (int64_t k = 0; k < j; ++k) pivot -= g[j * w + k] * g[j * w + k];
      if (!(pivot > least) || !(pivot > kLeftBesideRows * whole)) return false;
      const double root = std::sqrt(pivot);
      g[j * w + j] = root;
      for (int64_t i = j + 1; i < w; ++i) {
        double sum = g[i * w + j];
        for (int64_t k = 0; k < j; ++k) sum -= g[i * w + k] * g[j * w + k];
        g[i * w + j] = sum / root;
      }
    }
    for (int64_t j = 0; j < w; ++j) {  // its inverse: column j needs the columns of L behind it only
      g[j * w + j] = 1 / g[j * w + j];
      for (int64_t i = j + 1; i < w; ++i) {
        double sum = 0;
        for (int64_t k = j; k < i; ++k) sum -= g[i * w + k] * g[k * w + j];
        g[i * w + j] = sum / g[i * w + i];
      }
      for (int64_t i = 0; i < j; ++i) g[i * w + j] = 0;
    }
    multiply(g, w, rows, t_.n, to, t_.n, w, t_.n, false, false);
    return true;
  }

  void multiply(const double* x, int64_t x_row, const double* y, int64_t y_row, double* out, int64_t out_row,
                int64_t inner, int64_t columns, bool transposed, bool add) const {
    DoubleProductTask task = {};
    task.x = x, task.y = y, task.out = out;
    task.x_row_stride = x_row, task.y_row_stride = y_row, task.out_row_stride = out_row;
    task.batch = 1, task.rows = t_.width, task.inner = inner, task.columns = columns;
    task.transposed = transposed, task.add = add;
    double_product(task, threads_);
  }

  const OrthonormaliseTask& t_;
  const int threads_;
  std::vector<double> other_, inside_, gram_;
};

}  // namespace

void orthonormalise(const OrthonormaliseTask& task, int n_threads) {
  if (task.n % 8 != 0) throw std::invalid_argument("orthonormalise: rows must be padded to a multiple of 8");
  const int outer = useful_threads(task.batch * task.width * task.n, task.batch, n_threads);
  in_parallel(task.batch, outer, [&](int64_t first, int64_t last) {
    Rows rows(task, outer > 1 ? 1 : n_threads);
    for (int64_t b = first; b < last; ++b) task.done[b] = rows.run(b);
  });
}

}  // namespace balanced_rep
