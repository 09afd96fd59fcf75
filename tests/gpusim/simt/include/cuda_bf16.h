// Host stand-in for NVIDIA's header of the same name: the part that kernels here use.
#pragma once
#include "simt/half.h"

using __nv_bfloat16 = simt::Half<simt::Brain16>;
using __nv_bfloat162 = simt::Half2<simt::Brain16>;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 value) {
    return value;
}
inline __nv_bfloat16 __float2bfloat16(float value) {
    return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    return value;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return simt::bit_cast<__nv_bfloat16>(bits);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) {
    return value.bits;
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
    return {value.x, value.y};
}
inline float __low2float(__nv_bfloat162 value) {
    return value.x;
}
inline float __high2float(__nv_bfloat162 value) {
    return value.y;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {x, y};
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return {x, y};
}
inline bool __hisnan(__nv_bfloat16 a) {
    return isnan(float(a));
}
