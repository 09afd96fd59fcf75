// The tile instructions that attention_amx.inl needs, and the rounding to pairs of bfloat16 that goes with them.
//
// Written in assembly: the intrinsics need compiler flags that would let the compiler use these instructions elsewhere.
#pragma once

#include "simd.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and of float32 its columns
constexpr int64_t kDeep = 32;  // columns of bfloat16

// Every tile has 16 rows of 64 bytes. What the thread had configured comes back in the end.
class TileConfig {
 public:
  TileConfig() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = kTile;
    }
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileConfig() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// Tiles 0 to 3 are sums of two left and two right factors; 4 and 5 hold the left, 6 and 7 the right ones.
template <int kNumber>
BR_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kNumber) : "memory");
}
template <int kNumber>
BR_INLINE void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kNumber) : "memory");
}
BR_INLINE void zero_sums() { asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3"); }
template <bool kBoth>
BR_INLINE void add_products() {
  asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1");
  if (kBoth) asm volatile("tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
}

// Two rows, of 16 queries each, as pairs.
BR_INLINE VecU paired(VecF even, VecF odd) {
  __m512i halves;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"((__m512)even), "v"((__m512)odd));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (VecU)_mm512_permutexvar_epi16(order, halves);
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
