#define BR_ISA_NAMESPACE avx512
#include "jvp.inl"
