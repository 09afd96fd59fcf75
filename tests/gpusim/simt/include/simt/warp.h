// Barriers, warp primitives, fences.
#pragma once
#include "simt/runtime.h"

#define __syncthreads() simt::barrier(__FILE__, __LINE__)
#define __syncthreads_count(vote) simt::barrier(__FILE__, __LINE__, (vote))
#define __syncthreads_or(vote) (simt::barrier(__FILE__, __LINE__, (vote)) > 0)
#define __syncthreads_and(vote) (simt::barrier(__FILE__, __LINE__, (vote)) == simt::block->size)

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    simt::exchange(mask, 0, "__syncwarp");
}

// Blocks run one after another, so a fence has nothing to order.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

namespace simt {

template <class T>
uint64_t to_slot(T value) {
    static_assert(sizeof(T) <= 8, "warp primitives move 32 or 64 bits");
    uint64_t slot = 0;
    std::memcpy(&slot, &value, sizeof value);
    return slot;
}

template <class T>
T from_slot(uint64_t slot) {
    T value;
    std::memcpy(&value, &slot, sizeof value);
    return value;
}

// `source` outside the caller's segment of `width` lanes leaves the caller's own value; reading a lane that does not
// take part is undefined in CUDA and an error here.
template <class T>
T shuffle(unsigned mask, T value, int source, int width, const char* what) {
    const uint64_t* slots = exchange(mask, to_slot(value), what);
    int first = lane() / width * width;
    if (source < first || source >= first + width) return value;
    int lanes = std::min(kWarp, block->size - warp_rank() * kWarp);
    if (!(mask >> source & 1) || source >= lanes)
        fail("%s: lane %d reads lane %d, which takes no part (mask %08x)", what, lane(), source, mask);
    return from_slot<T>(slots[source]);
}

inline unsigned members(unsigned mask) {
    int lanes = std::min(kWarp, block->size - warp_rank() * kWarp);
    return lanes == kWarp ? mask : mask & ((1u << lanes) - 1);
}

template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine, const char* what) {
    const uint64_t* slots = exchange(mask, to_slot(value), what);
    unsigned rest = members(mask);
    T total = from_slot<T>(slots[__builtin_ctz(rest)]);
    for (rest &= rest - 1; rest; rest &= rest - 1) total = combine(total, from_slot<T>(slots[__builtin_ctz(rest)]));
    return total;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return simt::shuffle(mask, value, simt::lane() / width * width + source % width, width, "__shfl_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return simt::shuffle(mask, value, simt::lane() - static_cast<int>(delta), width, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return simt::shuffle(mask, value, simt::lane() + static_cast<int>(delta), width, "__shfl_down_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    return simt::shuffle(mask, value, simt::lane() ^ bits, width, "__shfl_xor_sync");
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
    const uint64_t* slots = simt::exchange(mask, vote != 0, "__ballot_sync");
    unsigned result = 0;
    for (unsigned rest = simt::members(mask); rest; rest &= rest - 1)
        result |= static_cast<unsigned>(slots[__builtin_ctz(rest)]) << __builtin_ctz(rest);
    return result;
}
inline int __any_sync(unsigned mask, int vote) {
    return __ballot_sync(mask, vote) != 0;
}
inline int __all_sync(unsigned mask, int vote) {
    return __ballot_sync(mask, vote) == simt::members(mask);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    const uint64_t* slots = simt::exchange(mask, simt::to_slot(value), "__match_any_sync");
    unsigned result = 0;
    for (unsigned rest = simt::members(mask); rest; rest &= rest - 1)
        result |= static_cast<unsigned>(slots[__builtin_ctz(rest)] == simt::to_slot(value)) << __builtin_ctz(rest);
    return result;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
    return simt::reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); }, "__reduce_add_sync");
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
    return simt::reduce(mask, value, [](T a, T b) { return std::min(a, b); }, "__reduce_min_sync");
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
    return simt::reduce(mask, value, [](T a, T b) { return std::max(a, b); }, "__reduce_max_sync");
}
