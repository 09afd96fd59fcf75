// Products of matrices whose rows lie in one piece with thin ones: tiles whose sums stay in registers, float or double.
//
// Vectors run along the rows in memory. Of x y^T each number of x is loaded once for four rows of y, and lanes are
// summed at the end; of x y each scalar of x is multiplied with several vectors of a row of y. Sums run in the order of
// memory, within pieces of kPiece bytes, and do not depend on how a product is cut into tiles.
#pragma once

#include "lanes.inl"
#include "simd.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int kFour = 4;                                 // rows of the thin factor at once
constexpr int kDotRows = BR_VECTOR_BYTES == 64 ? 6 : 3;  // with four of them: 24 sums of 32 registers, or 12 of 16
constexpr int kSumVectors = BR_VECTOR_BYTES == 64 ? 6 : 3;
constexpr int64_t kPiece = 4096;  // of a row: ten of them stay in the first cache

template <class Real>
BR_INLINE VecOf<Real> load_some(const Real* p, int64_t n) {
  VecOf<Real> v = {};
  memcpy(&v, p, n * sizeof(Real));
  return v;
}

BR_INLINE void store_sums(const VecF* sum, float* out, bool add) {
  typedef Quarter<float>::V Q;
  const Q a = fold_to_quarter<float>(sum[0], Add()), b = fold_to_quarter<float>(sum[1], Add());
  const Q c = fold_to_quarter<float>(sum[2], Add()), d = fold_to_quarter<float>(sum[3], Add());
  const Q ab = BR_SHUFFLE(a, b, 0, 4, 1, 5) + BR_SHUFFLE(a, b, 2, 6, 3, 7);
  const Q cd = BR_SHUFFLE(c, d, 0, 4, 1, 5) + BR_SHUFFLE(c, d, 2, 6, 3, 7);
  Q found = BR_SHUFFLE(ab, cd, 0, 1, 4, 5) + BR_SHUFFLE(ab, cd, 2, 3, 6, 7);
  if (add) found += load_bytes<Q>(out);
  store_bytes(out, found);
}

BR_INLINE void store_sums(const VecD* sum, double* out, bool add) {
#pragma GCC unroll 4
  for (int c = 0; c < kFour; ++c) out[c] = (add ? out[c] : 0) + sum_lanes(sum[c]);
}

// out[r * stride + c] (+)= sum_k x[r * row + k] y[c * lead + k], r < kRows, c < 4. Meanwhile what lies at `next` as x
// does is asked for: the rows that follow, or x itself where they were asked for already.
template <class Real, int kRows>
BR_NOINLINE void thin_dots(const Real* x, int64_t row, const Real* y, int64_t lead, int64_t n, Real* out,
                           int64_t stride, bool add, const Real* next) {
  typedef VecOf<Real> V;
  constexpr int kLanes = Simd<Real>::kLanes;
  V sum[kRows][kFour];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kFour; ++c) sum[r][c] = V{};
  }
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    V a[kRows];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      a[r] = load(x + r * row + k);
      __builtin_prefetch(next + r * row + k, 0, 2);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kFour; ++c) {
      const V b = load(y + c * lead + k);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) sum[r][c] += a[r] * b;
    }
  }
  if (whole < n) {
    V b[kFour];
#pragma GCC unroll 4
    for (int c = 0; c < kFour; ++c) b[c] = load_some(y + c * lead + whole, n - whole);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const V a = load_some(x + r * row + whole, n - whole);
#pragma GCC unroll 4
      for (int c = 0; c < kFour; ++c) sum[r][c] += a * b[c];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) store_sums(sum[r], out + r * stride, add);
}

