// Counter-based randomness: word j of item i is word j % 4 of Philox4x32-10 (Salmon et al., SC 2011) with key `seed`
// and counter (j / 4, i), 64 bits each, low half first. Normals come from Box-Muller on pairs of words.
//
// The same bits as every other backend: each written operation is rounded once (__fmul_rn, __fadd_rn and __fsqrt_rn are
// never contracted to an fma), the polynomials are those of balanced_rep/ops/philox.py.
//
// Device code only: compiles under NVRTC and as host C++.

namespace balanced_rep {

using int64 = long long;

constexpr int kRounds = 10;

struct Words {
  unsigned w[4];
};

__device__ __forceinline__ Words philox(int64 block, int64 item, int64 seed) {
  unsigned c0 = static_cast<unsigned>(block), c1 = static_cast<unsigned>(block >> 32);
  unsigned c2 = static_cast<unsigned>(item), c3 = static_cast<unsigned>(item >> 32);
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const unsigned high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const unsigned high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

template <int kCount>
__device__ __forceinline__ float horner(const float (&coefficients)[kCount], float x) {
  float value = coefficients[kCount - 1];
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) value = __fadd_rn(__fmul_rn(value, x), coefficients[i]);
  return value;
}

// ln u of u = (top 24 bits + 1) / 2^24 = m 2^e with m in [sqrt(1/2), sqrt(2))
__device__ __forceinline__ float log_uniform(unsigned word) {
  const float kLog[] = {1.0f,
                        -0.49999988079071045f,
                        0.33333346247673035f,
                        -0.2500157952308655f,
                        0.20000939071178436f,
                        -0.1660836935043335f,
                        0.14199650287628174f,
                        -0.13266031444072723f,
                        0.12806610763072968f,
                        -0.07451186329126358f};
  const int bits = __float_as_int(__fmul_rn(__uint2float_rn((word >> 8) + 1u), 0x1p-24f));
  const int exponent = (bits - 0x3F3504F3) >> 23;
  const float x = __fadd_rn(__int_as_float(bits - exponent * (1 << 23)), -1.0f);
  return __fadd_rn(__fmul_rn(__int2float_rn(exponent), 0.6931471824645996f), __fmul_rn(x, horner(kLog, x)));
}

// Cosine and sine of 2 pi word / 2^32: the nearest quarter turn, and a rest of 24 bits within half a quarter.
__device__ __forceinline__ void cos_sin_turn(unsigned word, float& cosine, float& sine) {
  const float kSin[] = {1.5707963705062866f, -0.6459640860557556f, 0.07969257980585098f, -0.004681266378611326f,
                        0.0001582063123350963f};
  const float kCos[] = {-1.2337005138397217f, 0.253669410943985f, -0.02086152881383896f, 0.0009067399078048766f};
  const unsigned quarter = (word + 0x20000000u) >> 30;
  const float a = __fmul_rn(__int2float_rn(static_cast<int>(word - (quarter << 30)) >> 6), 0x1p-24f);
  const float z = __fmul_rn(a, a);
  const float c = __fadd_rn(__fmul_rn(z, horner(kCos, z)), 1.0f), s = __fmul_rn(a, horner(kSin, z));
  const float first = quarter & 1 ? s : c, second = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -first : first;
  sine = quarter & 2 ? -second : second;
}

// Of this thread: which item, and which block of four words of it.
struct Place {
  int64 index, item, block;
  bool inside;  // false beyond the last item
  __device__ __forceinline__ Place(const int64* items, int64 n_items, int64 stride, int64 n) {
    const int64 thread = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x, blocks = (n + 3) / 4;
    index = thread / blocks;
    block = thread - index * blocks;
    inside = index < n_items;
    item = inside ? items[index * stride] : 0;
  }
};

constexpr unsigned kAllLanes = 0xffffffffu;

// Stores the four words of every lane. The lanes exchange them first, so that neighbouring lanes store neighbouring
// words: the 32 of a round lie side by side wherever rows begin, but for the ends of rows. All lanes of a warp must
// come.
template <class T, class W>
__device__ __forceinline__ void store_exchanged(T* out, const Place& at, int64 n, const W (&word)[4]) {
  const int64 first = at.index * n + at.block * 4;
  const int count = at.inside ? static_cast<int>(min(n - at.block * 4, 4LL)) : 0;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int round = 0; round < 4; ++round) {
    const int source = 8 * round + lane / 4;
    const int64 target = __shfl_sync(kAllLanes, first, source) + lane % 4;
    const bool exists = lane % 4 < __shfl_sync(kAllLanes, count, source);
    W value = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const W other = __shfl_sync(kAllLanes, word[j], source);
      if (lane % 4 == j) value = other;
    }
    if (exists) out[target] = value;
  }
}

// Uniform 32-bit words.
extern "C" __global__ void __launch_bounds__(256) philox_bits(const int64* items,  // (n_items,), given stride
                                                              int64* out,          // (n_items, n), contiguous
                                                              int64 n_items, int64 stride, int64 seed, int64 n) {
  const Place at(items, n_items, stride, n);
  const Words words = philox(at.block, at.item, seed);
  store_exchanged(out, at, n, words.w);
}

// Standard normal numbers.
extern "C" __global__ void __launch_bounds__(256)
    philox_normal(const int64* items,  // (n_items,), given stride
                  float* out,          // (n_items, n), contiguous, on a 16-byte boundary
                  int64 n_items, int64 stride, int64 seed, int64 n) {
  const Place at(items, n_items, stride, n);
  const Words words = philox(at.block, at.item, seed);
  float value[4];
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const float radius = __fsqrt_rn(__fmul_rn(-2.0f, log_uniform(words.w[j])));
    float cosine, sine;
    cos_sin_turn(words.w[j + 1], cosine, sine);
    value[j] = __fmul_rn(radius, cosine);
    value[j + 1] = __fmul_rn(radius, sine);
  }
  if (n % 4 == 0) {  // rows begin at multiples of 16 bytes; of a plain store the compiler makes four
    const int64 first = at.index * n + at.block * 4;
    if (at.inside) __stcg(reinterpret_cast<float4*>(out + first), make_float4(value[0], value[1], value[2], value[3]));
  } else {
    store_exchanged(out, at, n, value);
  }
}

}  // namespace balanced_rep
