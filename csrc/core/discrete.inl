// Rounded Gaussians in double, 128 at a time, and the release of sums on a grid with them.
//
// Element e of a stream lies in group e / 128 at place r = e % 128: block 16 * group + r % 16 of those with the top bit
// of the counter set, lane r / 16. Lane j < 4 is the cosine and lane 4 + j the sine of one pair: radius word j (low
// half) and 4 + j (high half), angle word 8 + j and 12 + j.
//
// Products and sums alone, of one instruction each: no branch, address, division or root depends on what is secret,
// and every instruction set and the Triton kernel give the same bits. The polynomials are minimax (Remez).

const uint64_t DISCRETE_BIT = 1ull << 63;  // of the counter
const uint64_t LOW_HALF = 0xffffffffull;
// A whole number below 2^32 is the last bits of 2^52 + it; a signed one below 2^51, of 1.5 * 2^52 + it.
const uint64_t UNSIGNED_BITS = 0x4330000000000000ull;
const int64_t SIGNED_BITS = 0x4338000000000000ll;

SYNTHWARD_INLINE vd choose_lanes(vl mask, vd yes, vd no) { return (vd)(((vl)yes & mask) | ((vl)no & ~mask)); }

// high * 2^32 + low + half, rounded once; both words below 2^32.
SYNTHWARD_INLINE vd join(vw high, vw low, double half) {
  return ((vd)(high | UNSIGNED_BITS) - 0x1p52) * 0x1p32 + ((vd)(low | UNSIGNED_BITS) - (0x1p52 - half));
}

// Nearest double of a signed number.
SYNTHWARD_INLINE vd signed_to_double(vl x) {
  const vw biased = (vw)x ^ (1ull << 63);
  const vd high = (vd)((biased >> 32) | UNSIGNED_BITS) - (0x1p52 + 0x1p31);
  return high * 0x1p32 + ((vd)((biased & LOW_HALF) | UNSIGNED_BITS) - 0x1p52);
}

// Nearest whole number, ties to even, of x in [-2^62, 2^62]; the two halves and their difference are exact.
SYNTHWARD_INLINE vl nearest(vd x) {
  const vd high = x * 0x1p-32 + 0x1.8p52;
  const vd low = (x - (high - 0x1.8p52) * 0x1p32) + 0x1.8p52;
  return (vl)(((vw)high - (uint64_t)SIGNED_BITS) << 32) + ((vl)low - SIGNED_BITS);
}

// sqrt(-2 log((word + 1/2) / 2^64)).
SYNTHWARD_INLINE vd wide_radius(vw high, vw low) {
  const vd whole = join(high, low, 0.5);
  // whole = m * 2^e with m in [sqrt(1/2), sqrt(2)), and e + 1024 in `biased`.
  const vw biased = ((vw)whole - 0x3fe6a09e667f3bcdull + (1024ull << 52)) >> 52;
  const vd m = (vd)((vw)whole - (biased << 52) + (1024ull << 52));
  const vd e = (vd)(biased | UNSIGNED_BITS) - (0x1p52 + 1024.0 + 64.0);
  // Near one the complement of the word has the digits that the sum above has rounded away.
  const vd below_one = join(high ^ LOW_HALF, low ^ LOW_HALF, 0.5) * -0x1p-64;
  const vd f = choose_lanes((vl)(biased == 1024u + 64u), below_one, m - 1.0);
  const vd d = f + 2.0;
  vd inverse = (0x1.deab9e5698d28p-4 * d - 0x1.71e43180d4476p-1) * d + 0x1.7a4e3611257dap+0;  // to 2^-9.6
  inverse = inverse * (2.0 - d * inverse);
  inverse = inverse * (2.0 - d * inverse);
  inverse = inverse + inverse * (1.0 - d * inverse);
  const vd s = f * inverse, z = s * s;
  vd series = 0x1.2f03b6cba1c11p-3 * z + 0x1.39a1e7dd49fc7p-3;
  series = series * z + 0x1.74663d0d072a3p-3;
  series = series * z + 0x1.c71c5212f92edp-3;
  series = series * z + 0x1.24924941e495ap-2;
  series = series * z + 0x1.999999997fea9p-2;
  series = series * z + 0x1.5555555555592p-1;
  // log 2 in two parts, the first of 32 bits.
  const vd logarithm = e * 0x1.62e42fee00000p-1 + (2.0 * s + (s * z * series + e * 0x1.a39ef35793c76p-33));
  const vd half = -logarithm;
  const vd square = half + half;
  vd root = (vd)(0x5fe6eb50c7b537a9ull - ((vw)square >> 1));  // of the inverse, to 2^-4.8
  for (int i = 0; i < 4; ++i) root = root * (1.5 - half * root * root);
  return square * root;
}

