// Checked views of NumPy arrays: type, dimensions, alignment and overlap, with messages that name the argument.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

namespace synthward {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

[[noreturn]] inline void refuse(const std::string& name, const std::string& what) {
  throw py::value_error(name + ": " + what);
}

template <typename T>
void check(const Array<T>& array, const char* name, int dimensions) {
  if (array.ndim() != dimensions)
    refuse(name, "has " + std::to_string(array.ndim()) + " dimensions, expected " + std::to_string(dimensions));
  if (reinterpret_cast<uintptr_t>(array.data()) % sizeof(T) != 0) refuse(name, "is not aligned to its type");
}

inline void check_length(int64_t got, int64_t expected, const char* name) {
  if (got != expected)
    refuse(name, "has length " + std::to_string(got) + ", expected " + std::to_string(expected));
}

template <typename T>
const T* input(const Array<T>& array, const char* name, int dimensions) {
  check(array, name, dimensions);
  return array.data();
}

// mutable_data() raises for a read-only array.
template <typename T>
T* output(Array<T>& array, const char* name, int dimensions) {
  check(array, name, dimensions);
  return array.mutable_data();
}

template <typename T, typename S>
void check_apart(const Array<T>& a, const Array<S>& b, const char* name) {
  const char* a0 = reinterpret_cast<const char*>(a.data());
  const char* b0 = reinterpret_cast<const char*>(b.data());
  if (a.nbytes() && b.nbytes() && a0 < b0 + b.nbytes() && b0 < a0 + a.nbytes())
    refuse(name, "overlaps another argument");
}

}  // namespace synthward
