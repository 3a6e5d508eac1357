// Noise and optimizer update in one pass: the normals live in registers and one kilobyte of stack.
// The clipped sum is read once and left at zero for the next logical step.

SYNTHWARD_INLINE void adam_run(const AdamArgs* a, int64_t at, const float* z, int64_t n) {
  float* param = a->param + at;
  float* grad = a->grad + at;
  float* m = a->m + at;
  float* v = a->v + at;
  const float l2 = a->decoupled ? 0.0f : a->weight_decay;
  const float keep = a->decay_factor;
  const float one_b1 = 1.0f - a->beta1, one_b2 = 1.0f - a->beta2;
  for (int64_t i = 0; i < n; ++i) {
    const float noisy = z ? grad[i] + a->noise_std * z[i] : grad[i];
    const float w = param[i] * keep;
    const float g = noisy * a->grad_scale + l2 * w;
    grad[i] = 0.0f;
    const float mi = m[i] + one_b1 * (g - m[i]);
    const float vi = a->beta2 * v[i] + one_b2 * (g * g);
    m[i] = mi;
    v[i] = vi;
    param[i] = w - a->step_size * (mi / (__builtin_sqrtf(vi) * a->bias2_sqrt_inv + a->eps));
  }
}

static void adam(const NoiseStream* stream, int64_t start, int64_t from, int64_t to, const AdamArgs* args) {
  if (args->noise_std == 0.0f)
    adam_run(args, from, nullptr, to - from);
  else
    for_normals(stream, start, from, to,
                [=](int64_t at, const float* z, int64_t n) { adam_run(args, at, z, n); });
}

SYNTHWARD_INLINE void sgd_run(const SgdArgs* a, int64_t at, const float* z, int64_t n) {
  float* param = a->param + at;
  float* grad = a->grad + at;
  float* buffer = a->momentum_buffer ? a->momentum_buffer + at : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    const float noisy = z ? grad[i] + a->noise_std * z[i] : grad[i];
    float g = noisy * a->grad_scale + a->weight_decay * param[i];
    grad[i] = 0.0f;
    if (buffer) {
      const float b = a->first_step ? g : a->momentum * buffer[i] + (1.0f - a->dampening) * g;
      buffer[i] = b;
      g = a->nesterov ? g + a->momentum * b : b;
    }
    param[i] -= a->lr * g;
  }
}

static void sgd(const NoiseStream* stream, int64_t start, int64_t from, int64_t to, const SgdArgs* args) {
  if (args->noise_std == 0.0f)
    sgd_run(args, from, nullptr, to - from);
  else
    for_normals(stream, start, from, to,
                [=](int64_t at, const float* z, int64_t n) { sgd_run(args, at, z, n); });
}
