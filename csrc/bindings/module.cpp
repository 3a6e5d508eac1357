#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "allocation.h"
#include "bindings/array_view.h"
#include "bindings/dense.h"
#include "bindings/noise.h"
#include "dispatch.h"
#include "parallel.h"

namespace synthward {
namespace {

using Floats = Array<float>;
using Longs = Array<int64_t>;
using MaybeFloats = std::optional<Floats>;
using MaybeLongs = std::optional<Longs>;

// Units, rows or columns of about as many elements.
int64_t grain_of(int64_t elements, int64_t pieces) {
  return pieces < 1 ? 1 : std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements / pieces));
}

struct Units {
  const int64_t* offsets;
  int64_t count;
  int64_t longest;  // rows of the longest
};

Units check_units(const MaybeLongs& offsets, int64_t rows) {
  if (!offsets) return {nullptr, rows, 1};
  const int64_t* at = input(*offsets, "offsets", 1);
  const int64_t entries = offsets->shape(0);
  if (entries < 1 || at[0] != 0 || at[entries - 1] != rows)
    refuse("offsets", "do not run from 0 to the number of rows");
  int64_t longest = 0;
  for (int64_t u = 1; u < entries; ++u) {
    if (at[u] < at[u - 1]) refuse("offsets", "decrease");
    longest = std::max(longest, at[u] - at[u - 1]);
  }
  return {at, entries - 1, longest};
}

// Returns the rows of the longest unit: those beyond kLongestGram are the caller's.
int64_t outer_sq_norms(const Floats& a, const Floats& g, const MaybeLongs& offsets, Floats& out, int threads) {
  const float* pa = input(a, "activations", 2);
  const float* pg = input(g, "output_grads", 2);
  check_length(g.shape(0), a.shape(0), "output_grads");
  const Units units = check_units(offsets, a.shape(0));
  float* po = output(out, "out", 1);
  check_length(out.shape(0), units.count, "out");
  check_apart(a, out, "out");
  check_apart(g, out, "out");
  const int64_t d = a.shape(1), p = g.shape(1), grain = grain_of(a.size() + g.size(), units.count);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(units.count, grain, threads,
               [=, &table](int64_t f, int64_t t) { table.outer_sq_norms(pa, pg, units.offsets, f, t, d, p, po); });
  return units.longest;
}

void diagonal_sq_norms(const Floats& rows, const MaybeFloats& factors, const MaybeLongs& offsets, Floats& out,
                       int threads) {
  const float* pr = input(rows, "rows", 2);
  const float* pf = factors ? input(*factors, "factors", 2) : nullptr;
  if (factors) {
    check_length(factors->shape(0), rows.shape(0), "factors");
    check_length(factors->shape(1), rows.shape(1), "factors");
  }
  const Units units = check_units(offsets, rows.shape(0));
  float* po = output(out, "out", 1);
  check_length(out.shape(0), units.count, "out");
  check_apart(rows, out, "out");
  if (factors) check_apart(*factors, out, "out");
  const int64_t p = rows.shape(1), grain = grain_of(rows.size(), units.count);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(units.count, grain, threads,
               [=, &table](int64_t f, int64_t t) { table.diagonal_sq_norms(pr, pf, units.offsets, f, t, p, po); });
}

void scatter_sq_norms(const Longs& ids, const Floats& g, const MaybeLongs& offsets, Floats& out, int threads) {
  const int64_t* pi = input(ids, "ids", 1);
  const float* pg = input(g, "output_grads", 2);
  check_length(ids.shape(0), g.shape(0), "ids");
  const Units units = check_units(offsets, g.shape(0));
  float* po = output(out, "out", 1);
  check_length(out.shape(0), units.count, "out");
  check_apart(g, out, "out");
  const int64_t p = g.shape(1), grain = grain_of(g.size(), units.count);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(units.count, grain, threads,
               [=, &table](int64_t f, int64_t t) { table.scatter_sq_norms(pi, pg, units.offsets, f, t, p, po); });
}

void scale_rows(const Floats& x, const Floats& weights, Floats& out, int threads) {
  const float* px = input(x, "rows", 2);
  const float* pw = input(weights, "row_weights", 1);
  check_length(weights.shape(0), x.shape(0), "row_weights");
  float* po = output(out, "out", 2);
  check_length(out.shape(0), x.shape(0), "out");
  check_length(out.shape(1), x.shape(1), "out");
  check_apart(x, out, "out");
  check_apart(weights, out, "out");
  const int64_t p = x.shape(1), grain = grain_of(x.size(), x.shape(0));
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(x.shape(0), grain, threads,
               [=, &table](int64_t f, int64_t t) { table.scale_rows(px, pw, f, t, p, po); });
}

void diagonal_weighted_sum(const Floats& rows, const MaybeFloats& factors, const Floats& weights, Floats& out,
                           int threads) {
  const float* pr = input(rows, "rows", 2);
  const float* pf = factors ? input(*factors, "factors", 2) : nullptr;
  if (factors) {
    check_length(factors->shape(0), rows.shape(0), "factors");
    check_length(factors->shape(1), rows.shape(1), "factors");
    check_apart(*factors, out, "out");
  }
  const float* pw = input(weights, "row_weights", 1);
  check_length(weights.shape(0), rows.shape(0), "row_weights");
  float* po = output(out, "out", 1);
  check_length(out.shape(0), rows.shape(1), "out");
  check_apart(rows, out, "out");
  check_apart(weights, out, "out");
  // Columns in runs of whole cache lines.
  const int64_t n = rows.shape(0), p = rows.shape(1), grain = (grain_of(rows.size(), p) + 255) / 256 * 256;
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(p, grain, threads,
               [=, &table](int64_t f, int64_t t) { table.diagonal_weighted_sum(pr, pf, pw, n, p, f, t, po); });
}

