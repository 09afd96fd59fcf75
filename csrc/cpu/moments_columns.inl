// Moments of every column of a block, rows being what is reduced: the kept dim is contiguous in memory.
//
// Panels of at most kColumnPanel rows are summed in float32 around a pivot and scale of each column, then merged into
// the float64 state of the column. Within a panel eight rows at a time cross the block from left to right, a vector of
// columns (strip) in registers: rows are read in runs of a block, the next eight are on their way, and no more than
// eight lines compete for one set of the cache where the row stride is a multiple of 4096 bytes. The sums of a strip
// wait in L1. Pivots follow moments_row.inl: mean so far; a sample of rows, checked, in the first panel. A column that
// fails a check is redone by itself, exactly: not finite, out of range, or a first panel far from its sample.

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int kRows = 8;
constexpr int kFlushRows = 64;
constexpr int kPooledPanel = 16;

template <class Real>
struct Strip {
  Sums<Real> sums;
  VecOf<Real> minus_pivot, scale;  // d = x * scale + minus_pivot
};

// Slots are lanes of strips in order. The last strip ends with the block, so it may share columns with its neighbour.
template <class Real>
struct ColumnStates {
  static constexpr int kSlots = kColumnBlock + Simd<Real>::kLanes;
  double n;
  double mean[kSlots], m2[kSlots], m3[kSlots], m4[kSlots], l1[kSlots], lo[kSlots], hi[kSlots], active[kSlots],
      nonfinite[kSlots];
  bool all_finite;
};

// States of the lanes of one strip, field by field.
template <class Real>
struct LaneStates {
  static constexpr int kLanes = Simd<Real>::kLanes;
  double mean[kLanes], m2[kLanes], m3[kLanes], m4[kLanes], l1[kLanes], lo[kLanes], hi[kLanes], active[kLanes],
      nonfinite[kLanes];
};

// Biased exponents as integers: scale = 2^-floor(log2 spread), within the normal numbers.
template <class Real>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr int kBits = 23;
  static constexpr int32_t kTop = 254;
};
template <>
struct Exponent<double> {
  static constexpr int kBits = 52;
  static constexpr int64_t kTop = 2046;
};

template <class Real>
BR_INLINE void set_frame(VecOf<Real> mean, VecOf<Real> spread, Strip<Real>& strip) {
  typedef IntVecOf<Real> I;
  typedef VecOf<Real> V;
  typedef Exponent<Real> E;
  spread = select(bit_cast<I>(spread > V{}), spread, abs_of(mean));
  I e = bit_cast<I>(spread) >> E::kBits;
  const I low = I{} + 1, high = I{} + (E::kTop - 1);
  e = select(bit_cast<I>(e < low), low, e);
  e = select(bit_cast<I>(e > high), high, e);
  strip.scale = bit_cast<V>((E::kTop - e) << E::kBits);
  const V pivot = mean * strip.scale;
  strip.minus_pivot = -keep(bit_cast<I>(pivot - pivot == V{}), pivot);
}

template <class T>
BR_INLINE void sample_rows(const T* const* rows, int n, int64_t j, Strip<RealOf<T>>& strip) {
  typedef RealOf<T> Real;
  VecOf<Real> sum{}, lo = splat(static_cast<Real>(__builtin_inf())), hi = -lo;
  for (int k = 0; k < n; ++k) {
    const VecOf<Real> x = load(rows[k] + j);
    sum += x;
    lo = min_of(lo, x);
    hi = max_of(hi, x);
  }
  set_frame<Real>(sum * splat(Real(1) / static_cast<Real>(n)), hi - lo, strip);
}

template <class Real>
BR_INLINE void frame_of_state(const ColumnStates<Real>& s, int slot, Strip<Real>& strip) {
  const auto spread = [&](int k) { return load(s.hi + slot + k) - load(s.lo + slot + k); };
  const auto mean = [&](int k) { return load(s.mean + slot + k); };
  set_frame<Real>(narrow<Real>(mean), narrow<Real>(spread), strip);
}

// Adds n <= kRows rows; the caller passes kRows as a constant where it can, so that the loop unrolls.
template <class T>
BR_INLINE void add_rows(const T* const* rows, int n, int64_t j, VecOf<RealOf<T>> limit, Strip<RealOf<T>>& strip) {
  Registers<RealOf<T>> registers(strip.sums);
  int k = 0;
#pragma GCC unroll 4
  for (; k + 2 <= n; k += 2) {
    registers.add(load(rows[k] + j), load(rows[k + 1] + j), strip.scale, strip.minus_pivot, limit);
  }
  if (k < n) registers.add(load(rows[k] + j), strip.scale, strip.minus_pivot, limit);
  registers.put_aside(strip.sums);
  registers.put_extremes(strip.sums);
}

