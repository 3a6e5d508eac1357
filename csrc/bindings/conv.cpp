#include <array>

#include <pybind11/stl.h>

#include "bindings/dense.h"

namespace synthward {
namespace {

using Floats = Array<float>;
using Longs = Array<int64_t>;
// groups, channels and outputs of a group; then size, kernel, stride, padding, dilation, out of three axes each.
using Numbers = std::array<int64_t, 21>;

ConvShape read_shape(const Numbers& numbers) {
  ConvShape v{};
  v.groups = numbers[0];
  v.channels = numbers[1];
  v.outputs = numbers[2];
  int64_t* const fields[] = {v.size, v.kernel, v.stride, v.padding, v.dilation, v.out};
  for (int f = 0; f < 6; ++f)
    for (int axis = 0; axis < 3; ++axis) fields[f][axis] = numbers[static_cast<size_t>(3 + 3 * f + axis)];
  bool is_sound = v.groups > 0 && v.channels > 0 && v.outputs > 0;
  for (int axis = 0; axis < 3; ++axis)
    is_sound = is_sound && v.size[axis] > 0 && v.kernel[axis] > 0 && v.stride[axis] > 0 && v.dilation[axis] > 0 &&
               v.out[axis] > 0 && v.padding[axis] < (int64_t{1} << 31) && v.padding[axis] > -(int64_t{1} << 31);
  if (!is_sound) refuse("shape", "is not that of a convolution");
  return v;
}

// Elements that a thread adds up over the parts at a time.
constexpr int64_t kColumns = 16384;

int64_t product(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }
int64_t grad_floats(const ConvShape& v) { return v.groups * v.outputs * product(v.kernel) * v.channels; }

void check_rows(const ConvShape& v, const Floats& x, const Floats& g) {
  check_length(x.shape(1), v.groups * v.channels * product(v.size), "images");
  check_length(g.shape(1), v.groups * v.outputs * product(v.out), "output_grads");
  check_length(g.shape(0), x.shape(0), "output_grads");
}

float* written_to(Floats& out, int64_t length, const char* name, const Floats& x, const Floats& g) {
  float* const to = output(out, name, 1);
  check_length(out.shape(0), length, name);
  check_apart(x, out, name);
  check_apart(g, out, name);
  return to;
}

void conv_norms(const Numbers& numbers, const Floats& x, const Floats& g, const Longs& offsets,
                const std::optional<Longs>& order, std::optional<Floats>& out,
                std::optional<Floats>& row_sums, std::optional<Floats>& grads, int threads) {
  const ConvShape v = read_shape(numbers);
  const float *px = input(x, "images", 2), *pg = input(g, "output_grads", 2);
  check_rows(v, x, g);
  const int64_t rows = x.shape(0), units = offsets.shape(0) - 1;
  const int64_t* const at = input(offsets, "offsets", 1);
  if (units < 0 || at[0] != 0 || at[units] != rows) refuse("offsets", "do not run from 0 to the number of rows");
  for (int64_t u = 0; u < units; ++u)
    if (at[u + 1] < at[u]) refuse("offsets", "decrease");
  const int64_t* po = nullptr;
  if (order) {
    po = input(*order, "order", 1);
    check_length(order->shape(0), rows, "order");
    for (int64_t n = 0; n < rows; ++n)
      if (po[n] < 0 || po[n] >= rows) refuse("order", "names a row that is not there");
  }
  if (out.has_value() != row_sums.has_value()) refuse("row_sums", "and out go together");
  float *to = nullptr, *sums = nullptr;
  if (out) {
    to = written_to(*out, units, "out", x, g);
    sums = written_to(*row_sums, units, "row_sums", x, g);
    check_apart(*out, *row_sums, "row_sums");
  }
  float* pm = nullptr;
  if (grads) {
    pm = output(*grads, "grads", 2);
    check_length(grads->shape(0), units, "grads");
    check_length(grads->shape(1), grad_floats(v), "grads");
    check_apart(x, *grads, "grads");
    check_apart(g, *grads, "grads");
  }
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t scratch = table.conv_scratch(&v);
  // Some units a piece: the border of the images is cleared once for each.
  parallel_for(units, std::max<int64_t>(1, units / (8 * std::max(1, threads))), threads,
               [=, &table, &v](int64_t f, int64_t t) {
    table.conv_norms(&v, px, pg, at, po, f, t, to, sums, pm, scratch_of(scratch));
  });
}

void conv_gram_norms(const Numbers& numbers, const Floats& x, const Floats& g, Floats& out, Floats& row_sums,
                     int threads) {
  const ConvShape v = read_shape(numbers);
  const float *px = input(x, "images", 2), *pg = input(g, "output_grads", 2);
  check_rows(v, x, g);
  if (v.stride[0] != 1 || v.stride[1] != 1 || v.stride[2] != 1) refuse("shape", "has a stride");
  if (product(v.kernel) > kMostTaps) refuse("shape", "has too large a kernel");
  const int64_t rows = x.shape(0);
  float *to = written_to(out, rows, "out", x, g), *sums = written_to(row_sums, rows, "row_sums", x, g);
  check_apart(out, row_sums, "row_sums");
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t scratch = table.conv_gram_scratch(&v);
  parallel_for(rows, 1, threads, [=, &table, &v](int64_t f, int64_t t) {
    table.conv_gram_norms(&v, px, pg, f, t, to, sums, scratch_of(scratch));
  });
}

// The rows are cut into parts by the shape alone, never by the number of threads.
void conv_sum(const Numbers& numbers, const Floats& x, const Floats& g, const Floats& weights, Floats& out,
              int threads) {
  const ConvShape v = read_shape(numbers);
  const float *px = input(x, "images", 2), *pg = input(g, "output_grads", 2), *pw = input(weights, "row_weights", 1);
  check_rows(v, x, g);
  const int64_t rows = x.shape(0), numel = grad_floats(v);
  check_length(weights.shape(0), rows, "row_weights");
  float* const to = written_to(out, numel, "out", x, g);
  check_apart(weights, out, "out");
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t scratch = table.conv_scratch(&v);
  const int64_t most = std::max<int64_t>(2, (int64_t{1} << 21) / numel);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({16, most, rows}));
  float* const found = parts_of(parts * numel);
  parallel_for(parts, 1, threads, [=, &table, &v](int64_t f, int64_t t) {
    for (int64_t i = f; i < t; ++i)
      table.conv_sum(&v, px, pg, pw, i * rows / parts, (i + 1) * rows / parts, found + i * numel,
                     scratch_of(scratch));
  });
  parallel_for(numel, kColumns, threads, [=](int64_t f, int64_t t) {
    for (int64_t i = 0; i < parts; ++i)
      for (int64_t j = f; j < t; ++j) to[j] += found[i * numel + j];
  });
}

}  // namespace

void bind_conv(py::module_& m) {
  using py::arg;
  const auto fixed = [](const char* name) { return arg(name).noconvert(); };
  m.def("conv_norms", &conv_norms, arg("shape"), fixed("images"), fixed("output_grads"), fixed("offsets"),
        fixed("order").none(true), fixed("out").none(true), fixed("row_sums").none(true), fixed("grads").none(true),
        arg("threads"));
  m.def("conv_gram_norms", &conv_gram_norms, arg("shape"), fixed("images"), fixed("output_grads"), fixed("out"),
        fixed("row_sums"), arg("threads"));
  m.def("conv_sum", &conv_sum, arg("shape"), fixed("images"), fixed("output_grads"), fixed("row_weights"),
        fixed("out"), arg("threads"));
}

}  // namespace synthward
