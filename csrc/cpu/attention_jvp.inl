// Attention with K tangents in one sweep over the keys, softmax carried along.
//
// Everything is transposed: a vector holds the same channel, or the score with the same key, of neighbouring queries.
// So keys and values are only ever broadcast, from where they are, and no row is summed across lanes. A strip is two
// vectors of queries. For a block of keys j, with s q and s dq as q and dq,
//   S_j = k_j q,  p_j = exp(S_j - top),  h_j = p_j (k_j dq + dk_j q),
//   total = sum p_j,  o = sum v_j p_j,  sum_h = sum h_j,  do = sum v_j h_j + dv_j p_j,
// all of which are scaled down when top grows; in the end y = o / total, dy = (do - sum_h y) / total.
#pragma once

#include "balanced_rep/jvp_kernels.h"
#include "convert.inl"
#include "real_math.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

#if BR_VECTOR_BYTES == 64 || defined(BR_NEON)
constexpr int kTileRows = 12;  // of two vectors each, in 32 registers
#else
constexpr int kTileRows = 6;  // in 16 registers
#endif

template <class Real>
struct Strip {
  static constexpr int kLanes = Simd<Real>::kLanes;
  static constexpr int kWidth = 2 * kLanes;  // queries
  static constexpr int kCount = kQueryBlock / kWidth;
};

template <int kRows>
struct Rows {
  static constexpr int value = kRows;
};

template <int kMost, class F>
BR_INLINE void with_rows(int64_t rows, const F& f, int64_t first) {
  if constexpr (kMost == 1) {
    f(Rows<1>(), first);
  } else {
    if (rows == kMost) return f(Rows<kMost>(), first);
    with_rows<kMost - 1>(rows, f, first);
  }
}

// f(Rows<r>, first) over [0, n) in tiles of nearly the same number of rows.
template <class F>
BR_INLINE void in_tiles(int64_t n, const F& f) {
  const int64_t tiles = (n + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = n * t / tiles;
    with_rows<kTileRows>(n * (t + 1) / tiles - first, f, first);
  }
}

// acc[r] += sum_i a[r row_step + i step] b[i], b a strip per i. One of the steps is 1.
template <bool kUnitStep, int kRows, class Real>
BR_INLINE void accumulate(VecOf<Real> (&acc)[kRows][2], const Real* a, int64_t stride, const Real* b, int64_t n) {
  constexpr int kLanes = Strip<Real>::kLanes;
  for (int64_t i = 0; i < n; ++i, b += 2 * kLanes) {
    const VecOf<Real> b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const VecOf<Real> s = splat(kUnitStep ? a[r * stride + i] : a[i * stride + r]);
      acc[r][0] += s * b0;
      acc[r][1] += s * b1;
    }
  }
}

// Rows of keys or values, or of their tangents, in Real.
template <class Real>
struct Panel {
  const Real* rows;  // null: there are none
  int64_t stride;
};

// rows [first, first + n) of x, where they are if they are of type Real, else converted.
template <class Real, class T>
BR_INLINE Panel<Real> panel(const T* x, int64_t stride, int64_t n, int64_t channels, Real* staged) {
  if (x == nullptr) return {nullptr, 0};
  if constexpr (sizeof(T) == sizeof(Real)) {
    return {x, stride};
  } else {
    for (int64_t j = 0; j < n; ++j) convert_row(x + j * stride, channels, staged + j * channels);
    return {staged, channels};
  }
}

// p (n, strip) = k q.
template <class Real>
BR_NOINLINE void scores(Panel<Real> key, const Real* q, int64_t d, int64_t n, Real* p) {
  constexpr int kLanes = Strip<Real>::kLanes;
  in_tiles(n, [&](auto rows, int64_t j) {
    VecOf<Real> acc[rows.value][2] = {};
    accumulate<true>(acc, key.rows + j * key.stride, key.stride, q, d);
    for (int r = 0; r < rows.value; ++r) {
      store_bytes(p + (j + r) * 2 * kLanes, acc[r][0]);
      store_bytes(p + (j + r) * 2 * kLanes + kLanes, acc[r][1]);
    }
  });
}