// Puts the float32 sums of a strip aside: no sum has more than kFlushRows / kRows terms before it is added to the next.
template <class Real>
BR_INLINE void flush(Strip<Real>& strip, Sums<Real>& total) {
  Sums<Real>& s = strip.sums;
  total.l1 += s.l1;
  total.d1 += s.d1;
  total.m2 += s.m2;
  total.m3 += s.m3;
  total.m4 += s.m4;
  s.l1 = s.d1 = s.m2 = s.m3 = s.m4 = VecOf<Real>{};
}

// All strips of a panel. With the last strip of a cache line go requests for that line of the next kRows rows; not
// earlier, since they may compete for the same set with the lines in use.
template <class T>
inline void sum_panel(const T* const* rows, int n_rows, int ahead, int64_t n_cols, bool sample, RealOf<T> threshold,
                      Strip<RealOf<T>>* strips, Sums<RealOf<T>>* totals) {
  typedef RealOf<T> Real;
  constexpr int kLanes = Simd<Real>::kLanes;
  constexpr int kStripBytes = kLanes * static_cast<int>(sizeof(T)), kPerLine = kStripBytes < 64 ? 64 / kStripBytes : 1;
  const VecOf<Real> limit = splat(threshold);
  for (int r = 0; r < n_rows; r += kRows) {
    const T* const* const now = rows + r;
    const bool prefetch = r + 2 * kRows <= n_rows + ahead, last = r + kRows >= n_rows;
    const bool full = r + kRows <= n_rows;
    for (int64_t s = 0, j = 0; j < n_cols; ++s, j += kLanes) {
      const int64_t at = j + kLanes <= n_cols ? j : n_cols - kLanes;
      if (sample && r == 0) sample_rows(now, full ? kRows : n_rows, at, strips[s]);
      if (full) {
        add_rows(now, kRows, at, limit, strips[s]);
      } else {
        add_rows(now, n_rows - r, at, limit, strips[s]);
      }
      if (prefetch && s % kPerLine == kPerLine - 1) {
        for (int k = 0; k < kRows; ++k) BR_PREFETCH(now[kRows + k] + at);
      }
      if (last || (r + kRows) % kFlushRows == 0) flush(strips[s], totals[s]);
    }
  }
}

// The sums of a strip as states of its lanes, and the lanes that have to be redone.
template <class Real>
BR_INLINE IntVecOf<Real> lane_states(const Strip<Real>& strip, const Sums<Real>& s, double n, bool first,
                                     LaneStates<Real>& b) {
  typedef VecOf<Real> V;
  typedef IntVecOf<Real> I;
  typedef Exponent<Real> E;
  const V inverse = bit_cast<V>((I{} + (E::kTop << E::kBits)) - bit_cast<I>(strip.scale));
  const I constant = bit_cast<I>(strip.sums.lo == strip.sums.hi);
  const VecD per_n = splat(1 / n);
  for (int part = 0; part < Parts<Real>::kCount; ++part) {
    const int k = part * Simd<double>::kLanes;
    const VecD u = widen(inverse, part), d1 = widen(s.d1, part), m2 = widen(s.m2, part), m3 = widen(s.m3, part),
               m4 = widen(s.m4, part), e = d1 * per_n, ne2 = d1 * e;
    const VecL flat = widen_mask(constant, part);
    store_bytes(b.mean + k, select(flat, widen(strip.sums.lo, part), (e - widen(strip.minus_pivot, part)) * u));
    store_bytes(b.m2 + k, keep(~flat, (m2 - ne2) * u * u));
    store_bytes(b.m3 + k, keep(~flat, (m3 - e * (3 * m2 - 2 * ne2)) * u * u * u));
    store_bytes(b.m4 + k, keep(~flat, (m4 - e * (4 * m3 - e * (6 * m2 - 3 * ne2))) * u * u * u * u));
    store_bytes(b.l1 + k, widen(s.l1, part));
    store_bytes(b.lo + k, widen(strip.sums.lo, part));
    store_bytes(b.hi + k, widen(strip.sums.hi, part));
    store_bytes(b.active + k, widen_count(strip.sums.active, part));
    store_bytes(b.nonfinite + k, VecD{});
  }
  const V count = splat(static_cast<Real>(n)), greatest = splat(static_cast<Real>(largest(Real())));
  I fine = bit_cast<I>(s.m4 <= greatest) & bit_cast<I>(s.m2 >= count * splat(static_cast<Real>(least_square(Real()))));
  if (first) fine &= bit_cast<I>(splat(Real(1.5)) * s.d1 * s.d1 <= count * s.m2);
  return ~(bit_cast<I>(s.l1 <= greatest) & (fine | constant));
}