void scatter_weighted_sum(const Longs& ids, const Floats& g, const Floats& weights, Floats& out, int threads) {
  const int64_t* pi = input(ids, "ids", 1);
  const float* pg = input(g, "output_grads", 2);
  check_length(g.shape(0), ids.shape(0), "output_grads");
  const float* pw = input(weights, "row_weights", 1);
  check_length(weights.shape(0), ids.shape(0), "row_weights");
  float* po = output(out, "out", 2);
  check_length(out.shape(1), g.shape(1), "out");
  check_apart(g, out, "out");
  check_apart(ids, out, "out");
  check_apart(weights, out, "out");
  const int64_t n = ids.shape(0), p = g.shape(1), grain = (grain_of(g.size(), p) + 15) / 16 * 16;
  for (int64_t r = 0; r < n; ++r)
    if (pi[r] >= out.shape(0)) refuse("ids", "name a row beyond the table");
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(p, grain, threads,
               [=, &table](int64_t f, int64_t t) { table.scatter_weighted_sum(pi, pg, pw, n, p, f, t, po); });
}

Array<uint32_t> chacha20_words(const py::bytes& key, int64_t stream, int64_t step, int64_t start, int64_t count) {
  const NoiseStream noise = make_stream(key, stream, step);
  check_range(start, count);
  Array<uint32_t> out(count);
  uint32_t* po = out.mutable_data();
  {
    py::gil_scoped_release release;
    uint32_t state[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
    std::memcpy(state + 4, noise.key, sizeof noise.key);
    state[12] = state[13] = 0;
    state[14] = static_cast<uint32_t>(noise.nonce);
    state[15] = static_cast<uint32_t>(noise.nonce >> 32);
    uint32_t words[256];
    for (int64_t done = 0; done < count;) {
      const uint64_t word = static_cast<uint64_t>(start + done);
      const uint64_t block = word / 16;
      kernels().chacha_blocks16(state, block, words);
      for (uint64_t at = word - block * 16; at < 256 && done < count; ++at, ++done)
        po[done] = words[(at % 16) * 16 + at / 16];
    }
  }
  return out;
}

// The raw block function over a whole state, for test vectors of other nonce layouts.
Array<uint32_t> chacha20_block(const Array<uint32_t>& state) {
  const uint32_t* ps = input(state, "state", 1);
  check_length(state.shape(0), 16, "state");
  const uint64_t counter = uint64_t{ps[13]} << 32 | ps[12];
  uint32_t words[256];
  kernels().chacha_blocks16(ps, counter, words);
  Array<uint32_t> out(16);
  for (int w = 0; w < 16; ++w) out.mutable_data()[w] = words[w * 16];
  return out;
}

void gaussian_noise(Floats& out, const py::bytes& key, int64_t stream, int64_t step, int64_t start, int threads) {
  const NoiseStream noise = make_stream(key, stream, step);
  float* po = output(out, "out", 1);
  const int64_t n = out.shape(0);
  check_range(start, n);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(n, kGrain, threads,
               [=, &table](int64_t f, int64_t t) { table.gaussian(&noise, start + f, t - f, po + f); });
}

}  // namespace
}  // namespace synthward

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  using namespace synthward;
  using py::arg;
  watch_forks();
  bind_dense(m);
  bind_conv(m);
  bind_normalize(m);
  bind_decode(m);
  bind_discrete(m);
  bind_update(m);
  m.doc() = "synthward's compiled kernels: NumPy views in, nothing converted, the GIL released.";
  m.def("outer_sq_norms", &outer_sq_norms, arg("activations").noconvert(), arg("output_grads").noconvert(),
        arg("offsets").noconvert(), arg("out").noconvert(), arg("threads"));
  m.def("diagonal_sq_norms", &diagonal_sq_norms, arg("rows").noconvert(), arg("factors").noconvert(),
        arg("offsets").noconvert(), arg("out").noconvert(), arg("threads"));
  m.def("scatter_sq_norms", &scatter_sq_norms, arg("ids").noconvert(), arg("output_grads").noconvert(),
        arg("offsets").noconvert(), arg("out").noconvert(), arg("threads"));
  m.def("scale_rows", &scale_rows, arg("rows").noconvert(), arg("row_weights").noconvert(), arg("out").noconvert(),
        arg("threads"));
  m.def("diagonal_weighted_sum", &diagonal_weighted_sum, arg("rows").noconvert(), arg("factors").noconvert(),
        arg("row_weights").noconvert(), arg("out").noconvert(), arg("threads"));
  m.def("scatter_weighted_sum", &scatter_weighted_sum, arg("ids").noconvert(), arg("output_grads").noconvert(),
        arg("row_weights").noconvert(), arg("out").noconvert(), arg("threads"));
  m.def("chacha20_words", &chacha20_words, arg("key"), arg("stream"), arg("step"), arg("start"), arg("count"));
  m.def("chacha20_block", &chacha20_block, arg("state").noconvert());
  m.def("gaussian_noise", &gaussian_noise, arg("out").noconvert(), arg("key"), arg("stream"), arg("step"),
        arg("start"), arg("threads"));
  m.attr("LONGEST_GRAM") = kLongestGram;
  m.def("reuse_freed_blocks", &reuse_freed_blocks, arg("library"));
  m.def("cpu_isa", [] { return std::string(kernels().name); });
  m.def("available_isas", &available_isas);
  m.def("force_isa", &force_isa, arg("name"));
}