// h (n, strip) = p (k dq + dk q), and sum += h.
template <class Real>
BR_NOINLINE void score_tangents(Panel<Real> key, Panel<Real> dkey, const Real* q, const Real* dq, int64_t d, int64_t n,
                                const Real* p, Real* h, Real* sum) {
  constexpr int kLanes = Strip<Real>::kLanes;
  VecOf<Real> sum0 = load(sum), sum1 = load(sum + kLanes);
  in_tiles(n, [&](auto rows, int64_t j) {
    VecOf<Real> acc[rows.value][2] = {};
    if (dq != nullptr) accumulate<true>(acc, key.rows + j * key.stride, key.stride, dq, d);
    if (dkey.rows != nullptr) accumulate<true>(acc, dkey.rows + j * dkey.stride, dkey.stride, q, d);
    for (int r = 0; r < rows.value; ++r) {
      const int64_t at = (j + r) * 2 * kLanes;
      const VecOf<Real> h0 = acc[r][0] * load(p + at), h1 = acc[r][1] * load(p + at + kLanes);
      store_bytes(h + at, h0);
      store_bytes(h + at + kLanes, h1);
      sum0 += h0;
      sum1 += h1;
    }
  });
  store_bytes(sum, sum0);
  store_bytes(sum + kLanes, sum1);
}

// o (c, strip) += v h + dv p; either product may be absent.
template <class Real>
BR_NOINLINE void outputs(Panel<Real> value, const Real* h, Panel<Real> dvalue, const Real* p, int64_t n, int64_t c,
                         Real* o) {
  constexpr int kLanes = Strip<Real>::kLanes;
  in_tiles(c, [&](auto rows, int64_t i) {
    VecOf<Real> acc[rows.value][2];
    Real* const at = o + i * 2 * kLanes;
    for (int r = 0; r < rows.value; ++r) {
      acc[r][0] = load(at + r * 2 * kLanes);
      acc[r][1] = load(at + r * 2 * kLanes + kLanes);
    }
    if (h != nullptr) accumulate<false>(acc, value.rows + i, value.stride, h, n);
    if (dvalue.rows != nullptr) accumulate<false>(acc, dvalue.rows + i, dvalue.stride, p, n);
    for (int r = 0; r < rows.value; ++r) {
      store_bytes(at + r * 2 * kLanes, acc[r][0]);
      store_bytes(at + r * 2 * kLanes + kLanes, acc[r][1]);
    }
  });
}

// Scores to p = exp(S - top), with top and total brought up to date. Returns whether sums so far must be multiplied by
// `shrink`. A query that has seen no key yet has top = -inf: its p is 0, not NaN.
template <class Real>
BR_INLINE bool exponentials(Real* p, int64_t n, Real* top, Real* total, VecOf<Real> (&shrink)[2]) {
  typedef VecOf<Real> V;
  typedef IntVecOf<Real> I;
  constexpr int kLanes = Strip<Real>::kLanes;
  bool grown = false;
  for (int half = 0; half < 2; ++half) {
    Real* const at = p + half * kLanes;
    const V before = load(top + half * kLanes);
    V now = before;
    for (int64_t j = 0; j < n; ++j) now = max_of(load(at + j * 2 * kLanes), now);
    const V base = select(bit_cast<I>(now == splat(-static_cast<Real>(INFINITY))), splat(Real{0}), now);
    shrink[half] = exp_of(before - base);
    V sum = load(total + half * kLanes) * shrink[half];
    for (int64_t j = 0; j < n; ++j) {
      const V e = exp_of(load(at + j * 2 * kLanes) - base);
      store_bytes(at + j * 2 * kLanes, e);
      sum += e;
    }
    store_bytes(total + half * kLanes, sum);
    store_bytes(top + half * kLanes, now);
    grown = grown || any(bit_cast<I>(now > before));
  }
  return grown;
}

