// Bindings of the dense products (core/gemm.inl), of convolutions (core/conv.inl), of normalisations (core/normalize.inl)
// and of samplers (core/decode.inl).
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "bindings/array_view.h"
#include "dispatch.h"
#include "parallel.h"

namespace synthward {

// Memory that is kept between calls: fresh memory costs more than what is done with it.
class KeptFloats {
 public:
  float* get(int64_t floats) {
    if (size_ < floats) {
      memory_.reset(new float[static_cast<size_t>(floats) + 16]);
      size_ = floats;
    }
    // From a cache line's begin on.
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + ((64 - at % 64) % 64) / sizeof(float);
  }

 private:
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0;
};

// A thread's own, for what a kernel works in.
inline float* scratch_of(int64_t floats) {
  thread_local KeptFloats memory;
  return memory.get(floats);
}

// The calling thread's, for partial sums that all threads write to.
inline float* parts_of(int64_t floats) {
  thread_local KeptFloats memory;
  return memory.get(floats);
}

void bind_dense(py::module_& m);
void bind_conv(py::module_& m);
void bind_normalize(py::module_& m);
void bind_decode(py::module_& m);

}  // namespace synthward
