// M V and M^T (M V) for a tall float32 matrix M and a block V of a few vectors, in one read of M.
//
// Where columns of M lie in one piece, both are the same tile: rows of a result, a few vectors wide, in registers, to
// which scalars of M times vectors of the other factor are added. A panel of rows of M stays in the second-level cache
// between the two; a BLAS library would copy all of M into a layout of its own for each product, which is more work
// than multiplying by 16 vectors.
//
// Layout: the width is padded to whole vectors and cut into groups of at most kGroup vectors; a group holds its
// columns side by side, (n, group). Sums run over rows in their order within a chunk, and chunks are added in double
// precision: the result does not depend on the number of threads.
#pragma once

#include "balanced_rep/kernels.h"
#include "krylov_rows.inl"
#include "simd.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int kGroup = 3;                               // vectors of a group: 12 sums, 3 factors, 1 scalar
constexpr int kSums = BR_VECTOR_BYTES == 64 ? 24 : 12;  // of 16 or 32 registers
constexpr int64_t kPanelRows = 96;                      // a multiple of every tile
constexpr int64_t kPanelElements = 1 << 16;             // half of a cache of 512 KiB
constexpr int64_t kKrylovColumns = 512;                 // columns of M whose part of V stays in the first cache
constexpr int64_t kPanelPad = 16;                       // keeps rows of a copied panel off each other's cache sets

// C[r] (+)= sum_k x[r * row + k * step] * y[k], rows r < kRows of kVectors vectors each.
template <int kVectors, int kRows>
BR_INLINE void krylov_tile(const float* x, int64_t row, int64_t step, const float* y, int64_t n, float* c, bool add) {
  constexpr int kLanes = Simd<float>::kLanes, kWidth = kVectors * kLanes;
  VecF sum[kRows][kVectors];
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = add ? load(c + r * kWidth + v * kLanes) : VecF{};
  }
  for (int64_t k = 0; k < n; ++k) {
    VecF factor[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) factor[v] = load(y + k * kWidth + v * kLanes);
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
      const VecF scalar = splat<float>(x[r * row + k * step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += scalar * factor[v];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_bytes(c + r * kWidth + v * kLanes, sum[r][v]);
  }
}

template <int kVectors>
BR_NOINLINE void krylov_rows(int64_t rows, const float* x, int64_t row, int64_t step, const float* y, int64_t n,
                             float* c, bool add) {
  constexpr int kRows = kSums / kVectors, kWidth = kVectors * Simd<float>::kLanes;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) krylov_tile<kVectors, kRows>(x + i * row, row, step, y, n, c + i * kWidth, add);
  for (; i < rows; ++i) krylov_tile<kVectors, 1>(x + i * row, row, step, y, n, c + i * kWidth, add);
}

BR_INLINE void krylov_rows(int vectors, int64_t rows, const float* x, int64_t row, int64_t step, const float* y,
                           int64_t n, float* c, bool add) {
  if (vectors == 1) krylov_rows<1>(rows, x, row, step, y, n, c, add);
  if (vectors == 2) krylov_rows<2>(rows, x, row, step, y, n, c, add);
  if (vectors == 3) krylov_rows<3>(rows, x, row, step, y, n, c, add);
}

int64_t krylov_width(int64_t width) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  return (width + kLanes - 1) / kLanes * kLanes;
}

// Floats from one column of a row-major V to the next, and of all of V or of its sums in either layout.
BR_INLINE int64_t krylov_lead(const KrylovTask& t) { return (t.columns + 15) / 16 * 16; }
int64_t krylov_block(const KrylovTask& t) { return krylov_width(t.width) * krylov_lead(t); }

// Vectors of the group that begins with this one of `vectors`: 4 are 2 and 2.
BR_INLINE int krylov_group(int64_t vectors, int64_t first) {
  const int64_t left = vectors - first;
  return static_cast<int>(left == 4 ? 2 : left < kGroup ? left : kGroup);
}

int64_t krylov_panel(const KrylovTask& t) {
  const int64_t rows = kPanelElements / (t.columns > 0 ? t.columns : 1) / 12 * 12;
  return rows < 12 ? 12 : rows > kPanelRows ? kPanelRows : rows;
}

int64_t krylov_workspace(const KrylovTask& t) {
  const int64_t panel = krylov_panel(t);
  return krylov_width(t.width) * panel + (panel + kPanelPad) * (t.columns + kPanelPad);
}

void krylov_pack(const KrylovTask& t, int64_t first, int64_t last) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  const int64_t padded = krylov_width(t.width), vectors = padded / kLanes;
  for (int64_t b = first; b < last; ++b) {
    const double* v = t.v + b * t.width * t.columns;
    float* out = t.packed + b * krylov_block(t);
    if (t.column_stride == 1) {
      krylov_rows_pack(t, b, krylov_lead(t), out);
      continue;
    }
    for (int64_t g = 0; g < vectors; g += krylov_group(vectors, g)) {
      const int64_t from = g * kLanes, width = krylov_group(vectors, g) * kLanes;
      float* group = out + from * t.columns;
      for (int64_t c = 0; c < width; ++c) {
        const double* row = v + (from + c) * t.columns;
        if (from + c < t.width) {
          for (int64_t j = 0; j < t.columns; ++j) group[j * width + c] = static_cast<float>(row[j]);
        } else {
          for (int64_t j = 0; j < t.columns; ++j) group[j * width + c] = 0;
        }
      }
    }
  }
}

