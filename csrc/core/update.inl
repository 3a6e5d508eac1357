// Noise and optimizer update in one pass: the normals live in registers and one kilobyte of stack.
// The clipped sum is read once and left at zero for the next logical step.

// With the noise's part taken off the second moment: Tang, Shpilevskiy and Lecuyer 2023, algorithm 1. NaN stays NaN.
SYNTHWARD_INLINE float corrected_root(float v, const AdamArgs& a) {
  const float rest = v * a.bias2_inv - a.bias_variance;
  return __builtin_sqrtf(rest < a.min_second_moment ? a.min_second_moment : rest);
}

template <bool kNoise, bool kCorrected>
SYNTHWARD_INLINE void adam_run(const AdamArgs* args, int64_t at, const float* __restrict z, int64_t n) {
  const AdamArgs a = *args;
  float* __restrict param = a.param + at;
  float* __restrict grad = a.grad + at;
  float* __restrict m = a.exp_avg + at;
  float* __restrict v = a.exp_avg_sq + at;
  for (int64_t i = 0; i < n; ++i) {
    const float noisy = kNoise ? grad[i] + a.noise_std * z[i] : grad[i];
    const float w = param[i] * a.keep;
    const float g = noisy * a.grad_scale + a.l2 * w;
    const float mi = m[i] + a.one_minus_beta1 * (g - m[i]);
    const float vi = a.beta2 * v[i] + a.one_minus_beta2 * (g * g);
    grad[i] = 0.0f;
    m[i] = mi;
    v[i] = vi;
    const float root = kCorrected ? corrected_root(vi, a) : __builtin_sqrtf(vi) * a.bias2_sqrt_inv + a.eps;
    param[i] = w - a.step_size * (mi / root);
  }
}

template <bool kCorrected>
SYNTHWARD_INLINE void adam_range(const NoiseStream* stream, const Correlation* correlation, int64_t start, int64_t from,
                                 int64_t to, const AdamArgs* args) {
  if (args->noise_std == 0.0f)
    adam_run<false, kCorrected>(args, from, nullptr, to - from);
  else
    for_noise(stream, correlation, start, from, to,
              [=](int64_t at, const float* z, int64_t n) { adam_run<true, kCorrected>(args, at, z, n); });
}

static void adam(const NoiseStream* stream, const Correlation* correlation, int64_t start, int64_t from, int64_t to,
                 const AdamArgs* args) {
  if (args->is_corrected)
    adam_range<true>(stream, correlation, start, from, to, args);
  else
    adam_range<false>(stream, correlation, start, from, to, args);
}

template <bool kNoise>
SYNTHWARD_INLINE void sgd_run(const SgdArgs* args, int64_t at, const float* __restrict z, int64_t n) {
  const SgdArgs a = *args;
  float* __restrict param = a.param + at;
  float* __restrict grad = a.grad + at;
  if (!a.momentum_buffer) {
    for (int64_t i = 0; i < n; ++i) {
      const float noisy = kNoise ? grad[i] + a.noise_std * z[i] : grad[i];
      grad[i] = 0.0f;
      param[i] -= a.lr * (noisy * a.grad_scale + a.weight_decay * param[i]);
    }
    return;
  }
  float* __restrict buffer = a.momentum_buffer + at;
  const float from_grad = a.nesterov ? 1.0f : 0.0f, from_buffer = a.nesterov ? a.momentum : 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float noisy = kNoise ? grad[i] + a.noise_std * z[i] : grad[i];
    const float g = noisy * a.grad_scale + a.weight_decay * param[i];
    // The first step seeds the buffer with the gradient itself, whatever the buffer held.
    const float b = a.first_step ? g : a.momentum * buffer[i] + a.one_minus_dampening * g;
    grad[i] = 0.0f;
    buffer[i] = b;
    param[i] -= a.lr * (from_grad * g + from_buffer * b);
  }
}

static void sgd(const NoiseStream* stream, const Correlation* correlation, int64_t start, int64_t from, int64_t to,
                const SgdArgs* args) {
  if (args->noise_std == 0.0f)
    sgd_run<false>(args, from, nullptr, to - from);
  else
    for_noise(stream, correlation, start, from, to,
              [=](int64_t at, const float* z, int64_t n) { sgd_run<true>(args, at, z, n); });
}
