#include <pybind11/stl.h>

#include "bindings/dense.h"

namespace synthward {
namespace {

using Floats = Array<float>;
using Longs = Array<int64_t>;
using MaybeFloats = std::optional<Floats>;

const float* maybe_input(const MaybeFloats& array, int64_t length, const char* name) {
  if (!array) return nullptr;
  const float* const from = input(*array, name, 1);
  check_length(array->shape(0), length, name);
  return from;
}

float* maybe_output(MaybeFloats& array, int64_t rows, int64_t columns, const char* name, const Floats& x,
                    const Floats& g) {
  if (!array) return nullptr;
  float* const to = output(*array, name, 2);
  check_length(array->shape(0), rows, name);
  check_length(array->shape(1), columns, name);
  check_apart(x, *array, name);
  check_apart(g, *array, name);
  return to;
}

void layer_norm_backward(const Floats& x, const Floats& g, const MaybeFloats& mean, const Floats& rstd,
                         const MaybeFloats& weight, const std::optional<Longs>& offsets,
                         const std::optional<Longs>& order, MaybeFloats& dx, MaybeFloats& scale, MaybeFloats& bias,
                         int threads) {
  const float *px = input(x, "x", 2), *pg = input(g, "output_grads", 2);
  const int64_t rows = x.shape(0), width = x.shape(1);
  check_length(g.shape(0), rows, "output_grads");
  check_length(g.shape(1), width, "output_grads");
  const float* const pr = input(rstd, "rstd", 1);
  check_length(rstd.shape(0), rows, "rstd");
  const float *const pm = maybe_input(mean, rows, "mean"), *const pw = maybe_input(weight, width, "weight");
  const int64_t units = offsets ? offsets->shape(0) - 1 : rows;
  const int64_t* const at = offsets ? input(*offsets, "offsets", 1) : nullptr;
  if (at) {
    if (units < 0 || at[0] != 0 || at[units] != rows) refuse("offsets", "do not run from 0 to the number of rows");
    for (int64_t u = 0; u < units; ++u)
      if (at[u + 1] < at[u]) refuse("offsets", "decrease");
  }
  const int64_t* const po = order ? input(*order, "order", 1) : nullptr;
  if (po) {
    check_length(order->shape(0), rows, "order");
    for (int64_t n = 0; n < rows; ++n)
      if (po[n] < 0 || po[n] >= rows) refuse("order", "is out of range");
  }
  float* const to_x = maybe_output(dx, rows, width, "dx", x, g);
  float* const to_scale = maybe_output(scale, units, width, "scale", x, g);
  float* const to_bias = maybe_output(bias, units, width, "bias", x, g);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t scratch = table.layer_norm_scratch(width);
  // Pieces of some ten thousand elements: enough to spread, long enough to be worth a thread's attention.
  const int64_t chunk = units > 0 ? std::max<int64_t>(1, 16384 / std::max<int64_t>(1, rows / units * width)) : 1;
  parallel_for(units, chunk, threads, [=, &table](int64_t f, int64_t t) {
    table.layer_norm_backward(px, pg, pm, pr, pw, at, po, f, t, width, to_x, to_scale, to_bias, scratch_of(scratch));
  });
}

void group_norm_backward(const Floats& x, const Floats& g, const Floats& mean, const Floats& rstd,
                         const MaybeFloats& weight, MaybeFloats& dx, Floats& scale, Floats& bias, int threads) {
  const float *px = input(x, "x", 3), *pg = input(g, "output_grads", 3);
  const float *const pm = input(mean, "mean", 2), *const pr = input(rstd, "rstd", 2);
  const int64_t rows = x.shape(0), channels = x.shape(1), length = x.shape(2), groups = mean.shape(1);
  for (int axis = 0; axis < 3; ++axis) check_length(g.shape(axis), x.shape(axis), "output_grads");
  check_length(mean.shape(0), rows, "mean");
  check_length(rstd.shape(0), rows, "rstd");
  check_length(rstd.shape(1), groups, "rstd");
  if (groups < 1 || channels % groups) refuse("mean", "has a number of groups that does not divide the channels");
  const float* const pw = maybe_input(weight, channels, "weight");
  float* to_x = nullptr;
  if (dx) {
    to_x = output(*dx, "dx", 3);
    for (int axis = 0; axis < 3; ++axis) check_length(dx->shape(axis), x.shape(axis), "dx");
    check_apart(x, *dx, "dx");
    check_apart(g, *dx, "dx");
  }
  float *const to_scale = output(scale, "scale", 2), *const to_bias = output(bias, "bias", 2);
  for (const Floats* out : {&scale, &bias}) {
    check_length(out->shape(0), rows, "scale and bias");
    check_length(out->shape(1), channels, "scale and bias");
    check_apart(x, *out, "scale and bias");
    check_apart(g, *out, "scale and bias");
  }
  check_apart(scale, bias, "bias");
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t each = channels / groups, chunk = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, each * length));
  parallel_for(rows * groups, chunk, threads, [=, &table](int64_t f, int64_t t) {
    table.group_norm_backward(px, pg, pm, pr, pw, f, t, groups, each, length, to_x, to_scale, to_bias);
  });
}

}  // namespace

void bind_normalize(py::module_& m) {
  using py::arg;
  const auto fixed = [](const char* name) { return arg(name).noconvert(); };
  m.def("layer_norm_backward", &layer_norm_backward, fixed("x"), fixed("output_grads"), fixed("mean").none(true),
        fixed("rstd"), fixed("weight").none(true), fixed("offsets").none(true), fixed("order").none(true),
        fixed("dx").none(true), fixed("scale").none(true), fixed("bias").none(true), arg("threads"));
  m.def("group_norm_backward", &group_norm_backward, fixed("x"), fixed("output_grads"), fixed("mean"), fixed("rstd"),
        fixed("weight").none(true), fixed("dx").none(true), fixed("scale"), fixed("bias"), arg("threads"));
}

}  // namespace synthward
