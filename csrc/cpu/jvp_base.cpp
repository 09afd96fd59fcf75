#if defined(__aarch64__)
#define BR_ISA_NAMESPACE neon
#else
#define BR_ISA_NAMESPACE base
#endif
#include "jvp.inl"
