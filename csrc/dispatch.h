// The choice of the kernel table: the best that build and processor share, or the one a test forces.
#pragma once
#include <string>
#include <vector>

#include "kernel_table.h"

namespace synthward {

const KernelTable& kernels();
std::vector<std::string> available_isas();
// Empty name: back to the best. False when the processor or the build does not have it.
bool force_isa(const std::string& name);

}  // namespace synthward
