// Host stand-in for NVIDIA's header of the same name: the part that kernels here use.
#pragma once
#include "simt/half.h"

using __half = simt::Half<simt::Binary16>;
using __half2 = simt::Half2<simt::Binary16>;
using half = __half;
using half2 = __half2;

inline float __half2float(__half value) {
    return value;
}
inline __half __float2half(float value) {
    return value;
}
inline __half __float2half_rn(float value) {
    return value;
}
inline __half __ushort_as_half(unsigned short bits) {
    return simt::bit_cast<__half>(bits);
}
inline unsigned short __half_as_ushort(__half value) {
    return value.bits;
}
inline float2 __half22float2(__half2 value) {
    return {value.x, value.y};
}
inline float __low2float(__half2 value) {
    return value.x;
}
inline float __high2float(__half2 value) {
    return value.y;
}
inline __half __low2half(__half2 value) {
    return value.x;
}
inline __half __high2half(__half2 value) {
    return value.y;
}
inline __half2 __floats2half2_rn(float x, float y) {
    return {x, y};
}
inline __half2 __float22half2_rn(float2 value) {
    return {value.x, value.y};
}
inline __half2 __halves2half2(__half x, __half y) {
    return {x, y};
}
inline __half __hadd(__half a, __half b) {
    return a + b;
}
inline __half __hsub(__half a, __half b) {
    return a - b;
}
inline __half __hmul(__half a, __half b) {
    return a * b;
}
inline __half __hfma(__half a, __half b, __half c) {
    return static_cast<float>(double(a) * double(b) + double(c));
}
inline __half2 __hadd2(__half2 a, __half2 b) {
    return {a.x + b.x, a.y + b.y};
}
inline __half2 __hsub2(__half2 a, __half2 b) {
    return {a.x - b.x, a.y - b.y};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
    return {a.x * b.x, a.y * b.y};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline bool __hisnan(__half a) {
    return isnan(float(a));
}
