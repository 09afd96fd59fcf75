// Attention whose tangents are bfloat16, by the tile products of AMX: 16 x 16 sums of float32, 32 factors deep.
//
// The primal is computed as in attention_jvp.inl. A tangent takes bfloat16 copies of keys and queries, of values and
// of p and h; what is added up, h among it, is float32. In a product of tiles the left factor lies in rows, and the
// right one in rows of pairs: (channel / 2, query, 2) for the scores, (key / 2, query, 2) for the outputs. Every
// extent is filled up with zeros to whole tiles.
#pragma once

#include "attention_jvp.inl"

#if defined(BR_AMX) && defined(BR_AVX512)

#ifdef BR_TILES  // a test has them in software
#include BR_TILES
#else
#include "tiles.inl"
#endif

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

// The sums, one or two tiles of rows by two, += a b, where a has rows of `a_stride` elements and b is two columns of
// tiles, `b_stride` elements apart, of pairs.
template <bool kBoth>
BR_INLINE void tile_product(const BFloat* a, int64_t a_stride, const BFloat* b, int64_t b_stride, int64_t depth) {
  for (int64_t i = 0; i < depth; i += kDeep, a += kDeep, b += kDeep * kTile) {
    tile_load<4>(a, 2 * a_stride);
    if (kBoth) tile_load<5>(a + kTile * a_stride, 2 * a_stride);
    tile_load<6>(b, 64);
    tile_load<7>(b + b_stride, 64);
    add_products<kBoth>();
  }
}

BR_INLINE int64_t whole_tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile * tile; }

// n rows of x as bfloat16, filled up to (rows, columns).
template <class E>
BR_NOINLINE void stage(const E* x, int64_t stride, int64_t n, int64_t channels, int64_t rows, int64_t columns,
                       BFloat* to) {
  for (int64_t i = 0; i < n; ++i, to += columns) {
    const E* const row = x + i * stride;
    if constexpr (sizeof(E) == sizeof(BFloat)) {
      memcpy(to, row, channels * sizeof(BFloat));
    } else {
      for_vectors<float>(channels, [&](auto at) { at.put(to, at.get(row)); });
    }
    memset(to + channels, 0, (columns - channels) * sizeof(BFloat));
  }
  memset(to, 0, (rows - n) * columns * sizeof(BFloat));
}

// (16, columns) to (columns / 2, 16, 2).
BR_INLINE void pairs_of_columns(const BFloat* x, int64_t columns, BFloat* to) {
  for (int64_t i = 0; i < columns; i += kDeep, x += kDeep, to += kDeep * kTile) {
    VecU m[16];
    for (int r = 0; r < 16; ++r) m[r] = load_bytes<VecU>(x + r * columns);
    transpose(m);
    for (int r = 0; r < 16; ++r) store_bytes(to + r * 2 * kTile, m[r]);
  }
}

// (rows, columns), rows a multiple of 32, to (columns, rows of `stride`).
BR_INLINE void transposed(const BFloat* x, int64_t rows, int64_t columns, BFloat* to, int64_t stride) {
  for (int64_t i = 0; i < rows; i += kDeep) {
    for (int64_t j = 0; j < columns; j += kTile) {
      VecU m[16];
      for (int r = 0; r < 16; ++r) {
        const BFloat* const at = x + (i + 2 * r) * columns + j;
        m[r] = __builtin_convertvector(load_bytes<HalfVec>(at), VecU) |
               __builtin_convertvector(load_bytes<HalfVec>(at + columns), VecU) << 16;
      }
      transpose(m);
      for (int r = 0; r < 16; ++r) store_bytes(to + (j + r) * stride + i, m[r]);
    }
  }
}

template <class T>
struct AmxAttentionItem : AttentionItem<T, BFloat> {
  typedef AttentionItem<T, BFloat> Base;
  static constexpr int64_t kWidth = Base::kWidth, kHalf = kWidth / 2;
  static_assert(kHalf == kTile && kKeyBlock % kDeep == 0, "a strip is two tiles wide");
  using Base::t, Base::batch, Base::head, Base::group, Base::query, Base::n_queries, Base::n_strips, Base::rows;

