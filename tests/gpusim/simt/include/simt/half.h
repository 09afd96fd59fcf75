// One template for the two 16-bit formats: stored as bits, computed in float, one rounding per operation.
#pragma once
#include "simt/math.h"

namespace simt {

struct Binary16 {
    static float widen(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }
    static uint16_t round(float value) { return bit_cast<uint16_t>(static_cast<_Float16>(value)); }
};

struct Brain16 {
    static float widen(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
    static uint16_t round(float value) {
        if (value != value) return 0x7fff;
        uint32_t bits = bit_cast<uint32_t>(value);
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

template <class Format>
struct alignas(2) Half {
    uint16_t bits;
    Half() = default;
    Half(float value) : bits(Format::round(value)) {}
    Half(double value) : bits(Format::round(static_cast<float>(value))) {}
    Half(int value) : bits(Format::round(static_cast<float>(value))) {}
    operator float() const { return Format::widen(bits); }
    Half& operator+=(Half other) { return *this = Half(float(*this) + float(other)); }
    Half& operator*=(Half other) { return *this = Half(float(*this) * float(other)); }
    friend Half operator+(Half a, Half b) { return float(a) + float(b); }
    friend Half operator-(Half a, Half b) { return float(a) - float(b); }
    friend Half operator*(Half a, Half b) { return float(a) * float(b); }
    friend Half operator/(Half a, Half b) { return float(a) / float(b); }
    friend Half operator-(Half a) { return -float(a); }
    friend bool operator<(Half a, Half b) { return float(a) < float(b); }
    friend bool operator>(Half a, Half b) { return float(a) > float(b); }
    friend bool operator==(Half a, Half b) { return float(a) == float(b); }
};

template <class Format>
struct alignas(4) Half2 {
    Half<Format> x, y;
};

}  // namespace simt
