#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/noise.h"

namespace synthward {
namespace {

using Floats = Array<float>;
using Buffers = std::vector<std::pair<const char*, Floats*>>;
// Rows that may be part of longer ones.
using Rows = py::array_t<float, 0>;
using Coefficients = std::vector<float>;

// The buffers of one update: flat, of one length, and none inside another.
void check_buffers(const Buffers& buffers, int64_t start) {
  const int64_t n = buffers[0].second->shape(0);
  check_range(start, n);
  for (size_t i = 0; i < buffers.size(); ++i) {
    check_length(buffers[i].second->shape(0), n, buffers[i].first);
    for (size_t j = 0; j < i; ++j) check_apart(*buffers[j].second, *buffers[i].second, buffers[i].first);
  }
}

// How a caller gives a correlation; no taps mean none.
struct Recipe {
  const Coefficients &taps, &weights, &decays, &gains;
  std::optional<Rows>& state;
};

float* check_state(Rows& state, int64_t slots, const Buffers& buffers) {
  constexpr int64_t size = sizeof(float);
  const int64_t n = buffers[0].second->shape(0);
  if (state.ndim() != 2) refuse("state", "has " + std::to_string(state.ndim()) + " dimensions, expected 2");
  check_length(state.shape(0), slots, "state");
  if (state.shape(1) != n) refuse("state", "has rows of another length than the parameter");
  if (reinterpret_cast<uintptr_t>(state.data()) % size != 0) refuse("state", "is not aligned to its type");
  if (n > 1 && state.strides(1) != size) refuse("state", "has rows that are not contiguous");
  if (slots > 1 && (state.strides(0) < n * size || state.strides(0) % size != 0))
    refuse("state", "has rows inside one another");
  const char* const first = reinterpret_cast<const char*>(state.data());
  for (const auto& [name, buffer] : buffers) {
    const char* const other = reinterpret_cast<const char*>(buffer->data());
    for (int64_t k = 0; k < slots; ++k) {
      const char* const row = first + k * state.strides(0);
      if (n && row < other + n * size && other < row + n * size) refuse("state", "overlaps another argument");
    }
  }
  return state.mutable_data();
}

// Pointers into the recipe; null if there is no correlation.
const Correlation* check_correlation(const Recipe& recipe, int64_t step, const Buffers& buffers, Correlation* out) {
  const size_t slots = recipe.weights.size();
  if (recipe.decays.size() != slots || recipe.gains.size() != slots)
    refuse("weights", "are not as many as decays and gains");
  if (recipe.state.has_value() != (slots > 0)) refuse("state", "is needed with weights, and only with them");
  if (recipe.taps.empty()) {
    if (slots) refuse("taps", "are empty");
    return nullptr;
  }
  if (static_cast<int64_t>(recipe.taps.size()) > step + 1) refuse("taps", "reach behind step 0");
  *out = {recipe.taps.data(),  recipe.weights.data(), recipe.decays.data(), recipe.gains.data(),
          static_cast<int64_t>(recipe.taps.size()), static_cast<int64_t>(slots), 0, nullptr};
  if (slots) {
    out->state = check_state(*recipe.state, out->num_slots, buffers);
    out->row_stride = slots > 1 ? recipe.state->strides(0) / static_cast<int64_t>(sizeof(float)) : 0;
  }
  return out;
}

void add_gaussian_noise(Floats& tensor, const py::bytes& key, int64_t stream, int64_t step, int64_t start,
                        float noise_std, int threads, const Coefficients& taps, const Coefficients& weights,
                        const Coefficients& decays, const Coefficients& gains, std::optional<Rows>& state) {
  const NoiseStream noise = make_stream(key, stream, step);
  float* po = output(tensor, "tensor", 1);
  const int64_t n = tensor.shape(0);
  check_range(start, n);
  Correlation made{};
  const Correlation* const c =
      check_correlation({taps, weights, decays, gains, state}, step, {{"tensor", &tensor}}, &made);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(n, kGrain, threads, [=, &noise, &table](int64_t f, int64_t t) {
    table.add_gaussian(&noise, c, start, f, t, noise_std, po);
  });
}

void noisy_adam(Floats& param, Floats& grad, Floats& exp_avg, Floats& exp_avg_sq, const py::bytes& key, int64_t stream,
                int64_t step, int64_t start, double noise_std, double grad_scale, double lr, double beta1, double beta2,
                double eps, double weight_decay, bool decoupled, double bias1, double bias2, int threads,
                std::optional<double> bias_variance, double min_second_moment, const Coefficients& taps,
                const Coefficients& weights, const Coefficients& decays, const Coefficients& gains,
                std::optional<Rows>& state) {
  const NoiseStream noise = make_stream(key, stream, step);
  AdamArgs args{};
  args.param = output(param, "param", 1);
  args.grad = output(grad, "summed_grad", 1);
  args.exp_avg = output(exp_avg, "exp_avg", 1);
  args.exp_avg_sq = output(exp_avg_sq, "exp_avg_sq", 1);
  const Buffers buffers{
      {"param", &param}, {"summed_grad", &grad}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}};
  check_buffers(buffers, start);
  Correlation made{};
  const Correlation* const c = check_correlation({taps, weights, decays, gains, state}, step, buffers, &made);
  args.noise_std = static_cast<float>(noise_std);
  args.grad_scale = static_cast<float>(grad_scale);
  args.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  args.beta2 = static_cast<float>(beta2);
  args.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  args.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
  args.keep = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  args.step_size = static_cast<float>(lr / bias1);
  args.bias2_sqrt_inv = static_cast<float>(1.0 / std::sqrt(bias2));
  args.eps = static_cast<float>(eps);
  args.is_corrected = bias_variance.has_value();
  args.bias2_inv = static_cast<float>(1.0 / bias2);
  args.bias_variance = static_cast<float>(bias_variance.value_or(0.0));
  args.min_second_moment = static_cast<float>(min_second_moment);
  const int64_t n = param.shape(0);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(n, kGrain, threads,
               [=, &noise, &args, &table](int64_t f, int64_t t) { table.adam(&noise, c, start, f, t, &args); });
}

void noisy_sgd(Floats& param, Floats& grad, std::optional<Floats>& momentum_buffer, const py::bytes& key,
               int64_t stream, int64_t step, int64_t start, double noise_std, double grad_scale, double lr,
               double momentum, double dampening, bool nesterov, double weight_decay, bool first_step, int threads,
               const Coefficients& taps, const Coefficients& weights, const Coefficients& decays,
               const Coefficients& gains, std::optional<Rows>& state) {
  const NoiseStream noise = make_stream(key, stream, step);
  SgdArgs args{};
  args.param = output(param, "param", 1);
  args.grad = output(grad, "summed_grad", 1);
  Buffers buffers{{"param", &param}, {"summed_grad", &grad}};
  if (momentum_buffer) {
    args.momentum_buffer = output(*momentum_buffer, "momentum_buffer", 1);
    buffers.emplace_back("momentum_buffer", &*momentum_buffer);
  }
  check_buffers(buffers, start);
  Correlation made{};
  const Correlation* const c = check_correlation({taps, weights, decays, gains, state}, step, buffers, &made);
  args.noise_std = static_cast<float>(noise_std);
  args.grad_scale = static_cast<float>(grad_scale);
  args.lr = static_cast<float>(lr);
  args.momentum = static_cast<float>(momentum);
  args.one_minus_dampening = static_cast<float>(1.0 - dampening);
  args.weight_decay = static_cast<float>(weight_decay);
  args.nesterov = nesterov;
  args.first_step = first_step;
  const int64_t n = param.shape(0);
  py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(n, kGrain, threads,
               [=, &noise, &args, &table](int64_t f, int64_t t) { table.sgd(&noise, c, start, f, t, &args); });
}

}  // namespace

