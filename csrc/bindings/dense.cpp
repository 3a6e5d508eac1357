#include "bindings/dense.h"

#include <pybind11/stl.h>

namespace synthward {
namespace {

using Floats = Array<float>;
using Longs = Array<int64_t>;
using MaybeFloats = std::optional<Floats>;

struct Segments {
  const int64_t* at;
  int64_t count, longest;
};

Segments check_segments(const Longs& offsets, int64_t rows) {
  const int64_t* at = input(offsets, "offsets", 1);
  const int64_t entries = offsets.shape(0);
  if (entries < 1 || at[0] != 0 || at[entries - 1] != rows)
    refuse("offsets", "do not run from 0 to the number of rows");
  int64_t longest = 0;
  for (int64_t u = 1; u < entries; ++u) {
    if (at[u] < at[u - 1]) refuse("offsets", "decrease");
    longest = std::max(longest, at[u] - at[u - 1]);
  }
  return {at, entries - 1, longest};
}

float* check_output(Floats& out, int64_t length, const char* name, const Floats& a, const Floats& g) {
  float* to = output(out, name, 1);
  check_length(out.shape(0), length, name);
  check_apart(a, out, name);
  check_apart(g, out, name);
  return to;
}

void gram_norms(const Floats& a, const Floats& g, const Longs& offsets, Floats& out, Floats& row_sums, bool with_bias,
                int threads) {
  const float *pa = input(a, "activations", 2), *pg = input(g, "output_grads", 2);
  check_length(g.shape(0), a.shape(0), "output_grads");
  const Segments units = check_segments(offsets, a.shape(0));
  float *po = check_output(out, units.count, "out", a, g), *ps = check_output(row_sums, units.count, "row_sums", a, g);
  check_apart(out, row_sums, "row_sums");
  const int64_t d = a.shape(1), p = g.shape(1);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t scratch = table.gram_scratch(units.longest);
  parallel_for(units.count, 1, threads, [=, &table](int64_t f, int64_t t) {
    table.gram_norms(pa, pg, units.at, f, t, d, p, with_bias, po, ps, scratch_of(scratch));
  });
}

void tile_norms(const Floats& a, const Floats& g, const Longs& offsets, Floats& out, Floats& row_sums,
                std::optional<Floats>& grads, int threads) {
  const float *pa = input(a, "activations", 2), *pg = input(g, "output_grads", 2);
  check_length(g.shape(0), a.shape(0), "output_grads");
  const Segments units = check_segments(offsets, a.shape(0));
  float *po = check_output(out, units.count, "out", a, g), *ps = check_output(row_sums, units.count, "row_sums", a, g);
  check_apart(out, row_sums, "row_sums");
  const int64_t d = a.shape(1), p = g.shape(1);
  float* to = nullptr;
  if (grads) {
    to = output(*grads, "grads", 2);
    check_length(grads->shape(0), units.count, "grads");
    check_length(grads->shape(1), p * d, "grads");
    check_apart(a, *grads, "grads");
    check_apart(g, *grads, "grads");
  }
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t scratch = table.tile_scratch(d, p);
  parallel_for(units.count, 1, threads, [=, &table](int64_t f, int64_t t) {
    table.tile_norms(pa, pg, units.at, f, t, d, p, po, ps, to, scratch_of(scratch));
  });
}

void rank1_norms(const Floats& a, const Floats& g, Floats& out, Floats& row_sums, std::optional<Floats>& bias_out,
                 int threads) {
  const float *pa = input(a, "activations", 2), *pg = input(g, "output_grads", 2);
  check_length(g.shape(0), a.shape(0), "output_grads");
  const int64_t n = a.shape(0), d = a.shape(1), p = g.shape(1);
  float *po = check_output(out, n, "out", a, g), *ps = check_output(row_sums, n, "row_sums", a, g);
  float* pb = bias_out ? check_output(*bias_out, n, "bias_out", a, g) : nullptr;
  check_apart(out, row_sums, "row_sums");
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, d + p));
  parallel_for(n, grain, threads,
               [=, &table](int64_t f, int64_t t) { table.rank1_norms(pa, pg, f, t, d, p, po, ps, pb); });
}