// Rows of Z between the panel's layout, (rows, width) for each group, and rows of doubles.
template <bool kRead>
BR_INLINE void krylov_exchange(const KrylovTask& t, int64_t b, int64_t i, int64_t rows, float* panel) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  const int64_t vectors = krylov_width(t.width) / kLanes;
  for (int64_t g = 0; g < vectors; g += krylov_group(vectors, g)) {
    const int64_t from = g * kLanes, width = krylov_group(vectors, g) * kLanes;
    float* group = panel + from * rows;
    for (int64_t c = 0; c < width; ++c) {
      double* z = t.z + b * t.z_batch_stride + (from + c) * t.z_row_stride + i;
      const bool real = from + c < t.width;
      if (kRead) {
        for (int64_t r = 0; r < rows; ++r) group[r * width + c] = real ? static_cast<float>(z[r]) : 0;
      } else if (real) {
        for (int64_t r = 0; r < rows; ++r) z[r] = group[r * width + c];
      }
    }
  }
}

void krylov_items(const KrylovTask& t, int64_t first, int64_t last, float* workspace) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  const int64_t padded = krylov_width(t.width), vectors = padded / kLanes, panel = krylov_panel(t);
  float* const images = workspace;
  float* const copy = workspace + padded * panel;
  for (int64_t item = first; item < last; ++item) {
    const int64_t b = item / t.n_chunks, begin = item % t.n_chunks * t.chunk;
    const int64_t end = begin + t.chunk < t.rows ? begin + t.chunk : t.rows;
    const float* const v = t.packed + b * krylov_block(t);
    float* const sums = t.adjoint ? t.partial + item * krylov_block(t) : nullptr;
    for (int64_t i = begin; i < end; i += panel) {
      const int64_t rows = end - i < panel ? end - i : panel;
      const float* m = t.m + b * t.batch_stride + i * t.row_stride;
      if (t.column_stride == 1) {
        krylov_rows_images(t, b, i, rows, m, v, krylov_lead(t), images);
        if (t.adjoint) krylov_rows_adjoint(t, rows, m, images, krylov_lead(t), sums, i > begin);
        continue;
      }
      const int64_t step = panel + kPanelPad;  // pieces of columns, far apart
      for (int64_t j = 0; j < t.columns; ++j) memcpy(copy + j * step, m + j * t.column_stride, rows * sizeof(float));
      m = copy;
      if (t.given) {
        krylov_exchange<true>(t, b, i, rows, images);
      } else {
        for (int64_t g = 0; g < vectors; g += krylov_group(vectors, g)) {
          const int64_t width = krylov_group(vectors, g) * kLanes;
          const float* part = v + g * kLanes * t.columns;
          for (int64_t j = 0; j < t.columns; j += kKrylovColumns) {
            const int64_t n = t.columns - j < kKrylovColumns ? t.columns - j : kKrylovColumns;
            krylov_rows(krylov_group(vectors, g), rows, m + j * step, 1, step, part + j * width, n,
                        images + g * kLanes * rows, j > 0);
          }
        }
        krylov_exchange<false>(t, b, i, rows, images);
      }
      if (t.adjoint) {
        for (int64_t g = 0; g < vectors; g += krylov_group(vectors, g)) {
          krylov_rows(krylov_group(vectors, g), t.columns, m, step, 1, images + g * kLanes * rows, rows,
                      sums + g * kLanes * t.columns, i > begin);
        }
      }
    }
  }
}

void krylov_join(const KrylovTask& t, int64_t first, int64_t last) {
  constexpr int64_t kLanes = Simd<float>::kLanes;
  const int64_t padded = krylov_width(t.width), vectors = padded / kLanes;
  for (int64_t b = first; b < last; ++b) {
    const float* const partial = t.partial + b * t.n_chunks * krylov_block(t);
    if (t.column_stride == 1) {
      krylov_rows_join(t, b, krylov_lead(t), krylov_block(t), partial);
      continue;
    }
    for (int64_t g = 0; g < vectors; g += krylov_group(vectors, g)) {
      const int64_t from = g * kLanes, width = krylov_group(vectors, g) * kLanes;
      for (int64_t c = 0; c < width && from + c < t.width; ++c) {
        const float* sums = partial + from * t.columns + c;
        double* w = t.w + (b * t.width + from + c) * t.columns;
        for (int64_t j = 0; j < t.columns; ++j) {
          double sum = 0;
          for (int64_t k = 0; k < t.n_chunks; ++k) sum += sums[k * krylov_block(t) + j * width];
          w[j] = sum;
        }
      }
    }
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