template <class T>
inline void redo_lanes(const T* const* rows, int n_rows, int64_t j, double threshold, IntVecOf<RealOf<T>> bad,
                       LaneStates<RealOf<T>>& b, bool& all_finite) {
  typedef Simd<RealOf<T>> S;
  typename S::Int lanes[S::kLanes];
  store_bytes(lanes, bad);
  for (int l = 0; l < S::kLanes; ++l) {
    if (lanes[l] == 0) continue;
    const State s = exact_state(n_rows, threshold, [&](int64_t i) { return static_cast<double>(to_real(rows[i][j + l])); });
    b.mean[l] = s.mean, b.m2[l] = s.m2, b.m3[l] = s.m3, b.m4[l] = s.m4, b.l1[l] = s.l1;
    b.lo[l] = s.lo, b.hi[l] = s.hi, b.active[l] = s.active, b.nonfinite[l] = s.nonfinite;
    all_finite &= s.nonfinite == 0;
  }
}

// merge() of moments_row.inl over the lanes of a strip, which share their counts.
template <class Real>
BR_INLINE void merge_lanes(const LaneStates<Real>& b, double nb, int slot, ColumnStates<Real>& a) {
  constexpr int kLanes = Simd<Real>::kLanes;
  const double na = a.n, n = na + nb, ra = na / n, rb = nb / n, w = na * rb;
  const double w3 = w * (ra - rb), w4 = w * (ra * ra - ra * rb + rb * rb);
  for (int l = 0; l < kLanes; l += Simd<double>::kLanes) {
    const int k = slot + l;
    const VecD b2 = load(b.m2 + l), b3 = load(b.m3 + l), a2 = load(a.m2 + k), a3 = load(a.m3 + k);
    const VecD d = load(b.mean + l) - load(a.mean + k), dd = d * d;
    store_bytes(a.m4 + k, load(a.m4 + k) + load(b.m4 + l) + dd * dd * w4 + 6 * dd * (ra * ra * b2 + rb * rb * a2) +
                              4 * d * (ra * b3 - rb * a3));
    store_bytes(a.m3 + k, a3 + b3 + dd * d * w3 + 3 * d * (ra * b2 - rb * a2));
    store_bytes(a.m2 + k, a2 + b2 + dd * w);
    store_bytes(a.mean + k, load(a.mean + k) + d * rb);
    store_bytes(a.l1 + k, load(a.l1 + k) + load(b.l1 + l));
    store_bytes(a.lo + k, min_of(load(a.lo + k), load(b.lo + l)));
    store_bytes(a.hi + k, max_of(load(a.hi + k), load(b.hi + l)));
    store_bytes(a.active + k, load(a.active + k) + load(b.active + l));
  }
}

template <class Real>
inline void merge_lanes_nonfinite(const LaneStates<Real>& b, double nb, int slot, ColumnStates<Real>& a) {
  for (int l = 0; l < Simd<Real>::kLanes; ++l) {
    const int k = slot + l;
    State s = {a.n, a.mean[k], a.m2[k], a.m3[k], a.m4[k], a.l1[k], a.lo[k], a.hi[k], a.active[k], a.nonfinite[k]};
    merge(s, {nb, b.mean[l], b.m2[l], b.m3[l], b.m4[l], b.l1[l], b.lo[l], b.hi[l], b.active[l], b.nonfinite[l]});
    a.mean[k] = s.mean, a.m2[k] = s.m2, a.m3[k] = s.m3, a.m4[k] = s.m4, a.l1[k] = s.l1;
    a.lo[k] = s.lo, a.hi[k] = s.hi, a.active[k] = s.active, a.nonfinite[k] = s.nonfinite;
  }
}

