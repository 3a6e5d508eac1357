// Bindings of the dense products (core/gemm.inl) and of convolutions (core/conv.inl).
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "bindings/array_view.h"
#include "dispatch.h"
#include "parallel.h"

namespace synthward {

// Memory of a thread that is kept between calls: fresh memory costs more than what is done with it.
inline float* scratch_of(int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset(new float[static_cast<size_t>(floats) + 16]);
    size = floats;
  }
  // From a cache line's begin on.
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + ((64 - at % 64) % 64) / sizeof(float);
}

void bind_dense(py::module_& m);
void bind_conv(py::module_& m);

}  // namespace synthward