void bind_update(py::module_& m) {
  using py::arg;
  const Coefficients none;
  m.def("add_gaussian_noise", &add_gaussian_noise, arg("tensor").noconvert(), arg("key"), arg("stream"), arg("step"),
        arg("start"), arg("noise_std"), arg("threads"), arg("taps") = none, arg("weights") = none,
        arg("decays") = none, arg("gains") = none, arg("state").noconvert() = py::none());
  m.def("noisy_adam", &noisy_adam, arg("param").noconvert(), arg("summed_grad").noconvert(),
        arg("exp_avg").noconvert(), arg("exp_avg_sq").noconvert(), arg("key"), arg("stream"), arg("step"),
        arg("start"), arg("noise_std"), arg("grad_scale"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
        arg("weight_decay"), arg("decoupled"), arg("bias1"), arg("bias2"), arg("threads"),
        arg("bias_variance") = py::none(), arg("min_second_moment") = 0.0, arg("taps") = none, arg("weights") = none,
        arg("decays") = none, arg("gains") = none, arg("state").noconvert() = py::none());
  m.def("noisy_sgd", &noisy_sgd, arg("param").noconvert(), arg("summed_grad").noconvert(),
        arg("momentum_buffer").noconvert(), arg("key"), arg("stream"), arg("step"), arg("start"), arg("noise_std"),
        arg("grad_scale"), arg("lr"), arg("momentum"), arg("dampening"), arg("nesterov"), arg("weight_decay"),
        arg("first_step"), arg("threads"), arg("taps") = none, arg("weights") = none, arg("decays") = none,
        arg("gains") = none, arg("state").noconvert() = py::none());
}

}  // namespace synthward
