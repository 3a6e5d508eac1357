// Gaussians from cipher words (Box-Muller), 256 at a time.
//
// Element e of a stream lies in group e / 256 at place r = e % 256: block = 16 * group + r % 16 and lane
// r / 16. Lane j < 8 is radius word j with the cosine of angle word 8 + j; lane 8 + j is the sine. So sixteen
// blocks computed side by side write sixteen elements at once and nothing is transposed.
//
// The radius has the resolution of a 64-bit uniform where it matters, in the tail: a word below 2^16
// (once in 65,536) is refined by 32 bits of the extension block of the same counter. With 32 bits alone the
// noise would end at 6.7 standard deviations, which costs delta.

const uint32_t RARE = 65536u;
const uint32_t EXTENSION_BIT = 0x80000000u;  // of state word 15

// Natural logarithm of positive normal x: mantissa in [sqrt(1/2), sqrt(2)), atanh series; within 3 ulp.
SYNTHWARD_INLINE vf logarithm(vf x) {
  vi bits = (vi)x;
  vi exponent = (bits - 0x3f3504f3) >> 23;
  vf m = (vf)(bits - (exponent << 23));
  vf e = to_float(exponent);
  vf s = (m - 1.0f) / (m + 1.0f);
  vf z = s * s;
  vf p = 0.22222222f * z + 0.28571429f;
  p = p * z + 0.4f;
  p = p * z + 0.66666667f;
  p = p * z + 2.0f;
  return e * 1.42860677e-6f + (s * p + e * 0.693145751953125f);
}

// Cosine and sine of 2 pi angle / 2^32: the quadrant by integers, then minimax polynomials on [-pi/4, pi/4].
SYNTHWARD_INLINE void cos_sin(vu angle, vf* cosine, vf* sine) {
  vu quadrant = (angle + 0x20000000u) >> 30;
  vi rest = (vi)(angle - (quadrant << 30));
  vf x = to_float(rest) * 1.4629180792671596e-9f;
  vf z = x * x;
  vf s = -1.9515295891e-4f * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * x + x;
  vf c = 2.443315711809948e-5f * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  vi swap = (vi)((quadrant & 1u) != 0u);
  vi exchanged = swap & ((vi)s ^ (vi)c);
  *cosine = (vf)((vu)((vi)c ^ exchanged) ^ (((quadrant + 1u) & 2u) << 30));
  *sine = (vf)((vu)((vi)s ^ exchanged) ^ ((quadrant & 2u) << 30));
}

// uniforms[j * LANES + l] of the radius words below RARE, with 64 bits.
static __attribute__((noinline)) void refine(const uint32_t* state, uint64_t counter, const uint32_t* words,
                                             float* uniforms) {
  uint32_t extended[16];
  for (int i = 0; i < 16; ++i) extended[i] = state[i];
  extended[15] |= EXTENSION_BIT;
  vu extra[16];
  chacha(extended, counter, extra);
  const uint32_t* low = (const uint32_t*)extra;
  for (int i = 0; i < 8 * LANES; ++i)
    if (words[i] < RARE) {
      double whole = (double)(((uint64_t)words[i] << 32) | low[i]) + 0.5;
      uniforms[i] = (float)(whole * 0x1p-64);
    }
}

// The normals of LANES blocks, out[lane * 16 + block].
SYNTHWARD_INLINE void gaussian_blocks(const uint32_t* state, uint64_t counter, float* out) {
  vu words[16];
  chacha(state, counter, words);
  vf uniforms[8];
  vu smallest = words[0];
  for (int j = 0; j < 8; ++j) {
    uniforms[j] = unsigned_to_float(words[j]) * 0x1p-32f;
    smallest = smaller(words[j], smallest);
  }
  if (__builtin_expect(any_below(smallest, RARE), 0)) {
    vu kept[8];
    vf refined[8];
    for (int j = 0; j < 8; ++j) kept[j] = words[j], refined[j] = uniforms[j];
    refine(state, counter, (const uint32_t*)kept, (float*)refined);
    for (int j = 0; j < 8; ++j) uniforms[j] = refined[j];
  }
  each<8>(SYNTHWARD_BODY(j) {
    // The largest words round to a uniform of exactly 1, and so to a radius of 0.
    vf radius = square_root(-2.0f * logarithm(uniforms[j.value]));
    vf cosine, sine;
    cos_sin(words[8 + j.value], &cosine, &sine);
    store(out + j.value * 16, radius * cosine);
    store(out + (8 + j.value) * 16, radius * sine);
  });
}

// The normals of one group.
SYNTHWARD_INLINE void gaussian_group(const uint32_t* state, uint64_t counter, float* normals) {
  for (int first = 0; first < 16; first += LANES) gaussian_blocks(state, counter + (uint64_t)first, normals + first);
}

// Calls use(index, normals, count) for runs that do not cross a group; index counts from `from`.
template <typename Use>
SYNTHWARD_INLINE void for_normals(const NoiseStream* stream, int64_t start, int64_t from, int64_t to, Use use) {
  uint32_t state[16];
  set_state(stream, state);
  alignas(64) float normals[256];
  for (int64_t at = from; at < to;) {
    const uint64_t element = (uint64_t)start + (uint64_t)at;
    const int64_t place = (int64_t)(element & 255u);
    const int64_t count = 256 - place < to - at ? 256 - place : to - at;
    const uint64_t counter = (element >> 8) * 16;
    gaussian_group(state, counter, normals);
    use(at, (const float*)normals + place, count);
    at += count;
  }
}

static void gaussian(const NoiseStream* stream, int64_t start, int64_t count, float* out) {
  for_normals(stream, start, 0, count, [=](int64_t at, const float* z, int64_t n) {
    __builtin_memcpy(out + at, z, (size_t)n * sizeof(float));
  });
}

SYNTHWARD_INLINE void add_run(float* out, float noise_std, int64_t at, const float* z, int64_t n) {
  float* __restrict target = out + at;
  for (int64_t i = 0; i < n; ++i) target[i] += noise_std * z[i];
}
