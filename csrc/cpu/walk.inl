// Walking strided dims in order, and reading values from them: gathered, converted, pooled.
#pragma once

#include "balanced_rep/kernels.h"
#include "lanes.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int kChunk = 4096;  // elements of a chunk: 16 KB of float32, half of L1

// Position in all but the innermost `inner` of some dims, the last one running fastest; next() moves by one.
struct Walker {
  const int64_t* size;
  const int64_t* stride;
  int n;
  int64_t offset;
  int64_t index[kMaxDims];

  BR_INLINE Walker(const Dims& dims, const int64_t* strides, int inner, int64_t linear)
      : size(dims.size), stride(strides), n(dims.n - inner), offset(0) {
    for (int k = n - 1; k >= 0; --k) {
      index[k] = linear % size[k];
      linear /= size[k];
      offset += index[k] * stride[k];
    }
  }
  BR_INLINE Walker(const Dims& dims, int inner, int64_t linear) : Walker(dims, dims.stride, inner, linear) {}

  BR_INLINE void next() {
    for (int k = n - 1; k >= 0; --k) {
      offset += stride[k];
      if (++index[k] < size[k]) return;
      offset -= size[k] * stride[k];
      index[k] = 0;
    }
  }
};

// Pooled values: the maximum in the precision of the input, the mean in float64, so that it is as good as exact.
template <class T, Pool kPool>
struct Pooled {
  typedef RealOf<T> Real;
};
template <class T>
struct Pooled<T, kPoolMean> {
  typedef double Real;
};

template <class T, Pool kPool>
using PooledReal = typename Pooled<T, kPool>::Real;

template <class Real>
struct Maximum {
  Real value;
  bool nan;
  BR_INLINE void add(Real x) {
    value = x > value ? x : value;
    nan |= x != x;
  }
};

template <class T>
BR_INLINE void max_run(const T* p, int64_t n, int64_t stride, Maximum<RealOf<T>>& m) {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  constexpr int kPair = 2 * Simd<Real>::kLanes;
  if (stride != 1 || n < kPair) {
    for (int64_t i = 0; i < n; ++i) m.add(to_real(p[i * stride]));
    return;
  }
  V hi = splat(m.value);
  IntVecOf<Real> nan{};
  for (int64_t i = 0;;
       i = i + 2 * kPair <= n ? i + kPair : n - kPair) {  // the last pair may overlap: max does not mind
    V x, y;
    load_pair(p + i, x, y);
    hi = max_of(hi, max_of(x, y));
    nan |= bit_cast<IntVecOf<Real>>(x != x) | bit_cast<IntVecOf<Real>>(y != y);
    if (i == n - kPair) break;
  }
  m.value = max_lane(hi);
  m.nan |= any(nan);
}

BR_INLINE VecD widened_sum(VecF x) { return widen(x, 0) + widen(x, 1); }
BR_INLINE VecD widened_sum(VecD x) { return x; }

template <class T>
BR_INLINE double sum_run(const T* p, int64_t n, int64_t stride) {
  constexpr int kPair = 2 * Simd<RealOf<T>>::kLanes;
  VecD sum_x{}, sum_y{};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kPair <= n; i += kPair) {
      VecOf<RealOf<T>> x, y;
      load_pair(p + i, x, y);
      sum_x += widened_sum(x);
      sum_y += widened_sum(y);
    }
  }
  double sum = sum_lanes(sum_x + sum_y);
  for (; i < n; ++i) sum += static_cast<double>(to_real(p[i * stride]));
  return sum;
}

template <class T, Pool kPool>
BR_INLINE PooledReal<T, kPool> pool_at(const T* p, const Reduction& r) {
  typedef PooledReal<T, kPool> Real;
  const int inner = r.pooled.n - 1;
  const int64_t n = r.pooled.size[inner], stride = r.pooled.stride[inner], outer = r.n_pooled / n;
  if (kPool == kPoolMax) {
    Maximum<RealOf<T>> m = {static_cast<RealOf<T>>(-__builtin_inf()), false};
    if (outer == 1) {
      max_run(p, n, stride, m);
    } else {
      Walker w(r.pooled, 1, 0);
      for (int64_t k = 0; k < outer; ++k, w.next()) max_run(p + w.offset, n, stride, m);
    }
    return m.nan ? static_cast<Real>(__builtin_nan("")) : static_cast<Real>(m.value);
  }
  double sum = 0;
  if (outer == 1) {
    sum = sum_run(p, n, stride);
  } else {
    Walker w(r.pooled, 1, 0);
    for (int64_t k = 0; k < outer; ++k, w.next()) sum += sum_run(p + w.offset, n, stride);
  }
  return static_cast<Real>(sum / static_cast<double>(r.n_pooled));
}