template <class Real>
BR_INLINE void multiply(Real* x, int64_t n, const VecOf<Real> (&by)[2]) {
  constexpr int kLanes = Strip<Real>::kLanes;
  for (int64_t i = 0; i < n; ++i) {
    store_bytes(x + i * 2 * kLanes, load(x + i * 2 * kLanes) * by[0]);
    store_bytes(x + i * 2 * kLanes + kLanes, load(x + i * 2 * kLanes + kLanes) * by[1]);
  }
}

// One batch entry, head and block of queries.
template <class T, class U>
struct AttentionItem {
  typedef RealOf<T> Real;
  typedef VecOf<Real> V;
  static constexpr int kWidth = Strip<Real>::kWidth;

  const AttentionTask& t;
  int64_t batch, head, group, query, n_queries;  // queries [query, query + n_queries)
  int64_t n_strips;
  int64_t rows;  // of an output: c, or more
  Real *q, *dq, *o, *d_o, *p, *h, *sum_h, *top, *total, *staged, *rest;

  AttentionItem(const AttentionTask& task, Real* workspace, int64_t output_rows) : t(task), rows(output_rows) {
    rest = workspace;
    q = take(kQueryBlock * t.d);
    dq = take(kQueryBlock * t.k * t.d);
    o = take(kQueryBlock * t.c);
    d_o = take(kQueryBlock * t.k * rows);
    p = take(kQueryBlock * kKeyBlock);
    sum_h = take(kQueryBlock * t.k);
    top = take(kQueryBlock);
    total = take(kQueryBlock);
    h = take(kWidth * kKeyBlock);
    staged = take(kKeyBlock * 2 * (t.d + t.c));
  }
  AttentionItem(const AttentionTask& task, Real* workspace) : AttentionItem(task, workspace, task.c) {}

  Real* take(int64_t n) {
    Real* const at = rest;
    rest += (n + 15) / 16 * 16;  // 64 bytes of float
    return at;
  }

  // Sums of the output of tangent k, (rows, kWidth).
  Real* output(int64_t k, int64_t strip) const { return d_o + (k * kQueryBlock + strip * kWidth) * rows; }

  template <class E>
  static const E* at(const void* base, const int64_t (&stride)[3], int64_t b, int64_t head, int64_t row) {
    return base == nullptr ? nullptr : static_cast<const E*>(base) + b * stride[0] + head * stride[1] + row * stride[2];
  }
  template <class E>
  static const E* at(const void* base, const int64_t (&stride)[4], int64_t k, int64_t b, int64_t head, int64_t row) {
    return base == nullptr
               ? nullptr
               : static_cast<const E*>(base) + k * stride[0] + b * stride[1] + head * stride[2] + row * stride[3];
  }

  // Queries as (strip, d, kWidth), times the scale; zeros behind the last.
  template <class E>
  void pack(const E* from, int64_t stride, Real* to) {
    const Real scale = static_cast<Real>(t.scale);
    for (int64_t s = 0; s < n_strips; ++s, to += kWidth * t.d) {
      const int64_t n = n_queries - s * kWidth < kWidth ? n_queries - s * kWidth : kWidth;
      if (n < kWidth) memset(to, 0, kWidth * t.d * sizeof(Real));
      for (int64_t i = 0; i < n; ++i) {
        const E* const row = from + (s * kWidth + i) * stride;
        for (int64_t j = 0; j < t.d; ++j) to[j * kWidth + i] = static_cast<Real>(to_real(row[j])) * scale;
      }
    }
  }

  void start(int64_t item) {
    start_primal(item);
    if (t.dq != nullptr) {
      for (int64_t k = 0; k < t.k; ++k) {
        pack(at<U>(t.dq, t.dq_stride, k, batch, head, query), t.dq_stride[3], dq + k * kQueryBlock * t.d);
      }
    }
  }

