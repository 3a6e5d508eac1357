// All kernels of one instruction set. Included once per set, with SYNTHWARD_ISA naming the namespace.
#include <stdint.h>

#include "core/vector.h"
#include "dispatch.h"

namespace synthward {
namespace SYNTHWARD_ISA {

#include "core/chacha.inl"
#include "core/gaussian.inl"
#include "core/norms.inl"
#include "core/update.inl"

extern const KernelTable table;
const KernelTable table = {
    SYNTHWARD_ISA_NAME, chacha_blocks16, gaussian,          add_gaussian,     adam,
    sgd,                outer_sq_norms,  diagonal_sq_norms, scatter_sq_norms, scale_rows,
};

}  // namespace SYNTHWARD_ISA
}  // namespace synthward
