// Atomics. Relaxed, as in CUDA: ThreadSanitizer must not learn an order from them.
#pragma once
#include "simt/runtime.h"

namespace simt {

template <class T, class Update>
T atomic_update(T* address, Update update) {
    maybe_yield();
    T old, fresh;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do {
        fresh = update(old);
    } while (!__atomic_compare_exchange(address, &old, &fresh, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

}  // namespace simt

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T old) { return std::min<T>(old, value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T old) { return std::max<T>(old, value); });
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T old) { return old & value; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T old) { return old | value; });
}
template <class T>
T atomicXor(T* address, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return simt::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
    return simt::atomic_update(address, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}
