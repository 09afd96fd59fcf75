// The multi-tangent kernels, compiled once per instruction set. A stub defines BR_ISA_NAMESPACE and includes this file.
#include "activation_jvp.inl"
#include "attention_amx.inl"
#include "attention_jvp.inl"
#include "group_norm_jvp.inl"
#include "norm_jvp.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {

#define BR_PAIRS(f) {f<float, float>, f<double, double>, f<Half, Half>, f<BFloat, BFloat>, f<float, BFloat>}

namespace {

constexpr JvpKernels kVectors = {
    BR_PAIRS(attention_items),
    BR_PAIRS(group_norm_items),
    BR_PAIRS(row_items),
    BR_PAIRS(activation_items),
};

#if defined(BR_AMX) && defined(BR_AVX512)
constexpr JvpKernels with_tiles(JvpKernels kernels) {
  kernels.attention[kPairBF16] = amx_attention_items<BFloat>;
  kernels.attention[kPairF32BF16] = amx_attention_items<float>;
  return kernels;
}
#endif

}  // namespace

extern const JvpKernels jvp_kernels;
const JvpKernels jvp_kernels = kVectors;

#if defined(BR_AMX) && defined(BR_AVX512)
extern const JvpKernels amx_jvp_kernels;
const JvpKernels amx_jvp_kernels = with_tiles(kVectors);
#endif

}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