  void start_primal(int64_t item) {
    const int64_t n_blocks = (t.n + kQueryBlock - 1) / kQueryBlock;
    query = item % n_blocks * kQueryBlock;
    head = item / n_blocks % t.h;
    batch = item / n_blocks / t.h;
    group = head / (t.h / t.g);
    n_queries = t.n - query < kQueryBlock ? t.n - query : kQueryBlock;
    n_strips = (n_queries + kWidth - 1) / kWidth;
    pack(at<T>(t.q, t.q_stride, batch, head, query), t.q_stride[2], q);
    memset(o, 0, kQueryBlock * t.c * sizeof(Real));
    memset(d_o, 0, kQueryBlock * t.k * rows * sizeof(Real));
    memset(sum_h, 0, kQueryBlock * t.k * sizeof(Real));
    memset(total, 0, kQueryBlock * sizeof(Real));
    for (int64_t i = 0; i < kQueryBlock; ++i) top[i] = -static_cast<Real>(INFINITY);
  }

  void mask_strip(int64_t strip, int64_t key, int64_t n, Real* scores_of) const {
    const Real hidden = -static_cast<Real>(INFINITY);
    for (int64_t i = 0; i < kWidth && strip * kWidth + i < n_queries; ++i) {
      const int64_t row = query + strip * kWidth + i;
      Real* const s = scores_of + i;
      if (t.mask_kind != kMaskNone) {
        const int64_t offset =
            batch * t.mask_stride[0] + head * t.mask_stride[1] + row * t.mask_stride[2] + key * t.mask_stride[3];
        if (t.mask_kind == kMaskBool) {
          const uint8_t* const m = static_cast<const uint8_t*>(t.mask) + offset;
          for (int64_t j = 0; j < n; ++j) {
            if (m[j * t.mask_stride[3]] == 0) s[j * kWidth] = hidden;
          }
        } else {
          const Real* const m = static_cast<const Real*>(t.mask) + offset;
          for (int64_t j = 0; j < n; ++j) s[j * kWidth] += m[j * t.mask_stride[3]];
        }
      }
      if (t.causal) {
        for (int64_t j = row + 1 > key ? row + 1 - key : 0; j < n; ++j) s[j * kWidth] = hidden;
      }
    }
  }

  void key_block(int64_t key, int64_t n) {
    const T* const value = at<T>(t.value, t.value_stride, batch, group, key);
    const Panel<Real> keys =
        panel<Real>(at<T>(t.key, t.key_stride, batch, group, key), t.key_stride[2], n, t.d, staged);
    const Panel<Real> values = panel<Real>(value, t.value_stride[2], n, t.c, staged + kKeyBlock * t.d);
    key_block_primal(key, n, keys, values);
    Real* const stage = staged + kKeyBlock * (t.d + t.c);
    for (int64_t k = 0; k < t.k; ++k) key_block_tangent(k, key, n, keys, values, stage);
  }

  void key_block_primal(int64_t key, int64_t n, Panel<Real> keys, Panel<Real> values) {
    const bool masked = t.mask_kind != kMaskNone || (t.causal && key + n > query + 1);
    for (int64_t s = 0; s < n_strips; ++s) {
      Real* const ps = p + s * kKeyBlock * kWidth;
      Real* const os = o + s * kWidth * t.c;
      scores(keys, q + s * kWidth * t.d, t.d, n, ps);
      if (masked) mask_strip(s, key, n, ps);
      V shrink[2];
      if (exponentials(ps, n, top + s * kWidth, total + s * kWidth, shrink)) {
        multiply(os, t.c, shrink);
        for (int64_t k = 0; k < t.k; ++k) {
          multiply(output(k, s), t.c, shrink);
          multiply(sum_h + k * kQueryBlock + s * kWidth, 1, shrink);
        }
      }
      outputs<Real>(values, ps, {nullptr, 0}, nullptr, n, t.c, os);
    }
  }

