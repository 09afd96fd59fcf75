// How the threads of a block share a tile, and how they combine what they have.
#pragma once
#include "moments_numbers.cuh"

namespace balanced_rep {

// Where the elements are. x has dims (kept2, kept1, kept0, red2, red1, red0, pool1, pool0), innermost last. A tile
// takes 2^inner_shift indices of red0 and fills up with indices of red1; red2, kept1 and kept2 are enumerated. Element
// offsets are 64 bits; what counts tiles is 32, because the launcher refuses more of them.
struct Layout {
  int64 n_kept;  // rows in all
  int64 n_kept0;
  int64 n_red0;
  int64 n_red1;
  int64 n_pool0;
  int64 n_pool1;
  int64 stride_kept0;
  int64 stride_kept1;
  int64 stride_kept2;
  int64 stride_red0;
  int64 stride_red1;
  int64 stride_red2;
  int64 stride_pool0;
  int64 stride_pool1;
  unsigned n_kept1;
  unsigned inner_shift;
  unsigned tiles_kept0;  // tiles along kept0
  unsigned tiles_red0;   // tiles along red0
  unsigned tiles_red1;   // tiles along red1
  unsigned n_tiles;      // tiles of a row, the indices of red2 included
  unsigned tiles_per_segment;
  unsigned n_segments;
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxFields = 5;  // of one reduction

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp() { return threadIdx.x >> 5; }

// A column is a row of x here seen from a thread: `kColumns` of them per thread, `kItems` values of each, and
// kLanes * kReduceWarps threads that share a column, each reading kVector neighbouring elements at a time.
template <int kLanes_, int kReduceWarps_, int kColumns_, int kItems_, int kVector_>
struct Geometry {
  static constexpr int kLanes = kLanes_, kReduceWarps = kReduceWarps_, kColumns = kColumns_, kItems = kItems_;
  static constexpr int kVector = kVector_;
  static constexpr int kReducers = kLanes * kReduceWarps;
  static constexpr int kBlockColumns = kThreads / kReducers * kColumns;
  static constexpr int kTile = kReducers * kItems;
  static constexpr bool kKeptFirst = kLanes == 1;  // lanes are neighbouring rows, so neighbouring blocks are too
  static_assert(kItems <= 32, "one bit per value");

  // Of this thread: its place among those that share its columns, and its first column.
  static __device__ __forceinline__ int reducer() {
    return kLanes == 1 ? warp() : kReduceWarps == 1 ? lane() : threadIdx.x;
  }
  static __device__ __forceinline__ int column() { return kLanes == 1 ? lane() * kColumns : threadIdx.x / kReducers; }
};

template <class T, bool kWide>
__device__ constexpr int vector_size() {
  return kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
}
__device__ constexpr int items(int bytes) { return bytes == 2 ? 32 : 16; }

// A block per segment of a row; 128-bit loads if wide.
template <class T, bool kWide>
using RowGeometry = Geometry<32, kWarps, 1, kWide ? items(sizeof(T)) : 16, vector_size<T, kWide>()>;
// A warp per row.
template <class T, bool kWide>
using WarpGeometry = Geometry<32, 1, 1, kWide ? items(sizeof(T)) : 16, vector_size<T, kWide>()>;
// Lanes take neighbouring rows, warps share them. More columns per thread would cost more in the reductions than wider
// loads gain, so 32 bits are the widest load; a warp still reads whole 128-byte lines.
template <class T, bool kWide>
using ColumnGeometry = Geometry<1, kWarps, kWide ? 2 : 1, 16, kWide ? 2 : 1>;
// One pooled value per thread.
using PoolGeometry = Geometry<32, kWarps, 1, 1, 1>;

// Combines the fields of all threads that share a column and hands the total to each of them. The first kMaxima fields
// are maxima, the others sums. Always in the same order: lanes as a butterfly, then warps by index.
template <class G, int kMaxima, int kCount, class A>
__device__ __forceinline__ void all_reduce(A (&field)[G::kColumns][kCount], A* scratch) {
  if (G::kLanes == 32) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
      for (int f = 0; f < kCount; ++f) {
        const A other = __shfl_xor_sync(kAllLanes, field[0][f], offset);
        field[0][f] = f < kMaxima ? larger(field[0][f], other) : field[0][f] + other;
      }
    }
  }
  if (G::kReduceWarps == 1) return;
  constexpr int n = kCount * G::kBlockColumns;
  A* const totals = scratch;  // in front, so that it lies in the same place whatever kCount is
  A* const parts = scratch + kMaxFields * G::kBlockColumns;
  A* const mine = parts + warp() * n + G::column();
  if (G::kLanes == 1 || lane() == 0) {
#pragma unroll
    for (int c = 0; c < G::kColumns; ++c)
#pragma unroll
      for (int f = 0; f < kCount; ++f) mine[f * G::kBlockColumns + c] = field[c][f];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kThreads) {
    A total = parts[i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w)
      total = i < kMaxima * G::kBlockColumns ? larger(total, parts[w * n + i]) : total + parts[w * n + i];
    totals[i] = total;
  }
  // From here on `parts` is free again; `totals` is after the first barrier of the next call.
  __syncthreads();
#pragma unroll
  for (int c = 0; c < G::kColumns; ++c)
#pragma unroll
    for (int f = 0; f < kCount; ++f) field[c][f] = totals[f * G::kBlockColumns + G::column() + c];
}

}  // namespace balanced_rep
