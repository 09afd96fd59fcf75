// Storage types, and the few operations on float and double that the moments need.
#pragma once

namespace balanced_rep {

using int64 = long long;
using float32 = float;
using float64 = double;
struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<float64> {
  using type = double;
};

__device__ __forceinline__ float widen(float32 value) { return value; }
__device__ __forceinline__ double widen(float64 value) { return value; }
__device__ __forceinline__ float widen(bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const unsigned sign = (value.bits & 0x8000u) << 16, rest = (value.bits & 0x7fffu) << 13;
  const bool finite = rest < 0x0f800000u;
  // The exponent is rebiased by an exact product, which also normalises subnormal numbers.
  const unsigned magnitude = finite ? __float_as_uint(__uint_as_float(rest) * 0x1p112f) : rest | 0x7f800000u;
  return __uint_as_float(sign | magnitude);
#endif
}

// The larger and smaller of two numbers; NaN loses against a number.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ float magnitude(float a) { return fabsf(a); }
__device__ __forceinline__ double magnitude(double a) { return fabs(a); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <class A>
__device__ __forceinline__ A infinity();
template <>
__device__ __forceinline__ float infinity<float>() {
  return __int_as_float(0x7f800000);
}
template <>
__device__ __forceinline__ double infinity<double>() {
  return __longlong_as_double(0x7ff0000000000000ll);
}
__device__ __forceinline__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

// The largest power of two <= magnitude, kept where its inverse is a normal number too, and that inverse.
__device__ __forceinline__ void power_of_two(float magnitude, float& unit, float& scale) {
  const int bits = min(max(__float_as_int(magnitude) & 0x7f800000, 0x00800000), 0x7e800000);
  unit = __int_as_float(bits);
  scale = __int_as_float(0x7f000000 - bits);
}
__device__ __forceinline__ void power_of_two(double magnitude, double& unit, double& scale) {
  const int64 bits =
      min(max(__double_as_longlong(magnitude) & 0x7ff0000000000000ll, 0x0010000000000000ll), 0x7fd0000000000000ll);
  unit = __longlong_as_double(bits);
  scale = __longlong_as_double(0x7fe0000000000000ll - bits);
}

}  // namespace balanced_rep