  void key_block_tangent(int64_t k, int64_t key, int64_t n, Panel<Real> keys, Panel<Real> values, Real* stage) {
    const Panel<Real> dkeys =
        panel<Real>(at<U>(t.dkey, t.dkey_stride, k, batch, group, key), t.dkey_stride[3], n, t.d, stage);
    const Panel<Real> dvalues = panel<Real>(at<U>(t.dvalue, t.dvalue_stride, k, batch, group, key), t.dvalue_stride[3],
                                            n, t.c, stage + kKeyBlock * t.d);
    const bool moved = t.dq != nullptr || t.dkey != nullptr;
    for (int64_t s = 0; s < n_strips; ++s) {
      const Real* const ps = p + s * kKeyBlock * kWidth;
      if (moved) {
        score_tangents(keys, dkeys, q + s * kWidth * t.d,
                       t.dq == nullptr ? nullptr : dq + k * kQueryBlock * t.d + s * kWidth * t.d, t.d, n, ps, h,
                       sum_h + k * kQueryBlock + s * kWidth);
      }
      outputs(values, moved ? h : nullptr, dvalues, ps, n, t.c, output(k, s));
    }
  }

  // (c, kWidth) to rows of c.
  template <class E>
  static void unpack(const Real* from, int64_t c, int64_t n, E* to, int64_t stride) {
#ifdef BR_AVX512
    if constexpr (sizeof(Real) == sizeof(float)) {
      for (int64_t i = 0; i < n; i += 16) {
        const int64_t left = n - i < 16 ? n - i : 16;
        for (int64_t j = 0; j < c; j += 16) {
          VecU m[16] = {};
          for (int64_t r = 0; r < 16 && j + r < c; ++r) m[r] = load_bytes<VecU>(from + (j + r) * kWidth + i);
          transpose(m);
          for (int64_t r = 0; r < left; ++r) {
            E* const at = to + (i + r) * stride + j;
            if (j + 16 <= c) {
              store(at, bit_cast<VecF>(m[r]));
            } else {
              Partial{0, static_cast<int>(c - j)}.put(at, bit_cast<VecF>(m[r]));
            }
          }
        }
      }
      return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < c; ++j) to[i * stride + j] = from_real<E>(from[j * kWidth + i]);
    }
  }

  void finish() {
    for (int64_t s = 0; s < n_strips; ++s) {
      const int64_t n = n_queries - s * kWidth < kWidth ? n_queries - s * kWidth : kWidth;
      Real* const os = o + s * kWidth * t.c;
      V by[2];
      for (int half = 0; half < 2; ++half) {
        const V sum = load(total + s * kWidth + half * kWidth / 2);
        by[half] = select(bit_cast<IntVecOf<Real>>(sum == 0), splat(Real{0}), 1 / sum);
      }
      multiply(os, t.c, by);
      const int64_t row = query + s * kWidth;
      unpack(os, t.c, n, const_cast<T*>(at<T>(t.y, t.y_stride, batch, head, row)), t.y_stride[2]);
      for (int64_t k = 0; k < t.k; ++k) {
        Real* const ds = output(k, s);
        const Real* const hs = sum_h + k * kQueryBlock + s * kWidth;
        for (int half = 0; half < 2; ++half) {
          const V sum = load(hs + half * kWidth / 2);
          for (int64_t j = 0; j < t.c; ++j) {
            const int64_t i = j * kWidth + half * kWidth / 2;
            store_bytes(ds + i, (load(ds + i) - sum * load(os + i)) * by[half]);
          }
        }
        unpack(ds, t.c, n, const_cast<U*>(at<U>(t.dy, t.dy_stride, k, batch, head, row)), t.dy_stride[3]);
      }
    }
  }
};

template <class Item>
BR_INLINE void run_attention(const AttentionTask& task, int64_t first_item, int64_t last_item, Item&& item) {
  for (int64_t i = first_item; i < last_item; ++i) {
    item.start(i);
    const int64_t end = task.causal && item.query + item.n_queries < task.m ? item.query + item.n_queries : task.m;
    for (int64_t key = 0; key < end; key += kKeyBlock) {
      item.key_block(key, end - key < kKeyBlock ? end - key : kKeyBlock);
    }
    item.finish();
  }
}

template <class T, class U>
void attention_items(const AttentionTask& task, int64_t first_item, int64_t last_item, void* workspace) {
  run_attention(task, first_item, last_item, AttentionItem<T, U>(task, static_cast<RealOf<T>*>(workspace)));
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
