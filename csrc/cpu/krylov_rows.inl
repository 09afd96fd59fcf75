// M V and M^T (M V) where rows of M lie in one piece, by the tiles of thin.inl, and products of doubles by the same.
//
// Layout: the width is padded to a multiple of four; V and sums are (width, lead), a panel of Z is (rows, width).
#pragma once

#include "balanced_rep/kernels.h"
#include "thin.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

BR_INLINE int64_t krylov_fours(const KrylovTask& t) { return (t.width + kFour - 1) / kFour * kFour; }

void krylov_rows_pack(const KrylovTask& t, int64_t b, int64_t lead, float* out) {
  for (int64_t c = 0; c < krylov_fours(t); ++c) {
    const double* v = t.v + (b * t.width + c) * t.columns;
    for (int64_t j = 0; j < t.columns; ++j) out[c * lead + j] = c < t.width ? static_cast<float>(v[j]) : 0;
  }
}

// A panel of Z from V, or from where it is given.
void krylov_rows_images(const KrylovTask& t, int64_t b, int64_t i, int64_t rows, const float* m, const float* v,
                        int64_t lead, float* images) {
  const int64_t width = krylov_fours(t);
  if (!t.given) thin_transposed(m, t.row_stride, rows, v, lead, width, t.columns, images, width);
  for (int64_t c = 0; c < width; ++c) {
    double* z = t.z + b * t.z_batch_stride + c * t.z_row_stride + i;
    if (t.given) {
      for (int64_t r = 0; r < rows; ++r) images[r * width + c] = c < t.width ? static_cast<float>(z[r]) : 0;
    } else if (c < t.width) {
      for (int64_t r = 0; r < rows; ++r) z[r] = images[r * width + c];
    }
  }
}

void krylov_rows_adjoint(const KrylovTask& t, int64_t rows, const float* m, const float* images, int64_t lead,
                         float* sums, bool add) {
  const int64_t width = krylov_fours(t);
  thin_plain<float>(width, rows, m, t.row_stride, t.columns, images, 1, width, sums, lead, add);
}

void krylov_rows_join(const KrylovTask& t, int64_t b, int64_t lead, int64_t block, const float* partial) {
  for (int64_t c = 0; c < t.width; ++c) {
    double* w = t.w + (b * t.width + c) * t.columns;
    for (int64_t k = 0; k < t.n_chunks; ++k) {
      const float* sums = partial + k * block + c * lead;
      for (int64_t j = 0; j < t.columns; ++j) w[j] = (k > 0 ? w[j] : 0) + sums[j];
    }
  }
}

// Pieces [first, last) of products of doubles: a piece is some rows of one out = x y^T, or some columns of one x y.
void double_products(const DoubleProductTask& t, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; ++item) {
    const int64_t b = item / t.n_pieces, from = item % t.n_pieces * t.piece;
    const int64_t all = t.transposed ? t.rows : t.columns, n = all - from < t.piece ? all - from : t.piece;
    const double* x = t.x + b * t.x_batch_stride;
    const double* y = t.y + b * t.y_batch_stride;
    double* out = t.out + b * t.out_batch_stride;
    if (!t.transposed) {
      thin_plain<double>(t.rows, t.inner, y + from, t.y_row_stride, n, x, t.x_row_stride, 1, out + from,
                         t.out_row_stride, t.add);
      continue;
    }
    const int64_t fours = t.columns / kFour * kFour;
    x += from * t.x_row_stride;
    out += from * t.out_row_stride;
    if (fours > 0) {
      thin_transposed(x, t.x_row_stride, n, y, t.y_row_stride, fours, t.inner, out, t.out_row_stride);
    }
    for (int64_t c = fours; c < t.columns; ++c) {  // one row of y, four times over
      for (int64_t r = 0; r < n; ++r) {
        double same[kFour];
        thin_transposed(x + r * t.x_row_stride, t.x_row_stride, 1, y + c * t.y_row_stride, 0, kFour, t.inner, same,
                        kFour);
        out[r * t.out_row_stride + c] = same[0];
      }
    }
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