template <class Real>
BR_INLINE void begin_lanes(const LaneStates<Real>& b, int slot, ColumnStates<Real>& a) {
  for (int l = 0; l < Simd<Real>::kLanes; ++l) {
    const int k = slot + l;
    a.mean[k] = b.mean[l], a.m2[k] = b.m2[l], a.m3[k] = b.m3[l], a.m4[k] = b.m4[l], a.l1[k] = b.l1[l];
    a.lo[k] = b.lo[l], a.hi[k] = b.hi[l], a.active[k] = b.active[l], a.nonfinite[k] = b.nonfinite[l];
  }
}

// One panel: rows[0, n_rows), and behind them `ahead` rows that are only prefetched. n_cols is at least one vector.
template <class T>
inline void add_panel(const T* const* rows, int n_rows, int ahead, int64_t n_cols, const MomentsTask& task,
                      ColumnStates<RealOf<T>>& states) {
  typedef RealOf<T> Real;
  constexpr int kLanes = Simd<Real>::kLanes;
  Strip<Real> strips[kColumnBlock / kLanes + 1];
  Sums<Real> totals[kColumnBlock / kLanes + 1];
  const int n_strips = static_cast<int>((n_cols + kLanes - 1) / kLanes);
  const bool first = states.n == 0;
  const auto column = [&](int s) { return (s + 1) * kLanes <= n_cols ? s * kLanes : n_cols - kLanes; };
  for (int s = 0; s < n_strips; ++s) {
    strips[s].sums = totals[s] = zero_sums<Real>();
    if (!first) frame_of_state(states, s * kLanes, strips[s]);
  }
  sum_panel(rows, n_rows, ahead, n_cols, first, threshold_of<Real>(task), strips, totals);
  for (int s = 0; s < n_strips; ++s) {
    LaneStates<Real> b;
    const auto bad = lane_states(strips[s], totals[s], n_rows, first || states.n < n_rows, b);
    if (any(bad)) redo_lanes(rows, n_rows, column(s), task.threshold, bad, b, states.all_finite);
    if (first) {
      begin_lanes(b, s * kLanes, states);
    } else if (states.all_finite) {
      merge_lanes(b, n_rows, s * kLanes, states);
    } else {
      merge_lanes_nonfinite(b, n_rows, s * kLanes, states);
    }
  }
  states.n += n_rows;
}

// Writes the states of n_cols columns, field by field; out is the place of the first column.
template <class Real>
inline void emit_columns(ColumnStates<Real>& s, int64_t n_cols, double* out, int64_t field_stride, int64_t stride) {
  constexpr int kLanes = Simd<Real>::kLanes;
  const int64_t n_strips = (n_cols + kLanes - 1) / kLanes, shared = n_cols < kLanes ? 0 : n_strips * kLanes - n_cols;
  const int64_t n_slots = n_strips * kLanes;
  for (int64_t k = 0; k < n_slots; ++k) {
    const bool constant = (s.lo[k] == s.hi[k]) & (s.nonfinite[k] == 0);
    s.mean[k] = constant ? s.lo[k] : s.mean[k];
    s.m2[k] = constant | (s.m2[k] < 0) ? 0.0 : s.m2[k];
    s.m3[k] = constant ? 0.0 : s.m3[k];
    s.m4[k] = constant | (s.m4[k] < 0) ? 0.0 : s.m4[k];
  }
  const double* fields[kFields] = {nullptr, s.mean, s.m2, s.m3, s.m4, s.l1, s.lo, s.hi, s.active, s.nonfinite};
  for (int64_t c = 0; c < n_cols; ++c) out[c * stride] = s.n;
  const int64_t n_plain = n_cols < kLanes ? n_cols : n_cols / kLanes * kLanes;
  for (int f = 1; f < kFields; ++f) {
    double* const to = out + f * field_stride;
    for (int64_t c = 0; c < n_plain; ++c) to[c * stride] = fields[f][c];
    for (int64_t c = n_plain; c < n_cols; ++c) to[c * stride] = fields[f][c + shared];
  }
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
    if (kPool == kPoolNone && n_cols >= Simd<Real>::kLanes) {
      if constexpr (kPool == kPoolNone) sum_block(x, n_cols, first, last, task, states);
    } else {
      sum_block_buffered<T, kPool>(x, n_cols, first, last, task, states);
    }
    const int64_t index = Walker(r.kept, r.kept_out, 1, outer).offset + column * r.kept_out[inner];
    emit_columns(states, n_cols, task.out + segment * r.n_kept + index, task.field_stride, step);
  }
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
