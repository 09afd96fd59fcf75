// exp, the logistic function and the normal distribution on vectors, to a few units in the last place of float32.
//
// float32: exp x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2, with the Taylor series of e^r to r^7 (remainder
// 5e-9). float64 goes lane by lane through the C library: no kernel is measured in it.
#pragma once

#include "lanes.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {
namespace {

template <class V, class F>
BR_INLINE V by_lane(V x, F f) {
  V y = x;
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) y[i] = f(x[i]);
  return y;
}

// Below -87.3, where the result is subnormal, zero; above 88.7 infinity; NaN stays.
BR_INLINE VecF exp_of(VecF x) {
  constexpr float kShift = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  const VecI low = bit_cast<VecI>(x < -87.33654f);
  const VecF top = splat(88.72284f);
  const VecF bounded = select(bit_cast<VecI>(x > top), top, x);
  const VecF shifted = bounded * 1.44269504f + kShift;
  const VecF n = shifted - kShift;
  const VecF r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n as 2^(n - 1) 2: n reaches 128.
  const VecI power = (bit_cast<VecI>(shifted) - bit_cast<int32_t>(kShift) + 126) << 23;
  const VecF y = p * bit_cast<VecF>(power) * 2.0f;
  return keep(~low, select(bit_cast<VecI>(x > top), splat(INFINITY), y));
}
BR_INLINE VecD exp_of(VecD x) {
  return by_lane(x, [](double v) { return exp(v); });
}

// sigma(x), and 1 - sigma(x) without cancellation.
template <class V>
BR_INLINE V logistic(V x, V& complement) {
  const V e = exp_of(-x), g = 1 / (1 + e);
  complement = select(x > 0, e * g, 1 - g);  // e may be infinite where x < 0
  return g;
}

// Phi(x) and phi(x), distribution and density of the standard normal. With |x| <= 1, the series of Phi(x) - 1/2; else
// the tail phi(x) t q(t), t = 1 / (1 + |x| / 5), a polynomial fitted to 2e-8 relative.
BR_INLINE void normal_of(VecF x, VecF& distribution, VecF& density) {
  constexpr float kScale = 0.398942280f;  // 1 / sqrt(2 pi)
  const VecF z = x * x;
  const VecF e = exp_of(-0.5f * z);
  density = kScale * e;
  VecF s = splat(1.0f / 175472640);  // (-1)^k / (2^k k! (2 k + 1))
  s = s * z - 1.0f / 9676800;
  s = s * z + 1.0f / 599040;
  s = s * z - 1.0f / 42240;
  s = s * z + 1.0f / 3456;
  s = s * z - 1.0f / 336;
  s = s * z + 1.0f / 40;
  s = s * z - 1.0f / 6;
  s = s * z + 1.0f;
  const VecF near = 0.5f + kScale * x * s;
  const VecF t = 1 / (1 + 0.2f * abs_of(x));
  VecF q = splat(-0.04624262951149f);
  q = q * t + 0.16351586104383f;
  q = q * t - 0.16304777230938f;
  q = q * t + 0.17825485027145f;
  q = q * t - 0.01669946051646f;
  q = q * t + 0.08136551508627f;
  q = q * t + 0.06623560637813f;
  q = q * t + 0.07707130857604f;
  q = q * t + 0.07975741132559f;
  q = q * t + 0.07978930117199f;
  const VecF tail = e * t * q;
  const VecF far = select(bit_cast<VecI>(x < 0), tail, 1 - tail);
  distribution = select(bit_cast<VecI>(z <= 1), near, far);
}
BR_INLINE void normal_of(VecD x, VecD& distribution, VecD& density) {
  distribution = by_lane(x, [](double v) { return 0.5 * erfc(-0.70710678118654752 * v); });
  density = by_lane(x, [](double v) { return 0.39894228040143268 * exp(-0.5 * v * v); });
}

}  // namespace
}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
