// What the bindings of noise share: the place in a stream, checked, and how the work is cut.
#pragma once
#include <string>

#include "bindings/array_view.h"
#include "dispatch.h"
#include "parallel.h"

namespace synthward {

// Elements that are worth a thread of their own (a multiple of 256: whole groups of normals).
constexpr int64_t kGrain = 65536;

inline NoiseStream make_stream(const py::bytes& key, int64_t stream, int64_t step) {
  const std::string text = key;
  if (text.size() != 32) refuse("key", "has " + std::to_string(text.size()) + " bytes, expected 32");
  if (stream < 0 || stream >= (1 << 15)) refuse("stream", "is not in [0, 2^15)");
  if (step < 0 || step >= (int64_t{1} << 48)) refuse("step", "is not in [0, 2^48)");
  NoiseStream out{};
  for (int i = 0; i < 8; ++i) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(text.data()) + 4 * i;
    out.key[i] = uint32_t{bytes[0]} | uint32_t{bytes[1]} << 8 | uint32_t{bytes[2]} << 16 | uint32_t{bytes[3]} << 24;
  }
  out.nonce = static_cast<uint64_t>(stream) << 48 | static_cast<uint64_t>(step);
  return out;
}

inline void check_range(int64_t start, int64_t count) {
  if (start < 0) refuse("start", "is negative");
  if (count < 0) refuse("count", "is negative");
  if (start > INT64_MAX - count) refuse("start", "is too large");
}

// Bindings of integer noise (core/discrete.inl).
void bind_discrete(py::module_& m);
// Bindings of added noise and fused updates (core/correlated.inl, core/update.inl).
void bind_update(py::module_& m);

}  // namespace synthward
