// Sixteen fixed lanes as compiler vectors: one register on AVX-512, two on AVX2, four on SSE2 and NEON.
#pragma once
#include <stdint.h>

#define SYNTHWARD_INLINE static inline __attribute__((always_inline))

namespace synthward {
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));
}  // namespace synthward
