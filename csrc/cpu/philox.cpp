// Philox4x32-10 words and the normals made of them, bit for bit as balanced_rep/ops/philox.py defines them: one
// rounding per written operation, so this file is compiled with -ffp-contract=off.
#include <cmath>
#include <cstring>

#include "balanced_rep/ops.h"
#include "reduction.h"

namespace balanced_rep {
namespace {

struct Block {
  uint32_t w[4];
};

Block philox(uint64_t block, uint64_t item, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(item), c3 = static_cast<uint32_t>(item >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

constexpr float kLog[] = {1.0f,
                          -0.49999988079071045f,
                          0.33333346247673035f,
                          -0.2500157952308655f,
                          0.20000939071178436f,
                          -0.1660836935043335f,
                          0.14199650287628174f,
                          -0.13266031444072723f,
                          0.12806610763072968f,
                          -0.07451186329126358f};
constexpr float kSin[] = {1.5707963705062866f, -0.6459640860557556f, 0.07969257980585098f, -0.004681266378611326f,
                          0.0001582063123350963f};
constexpr float kCos[] = {-1.2337005138397217f, 0.253669410943985f, -0.02086152881383896f, 0.0009067399078048766f};
constexpr float kLn2 = 0.6931471824645996f;
constexpr int32_t kSqrtHalfBits = 0x3F3504F3;

template <int N>
float horner(const float (&coefficients)[N], float x) {
  float value = coefficients[N - 1];
  for (int i = N - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

template <class To, class From>
To bits_as(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ln u of u = (top 24 bits + 1) / 2^24; u = m 2^exponent with m in [sqrt(1/2), sqrt(2)).
float log_uniform(uint32_t word) {
  const float u = static_cast<float>((word >> 8) + 1) * 0x1p-24f;
  const int32_t bits = bits_as<int32_t>(u);
  const int32_t exponent = (bits - kSqrtHalfBits) >> 23;
  const float x = bits_as<float>(bits - exponent * (1 << 23)) - 1.0f;
  return static_cast<float>(exponent) * kLn2 + x * horner(kLog, x);
}

// Two normals from two words by Box and Muller.
void normal_pair(uint32_t first, uint32_t second, float* out) {
  const float radius = std::sqrt(-2.0f * log_uniform(first));
  const int64_t quarter = (static_cast<int64_t>(second) + (int64_t{1} << 29)) >> 30;  // nearest quarter turn
  const float a = static_cast<float>((static_cast<int64_t>(second) - quarter * (int64_t{1} << 30)) >> 6) * 0x1p-24f;
  const float z = a * a, cos = z * horner(kCos, z) + 1.0f, sin = a * horner(kSin, z);
  const float c = quarter & 1 ? sin : cos, s = quarter & 1 ? cos : sin;
  out[0] = radius * ((quarter + 1) & 2 ? -c : c);
  out[1] = radius * (quarter & 2 ? -s : s);
}

// write(block, p, count) stores `count` values of a block at p.
template <class T, class Write>
void fill(const int64_t* items, int64_t n_items, int64_t seed, int64_t n, T* out, int n_threads, Write write) {
  const int64_t n_blocks = (n + 3) / 4, total = n_items * n_blocks;
  in_parallel(total, useful_threads(8 * total, total, n_threads), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t item = i / n_blocks, block = i % n_blocks, left = n - 4 * block;
      write(philox(static_cast<uint64_t>(block), static_cast<uint64_t>(items[item]), static_cast<uint64_t>(seed)),
            out + item * n + 4 * block, left < 4 ? static_cast<int>(left) : 4);
    }
  });
}

}  // namespace

void philox_bits(const int64_t* items, int64_t n_items, int64_t seed, int64_t n, int64_t* out, int n_threads) {
  fill(items, n_items, seed, n, out, n_threads, [](const Block& b, int64_t* p, int count) {
    for (int j = 0; j < count; ++j) p[j] = b.w[j];
  });
}

void philox_normal(const int64_t* items, int64_t n_items, int64_t seed, int64_t n, float* out, int n_threads) {
  fill(items, n_items, seed, n, out, n_threads, [](const Block& b, float* p, int count) {
    float normals[4];
    normal_pair(b.w[0], b.w[1], normals);
    normal_pair(b.w[2], b.w[3], normals + 2);
    for (int j = 0; j < count; ++j) p[j] = normals[j];
  });
}

}  // namespace balanced_rep
