// Moments of a strided activation in one launch: n, mean, m2, m3, m4, sum |v|, min, max, active and non-finite count of
// every row of pooled values v, with m_k = sum (v - mean)^k.
//
// A block of 256 threads holds one tile of a row (or of several neighbouring rows) in registers and reduces it twice:
//   1. sum, min, max and active count give the pivot (the rounded mean) and a power of two u <= max |v|;
//   2. d = (v - pivot) / u, exact up to one rounding, gives sum |v| / u and sum d^k, which neither overflow nor
//   underflow.
// Sums are in float32 (float64 for float64 input), tiles are merged in float64 (Chan et al. 1979, Pebay 2008) by one
// thread per row, because float64 is slow on many devices.
// Where a row is cut into segments, the block that draws the last ticket of the row merges them in index order, so the
// bits of the result do not depend on the order in which blocks finish.
//
// Device code only: compiles under NVRTC, which instantiates the kernels that it is asked for, and as host C++.

#include "moments_tile.cuh"

namespace balanced_rep {

template <class G, class A>
__device__ constexpr int scratch_doubles() {
  constexpr int reduction = G::kReduceWarps > 1 ? (kWarps + 1) * kMaxFields * G::kBlockColumns * sizeof(A) / 8 + 1 : 1;
  constexpr int merging = G::kReduceWarps > 1 ? kThreads / 2 * kFields : 1;
  return reduction > merging ? reduction : merging;
}

// The block's rows: kept0 = first + column, and the index of the outer kept dims, which they share.
struct Rows {
  int64 first;
  unsigned kept;
  __device__ __forceinline__ int64 index(int column, const Layout& at) const {
    return kept * at.n_kept0 + first + column;
  }
  __device__ __forceinline__ bool inside(int column, const Layout& at) const { return first + column < at.n_kept0; }
};

// Merges the segments of the block's rows: every thread takes each kShares-th one of a row, then halves meet.
template <class G>
__device__ __forceinline__ void merge_segments(const double* parts, double* out, const Rows& rows, const Layout& at,
                                               State* buffer) {
  constexpr unsigned kShares = kThreads / G::kBlockColumns;
  const int column = threadIdx.x % G::kBlockColumns;
  const unsigned share = threadIdx.x / G::kBlockColumns, rounds = (at.n_segments + kShares - 1) / kShares;
  const unsigned n = rows.inside(column, at) ? at.n_segments : 0;
  const double* const row = parts + rows.index(column, at);
  const int64 field_stride = at.n_kept * at.n_segments;
  State state = share < n ? fetch(row + share * at.n_kept, field_stride) : empty_state();
  unsigned half = kShares / 2;
#pragma unroll 1
  for (unsigned round = 1; round < rounds || half > 0; ++round) {
    State other = empty_state();
    if (round < rounds) {
      const unsigned segment = share + round * kShares;
      if (segment < n) other = fetch(row + segment * at.n_kept, field_stride);
    } else {
      __syncthreads();  // the previous round has read the buffer
      if (share >= half && share < 2 * half) buffer[threadIdx.x - half * G::kBlockColumns] = state;
      __syncthreads();
      if (share < half) other = buffer[threadIdx.x];
      half >>= 1;
    }
    state = merge(state, other);
  }
  if (share == 0 && n > 0) store(out + rows.index(column, at), at.n_kept, state);
}

// True in the block that is the last of n to come here, which then sees what the others have written before.
__device__ __forceinline__ bool last_to_arrive(unsigned* ticket, unsigned n, bool* shared) {
  __syncthreads();  // the block has written
  if (threadIdx.x == 0) {
    __threadfence();  // release: what the block has written, before the ticket
    *shared = atomicAdd(ticket, 1u) == n - 1;
    if (*shared) *ticket = 0;  // for the next launch; nobody else comes here in this one
    __threadfence();           // acquire: the ticket, before what other blocks have written
  }
  __syncthreads();
  return *shared;
}

template <class G, class A, class Read, class T>
__device__ __forceinline__ void moments(const T* __restrict__ x, double* parts, double* out, unsigned* tickets,
                                        double threshold, const Layout& at) {
  __shared__ double scratch[scratch_doubles<G, A>()];
  __shared__ A raw[kRaw][G::kBlockColumns];
  __shared__ State running[G::kBlockColumns];

  const unsigned row_tiles = gridDim.x / at.n_segments;
  const unsigned quotient = blockIdx.x / (G::kKeptFirst ? row_tiles : at.n_segments);
  const unsigned remainder = blockIdx.x - quotient * (G::kKeptFirst ? row_tiles : at.n_segments);
  const unsigned row_tile = G::kKeptFirst ? remainder : quotient, segment = G::kKeptFirst ? quotient : remainder;
  const unsigned kept = row_tile / at.tiles_kept0, kept2 = kept / at.n_kept1;
  const Rows rows = {static_cast<int64>(row_tile - kept * at.tiles_kept0) * G::kBlockColumns, kept};
  const int64 columns = at.n_kept0 - rows.first - G::column();  // that exist, from the first of this thread on
  const T* const row = x + (rows.first + G::column()) * at.stride_kept0 +
                       (kept - kept2 * at.n_kept1) * at.stride_kept1 + kept2 * at.stride_kept2;
  const int mine = threadIdx.x;  // the column whose moments this thread keeps, if there are as many

  const unsigned begin = segment * at.tiles_per_segment, end = min(begin + at.tiles_per_segment, at.n_tiles);
#pragma unroll 1
  for (unsigned tile = begin; tile < end; ++tile) {
    const Window window = window_of<G>(tile, at);
    const int n = window.n0 * window.n1;
    Values<G, A> values;
    Read::read(row + window.offset, columns, window, at, values);
    A fields[G::kColumns][kRaw];
    reduce_tile(values, static_cast<A>(n), static_cast<A>(threshold), reinterpret_cast<A*>(scratch), fields);
    __syncthreads();  // the previous tile's fields are read
    if (G::reducer() == 0) {
#pragma unroll
      for (int c = 0; c < G::kColumns; ++c)
#pragma unroll
        for (int f = 0; f < kRaw; ++f) raw[f][G::column() + c] = fields[c][f];
    }
    __syncthreads();
    if (mine < G::kBlockColumns) {
      const State state = tile_state(n, &raw[0][mine], G::kBlockColumns);
      running[mine] = tile == begin ? state : merge(running[mine], state);
    }
  }
  double* const target = at.n_segments == 1 ? out : parts;
  if (mine < G::kBlockColumns && rows.inside(mine, at))
    store(target + segment * at.n_kept + rows.index(mine, at), at.n_kept * at.n_segments, running[mine]);
  if constexpr (G::kReduceWarps > 1) {
    __shared__ bool is_last;
    if (at.n_segments > 1 && last_to_arrive(tickets + row_tile, at.n_segments, &is_last))
      merge_segments<G>(parts, out, rows, at, reinterpret_cast<State*>(scratch));
  }
}

// Entry points.
//
// x: activation, see Layout            parts: (10, n_segments, n_kept), not used if n_segments is 1
// out: (10, n_kept)                    tickets: one per tile of rows, zero before and after
// threshold: for float32 sums rounded toward -inf, so that its conversion is exact
// grid: tiles of rows times segments

template <class T>
using Sum = typename Accumulator<T>::type;

// Blocks that the registers of a processor have to hold, chosen so that nothing spills: what decides is the number of
// values a thread keeps, their size, and whether each load needs an address of its own.
template <class T, bool kWide>
__device__ constexpr int resident_blocks() {
  return sizeof(T) == 8 ? 2 : sizeof(T) == 4 && kWide ? 4 : 3;
}

// A block per segment of a row. kWide: 128-bit loads, for which red0 is contiguous and everything else aligned.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, resident_blocks<T, kWide>())
    moments_rows(const T* x, double* parts, double* out, unsigned* tickets, double threshold, Layout layout) {
  moments<RowGeometry<T, kWide>, Sum<T>, Unpooled>(x, parts, out, tickets, threshold, layout);
}

// A warp per row, for rows of a few hundred elements; n_segments is 1.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, resident_blocks<T, kWide>())
    moments_warps(const T* x, double* parts, double* out, unsigned* tickets, double threshold, Layout layout) {
  moments<WarpGeometry<T, kWide>, Sum<T>, Unpooled>(x, parts, out, tickets, threshold, layout);
}

// A lane per row, for rows that are neighbours in memory. kWide, of 16-bit types only: two rows in a load of 32 bits.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    moments_columns(const T* x, double* parts, double* out, unsigned* tickets, double threshold, Layout layout) {
  moments<ColumnGeometry<T, kWide>, Sum<T>, Unpooled>(x, parts, out, tickets, threshold, layout);
}

// A thread, or with kWindows a warp, per pooled value. Means are summed in float64, and so is what follows.
template <class T, class Pool, bool kWindows>
__global__ void __launch_bounds__(kThreads, 2)
    moments_pooled(const T* x, double* parts, double* out, unsigned* tickets, double threshold, Layout layout) {
  using A = typename Pool::template Sum<T>;
  moments<PoolGeometry, A, Pooled<Pool, kWindows>>(x, parts, out, tickets, threshold, layout);
}

}  // namespace balanced_rep