// acc_j = max(acc_j, x_j) over some rows x, NaN kept; and acc_j += x_j in float64.
template <int kRows, class T>
BR_INLINE void max_rows(const T* const* p, int64_t n, RealOf<T>* acc) {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  constexpr int kLanes = Simd<Real>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    V hi = load(acc + j);
    IntVecOf<Real> nan = bit_cast<IntVecOf<Real>>(hi != hi);
    for (int k = 0; k < kRows; ++k) {
      const V x = load(p[k] + j);
      nan |= bit_cast<IntVecOf<Real>>(x != x);
      hi = max_of(hi, x);
    }
    store_bytes(acc + j, select(nan, splat(static_cast<Real>(__builtin_nan(""))), hi));
  }
  for (; j < n; ++j) {
    for (int k = 0; k < kRows; ++k) {
      const Real x = to_real(p[k][j]);
      acc[j] = x != x || x > acc[j] ? x : acc[j];
    }
  }
}

BR_INLINE void add_wide(VecF x, double* acc) {
  constexpr int kHalf = Simd<double>::kLanes;
  store_bytes(acc, load(acc) + widen(x, 0));
  store_bytes(acc + kHalf, load(acc + kHalf) + widen(x, 1));
}
BR_INLINE void add_wide(VecD x, double* acc) { store_bytes(acc, load(acc) + x); }

template <class T>
BR_INLINE void add_row(const T* p, int64_t n, double* acc) {
  constexpr int kLanes = Simd<RealOf<T>>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) add_wide(load(p + j), acc + j);
  for (; j < n; ++j) acc[j] += static_cast<double>(to_real(p[j]));
}

// out_j = pooled value of the window that begins at p + j.
template <class T, Pool kPool>
inline void pool_row(const T* p, int64_t n, const Reduction& r, PooledReal<T, kPool>* out) {
  typedef PooledReal<T, kPool> Real;
  constexpr int kTogether = 4;  // rows that share a load and a store of the result
  const Real neutral = kPool == kPoolMax ? static_cast<Real>(-__builtin_inf()) : Real(0);
  for (int64_t j = 0; j < n; ++j) out[j] = neutral;
  Walker w(r.pooled, 0, 0);
  int64_t k = 0;
  if constexpr (kPool == kPoolMax) {
    const T* rows[kTogether];
    for (; k + kTogether <= r.n_pooled; k += kTogether) {
      for (int row = 0; row < kTogether; ++row, w.next()) rows[row] = p + w.offset;
      max_rows<kTogether>(rows, n, out);
    }
  }
  for (; k < r.n_pooled; ++k, w.next()) {
    const T* const row = p + w.offset;
    if constexpr (kPool == kPoolMax) {
      max_rows<1>(&row, n, out);
    } else {
      add_row(row, n, out);
    }
  }
  if (kPool == kPoolMean) {
    for (int64_t j = 0; j < n; ++j) out[j] /= static_cast<Real>(r.n_pooled);
  }
}

template <class T>
inline void gather_run(const T* p, int64_t n, int64_t stride, RealOf<T>* out) {
  constexpr int kLanes = Simd<RealOf<T>>::kLanes;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store_bytes(out + i, load(p + i));
  }
  for (; i < n; ++i) out[i] = to_real(p[i * stride]);
}

// n values of the innermost reduced dim, from p on. One copy for all ops: this is most of the code.
template <class T, Pool kPool>
__attribute__((noinline)) void read_values(const T* p, int64_t n, int64_t stride, const Reduction& r,
                                           PooledReal<T, kPool>* out) {
  if constexpr (kPool == kPoolNone) {
    gather_run(p, n, stride, out);
  } else if (stride == 1 && r.pooled.stride[r.pooled.n - 1] != 1) {
    pool_row<T, kPool>(p, n, r, out);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = pool_at<T, kPool>(p + i * stride, r);
  }
}

// Calls use(pointer, n) on the reduced values [first, last) of the sample at x: at most kRun at a time on the memory of
// the tensor where its runs are long, else at most kChunk at a time on a buffer in L1.
template <class T, Pool kPool, int kRun = kChunk, class Use>
BR_INLINE void for_each_chunk(const T* x, const Reduction& r, int64_t first, int64_t last, Use use) {
  const int inner = r.reduced.n - 1;
  const int64_t length = r.reduced.size[inner], stride = r.reduced.stride[inner];
  const bool direct = kPool == kPoolNone && stride == 1 && (r.reduced.n == 1 || length >= kChunk / 2);
  PooledReal<T, kPool> buffer[kChunk];
  int64_t filled = 0, column = first % length;
  for (Walker w(r.reduced, 1, first / length); first < last; w.next()) {
    for (int64_t n; column < length && first < last; column += n, first += n) {
      n = length - column < last - first ? length - column : last - first;
      const int64_t room = direct ? kRun : kChunk - filled;
      n = n < room ? n : room;
      const T* p = x + w.offset + column * stride;
      if constexpr (kPool == kPoolNone) {
        if (direct) {
          use(p, n);
          continue;
        }
      }
      read_values<T, kPool>(p, n, stride, r, buffer + filled);
      filled += n;
      if (filled == kChunk) {
        use(static_cast<const PooledReal<T, kPool>*>(buffer), filled);
        filled = 0;
      }
    }
    column = 0;
  }
  if (filled > 0) use(static_cast<const PooledReal<T, kPool>*>(buffer), filled);
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
