// What csrc/cpu/tiles.inl offers, without the instructions: for processors that lack them, and for sanitizers.
#pragma once

#include <cstdlib>

#include "convert.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int64_t kTile = 16, kDeep = 32;

float tiles[8][kTile][kTile];
int configured = 0;

void need(bool right) {
  if (!right) abort();
}

struct TileConfig {
  TileConfig() { ++configured; }
  ~TileConfig() { --configured; }
};

template <int kNumber>
void tile_load(const void* from, int64_t stride_bytes) {
  need(configured == 1);
  for (int64_t r = 0; r < kTile; ++r) memcpy(tiles[kNumber][r], static_cast<const char*>(from) + r * stride_bytes, 64);
}
template <int kNumber>
void tile_store(void* to, int64_t stride_bytes) {
  need(configured == 1);
  for (int64_t r = 0; r < kTile; ++r) memcpy(static_cast<char*>(to) + r * stride_bytes, tiles[kNumber][r], 64);
}

void zero_sums() { memset(tiles, 0, 4 * sizeof(tiles[0])); }

void add_product(int left, int right, int sums) {
  for (int64_t i = 0; i < kTile; ++i) {
    BFloat a[kDeep];
    memcpy(a, tiles[left][i], sizeof(a));
    for (int64_t j = 0; j < kTile; ++j) {
      for (int64_t k = 0; k < kTile; ++k) {
        BFloat b[2];
        memcpy(b, &tiles[right][k][j], sizeof(b));
        tiles[sums][i][j] += to_real(a[2 * k]) * to_real(b[0]) + to_real(a[2 * k + 1]) * to_real(b[1]);
      }
    }
  }
}
template <bool kBoth>
void add_products() {
  for (int i = 0; i < (kBoth ? 4 : 2); ++i) add_product(4 + i / 2, 6 + i % 2, i);
}

VecU paired(VecF even, VecF odd) { return bfloat_bits(even) | bfloat_bits(odd) << 16; }

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
