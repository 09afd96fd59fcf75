#define BR_ISA_NAMESPACE avx2
#include "jvp.inl"