void outer_sum(const Floats& a, const Floats& g, const Floats& weights, Floats& out, MaybeFloats& bias, int threads) {
  const float *pa = input(a, "activations", 2), *pg = input(g, "output_grads", 2);
  const float* pw = input(weights, "row_weights", 1);
  const int64_t n = a.shape(0), d = a.shape(1), p = g.shape(1);
  check_length(g.shape(0), n, "output_grads");
  check_length(weights.shape(0), n, "row_weights");
  float* po = output(out, "out", 2);
  check_length(out.shape(0), p, "out");
  check_length(out.shape(1), d, "out");
  check_apart(a, out, "out");
  check_apart(g, out, "out");
  check_apart(weights, out, "out");
  float* const pb = bias ? output(*bias, "bias", 1) : nullptr;
  if (bias) {
    check_length(bias->shape(0), p, "bias");
    check_apart(a, *bias, "bias");
    check_apart(g, *bias, "bias");
    check_apart(weights, *bias, "bias");
    check_apart(out, *bias, "bias");
  }
  if (n == 0 || p == 0) return;
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  if (d == 0) {
    if (pb) table.diagonal_weighted_sum(pg, nullptr, pw, n, p, 0, p, pb);
    return;
  }
  int64_t pieces = 0, splits = 0, scratch = 0;
  table.outer_sum_layout(n, d, p, &pieces, &splits, &scratch);
  const int64_t each = p * d + p;
  float* const parts = splits > 1 ? parts_of(splits * each) : nullptr;
  parallel_for(pieces, 1, threads, [=, &table](int64_t f, int64_t t) {
    for (int64_t i = f; i < t; ++i) table.outer_sum(pa, pg, pw, n, d, p, i, po, pb, parts, scratch_of(scratch));
  });
  for (int64_t s = 0; s < (splits > 1 ? splits : 0); ++s) {
    const float* const part = parts + s * each;
    for (int64_t i = 0; i < p * d; ++i) po[i] += part[i];
    for (int64_t i = 0; pb && i < p; ++i) pb[i] += part[p * d + i];
  }
}

void product(const Floats& x, const Floats& w, const std::optional<Floats>& bias, bool is_transposed, Floats& out,
             int threads) {
  const float *px = input(x, "x", 2), *pw = input(w, "weight", 2);
  const int64_t n = x.shape(0), k = x.shape(1), q = w.shape(is_transposed ? 0 : 1);
  check_length(w.shape(is_transposed ? 1 : 0), k, "weight");
  float* po = output(out, "out", 2);
  check_length(out.shape(0), n, "out");
  check_length(out.shape(1), q, "out");
  check_apart(x, out, "out");
  check_apart(w, out, "out");
  const float* const pb = bias ? input(*bias, "bias", 1) : nullptr;
  if (bias) {
    check_length(bias->shape(0), q, "bias");
    check_apart(*bias, out, "out");
  }
  if (n == 0 || q == 0) return;
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  int64_t pieces = 0, scratch = 0;
  table.product_layout(n, q, &pieces, &scratch);
  parallel_for(pieces, 1, threads, [=, &table](int64_t f, int64_t t) {
    for (int64_t i = f; i < t; ++i) table.product(px, pw, pb, n, k, q, is_transposed, i, po, scratch_of(scratch));
  });
}

}  // namespace

void bind_dense(py::module_& m) {
  using py::arg;
  const auto fixed = [](const char* name) { return arg(name).noconvert(); };
  m.def("gram_norms", &gram_norms, fixed("activations"), fixed("output_grads"), fixed("offsets"), fixed("out"),
        fixed("row_sums"), arg("with_bias"), arg("threads"));
  m.def("tile_norms", &tile_norms, fixed("activations"), fixed("output_grads"), fixed("offsets"), fixed("out"),
        fixed("row_sums"), fixed("grads").none(true), arg("threads"));
  m.def("rank1_norms", &rank1_norms, fixed("activations"), fixed("output_grads"), fixed("out"), fixed("row_sums"),
        fixed("bias_out").none(true), arg("threads"));
  m.def("outer_sum", &outer_sum, fixed("activations"), fixed("output_grads"), fixed("row_weights"), fixed("out"),
        fixed("bias").none(true), arg("threads"));
  m.def("product", &product, fixed("x"), fixed("weight"), fixed("bias").none(true), arg("is_transposed"), fixed("out"),
        arg("threads"));
}

}  // namespace synthward
