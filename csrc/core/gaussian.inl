// Gaussians from cipher words (Box-Muller), 256 at a time.
//
// Element e of a stream lies in group e / 256 at place r = e % 256: block = 16 * group + r % 16 and lane
// r / 16. Lane j < 8 is radius word j with the cosine of angle word 8 + j; lane 8 + j is the sine. So sixteen
// blocks computed side by side write sixteen elements at once and nothing is transposed.
//
// The radius has the resolution of a 64-bit uniform where it matters, in the tail: a word below 2^16
// (once in 65,536) is refined by 32 bits of the extension block of the same counter. With 32 bits alone the
// noise would end at 6.7 standard deviations, which costs delta.

const uint64_t EXTENSION_BIT = 1ull << 63;

SYNTHWARD_INLINE f32x16 to_float(i32x16 x) { return __builtin_convertvector(x, f32x16); }

// Natural logarithm of positive normal x: mantissa in [sqrt(1/2), sqrt(2)), atanh series; within 2 ulp.
SYNTHWARD_INLINE f32x16 log_lanes(f32x16 x) {
  i32x16 bits = (i32x16)x;
  i32x16 exponent = (bits - 0x3f3504f3) >> 23;
  f32x16 m = (f32x16)(bits - (exponent << 23));
  f32x16 e = to_float(exponent);
  f32x16 s = (m - 1.0f) / (m + 1.0f);
  f32x16 z = s * s;
  f32x16 p = 0.22222222f * z + 0.28571429f;
  p = p * z + 0.4f;
  p = p * z + 0.66666667f;
  p = p * z + 2.0f;
  return e * 1.42860677e-6f + (s * p + e * 0.693145751953125f);
}

// Cosine and sine of 2 pi angle / 2^32: the octant by integers, then minimax polynomials on [-pi/4, pi/4].
SYNTHWARD_INLINE void cos_sin_lanes(u32x16 angle, f32x16* cosine, f32x16* sine) {
  u32x16 quadrant = (angle + 0x20000000u) >> 30;
  i32x16 rest = (i32x16)(angle - (quadrant << 30));
  f32x16 x = to_float(rest) * 1.4629180792671596e-9f;
  f32x16 z = x * x;
  f32x16 s = -1.9515295891e-4f * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * x + x;
  f32x16 c = 2.443315711809948e-5f * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  i32x16 swap = (i32x16)((quadrant & 1u) != 0u);
  f32x16 cos_abs = (f32x16)((swap & (i32x16)s) | (~swap & (i32x16)c));
  f32x16 sin_abs = (f32x16)((swap & (i32x16)c) | (~swap & (i32x16)s));
  u32x16 cos_sign = ((quadrant + 1u) & 2u) << 30;
  u32x16 sin_sign = (quadrant & 2u) << 30;
  *cosine = (f32x16)((u32x16)cos_abs ^ cos_sign);
  *sine = (f32x16)((u32x16)sin_abs ^ sin_sign);
}

static __attribute__((noinline)) void refine_radii(const uint32_t* state, uint64_t counter, const u32x16* words,
                                                   f32x16* uniforms) {
  uint32_t extended[16];
  for (int i = 0; i < 16; ++i) extended[i] = state[i];
  extended[15] |= (uint32_t)(EXTENSION_BIT >> 32);
  u32x16 extra[16];
  chacha16(extended, counter, extra);
  for (int j = 0; j < 8; ++j)
    for (int l = 0; l < 16; ++l)
      if (words[j][l] < 65536u) {
        double fine = (double)(((uint64_t)words[j][l] << 32) | extra[j][l]) + 0.5;
        uniforms[j][l] = (float)(fine * 0x1p-64);
      }
}

// 256 normals of one group, out[lane * 16 + block].
SYNTHWARD_INLINE void gaussian_group(const uint32_t* state, uint64_t group, f32x16* out) {
  u32x16 words[16];
  chacha16(state, group * 16, words);
  f32x16 uniforms[8];
  u32x16 smallest = words[0];
  for (int j = 0; j < 8; ++j) {
    // 23 bits and a half are exact in a float; the low nine bits matter in the tail alone, see above.
    uniforms[j] = (to_float((i32x16)(words[j] >> 9)) + 0.5f) * 0x1p-23f;
    i32x16 less = (i32x16)(words[j] < smallest);
    smallest = (u32x16)(((i32x16)words[j] & less) | ((i32x16)smallest & ~less));
  }
  i32x16 rare = (i32x16)(smallest < 65536u);
  int32_t any = 0;
  for (int l = 0; l < 16; ++l) any |= rare[l];
  if (__builtin_expect(any != 0, 0)) refine_radii(state, group * 16, words, uniforms);
  for (int j = 0; j < 8; ++j) {
    f32x16 square = -2.0f * log_lanes(uniforms[j]);
    f32x16 radius;
    for (int l = 0; l < 16; ++l) radius[l] = __builtin_sqrtf(square[l]);
    f32x16 cosine, sine;
    cos_sin_lanes(words[8 + j], &cosine, &sine);
    out[j] = radius * cosine;
    out[8 + j] = radius * sine;
  }
}

// Calls use(index, normals, count) for runs that do not cross a group; index counts from `from`.
template <typename Use>
SYNTHWARD_INLINE void for_normals(const NoiseStream* stream, int64_t start, int64_t from, int64_t to, Use use) {
  uint32_t state[16];
  set_state(stream, stream->nonce, state);
  f32x16 normals[16];
  int64_t at = from;
  while (at < to) {
    uint64_t element = (uint64_t)(start + at);
    int64_t place = (int64_t)(element & 255u);
    int64_t count = 256 - place;
    if (count > to - at) count = to - at;
    gaussian_group(state, element >> 8, normals);
    use(at, (const float*)normals + place, count);
    at += count;
  }
}

static void gaussian(const NoiseStream* stream, int64_t start, int64_t count, float* out) {
  for_normals(stream, start, 0, count, [=](int64_t at, const float* z, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[at + i] = z[i];
  });
}

static void add_gaussian(const NoiseStream* stream, int64_t start, int64_t count, float std, float* out) {
  for_normals(stream, start, 0, count, [=](int64_t at, const float* z, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[at + i] += std * z[i];
  });
}
