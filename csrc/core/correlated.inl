// Noise correlated over steps: w = sum_j taps[j] z(step - j) - sum_k weights[k] state[k], then
// state[k] = decays[k] state[k] + gains[k] w. Past normals are drawn again from their own counters, a group at a time,
// so that no sum depends on where a run begins; what the state holds is read and written once, in cache.

// The sum over taps for one group.
SYNTHWARD_INLINE void combine_steps(const NoiseStream* stream, const Correlation* c, uint64_t counter, uint32_t* state,
                                    float* __restrict drawn, float* __restrict w) {
  for (int64_t j = 0; j < c->num_taps; ++j) {
    // The step is the low part of the nonce and is at least j: nothing is borrowed from the stream.
    const uint64_t nonce = stream->nonce - (uint64_t)j;
    state[14] = (uint32_t)nonce;
    state[15] = (uint32_t)(nonce >> 32);
    gaussian_group(state, counter, drawn);
    const float tap = c->taps[j];
    if (j == 0)
      for (int i = 0; i < 256; ++i) w[i] = tap * drawn[i];
    else
      for (int i = 0; i < 256; ++i) w[i] += tap * drawn[i];
  }
}

// A weight of 0 or a decay of 0 reads nothing: what stands in a slot that is not yet used may be anything.
SYNTHWARD_INLINE void pass_state(const Correlation* c, int64_t at, float* __restrict w, int64_t n) {
  for (int64_t k = 0; k < c->num_slots; ++k) {
    const float weight = c->weights[k];
    const float* __restrict slot = c->state + k * c->row_stride + at;
    if (weight != 0.0f)
      for (int64_t i = 0; i < n; ++i) w[i] -= weight * slot[i];
  }
  for (int64_t k = 0; k < c->num_slots; ++k) {
    const float decay = c->decays[k], gain = c->gains[k];
    float* __restrict slot = c->state + k * c->row_stride + at;
    if (decay == 0.0f)
      for (int64_t i = 0; i < n; ++i) slot[i] = gain * w[i];
    else if (decay != 1.0f || gain != 0.0f)
      for (int64_t i = 0; i < n; ++i) slot[i] = decay * slot[i] + gain * w[i];
  }
}

// As for_normals, with correlated normals.
template <typename Use>
SYNTHWARD_INLINE void for_correlated(const NoiseStream* stream, const Correlation* c, int64_t start, int64_t from,
                                     int64_t to, Use use) {
  uint32_t state[16];
  set_state(stream, state);
  alignas(64) float drawn[256];
  alignas(64) float w[256];
  for (int64_t at = from; at < to;) {
    const uint64_t element = (uint64_t)start + (uint64_t)at;
    const int64_t place = (int64_t)(element & 255u);
    const int64_t count = 256 - place < to - at ? 256 - place : to - at;
    combine_steps(stream, c, (element >> 8) * 16, state, drawn, w);
    pass_state(c, at, w + place, count);
    use(at, (const float*)w + place, count);
    at += count;
  }
}

template <typename Use>
SYNTHWARD_INLINE void for_noise(const NoiseStream* stream, const Correlation* correlation, int64_t start, int64_t from,
                                int64_t to, Use use) {
  if (correlation)
    for_correlated(stream, correlation, start, from, to, use);
  else
    for_normals(stream, start, from, to, use);
}

static void add_gaussian(const NoiseStream* stream, const Correlation* correlation, int64_t start, int64_t from,
                         int64_t to, float noise_std, float* out) {
  for_noise(stream, correlation, start, from, to,
            [=](int64_t at, const float* z, int64_t n) { add_run(out, noise_std, at, z, n); });
}
