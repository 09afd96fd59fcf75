// The multi-tangent kernels, compiled once per instruction set. A stub defines BR_ISA_NAMESPACE and includes this file.
#include "activation_jvp.inl"
#include "attention_amx.inl"
#include "attention_jvp.inl"
#include "group_norm_jvp.inl"
#include "norm_jvp.inl"

namespace balanced_rep {
namespace BR_ISA_NAMESPACE {

#define BR_PAIRS(f) {f<float, float>, f<double, double>, f<Half, Half>, f<BFloat, BFloat>, f<float, BFloat>}

extern const JvpKernels jvp_kernels;
const JvpKernels jvp_kernels = {
    BR_PAIRS(attention_items),
    BR_PAIRS(group_norm_items),
    BR_PAIRS(row_items),
    BR_PAIRS(activation_items),
};

#if defined(BR_AMX) && defined(BR_AVX512)
extern const JvpKernels amx_jvp_kernels;
const JvpKernels amx_jvp_kernels = {
    {attention_items<float, float>, attention_items<double, double>, attention_items<Half, Half>,
     amx_attention_items<BFloat>, amx_attention_items<float>},
    BR_PAIRS(group_norm_items),
    BR_PAIRS(row_items),
    BR_PAIRS(activation_items),
};
#endif

}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