  int64_t deep_d;                    // d and c, in whole tiles
  BFloat *q, *dq;                    // (strip, 2, deep_d / 2, 16, 2), the latter for every tangent
  BFloat *keys, *dkeys;              // (kKeyBlock, deep_d)
  BFloat *values, *dvalues;          // (rows, kKeyBlock)
  BFloat *p, *h, *rows_of_channels;  // (strip, 2, kKeyBlock / 2, 16, 2), the same of one strip; to be transposed
  float* scores;                     // (32, kWidth)

  AmxAttentionItem(const AttentionTask& task, float* workspace)
      : Base(task, workspace, whole_tiles(task.c, kTile)), deep_d(whole_tiles(task.d, kDeep)) {
    auto take = [&](int64_t n) { return reinterpret_cast<BFloat*>(Base::take((n + 1) / 2)); };
    q = take(kQueryBlock * deep_d);
    dq = take(kQueryBlock * deep_d * t.k);
    keys = take(kKeyBlock * deep_d);
    dkeys = take(kKeyBlock * deep_d);
    values = take(rows * kKeyBlock);
    dvalues = take(rows * kKeyBlock);
    p = take(kQueryBlock * kKeyBlock);
    h = take(kWidth * kKeyBlock);
    rows_of_channels = take(kKeyBlock * (rows > deep_d ? rows : deep_d));
    scores = Base::take(kDeep * kWidth);
  }

  template <class E>
  void pack_queries(const E* from, int64_t stride, BFloat* to) {
    const int64_t filled = n_strips * kWidth;
    stage(from, stride, n_queries, t.d, filled, deep_d, rows_of_channels);
    for (int64_t i = 0; i < filled; i += kTile)
      pairs_of_columns(rows_of_channels + i * deep_d, deep_d, to + i * deep_d);
  }

  // x (n, c) as (rows, keys).
  template <class E>
  void pack_values(const E* from, int64_t stride, int64_t n, int64_t filled, BFloat* to) {
    stage(from, stride, n, t.c, filled, rows, rows_of_channels);
    transposed(rows_of_channels, filled, rows, to, kKeyBlock);
  }

  void start(int64_t item) {
    Base::start_primal(item);
    if (t.dkey != nullptr) {
      pack_queries(Base::template at<T>(t.q, t.q_stride, batch, head, query), t.q_stride[2], q);
    }
    for (int64_t k = 0; k < t.k && t.dq != nullptr; ++k) {
      const BFloat* const from = Base::template at<BFloat>(t.dq, t.dq_stride, k, batch, head, query);
      pack_queries(from, t.dq_stride[3], dq + k * kQueryBlock * deep_d);
    }
  }

  void key_block(int64_t key, int64_t n) {
    const T* const key_rows = Base::template at<T>(t.key, t.key_stride, batch, group, key);
    const T* const value_rows = Base::template at<T>(t.value, t.value_stride, batch, group, key);
    Base::key_block_primal(key, n, panel<float>(key_rows, t.key_stride[2], n, t.d, Base::staged),
                           panel<float>(value_rows, t.value_stride[2], n, t.c, Base::staged + kKeyBlock * t.d));
    const int64_t filled = whole_tiles(n, kDeep);
    if (t.dq != nullptr) stage(key_rows, t.key_stride[2], n, t.d, filled, deep_d, keys);
    if (t.dq != nullptr || t.dkey != nullptr) pack_values(value_rows, t.value_stride[2], n, filled, values);
    for (int64_t s = 0; s < n_strips; ++s) weights(s, n, filled);
    for (int64_t k = 0; k < t.k; ++k) key_block_tangent(k, key, n, filled);
  }

  // p as pairs of keys, if it is needed so, and the other one times the scale.
  void weights(int64_t s, int64_t n, int64_t filled) {
    const float scale = static_cast<float>(t.scale);
    float* const ps = Base::p + s * kKeyBlock * kWidth;
    memset(ps + n * kWidth, 0, (filled - n) * kWidth * sizeof(float));
    for (int64_t j = 0; j < filled; j += 2) {
      for (int64_t side = 0; side < 2; ++side) {
        float* const at = ps + j * kWidth + side * kHalf;
        const VecF even = load(at), odd = load(at + kWidth);
        store_bytes(p + (s * kKeyBlock * 2 + side * kKeyBlock + j) * kTile, paired(even, odd));
        store_bytes(at, even * scale);
        store_bytes(at + kWidth, odd * scale);
      }
    }
  }

