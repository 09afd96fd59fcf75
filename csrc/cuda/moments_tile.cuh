// The two reductions of a tile and what they leave behind.
#pragma once
#include "moments_state.cuh"
#include "moments_values.cuh"

namespace balanced_rep {

// Sums of a tile of the largest float stay finite.
constexpr float kSmall = 1.0f / 65536;

// -min, max, active count, sum / 65536
template <bool kFull, class G, class A>
__device__ __forceinline__ void extremes(const Values<G, A>& values, A threshold, A (&field)[G::kColumns][4]) {
#pragma unroll
  for (int c = 0; c < G::kColumns; ++c) {
    A low = infinity<A>(), high = -low, sum = 0;
    int active = 0;
#pragma unroll
    for (int i = 0; i < G::kItems; ++i) {
      if (!kFull && !(values.live >> i & 1)) continue;
      const A v = values.v[c][i];
      low = smaller(low, v);
      high = larger(high, v);
      active += v > threshold;
      sum = multiply_add(v, A(kSmall), sum);
    }
    field[c][0] = -low;
    field[c][1] = high;
    field[c][2] = static_cast<A>(active);
    field[c][3] = sum;
  }
}

// sum |v| / u, then sum d^k, k = 1 .. 4
template <bool kFull, class G, class A>
__device__ __forceinline__ void powers(const Values<G, A>& values, const A (&pivot)[G::kColumns],
                                       const A (&scale)[G::kColumns], A (&field)[G::kColumns][5]) {
#pragma unroll
  for (int c = 0; c < G::kColumns; ++c) {
    const A shift = -pivot[c] * scale[c];
    A l1 = 0, d1 = 0, d2 = 0, d3 = 0, d4 = 0;
#pragma unroll
    for (int i = 0; i < G::kItems; ++i) {
      if (!kFull && !(values.live >> i & 1)) continue;
      const A v = values.v[c][i], d = multiply_add(v, scale[c], shift), square = d * d;
      l1 = multiply_add(magnitude(v), scale[c], l1);
      d1 += d;
      d2 += square;
      d3 = multiply_add(square, d, d3);
      d4 = multiply_add(square, square, d4);
    }
    field[c][0] = l1;
    field[c][1] = d1;
    field[c][2] = d2;
    field[c][3] = d3;
    field[c][4] = d4;
  }
}

template <class G, class A>
__device__ __forceinline__ void count_nonfinite(const Values<G, A>& values, A (&field)[G::kColumns][1]) {
#pragma unroll
  for (int c = 0; c < G::kColumns; ++c) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < G::kItems; ++i) count += (values.live >> i & 1) && !(magnitude(values.v[c][i]) < infinity<A>());
    field[c][0] = static_cast<A>(count);
  }
}

// What a tile leaves behind, in the units of d: |v| and d^k are multiplied by u^k later.
enum Raw { kPivot, kError, kM2, kM3, kM4, kL1, kLow, kHigh, kActive, kNonfinite, kUnit, kRaw };

// Reduces a tile. With e = sum d / n, which is what the pivot lacks of being the mean,
//   m2 = sum d^2 - n e^2,  m3 = sum d^3 - 3 e sum d^2 + 2 n e^3,
//   m4 = sum d^4 - 4 e sum d^3 + 6 e^2 sum d^2 - 3 n e^4.
template <class G, class A>
__device__ __forceinline__ void reduce_tile(const Values<G, A>& values, A n, A threshold, A* scratch,
                                            A (&raw)[G::kColumns][kRaw]) {
  const bool full = values.live == (kAllLanes >> (32 - G::kItems));
  A first[G::kColumns][4], second[G::kColumns][5], nonfinite[G::kColumns][1];
  if (full)
    extremes<true>(values, threshold, first);
  else
    extremes<false>(values, threshold, first);
  all_reduce<G, 2>(first, scratch);

  A pivot[G::kColumns], unit[G::kColumns], scale[G::kColumns];
#pragma unroll
  for (int c = 0; c < G::kColumns; ++c) {
    // Never outside [min, max], so that constant values have deviations of exactly zero.
    pivot[c] = smaller(larger(first[c][3] / n * A(65536), -first[c][0]), first[c][1]);
    power_of_two(larger(first[c][0], first[c][1]), unit[c], scale[c]);
  }
  if (full)
    powers<true>(values, pivot, scale, second);
  else
    powers<false>(values, pivot, scale, second);
  all_reduce<G, 0>(second, scratch);

  bool finite = true;
#pragma unroll
  for (int c = 0; c < G::kColumns; ++c) {
    nonfinite[c][0] = 0;
    finite = finite && second[c][0] < infinity<A>();
  }
  // Warps that share columns hold the same totals, so they agree here and meet at the barriers inside.
  if (!__all_sync(kAllLanes, finite)) {
    count_nonfinite(values, nonfinite);
    all_reduce<G, 0>(nonfinite, scratch);
  }
#pragma unroll
  for (int c = 0; c < G::kColumns; ++c) {
    const A l1 = second[c][0], d2 = second[c][2], d3 = second[c][3], d4 = second[c][4];
    const A e = second[c][1] / n, ne2 = n * e * e;
    const bool bad = nonfinite[c][0] > 0, number = l1 == l1;  // min and max drop NaN, the sum of |v| cannot
    raw[c][kPivot] = bad ? first[c][3] / n : pivot[c];        // inf or NaN, as a plain sum has it
    raw[c][kError] = bad ? A(0) : e;
    raw[c][kM2] = d2 - ne2;
    raw[c][kM3] = d3 - 3 * e * d2 + 2 * ne2 * e;
    raw[c][kM4] = d4 - 4 * e * d3 + 6 * e * e * d2 - 3 * ne2 * e * e;
    raw[c][kL1] = l1;
    raw[c][kLow] = number ? -first[c][0] : l1;
    raw[c][kHigh] = number ? first[c][1] : l1;
    raw[c][kActive] = first[c][2];
    raw[c][kNonfinite] = nonfinite[c][0];
    raw[c][kUnit] = unit[c];
  }
}

// The moments of a tile; `raw` points to one column of kRaw rows.
template <class A>
__device__ __forceinline__ State tile_state(double n, const A* raw, int stride) {
  const double u = raw[kUnit * stride], uu = u * u;
  State s;
  s.n = n;
  s.mean = raw[kPivot * stride] + raw[kError * stride] * u;
  s.m2 = raw[kM2 * stride] * uu;
  s.m3 = raw[kM3 * stride] * uu * u;
  s.m4 = raw[kM4 * stride] * uu * uu;
  s.l1 = raw[kL1 * stride] * u;
  s.low = raw[kLow * stride];
  s.high = raw[kHigh * stride];
  s.n_active = raw[kActive * stride];
  s.n_nonfinite = raw[kNonfinite * stride];
  return s;
}

}  // namespace balanced_rep
