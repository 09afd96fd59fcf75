// Group normalisation, with SiLU or not, and K tangents. An item holds `unit` and `slope` of its groups, in L2:
// dy = slope (dx - <dx> - unit <dx unit>), slope = w r, times the derivative of SiLU.
#pragma once

#include "norm_jvp.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

template <class T, class U>
struct GroupNormItem {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  static constexpr int kLanes = Simd<Real>::kLanes;

  const GroupNormTask& t;
  Real *unit, *slope;
  double* sums;  // (2, channels)
  Real *shared, *along;
  int64_t batch, channel, channels, first_tangent, last_tangent;

  GroupNormItem(const GroupNormTask& task, Real* workspace) : t(task) {
    const int64_t most = t.c / t.groups * t.block_groups;
    auto take = [&](int64_t n) {
      Real* const at = workspace;
      workspace += (n + 15) / 16 * 16;
      return at;
    };
    unit = take(most * t.s);
    slope = take(most * t.s);
    sums = reinterpret_cast<double*>(take(4 * most));
    shared = take(2 * most);
    along = shared + most;
  }

  void start(int64_t item) {
    const int64_t tangent_blocks = (t.k + t.tangents_per_item - 1) / t.tangents_per_item;
    const int64_t blocks = (t.groups + t.block_groups - 1) / t.block_groups;
    const int64_t parts = tangent_blocks > 0 ? tangent_blocks : 1;
    first_tangent = item % parts * t.tangents_per_item;
    last_tangent = t.k - first_tangent < t.tangents_per_item ? t.k : first_tangent + t.tangents_per_item;
    const int64_t group = item / parts % blocks * t.block_groups;
    const int64_t n = t.groups - group < t.block_groups ? t.groups - group : t.block_groups;
    batch = item / parts / blocks;
    channel = group * (t.c / t.groups);
    channels = n * (t.c / t.groups);
  }

  Real weight(int64_t c) const {
    return t.weight == nullptr ? Real{1} : static_cast<const Real*>(t.weight)[channel + c];
  }
  Real bias(int64_t c) const { return t.bias == nullptr ? Real{0} : static_cast<const Real*>(t.bias)[channel + c]; }

  // The result for unit values u, and the factor of their tangents but for r w.
  BR_INLINE V activated(V v, V& factor) const {
    if (!t.silu) {
      factor = splat(Real{1});
      return v;
    }
    V rest;
    const V g = logistic(v, rest);
    factor = g * (1 + v * rest);
    return v * g;
  }

  template <class E>
  E* at(const void* base, const int64_t (&stride)[3], int64_t c, int64_t s) const {
    return const_cast<E*>(static_cast<const E*>(base)) + batch * stride[0] + (channel + c) * stride[1] + s * stride[2];
  }
  template <class E>
  E* at(const void* base, const int64_t (&stride)[4], int64_t k, int64_t c, int64_t s) const {
    return const_cast<E*>(static_cast<const E*>(base)) + k * stride[0] + batch * stride[1] + (channel + c) * stride[2] +
           s * stride[3];
  }

  bool writes_primal() const { return first_tangent == 0; }

  // One group, each of its channels a run of s elements; a single run if they follow each other.
  void contiguous() {
    const double n = static_cast<double>(channels * t.s);
    double sum = 0, squares = 0;
    const Real pivot = to_real(*at<T>(t.x, t.x_stride, 0, 0));
    for (int64_t c = 0; c < channels; ++c) sum += sum_from<Real>(at<T>(t.x, t.x_stride, c, 0), t.s, pivot);
    const Centre<Real> centre(static_cast<double>(pivot) + sum / n);
    for (int64_t c = 0; c < channels; ++c) {
      squares += centre_into<Real>(at<T>(t.x, t.x_stride, c, 0), t.s, centre, unit + c * t.s);
    }
    const Real rate = static_cast<Real>(1 / sqrt(squares / n + t.eps));
    for (int64_t c = 0; c < channels; ++c) {
      Real* const u = unit + c * t.s;
      const Real w = weight(c), shift = bias(c);
      T* const y = at<T>(t.y, t.y_stride, c, 0);
      for_vectors<Real>(t.s, [&](auto i) {
        const V v = i.get(u) * rate;
        V factor;
        const V result = activated(v * w + shift, factor);
        i.put(u, v);
        i.put(slope + c * t.s, factor * (w * rate));
        if (writes_primal()) i.put(y, result);
      });
    }
    const bool joined = t.dx_stride[2] == t.s && t.dy_stride[2] == t.s;
    const int64_t runs = joined ? 1 : channels, run = joined ? channels * t.s : t.s;
    for (int64_t k = first_tangent; k < last_tangent; ++k) {
      double total[2] = {};
      for (int64_t c = 0; c < runs; ++c) {
        const U* const from = at<U>(t.dx, t.dx_stride, k, c, 0);
        const Real* const u = unit + c * t.s;
        sum_vectors<2, Real>(run, total, [&](auto i, auto& s) {
          const V v = i.get(from);
          s[0] += v;
          s[1] += v * i.get(u);
        });
      }
      const Real all = static_cast<Real>(total[0] / n), part = static_cast<Real>(total[1] / n);
      for (int64_t c = 0; c < runs; ++c) {
        const U* const from = at<U>(t.dx, t.dx_stride, k, c, 0);
        U* const to = at<U>(t.dy, t.dy_stride, k, c, 0);
        const Real *const u = unit + c * t.s, *const by = slope + c * t.s;
        for_vectors<Real>(run, [&](auto i) { i.put(to, ((i.get(from) - all) - i.get(u) * part) * i.get(by)); });
      }
    }
  }

