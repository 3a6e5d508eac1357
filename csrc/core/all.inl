// All kernels of one instruction set. Included once per set, with SYNTHWARD_ISA naming the namespace. C
// headers only: see kernel_table.h.
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernel_table.h"

namespace synthward {
namespace SYNTHWARD_ISA {

#include "core/vector.inl"

#include "core/chacha.inl"
#include "core/gaussian.inl"
#include "core/discrete.inl"
#include "core/correlated.inl"
#include "core/norms.inl"
#include "core/gemm.inl"
#include "core/product.inl"
#include "core/conv.inl"
#include "core/decode.inl"
#include "core/normalize.inl"
#include "core/sums.inl"
#include "core/update.inl"

extern const KernelTable table;
const KernelTable table = {
    SYNTHWARD_ISA_NAME, chacha_blocks16,  gaussian,   add_gaussian,          adam, sgd, outer_sq_norms,
    diagonal_sq_norms,  scatter_sq_norms, scale_rows, diagonal_weighted_sum, scatter_weighted_sum,
    gram_scratch,       gram_norms,       tile_scratch, tile_norms, rank1_norms, outer_sum_layout, outer_sum,
    conv_scratch,       conv_norms,       conv_sum,   conv_gram_scratch,     conv_gram_norms,
    layer_norm_scratch, layer_norm_backward, group_norm_backward, product_layout, product,
    wide_normals,       rounded_gaussian, discrete_release, residual_panels, residual_pack, residual_scratch,
    residual_features,  draw_scratch, draw_tokens,
};

}  // namespace SYNTHWARD_ISA
}  // namespace synthward
