// Moments of every column of a block, rows being what is reduced: the kept dim is contiguous in memory.
//
// Panels of at most kColumnPanel rows are summed in float32 around a pivot and scale of each column, then merged into
// the float64 state of the column. Within a panel eight rows at a time cross the block from left to right, a vector of
// columns (strip) in registers: rows are read in runs of a block, the next eight are on their way, and no more than
// eight lines compete for one set of the cache where the row stride is a multiple of 4096 bytes. The sums of a strip
// wait in L1. Pivots follow moments_row.inl: mean so far; a sample of rows, checked, in the first panel. A column that
// fails a check is redone by itself, exactly: not finite, out of range, or a first panel far from its sample.
#pragma once

#include "moments_strip.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int kPooledPanel = 16;  // pooled rows that are buffered

// States of neighbouring slots (lanes of strips, in order), field by field. They share their count.
enum Field { kMean, kM2, kM3, kM4, kL1, kLo, kHi, kActive, kNonfinite, kStateFields };

template <class Real>
struct ColumnStates {
  static constexpr int kSlots = kColumnBlock + 2 * Simd<Real>::kLanes;
  double n;
  bool all_finite;
  double fields[kStateFields][kSlots];
};

template <class Real>
BR_INLINE void frame_of_state(const ColumnStates<Real>& s, int slot, Strip<Real>& strip) {
  const auto spread = [&](int k) { return load(s.fields[kHi] + slot + k) - load(s.fields[kLo] + slot + k); };
  const auto mean = [&](int k) { return load(s.fields[kMean] + slot + k); };
  set_frame<Real>(narrow<Real>(mean), narrow<Real>(spread), strip);
}

// The sums of a strip as states of its lanes, field f at b + f * stride; returns the lanes that have to be redone.
template <class Real>
BR_INLINE IntVecOf<Real> lane_states(const Strip<Real>& strip, double n, bool outweighs, double* b, int64_t stride) {
  typedef VecOf<Real> V;
  typedef IntVecOf<Real> I;
  typedef Exponent<Real> E;
  const Sums<Real>& s = strip.sums;
  const V inverse = bit_cast<V>((I{} + (E::kTop << E::kBits)) - bit_cast<I>(strip.scale));
  const I constant = bit_cast<I>(s.lo == s.hi);
  const VecD per_n = splat(1 / n);
  for (int part = 0; part < Parts<Real>::kCount; ++part, b += Simd<double>::kLanes) {
    const VecD u = widen(inverse, part), d1 = widen(s.d1, part), m2 = widen(s.m2, part), m3 = widen(s.m3, part),
               m4 = widen(s.m4, part), e = d1 * per_n, ne2 = d1 * e, u2 = u * u, lo = widen(s.lo, part);
    const VecD c2 = m2 - ne2, c3 = m3 - e * (3 * m2 - 2 * ne2), c4 = m4 - e * (4 * m3 - e * (6 * m2 - 3 * ne2));
    const VecL varies = ~widen_mask(constant, part);
    store_bytes(b + kMean * stride, select(varies, (e - widen(strip.minus_pivot, part)) * u, lo));
    store_bytes(b + kM2 * stride, keep(varies, max_of(c2, VecD{}) * u2));
    store_bytes(b + kM3 * stride, keep(varies, c3 * u2 * u));
    store_bytes(b + kM4 * stride, keep(varies, max_of(c4, VecD{}) * u2 * u2));
    store_bytes(b + kL1 * stride, widen(s.l1, part));
    store_bytes(b + kLo * stride, lo);
    store_bytes(b + kHi * stride, widen(s.hi, part));
    store_bytes(b + kActive * stride, widen_count(s.active, part));
    store_bytes(b + kNonfinite * stride, VecD{});
  }
  const V count = splat(static_cast<Real>(n)), greatest = splat(static_cast<Real>(largest(Real())));
  I fine = bit_cast<I>(s.m4 <= greatest) & bit_cast<I>(s.m2 >= count * splat(static_cast<Real>(least_square(Real()))));
  if (outweighs) fine &= bit_cast<I>(splat(Real(1.5)) * s.d1 * s.d1 <= count * s.m2);
  return ~(bit_cast<I>(s.l1 <= greatest) & (fine | constant));
}

BR_INLINE State state_at(const double* p, int64_t stride, double n) {
  return {n,
          p[kMean * stride],
          p[kM2 * stride],
          p[kM3 * stride],
          p[kM4 * stride],
          p[kL1 * stride],
          p[kLo * stride],
          p[kHi * stride],
          p[kActive * stride],
          p[kNonfinite * stride]};
}

BR_INLINE void put_state(const State& s, double* p, int64_t stride) {
  p[kMean * stride] = s.mean;
  p[kM2 * stride] = s.m2;
  p[kM3 * stride] = s.m3;
  p[kM4 * stride] = s.m4;
  p[kL1 * stride] = s.l1;
  p[kLo * stride] = s.lo;
  p[kHi * stride] = s.hi;
  p[kActive * stride] = s.active;
  p[kNonfinite * stride] = s.nonfinite;
}

