// From memory to the values of a tile: elements, or pools of windows of elements.
#pragma once
#include "moments_block.cuh"

namespace balanced_rep {

// The part of a tile that one thread holds; bit i of `live` says that item i exists. Others are zero.
template <class G, class A>
struct Values {
  A v[G::kColumns][G::kItems];
  unsigned live;
};

// The part of the reduced indices that a tile covers.
struct Window {
  int64 offset;  // of its first element
  int n0, n1;    // sizes along red0 and red1
};

template <class G>
__device__ __forceinline__ Window window_of(unsigned tile, const Layout& at) {
  const int inner = 1 << at.inner_shift, outer = G::kTile >> at.inner_shift;
  const unsigned rest = tile / at.tiles_red0, red2 = rest / at.tiles_red1;
  const int64 red0 = static_cast<int64>(tile - rest * at.tiles_red0) * inner;
  const int64 red1 = static_cast<int64>(rest - red2 * at.tiles_red1) * outer;
  return {red0 * at.stride_red0 + red1 * at.stride_red1 + red2 * at.stride_red2,
          static_cast<int>(min(static_cast<int64>(inner), at.n_red0 - red0)),
          static_cast<int>(min(static_cast<int64>(outer), at.n_red1 - red1))};
}

// Walks the elements of a thread, kStride apart in the tile. Both kStride and the inner size of the tile are powers of
// two, so a step goes along red0, or every `period` steps back to where it began and on along red1.
template <class T, int kStride>
struct Cursor {
  const T* address;
  int red0, red1;  // in the window
  int period, rise;
  int64 step, turn;

  __device__ __forceinline__ Cursor(const T* origin, int element, const Layout& at) {
    const int inner = 1 << at.inner_shift;
    red0 = element & (inner - 1);
    red1 = element >> at.inner_shift;
    period = max(inner / kStride, 1);
    rise = max(kStride / inner, 1);
    step = kStride * at.stride_red0;
    turn = rise * at.stride_red1 - (period - 1) * step;
    address = origin + red0 * at.stride_red0 + red1 * at.stride_red1;
  }
  __device__ __forceinline__ void advance(int round) {
    const bool wraps = ((round + 1) & (period - 1)) == 0;
    address += wraps ? turn : step;
    red0 += wraps ? -(period - 1) * kStride : kStride;
    red1 += wraps ? rise : 0;
  }
};

// kCount neighbouring elements in one load.
template <int kCount, class T, class A>
__device__ __forceinline__ void load(const T* address, A (&value)[kCount]) {
  struct __align__(sizeof(T) * kCount) Pack {
    T element[kCount];
  };
  const Pack pack = *reinterpret_cast<const Pack*>(address);
#pragma unroll
  for (int j = 0; j < kCount; ++j) value[j] = widen(pack.element[j]);
}

// Elements as they are.
struct Unpooled {
  // kVector neighbours along red0 at a time.
  template <class G, class T, class A>
  static __device__ __forceinline__ void along_reduced(const T* row, bool inside, const Window& w, const Layout& at,
                                                       Values<G, A>& values) {
    constexpr int kVector = G::kVector;
    Cursor<T, G::kReducers * kVector> cursor(row, G::reducer() * kVector, at);
    values.live = 0;
#pragma unroll
    for (int round = 0; round < G::kItems / kVector; ++round, cursor.advance(round - 1)) {
      const int left = inside && cursor.red1 < w.n1 ? w.n0 - cursor.red0 : 0;
      A part[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) part[j] = 0;
      if (left >= kVector) {
        load(cursor.address, part);
        values.live |= ((1u << kVector) - 1) << (round * kVector);
      } else {
#pragma unroll
        for (int j = 0; j < kVector - 1; ++j)
          if (j < left) {
            part[j] = widen(cursor.address[j]);
            values.live |= 1u << (round * kVector + j);
          }
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) values.v[0][round * kVector + j] = part[j];
    }
  }

