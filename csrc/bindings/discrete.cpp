#include <utility>

#include "bindings/noise.h"

namespace synthward {
namespace {

using Doubles = Array<double>;
using Words = Array<uint64_t>;

std::pair<Doubles, Doubles> wide_normals(const Words& radius, const Words& angle) {
  const uint64_t *pr = input(radius, "radius", 1), *pa = input(angle, "angle", 1);
  const int64_t n = radius.shape(0);
  check_length(angle.shape(0), n, "angle");
  if (n % 8 != 0) refuse("radius", "has a length that is no multiple of 8");
  Doubles cosines(n), sines(n);
  kernels().wide_normals(pr, pa, n, cosines.mutable_data(), sines.mutable_data());
  return {cosines, sines};
}

void rounded_gaussian(Array<int64_t>& out, const py::bytes& key, int64_t stream, int64_t step, int64_t start,
                      double scale, int threads) {
  const NoiseStream noise = make_stream(key, stream, step);
  int64_t* po = output(out, "out", 1);
  const int64_t n = out.shape(0);
  check_range(start, n);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(n, kGrain, threads, [=, &noise, &table](int64_t f, int64_t t) {
    table.rounded_gaussian(&noise, start + f, t - f, scale, po + f);
  });
}

void discrete_release(Doubles& sums, Array<float>& out, const py::bytes& key, int64_t stream, int64_t step,
                      int64_t start, double grid, double noise_std, int threads) {
  const NoiseStream noise = make_stream(key, stream, step);
  ReleaseArgs args{};
  args.sums = output(sums, "sums", 1);
  args.out = output(out, "out", 1);
  const int64_t n = sums.shape(0);
  check_length(out.shape(0), n, "out");
  check_apart(sums, out, "out");
  check_range(start, n);
  args.grid = grid;
  args.per_grid = 1.0 / grid;
  args.scale = noise_std / grid;
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(n, kGrain, threads, [=, &noise, &args, &table](int64_t f, int64_t t) {
    table.discrete_release(&noise, start, f, t, &args);
  });
}

}  // namespace

void bind_discrete(py::module_& m) {
  using py::arg;
  m.def("wide_normals", &wide_normals, arg("radius").noconvert(), arg("angle").noconvert());
  m.def("rounded_gaussian", &rounded_gaussian, arg("out").noconvert(), arg("key"), arg("stream"), arg("step"),
        arg("start"), arg("scale"), arg("threads"));
  m.def("discrete_release", &discrete_release, arg("sums").noconvert(), arg("out").noconvert(), arg("key"),
        arg("stream"), arg("step"), arg("start"), arg("grid"), arg("noise_std"), arg("threads"));
}

}  // namespace synthward