template <class T>
__attribute__((noinline)) void redo_lanes(const T* const* rows, int n_rows, int64_t n_cols, int strip, double threshold,
                                          IntVecOf<RealOf<T>> bad, double* b, int64_t stride, bool& all_finite) {
  typedef Simd<RealOf<T>> S;
  typename S::Int lanes[S::kLanes];
  store_bytes(lanes, bad);
  for (int l = 0; l < S::kLanes; ++l) {
    if (lanes[l] == 0) continue;
    const int64_t j = Strips<T>::column(strip, l, n_cols);
    const State s = exact_state(n_rows, threshold, [&](int64_t i) { return static_cast<double>(to_real(rows[i][j])); });
    put_state(s, b + l, stride);
    all_finite &= s.nonfinite == 0;
  }
}

// merge() of moments_row.inl for the lanes of a strip: b, field f at b + f * kLanes, joins the states from slot on.
template <class Real>
BR_INLINE void merge_lanes(const double* b, double nb, int slot, ColumnStates<Real>& states) {
  constexpr int kLanes = Simd<Real>::kLanes;
  const double na = states.n, n = na + nb, ra = na / n, rb = nb / n, w = na * rb;
  const double w3 = w * (ra - rb), w4 = w * (ra * ra - ra * rb + rb * rb);
  for (int l = 0; l < kLanes; l += Simd<double>::kLanes) {
    const auto to = [&](Field f) { return states.fields[f] + slot + l; };
    const auto old = [&](Field f) { return load(to(f)); };
    const auto more = [&](Field f) { return load(b + f * kLanes + l); };
    const VecD a2 = old(kM2), a3 = old(kM3), b2 = more(kM2), b3 = more(kM3), d = more(kMean) - old(kMean), dd = d * d;
    store_bytes(to(kM4), old(kM4) + more(kM4) + dd * dd * w4 + 6 * dd * (ra * ra * b2 + rb * rb * a2) +
                             4 * d * (ra * b3 - rb * a3));
    store_bytes(to(kM3), a3 + b3 + dd * d * w3 + 3 * d * (ra * b2 - rb * a2));
    store_bytes(to(kM2), a2 + b2 + dd * w);
    store_bytes(to(kMean), old(kMean) + d * rb);
    store_bytes(to(kL1), old(kL1) + more(kL1));
    store_bytes(to(kLo), min_of(old(kLo), more(kLo)));
    store_bytes(to(kHi), max_of(old(kHi), more(kHi)));
    store_bytes(to(kActive), old(kActive) + more(kActive));
  }
}

template <class Real>
__attribute__((noinline)) void merge_lanes_nonfinite(const double* b, double nb, int slot, ColumnStates<Real>& states) {
  constexpr int kLanes = Simd<Real>::kLanes;
  for (int l = 0; l < kLanes; ++l) {
    double* const p = states.fields[0] + slot + l;
    State s = state_at(p, ColumnStates<Real>::kSlots, states.n);
    merge(s, state_at(b + l, kLanes, nb));
    put_state(s, p, ColumnStates<Real>::kSlots);
  }
}

// One panel: rows[0, n_rows), and behind them `ahead` rows that are only prefetched.
template <class T>
inline void add_panel(const T* const* rows, int n_rows, int ahead, int64_t n_cols, const MomentsTask& task,
                      ColumnStates<RealOf<T>>& states) {
  typedef RealOf<T> Real;
  constexpr int kLanes = Simd<Real>::kLanes, kMost = ColumnStates<Real>::kSlots / kLanes;
  Strip<Real> strips[kMost];
  Sums<Real> totals[kMost];
  const int n_strips = Strips<T>::count(n_cols), n_sample = n_rows < kRows ? n_rows : kRows;
  const bool first = states.n == 0, outweighs = states.n < n_rows;
  for (int s = 0; s < n_strips; ++s) {
    const int64_t j = Strips<T>::first_column(s, n_cols);
    clear(strips[s].sums);
    if (!first) {
      frame_of_state(states, s * kLanes, strips[s]);
    } else if (s % Strips<T>::kTogether == 1) {
      sample_rows<T, true>(rows, n_sample, j, strips[s]);
    } else {
      sample_rows<T, false>(rows, n_sample, j, strips[s]);
    }
  }
  sum_panel(rows, n_rows, ahead, n_cols, threshold_of<Real>(task), strips, totals);
  for (int s = 0; s < n_strips; ++s) {
    double fresh[kStateFields * kLanes];
    double* const b = first ? states.fields[0] + s * kLanes : fresh;
    const int64_t stride = first ? ColumnStates<Real>::kSlots : kLanes;
    const auto bad = lane_states(strips[s], n_rows, outweighs, b, stride);
    if (any(bad)) redo_lanes(rows, n_rows, n_cols, s, task.threshold, bad, b, stride, states.all_finite);
    if (first) continue;
    if (states.all_finite) {
      merge_lanes(fresh, n_rows, s * kLanes, states);
    } else {
      merge_lanes_nonfinite(fresh, n_rows, s * kLanes, states);
    }
  }
  states.n += n_rows;
}

