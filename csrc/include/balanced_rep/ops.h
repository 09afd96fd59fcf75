// The CPU ops over raw pointers, sizes and strides. Strides are in elements and not negative; 0 repeats.
#pragma once

#include <cstdint>
#include <vector>

#include "balanced_rep/jvp_kernels.h"
#include "balanced_rep/kernels.h"

namespace balanced_rep {

// A strided view whose dims are (kept..., reduced..., pooled...).
struct View {
  const void* x;
  DType dtype;
  std::vector<int64_t> kept_shape, kept_strides, reduced_shape, reduced_strides, pooled_shape, pooled_strides;
  Pool pool;
};

// out: float64 (kFields, *kept), contiguous.
void moments(const View& view, double threshold, double* out, int n_threads);

// top: int64 (*kept); out: int64 (3, *kept, kHistogramBins), contiguous: count, sum r, sum r^2.
void log_histogram(const View& view, const int64_t* top, int64_t* out, int n_threads);

// out: float64 (*kept), the sums of v^2 ln v^2.
void energy_entropy(const View& view, double* out, int n_threads);

// Counter-based randomness, (n_items, n) contiguous: 32-bit words in int64, and standard normals.
void philox_bits(const int64_t* items, int64_t n_items, int64_t seed, int64_t n, int64_t* out, int n_threads);
void philox_normal(const int64_t* items, int64_t n_items, int64_t seed, int64_t n, float* out, int n_threads);

// Functions with K tangents; see jvp_kernels.h. The fields of the group norm that say how it is cut are set here.
void attention_jvp(const AttentionTask& task, DTypePair pair, int n_threads);
void group_norm_jvp(GroupNormTask task, DTypePair pair, int n_threads);
void row_jvp(const RowTask& task, DTypePair pair, int n_threads);
void activation_jvp(const ActivationTask& task, DTypePair pair, int n_threads);

// Products of tall matrices with a thin block; see KrylovTask. How it is cut, and memory to work in, are set here.
void krylov_product(KrylovTask task, int n_threads);
void double_product(DoubleProductTask task, int n_threads);
void survey(SurveyTask task, double* out, int n_threads);  // (batch, 2)

// Rows that are orthonormal, orthogonal to those of a basis, and span what w adds to it.
struct OrthonormaliseTask {
  const double* w;      // (batch, width, n), contiguous; n is a multiple of 8
  const double* basis;  // (batch, held, n), orthonormal rows in one piece
  int64_t basis_batch_stride, basis_row_stride;
  int64_t batch, width, held, n;
  double* out;  // (batch, width, n), contiguous; arbitrary where not done
  bool* done;   // (batch): no where rows are too near to dependent ones for a Cholesky factor
};
void orthonormalise(const OrthonormaliseTask& task, int n_threads);

// Blocks of an orthonormal basis of the Krylov space of M^T M, and their images: block r + 1 is what M^T M times block
// r adds to those before.
struct KrylovSpaceTask {
  const float* m;  // as in KrylovTask
  int64_t batch, rows, columns;
  int64_t batch_stride, row_stride, column_stride;
  int64_t width, rounds;
  double* basis;   // (batch, rounds * width, basis_row_stride): rows of V, padded with zeros; block 0 is given
  double* images;  // (batch, rounds * width, images_row_stride): rows of M V
  int64_t basis_batch_stride, basis_row_stride, images_batch_stride, images_row_stride;
  bool* done;  // (batch): no where a block could not be made orthonormal
};
void krylov_space(const KrylovSpaceTask& task, int n_threads);

// Sum of n floats at the speed of memory: the benchmarks' yardstick, no statistic.
float read_test(const float* x, int64_t n, int n_threads);

}  // namespace balanced_rep
