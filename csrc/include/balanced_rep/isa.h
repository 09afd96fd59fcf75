// Choice of the instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "balanced_rep/jvp_kernels.h"
#include "balanced_rep/kernels.h"

namespace balanced_rep {

std::vector<std::string> compiled_isas();
std::vector<std::string> usable_isas();  // compiled and supported by this processor, slowest first

// The widest usable one, or what BALANCED_REP_ISA names; throws std::invalid_argument if that cannot be used.
void choose_isa();
void set_isa(const std::string& name);
std::string isa();
const Kernels& kernels();
const JvpKernels& jvp_kernels();

}  // namespace balanced_rep