// Copies one field of n_cols columns from slots to columns.
template <class T>
BR_INLINE void emit_field(const double* from, int64_t n_cols, double* to, int64_t stride) {
  constexpr int kLanes = Strips<T>::kLanes, kTogether = Strips<T>::kTogether, kWidth = Strips<T>::kWidth;
  if (kTogether == 1 && n_cols >= kWidth) {
    const int64_t plain = n_cols / kLanes * kLanes, shared = (kLanes - n_cols % kLanes) % kLanes;
    for (int64_t c = 0; c < plain; ++c) to[c * stride] = from[c];
    for (int64_t c = plain; c < n_cols; ++c) to[c * stride] = from[c + shared];
    return;
  }
  for (int64_t j = 0; j < n_cols; j += kWidth, from += kWidth) {
    const int64_t at = j + kWidth <= n_cols || n_cols < kWidth ? j : n_cols - kWidth;
    for (int l = 0; l < kLanes; ++l) {
      for (int odd = 0; odd < kTogether; ++odd) {
        const int64_t c = at + l * kTogether + odd;
        if (c < n_cols) to[c * stride] = from[odd * kLanes + l];
      }
    }
  }
}

// Writes the states of n_cols columns, summed from rows of T; out is the place of the first column.
template <class T>
inline void emit_columns(const ColumnStates<RealOf<T>>& s, int64_t n_cols, double* out, int64_t field_stride,
                         int64_t stride) {
  for (int64_t c = 0; c < n_cols; ++c) out[c * stride] = s.n;
  for (int f = 0; f < kStateFields; ++f) emit_field<T>(s.fields[f], n_cols, out + (f + 1) * field_stride, stride);
}

// Rows as they lie in memory.
template <class T>
inline void sum_block(const T* x, int64_t n_cols, int64_t first, int64_t last, const MomentsTask& task,
                      ColumnStates<RealOf<T>>& states) {
  const T* rows[kColumnPanel + kRows];
  Walker w(task.r.reduced, 0, first);
  int known = 0;  // rows of this panel that the last one has looked up already
  while (first < last) {
    const int n = static_cast<int>(last - first < kColumnPanel ? last - first : kColumnPanel);
    const int wanted = static_cast<int>(last - first < n + kRows ? last - first : n + kRows);
    for (; known < wanted; ++known, w.next()) rows[known] = x + w.offset;
    add_panel(rows, n, wanted - n, n_cols, task, states);
    for (int k = n; k < wanted; ++k) rows[k - n] = rows[k];
    known = wanted - n;
    first += n;
  }
}

// Rows that are first pooled into a buffer, or that are narrower than a vector and are padded there.
template <class T, Pool kPool>
inline void sum_block_buffered(const T* x, int64_t n_cols, int64_t first, int64_t last, const MomentsTask& task,
                               ColumnStates<PooledReal<T, kPool>>& states) {
  typedef PooledReal<T, kPool> Real;
  constexpr int kLanes = Simd<Real>::kLanes;
  const int64_t width = n_cols < kLanes ? kLanes : n_cols;
  Real buffer[kPooledPanel * kColumnBlock];
  const Real* rows[kPooledPanel];
  Walker w(task.r.reduced, 0, first);
  while (first < last) {
    const int n = static_cast<int>(last - first < kPooledPanel ? last - first : kPooledPanel);
    for (int k = 0; k < n; ++k, w.next()) {
      Real* const row = buffer + k * width;
      rows[k] = row;
      read_values<T, kPool>(x + w.offset, n_cols, 1, task.r, row);
      for (int64_t j = n_cols; j < width; ++j) row[j] = 0;
    }
    add_panel(rows, n, 0, width, task, states);
    first += n;
  }
}

template <class T, Pool kPool>
inline void column_items(const MomentsTask& task, int64_t first_item, int64_t last_item) {
  typedef PooledReal<T, kPool> Real;
  const Reduction& r = task.r;
  const int inner = r.kept.n - 1;
  const int64_t per_outer = r.n_blocks * r.n_segments, step = r.kept_out[inner];
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t outer = item / per_outer, block = item / r.n_segments % r.n_blocks, segment = item % r.n_segments;
    const int64_t column = block * kColumnBlock, left = r.kept.size[inner] - column;
    const int64_t n_cols = left < kColumnBlock ? left : kColumnBlock;
    const int64_t first = segment * r.segment, last = first + r.segment < r.n_reduced ? first + r.segment : r.n_reduced;
    const T* const x = static_cast<const T*>(r.x) + Walker(r.kept, 1, outer).offset + column;
    ColumnStates<Real> states;
    states.n = 0;
    states.all_finite = true;
    const int64_t index = Walker(r.kept, r.kept_out, 1, outer).offset + column * r.kept_out[inner];
    double* const out = task.out + segment * r.n_kept + index;
    if constexpr (kPool == kPoolNone) {
      if (n_cols >= Strips<T>::kWidth) {
        sum_block(x, n_cols, first, last, task, states);
        emit_columns<T>(states, n_cols, out, task.field_stride, step);
        continue;
      }
    }
    sum_block_buffered<T, kPool>(x, n_cols, first, last, task, states);
    emit_columns<Real>(states, n_cols, out, task.field_stride, step);
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
