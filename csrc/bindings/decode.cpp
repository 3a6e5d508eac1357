#include <pybind11/stl.h>

#include "bindings/dense.h"

namespace synthward {
namespace {

using Floats = Array<float>;
using Longs = Array<int64_t>;
using MaybeFloats = std::optional<Floats>;

// Rows that are worth a thread of their own; whole tiles of them.
constexpr int64_t kRows = 256;

void check_matrix(const Floats& array, int64_t rows, int64_t columns, const char* name) {
  check(array, name, 2);
  check_length(array.shape(0), rows, name);
  check_length(array.shape(1), columns, name);
}

void residual_features(const Floats& sums, const Floats& common, const Floats& values, const Floats& value_weights,
                       const Floats& weights, const Floats& biases, const Floats& scales, const Floats& shifts,
                       float eps, Floats& out, int threads) {
  check(sums, "sums", 2);
  check(values, "values", 2);
  const int64_t rows = sums.shape(0), width = sums.shape(1);
  check_length(values.shape(0), rows, "values");
  check_matrix(value_weights, values.shape(1), width, "value_weights");
  check(common, "common", 1);
  check_length(common.shape(0), width, "common");
  check(weights, "weights", 3);
  const int64_t blocks = weights.shape(0);
  for (int axis = 1; axis < 3; ++axis) check_length(weights.shape(axis), width, "weights");
  check_matrix(biases, blocks, width, "biases");
  check_matrix(scales, blocks + 1, width, "scales");
  check_matrix(shifts, blocks + 1, width, "shifts");
  ResidualArgs args{sums.data(), common.data(), values.data(), value_weights.data(), nullptr, width,
                    values.shape(1), blocks, eps, output(out, "out", 2)};
  check_matrix(out, rows, width, "out");
  for (const Floats* in : {&sums, &common, &values, &value_weights, &weights, &biases, &scales, &shifts})
    check_apart(*in, out, "out");
  if (rows == 0 || width == 0) return;
  const float *pw = weights.data(), *pb = biases.data(), *ps = scales.data(), *pt = shifts.data();
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t each = table.residual_panels(width), scratch = table.residual_scratch(width);
  float* const panels = parts_of((blocks + 1) * each);
  for (int64_t b = 0; b <= blocks; ++b) {
    const bool is_last = b == blocks;
    table.residual_pack(is_last ? nullptr : pw + b * width * width, ps + b * width, pt + b * width,
                        is_last ? nullptr : pb + b * width, width, panels + b * each);
  }
  args.panels = panels;
  parallel_for(rows, kRows, threads, [&args, &table, scratch](int64_t f, int64_t t) {
    table.residual_features(&args, f, t, scratch_of(scratch));
  });
}

void draw_tokens(const Floats& features, const Floats& weight, const Floats& bias, const Longs& offsets,
                 const Longs& columns, const Floats& uniforms, Longs& tokens, const MaybeFloats& added,
                 std::optional<Floats>& sums, int threads) {
  check(features, "features", 2);
  check(columns, "columns", 2);
  const int64_t rows = features.shape(0), width = features.shape(1), count = columns.shape(1);
  const int64_t* const at = input(offsets, "offsets", 1);
  const int64_t kinds = offsets.shape(0) - 1;
  if (kinds < 0 || at[0] != 0) refuse("offsets", "do not begin with 0");
  int64_t longest = 0;
  for (int64_t c = 0; c < kinds; ++c) {
    if (at[c + 1] <= at[c]) refuse("offsets", "do not increase");
    longest = std::max(longest, at[c + 1] - at[c]);
  }
  check_matrix(weight, at[kinds], width, "weight");
  check(bias, "bias", 1);
  check_length(bias.shape(0), at[kinds], "bias");
  check_length(columns.shape(0), rows, "columns");
  check_matrix(uniforms, rows, count, "uniforms");
  const int64_t* const pc = columns.data();
  for (int64_t i = 0; i < rows * count; ++i)
    if (pc[i] < 0 || pc[i] >= kinds) refuse("columns", "name a column that is not there");
  DrawArgs args{features.data(), weight.data(), bias.data(), uniforms.data(), nullptr, at, pc, width, count, 0,
                output(tokens, "tokens", 2), nullptr};
  check_length(tokens.shape(0), rows, "tokens");
  check_length(tokens.shape(1), count, "tokens");
  check_apart(columns, tokens, "tokens");
  if (sums && added) {
    args.sums = output(*sums, "sums", 2);
    check_length(sums->shape(0), rows, "sums");
    check_matrix(*added, at[kinds], sums->shape(1), "added");
    for (const Floats* in : {&features, &weight, &bias, &uniforms, &*added}) check_apart(*in, *sums, "sums");
    check_apart(tokens, *sums, "sums");
    args.table = added->data();
    args.table_width = sums->shape(1);
  }
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t scratch = table.draw_scratch(longest);
  parallel_for(rows, kRows, threads, [&args, &table, scratch](int64_t f, int64_t t) {
    table.draw_tokens(&args, f, t, scratch_of(scratch));
  });
}

}  // namespace

void bind_decode(py::module_& m) {
  using py::arg;
  const auto fixed = [](const char* name) { return arg(name).noconvert(); };
  m.def("residual_features", &residual_features, fixed("sums"), fixed("common"), fixed("values"),
        fixed("value_weights"), fixed("weights"), fixed("biases"), fixed("scales"), fixed("shifts"), arg("eps"),
        fixed("out"), arg("threads"));
  m.def("draw_tokens", &draw_tokens, fixed("features"), fixed("weight"), fixed("bias"), fixed("offsets"),
        fixed("columns"), fixed("uniforms"), fixed("tokens"), fixed("added").none(true), fixed("sums").none(true),
        arg("threads"));
}

}  // namespace synthward