  // sums[s * channels + c] = the sums s over positions of what add(c, position, sums) adds, for vectors of channels.
  template <int kSums, class F>
  void sum_positions(const F& add) {
    constexpr int64_t kStretch = 1024;
    memset(sums, 0, kSums * channels * sizeof(double));
    for (int64_t first = 0; first < t.s; first += kStretch) {
      const int64_t end = t.s - first < kStretch ? t.s : first + kStretch;
      int64_t c = 0;
      for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
        V acc[4][kSums] = {};
        for (int64_t s = first; s < end; ++s) {
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) add(Whole{c + u * kLanes}, s, acc[u]);
        }
        for (int u = 0; u < 4; ++u) fold_into<kSums>(acc[u], c + u * kLanes, kLanes);
      }
      for (; c < channels; c += kLanes) {
        V acc[kSums] = {};
        const int left = channels - c < kLanes ? static_cast<int>(channels - c) : kLanes;
        for (int64_t s = first; s < end; ++s) {
          left == kLanes ? add(Whole{c}, s, acc) : add(Partial{c, left}, s, acc);
        }
        fold_into<kSums>(acc, c, left);
      }
    }
  }
  template <int kSums>
  BR_INLINE void fold_into(const V (&acc)[kSums], int64_t c, int n) {
    for (int i = 0; i < kSums; ++i) {
      for (int j = 0; j < n; ++j) sums[i * channels + c + j] += static_cast<double>(acc[i][j]);
    }
  }

  // Replaces each channel's sum by that of its group over n.
  void average_groups(double* of, double n) {
    const int64_t per = t.c / t.groups;
    for (int64_t c = 0; c < channels; c += per) {
      double sum = 0;
      for (int64_t j = 0; j < per; ++j) sum += of[c + j];
      for (int64_t j = 0; j < per; ++j) of[c + j] = sum / n;
    }
  }

  // Positions are runs of channels, several groups side by side.
  void channels_last() {
    const double n = static_cast<double>(t.c / t.groups * t.s);
    const int64_t cs = channels;
    const T* const pivots = at<T>(t.x, t.x_stride, 0, 0);
    sum_positions<1>(
        [&](auto i, int64_t s, auto& acc) { acc[0] += i.get(at<T>(t.x, t.x_stride, 0, s)) - i.get(pivots); });
    for (int64_t c = 0; c < cs; ++c) sums[c] += static_cast<double>(to_real(pivots[c])) * static_cast<double>(t.s);
    average_groups(sums, n);
    for (int64_t c = 0; c < cs; ++c) {
      const Centre<Real> centre(sums[c]);
      shared[c] = centre.high;
      along[c] = centre.low;
    }
    sum_positions<1>([&](auto i, int64_t s, auto& acc) {
      const V c = (i.get(at<T>(t.x, t.x_stride, 0, s)) - i.get(shared)) - i.get(along);
      i.put(unit + s * cs, c);
      acc[0] += c * c;
    });
    average_groups(sums, n);
    for (int64_t c = 0; c < cs; ++c) {
      shared[c] = static_cast<Real>(1 / sqrt(sums[c] + t.eps));
      along[c] = shared[c] * weight(c);
    }
    const Real* const w = t.weight == nullptr ? nullptr : static_cast<const Real*>(t.weight) + channel;
    const Real* const shift = t.bias == nullptr ? nullptr : static_cast<const Real*>(t.bias) + channel;
    for (int64_t s = 0; s < t.s; ++s) {
      Real* const u = unit + s * cs;
      T* const y = at<T>(t.y, t.y_stride, 0, s);
      for_vectors<Real>(cs, [&](auto i) {
        const V v = i.get(u) * i.get(shared);
        const V scaled = w == nullptr ? v : v * i.get(w);
        V factor;
        const V result = activated(shift == nullptr ? scaled : scaled + i.get(shift), factor);
        i.put(u, v);
        i.put(slope + s * cs, factor * i.get(along));
        if (writes_primal()) i.put(y, result);
      });
    }
    for (int64_t k = first_tangent; k < last_tangent; ++k) {
      sum_positions<2>([&](auto i, int64_t s, auto& acc) {
        const V v = i.get(at<U>(t.dx, t.dx_stride, k, 0, s));
        acc[0] += v;
        acc[1] += v * i.get(unit + s * cs);
      });
      average_groups(sums, n);
      average_groups(sums + cs, n);
      for (int64_t c = 0; c < cs; ++c) {
        shared[c] = static_cast<Real>(sums[c]);
        along[c] = static_cast<Real>(sums[cs + c]);
      }
      for (int64_t s = 0; s < t.s; ++s) {
        const U* const from = at<U>(t.dx, t.dx_stride, k, 0, s);
        U* const to = at<U>(t.dy, t.dy_stride, k, 0, s);
        const Real *const u = unit + s * cs, *const by = slope + s * cs;
        for_vectors<Real>(
            cs, [&](auto i) { i.put(to, ((i.get(from) - i.get(shared)) - i.get(u) * i.get(along)) * i.get(by)); });
      }
    }
  }
};

template <class T, class U>
void group_norm_items(const GroupNormTask& task, int64_t first_item, int64_t last_item, void* workspace) {
  GroupNormItem<T, U> item(task, static_cast<RealOf<T>*>(workspace));
  for (int64_t i = first_item; i < last_item; ++i) {
    item.start(i);
    task.channels_last ? item.channels_last() : item.contiguous();
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