  // kColumns neighbours along kept0 at a time; `columns` of them exist.
  template <class G, class T, class A>
  static __device__ __forceinline__ void along_kept(const T* row, int64 columns, const Window& w, const Layout& at,
                                                    Values<G, A>& values) {
    Cursor<T, G::kReducers> cursor(row, G::reducer(), at);
    values.live = 0;
#pragma unroll
    for (int round = 0; round < G::kItems; ++round, cursor.advance(round - 1)) {
      const bool inside = cursor.red0 < w.n0 && cursor.red1 < w.n1;
      A part[G::kColumns];
#pragma unroll
      for (int c = 0; c < G::kColumns; ++c) part[c] = 0;
      if (inside && columns >= G::kColumns) {
        load(cursor.address, part);
      } else if (inside && columns > 0) {
        part[0] = widen(cursor.address[0]);
      }
      values.live |= static_cast<unsigned>(inside) << round;
#pragma unroll
      for (int c = 0; c < G::kColumns; ++c) values.v[c][round] = part[c];
    }
  }

  template <class G, class T, class A>
  static __device__ __forceinline__ void read(const T* row, int64 columns, const Window& w, const Layout& at,
                                              Values<G, A>& values) {
    if (G::kLanes == 1) {
      along_kept(row, columns, w, at, values);
    } else {
      along_reduced(row, columns > 0, w, at, values);
    }
  }
};

// Maximum of a window; NaN wins.
struct Maximum {
  template <class T>
  using Sum = typename Accumulator<T>::type;
  template <class A>
  static __device__ __forceinline__ A start() {
    return -infinity<A>();
  }
  template <class A>
  static __device__ __forceinline__ A combine(A a, A b) {
    return b > a || b != b ? b : a;
  }
  template <class A>
  static __device__ __forceinline__ A finish(A total, const Layout&) {
    return total;
  }
};

struct Mean {
  template <class T>
  using Sum = double;
  template <class A>
  static __device__ __forceinline__ A start() {
    return 0;
  }
  template <class A>
  static __device__ __forceinline__ A combine(A a, A b) {
    return a + b;
  }
  template <class A>
  static __device__ __forceinline__ A finish(A total, const Layout& at) {
    return total / (static_cast<A>(at.n_pool0) * static_cast<A>(at.n_pool1));
  }
};

// The pool of a window is one value. Where windows lie along memory a warp reads one after the other, all lanes side by
// side; else every thread walks its own window, and neighbouring lanes read neighbouring values.
template <class Pool, bool kWarpPerWindow>
struct Pooled {
  template <class T, class A>
  static __device__ __forceinline__ A walk(const T* window, int64 first, int64 step, const Layout& at) {
    A total = Pool::template start<A>();
    for (int64 outer = 0; outer < at.n_pool1; ++outer)
      for (int64 inner = first; inner < at.n_pool0; inner += step)
        total = Pool::combine(total, A(widen(window[inner * at.stride_pool0 + outer * at.stride_pool1])));
    return total;
  }

  template <class G, class T, class A>
  static __device__ __forceinline__ void read(const T* row, int64, const Window& w, const Layout& at,
                                              Values<G, A>& values) {
    const int red0 = G::reducer() & ((1 << at.inner_shift) - 1), red1 = G::reducer() >> at.inner_shift;
    const bool inside = red0 < w.n0 && red1 < w.n1;
    const int64 offset = red0 * at.stride_red0 + red1 * at.stride_red1;
    A value = 0;
    if (kWarpPerWindow) {
#pragma unroll 2
      for (int source = 0; source < 32; ++source) {
        const int64 start = __shfl_sync(kAllLanes, offset, source);
        if (!__shfl_sync(kAllLanes, static_cast<int>(inside), source)) continue;  // the same in all lanes
        A total = walk<T, A>(row + start, lane(), 32, at);
#pragma unroll
        for (int step = 16; step > 0; step >>= 1) total = Pool::combine(total, __shfl_xor_sync(kAllLanes, total, step));
        if (source == lane()) value = total;
      }
    } else if (inside) {
      value = walk<T, A>(row + offset, 0, 1, at);
    }
    values.v[0][0] = inside ? Pool::finish(value, at) : A(0);
    values.live = inside;
  }
};

}  // namespace balanced_rep
