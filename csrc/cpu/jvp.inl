// The multi-tangent kernels, compiled once per instruction set. A stub defines BR_ISA_NAMESPACE and includes this file.
#include "activation_jvp.inl"
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

}  // namespace BR_ISA_NAMESPACE
}  // namespace balanced_rep