// Cosine and sine of 2 pi angle / 2^64.
SYNTHWARD_INLINE void wide_cos_sin(vw angle, vd* cosine, vd* sine) {
  const vw quadrant = (angle + (1ull << 61)) >> 62;
  const vd x = signed_to_double((vl)(angle - (quadrant << 62))) * 0x1.921fb54442d18p-62;
  const vd z = x * x;
  vd s = 0x1.5d8fba99d8dc7p-33 * z - 0x1.ae5e5a4440573p-26;
  s = s * z + 0x1.71de356773b29p-19;
  s = s * z - 0x1.a01a019bfd847p-13;
  s = s * z + 0x1.111111110f7cdp-7;
  s = s * z - 0x1.5555555555548p-3;
  s = s * z * x + x;
  vd c = -0x1.8fa4800699a6bp-37 * z + 0x1.1ee9d783d4849p-29;
  c = c * z - 0x1.27e4f7ea7e574p-22;
  c = c * z + 0x1.a01a019c83f07p-16;
  c = c * z - 0x1.6c16c16c14f8ep-10;
  c = c * z + 0x1.555555555554bp-5;
  c = c * z * z - 0.5 * z + 1.0;
  const vl swap = (vl)((quadrant & 1ull) != 0ull);
  const vl exchanged = swap & ((vl)s ^ (vl)c);
  *cosine = (vd)((vw)((vl)c ^ exchanged) ^ (((quadrant + 1ull) & 2ull) << 62));
  *sine = (vd)((vw)((vl)s ^ exchanged) ^ ((quadrant & 2ull) << 62));
}

// Both normals of n pairs of words, for tests of words that no stream shows; n a multiple of 8.
static void wide_normals(const uint64_t* radius, const uint64_t* angle, int64_t n, double* cosines, double* sines) {
  for (int64_t i = 0; i < n; i += WIDE) {
    vw r, a;
    __builtin_memcpy(&r, radius + i, sizeof r);
    __builtin_memcpy(&a, angle + i, sizeof a);
    vd cosine, sine;
    wide_cos_sin(a, &cosine, &sine);
    const vd length = wide_radius(r >> 32, r & LOW_HALF);
    const vd first = length * cosine, second = length * sine;
    __builtin_memcpy(cosines + i, &first, sizeof first);
    __builtin_memcpy(sines + i, &second, sizeof second);
  }
}

// rint(scale * z) of LANES blocks, out[lane * 16 + block].
SYNTHWARD_INLINE void rounded_blocks(const uint32_t* state, uint64_t counter, double scale, int64_t* out) {
  vu words[16];
  chacha(state, counter, words);
  const uint32_t* word = (const uint32_t*)words;
  for (int j = 0; j < 4; ++j)
    for (int block = 0; block < LANES; block += WIDE) {
      const uint32_t* at = word + j * LANES + block;
      const vd radius = wide_radius(widen_words(at + 4 * LANES), widen_words(at));
      vd cosine, sine;
      wide_cos_sin((widen_words(at + 12 * LANES) << 32) | widen_words(at + 8 * LANES), &cosine, &sine);
      const vl first = nearest(radius * cosine * scale), second = nearest(radius * sine * scale);
      __builtin_memcpy(out + j * 16 + block, &first, sizeof first);
      __builtin_memcpy(out + (4 + j) * 16 + block, &second, sizeof second);
    }
}

// Calls use(index, integers, count) for runs that do not cross a group; index counts from `from`.
template <typename Use>
SYNTHWARD_INLINE void for_rounded(const NoiseStream* stream, int64_t start, int64_t from, int64_t to, double scale,
                                  Use use) {
  uint32_t state[16];
  set_state(stream, state);
  alignas(64) int64_t integers[128];
  for (int64_t at = from; at < to;) {
    const uint64_t element = (uint64_t)start + (uint64_t)at;
    const int64_t place = (int64_t)(element & 127u);
    const int64_t count = 128 - place < to - at ? 128 - place : to - at;
    const uint64_t counter = DISCRETE_BIT | ((element >> 7) * 16);
    for (int first = 0; first < 16; first += LANES)
      rounded_blocks(state, counter + (uint64_t)first, scale, integers + first);
    use(at, (const int64_t*)integers + place, count);
    at += count;
  }
}

static void rounded_gaussian(const NoiseStream* stream, int64_t start, int64_t count, double scale, int64_t* out) {
  for_rounded(stream, start, 0, count, scale, [=](int64_t at, const int64_t* k, int64_t n) {
    __builtin_memcpy(out + at, k, (size_t)n * sizeof(int64_t));
  });
}

// `count` elements, at most WIDE: what the rest of the register holds is dropped.
SYNTHWARD_INLINE void release_lanes(const ReleaseArgs* args, int64_t at, const int64_t* k, int64_t count) {
  vd x = {};
  vl noise = {};
  __builtin_memcpy(&x, args->sums + at, (size_t)count * sizeof(double));
  __builtin_memcpy(&noise, k, (size_t)count * sizeof(int64_t));
  x = x * args->per_grid;
  x = (vd)((vl)x & (vl)(x == x));
  // Cutting off at both ends brings no two sums further apart, as wrapping around would.
  const vd most = vd{} + 0x1p62;
  x = choose_lanes((vl)(x > most), most, x);
  x = choose_lanes((vl)(x < -most), -most, x);
  const vd value = signed_to_double(nearest(x) + noise) * args->grid;
  float narrowed[WIDE];
  narrow(value, narrowed);
  __builtin_memcpy(args->out + at, narrowed, (size_t)count * sizeof(float));
  const vd zero = {};
  __builtin_memcpy(args->sums + at, &zero, (size_t)count * sizeof(double));
}

static void discrete_release(const NoiseStream* stream, int64_t start, int64_t from, int64_t to,
                             const ReleaseArgs* args) {
  for_rounded(stream, start, from, to, args->scale, [=](int64_t at, const int64_t* k, int64_t n) {
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE) release_lanes(args, at + i, k + i, WIDE);
    if (i < n) release_lanes(args, at + i, k + i, n - i);
  });
}