// All of x y^T, (rows, width) with a width that is a multiple of four; pieces of n are added up.
template <class Real>
void thin_transposed(const Real* x, int64_t row, int64_t rows, const Real* y, int64_t lead, int64_t width, int64_t n,
                     Real* out, int64_t stride) {
  constexpr int64_t kLong = kPiece / sizeof(Real);
  for (int64_t k = 0; k < n; k += kLong) {
    const int64_t some = n - k < kLong ? n - k : kLong;
    int64_t r = 0;
    for (; r + kDotRows <= rows; r += kDotRows) {
      for (int64_t c = 0; c < width; c += kFour) {
        thin_dots<Real, kDotRows>(x + r * row + k, row, y + c * lead + k, lead, some, out + r * stride + c, stride,
                                  k > 0, x + (c == 0 && r + 2 * kDotRows <= rows ? r + kDotRows : r) * row + k);
      }
    }
    for (; r < rows; ++r) {
      for (int64_t c = 0; c < width; c += kFour) {
        thin_dots<Real, 1>(x + r * row + k, row, y + c * lead + k, lead, some, out + r * stride + c, stride, k > 0,
                           x + r * row + k);
      }
    }
  }
}

// out[c * lead + j] (+)= sum_i z[c * z_row + i * z_step] y[i * row + j], c < kRows, j < kVectors vectors; with one
// vector maybe only `last` columns.
template <class Real, int kRows, int kVectors>
BR_NOINLINE void thin_sums(int64_t n, const Real* y, int64_t row, int64_t last, const Real* z, int64_t z_row,
                           int64_t z_step, Real* out, int64_t lead, bool add) {
  typedef VecOf<Real> V;
  constexpr int kLanes = Simd<Real>::kLanes;
  const bool part = kVectors == 1 && last < kLanes;
  V sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int c = 0; c < kRows; ++c) {
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) {
      const Real* at = out + c * lead + v * kLanes;
      sum[c][v] = !add ? V{} : part ? load_some(at, last) : load(at);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    V a[kVectors];
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) {
      const Real* at = y + i * row + v * kLanes;
      a[v] = part ? load_some(at, last) : load(at);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kRows; ++c) {
      const V scalar = splat<Real>(z[c * z_row + i * z_step]);
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) sum[c][v] += scalar * a[v];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kRows; ++c) {
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) {
      Real* at = out + c * lead + v * kLanes;
      if (part) {
        memcpy(at, &sum[c][v], last * sizeof(Real));
      } else {
        store_bytes(at, sum[c][v]);
      }
    }
  }
}

template <class Real, int kVectors>
BR_INLINE void thin_rows(int64_t rows, int64_t n, const Real* y, int64_t row, int64_t last, const Real* z,
                         int64_t z_row, int64_t z_step, Real* out, int64_t lead, bool add) {
  int64_t c = 0;
  for (; c + kFour <= rows; c += kFour) {
    thin_sums<Real, kFour, kVectors>(n, y, row, last, z + c * z_row, z_row, z_step, out + c * lead, lead, add);
  }
  for (; c < rows; ++c) {
    thin_sums<Real, 1, kVectors>(n, y, row, last, z + c * z_row, z_row, z_step, out + c * lead, lead, add);
  }
}

// All of z y, (rows, columns), added to what is there or not; exactly `columns` of y and of out are touched.
template <class Real>
void thin_plain(int64_t rows, int64_t n, const Real* y, int64_t row, int64_t columns, const Real* z, int64_t z_row,
                int64_t z_step, Real* out, int64_t lead, bool add) {
  constexpr int64_t kLanes = Simd<Real>::kLanes, kStep = kSumVectors * kLanes;
  int64_t j = 0;
  for (; j + kStep <= columns; j += kStep) {
    thin_rows<Real, kSumVectors>(rows, n, y + j, row, kLanes, z, z_row, z_step, out + j, lead, add);
  }
  if constexpr (kSumVectors > 4) {
    if (columns - j >= 4 * kLanes) {
      thin_rows<Real, 4>(rows, n, y + j, row, kLanes, z, z_row, z_step, out + j, lead, add);
      j += 4 * kLanes;
    }
  }
  if (columns - j >= 2 * kLanes) {
    thin_rows<Real, 2>(rows, n, y + j, row, kLanes, z, z_row, z_step, out + j, lead, add);
    j += 2 * kLanes;
  }
  for (; j < columns; j += kLanes) {
    const int64_t last = columns - j < kLanes ? columns - j : kLanes;
    thin_rows<Real, 1>(rows, n, y + j, row, last, z, z_row, z_step, out + j, lead, add);
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