  void key_block_tangent(int64_t k, int64_t key, int64_t n, int64_t filled) {
    if (t.dkey != nullptr) {
      const BFloat* const from = Base::template at<BFloat>(t.dkey, t.dkey_stride, k, batch, group, key);
      stage(from, t.dkey_stride[3], n, t.d, filled, deep_d, dkeys);
    }
    if (t.dvalue != nullptr) {
      const BFloat* const from = Base::template at<BFloat>(t.dvalue, t.dvalue_stride, k, batch, group, key);
      pack_values(from, t.dvalue_stride[3], n, filled, dvalues);
    }
    for (int64_t s = 0; s < n_strips; ++s) {
      if (t.dq != nullptr || t.dkey != nullptr) score_tangents(k, s, filled);
      for (int64_t i = 0; i < rows; i += 2 * kTile) {
        if (i + kTile < rows) {
          outputs<true>(i, s, filled, Base::output(k, s) + i * kWidth);
        } else {
          outputs<false>(i, s, filled, Base::output(k, s) + i * kWidth);
        }
      }
    }
  }

  // h = p (k dq + dk q), as pairs of keys, and sum_h += h.
  BR_NOINLINE void score_tangents(int64_t k, int64_t s, int64_t filled) {
    const int64_t strip = s * kWidth * deep_d, half = kHalf * deep_d;
    float* const sums = Base::sum_h + k * kQueryBlock + s * kWidth;
    VecF sum[2] = {load(sums), load(sums + kHalf)};
    for (int64_t j = 0; j < filled; j += kDeep) {
      zero_sums();
      if (t.dq != nullptr) {
        tile_product<true>(keys + j * deep_d, deep_d, dq + k * kQueryBlock * deep_d + strip, half, deep_d);
      }
      if (t.dkey != nullptr) tile_product<true>(dkeys + j * deep_d, deep_d, q + strip, half, deep_d);
      tile_store<0>(scores, 4 * kWidth);
      tile_store<1>(scores + kHalf, 4 * kWidth);
      tile_store<2>(scores + kTile * kWidth, 4 * kWidth);
      tile_store<3>(scores + kTile * kWidth + kHalf, 4 * kWidth);
      const float* const ps = Base::p + (s * kKeyBlock + j) * kWidth;
      for (int64_t i = 0; i < kDeep; i += 2) {
        for (int64_t side = 0; side < 2; ++side) {
          const int64_t at = i * kWidth + side * kHalf;
          const VecF even = load(scores + at) * load(ps + at);
          const VecF odd = load(scores + at + kWidth) * load(ps + at + kWidth);
          const VecU pairs = paired(even, odd);
          // Of what is multiplied with the values: where one key has all the weight, h v - sum_h o nearly cancels.
          sum[side] += bit_cast<VecF>(pairs << 16) + bit_cast<VecF>(pairs & 0xffff0000u);
          store_bytes(h + (side * kKeyBlock + j + i) * kTile, pairs);
        }
      }
    }
    store_bytes(sums, sum[0]);
    store_bytes(sums + kHalf, sum[1]);
  }

  // Sums of one or two tiles of channels += v h + dv p.
  template <bool kBoth>
  BR_INLINE void outputs(int64_t channel, int64_t s, int64_t filled, float* to) {
    constexpr int64_t kStride = 4 * kWidth;
    tile_load<0>(to, kStride);
    tile_load<1>(to + kHalf, kStride);
    if (kBoth) tile_load<2>(to + kTile * kWidth, kStride);
    if (kBoth) tile_load<3>(to + kTile * kWidth + kHalf, kStride);
    const int64_t first = channel * kKeyBlock, side = kKeyBlock * kTile;
    if (t.dq != nullptr || t.dkey != nullptr) tile_product<kBoth>(values + first, kKeyBlock, h, side, filled);
    if (t.dvalue != nullptr) tile_product<kBoth>(dvalues + first, kKeyBlock, p + 2 * s * side, side, filled);
    tile_store<0>(to, kStride);
    tile_store<1>(to + kHalf, kStride);
    if (kBoth) tile_store<2>(to + kTile * kWidth, kStride);
    if (kBoth) tile_store<3>(to + kTile * kWidth + kHalf, kStride);
  }
};

template <class T>
void amx_attention_items(const AttentionTask& task, int64_t first_item, int64_t last_item, void* workspace) {
  const TileConfig config;
  run_attention(task, first_item, last_item, AmxAttentionItem<T>(task, static_cast<float*>(workspace)));
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep

#endif
