// What a sampler of tables does for its rows, step after step: the features of a residual network, whose input is a sum
// that grows by a row of a table with every token that is known, and tokens drawn from a linear head.
//
// A row's numbers do not depend on which other rows there are. Sums over a row's width are of floats in LANES lanes,
// products as in gemm.inl: their order differs between instruction sets.

// Rows that go through all layers at once: with packed weights they fill a core's own cache.
enum { FEATURE_ROWS = 64 };

// e^x within 2 ulp for x <= 88; 0 below -87, and where x is not a number.
SYNTHWARD_INLINE vf exponential(vf x) {
  // Adding 1.5 * 2^23 leaves no bits behind the point.
  const vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi is_normal = (vi)(x > -87.0f);
  const vi exponent = __builtin_convertvector((vf)((vi)n & is_normal), vi);
  return (vf)((vi)(p * (vf)((exponent + 127) << 23)) & is_normal);
}

// x / (1 + e^-x).
SYNTHWARD_INLINE vf silu(vf x) {
  const vi is_far = (vi)(x < -87.0f);
  const vf near = (vf)(((vi)x & ~is_far) | ((vi)(vf{} - 87.0f) & is_far));
  return x / (1.0f + exponential(-near));
}

SYNTHWARD_INLINE float add_lanes(vf x) {
  float lanes[LANES];
  store(lanes, x);
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Layer norm of a row of `width` elements, filled up to `padded`; scale and shift are zero in the filling.
SYNTHWARD_INLINE void normalize_row(const float* x, const float* scale, const float* shift, float eps, int64_t width,
                                    int64_t padded, float* to) {
  const int64_t whole = width / LANES * LANES;
  vf sums = {};
  for (int64_t l = 0; l < padded; l += LANES) sums += load(x + l);  // the filling of x is zero
  const float mean = add_lanes(sums) / (float)width;
  vf squares = {};
  for (int64_t l = 0; l < whole; l += LANES) {
    const vf centred = load(x + l) - mean;
    squares += centred * centred;
  }
  float rest = 0.0f;
  for (int64_t l = whole; l < width; ++l) rest += (x[l] - mean) * (x[l] - mean);
  const float variance = (add_lanes(squares) + rest) / (float)width;
  const float rstd = 1.0f / __builtin_sqrtf(variance + eps);
  for (int64_t l = 0; l < padded; l += LANES)
    store(to + l, (load(x + l) - mean) * rstd * load(scale + l) + load(shift + l));
}

// A block's packed weight, then scale and shift of its norm and its bias, each filled up to whole panels.
static int64_t residual_panels(int64_t width) {
  const int64_t padded = round_up(width, PANEL);
  return padded * padded + 3 * padded;
}

static void residual_pack(const float* weight, const float* scale, const float* shift, const float* bias, int64_t width,
                          float* panels) {
  const int64_t padded = round_up(width, PANEL);
  const Columns columns{weight, width};
  float* to = panels;
  for (int64_t k = 0; weight && k < width; k += BLOCK) {
    const int64_t count = width - k < BLOCK ? width - k : (int64_t)BLOCK;
    columns.pack(k, count, 0, width, to);
    to += count * padded;
  }
  to = panels + padded * padded;
  const float* const vectors[] = {scale, shift, bias};
  for (int v = 0; v < 3; ++v, to += padded) {
    __builtin_memset(to, 0, sizeof(float) * padded);
    if (vectors[v]) __builtin_memcpy(to, vectors[v], sizeof(float) * width);
  }
}

// Of a thread: rows, their norms, and the products' operand and result.
static int64_t residual_scratch(int64_t width) { return FEATURE_ROWS * (3 * round_up(width, PANEL) + BLOCK); }

static void first_layer(const ResidualArgs* args, int64_t row, int64_t padded, float* x) {
  const int64_t width = args->width;
  __builtin_memcpy(x, args->sums + row * width, sizeof(float) * width);
  for (int64_t l = width; l < padded; ++l) x[l] = 0.0f;
  float* __restrict to = x;
  for (int64_t l = 0; l < width; ++l) to[l] += args->common[l];
  for (int64_t c = 0; c < args->numbers; ++c) {
    const float value = args->values[row * args->numbers + c];
    const float* const weight = args->value_weights + c * width;
    for (int64_t l = 0; l < width; ++l) to[l] += value * weight[l];
  }
  for (int64_t l = 0; l < padded; l += LANES) store(x + l, silu(load(x + l)));
}

static void residual_features(const ResidualArgs* args, int64_t from, int64_t to, float* scratch) {
  const int64_t width = args->width, padded = round_up(width, PANEL), each_block = residual_panels(width);
  float *const x = scratch, *const y = x + FEATURE_ROWS * padded, *const c = y + FEATURE_ROWS * padded;
  float* const left = c + FEATURE_ROWS * padded;
  for (int64_t first = from; first < to; first += FEATURE_ROWS) {
    const int64_t rows = to - first < FEATURE_ROWS ? to - first : (int64_t)FEATURE_ROWS;
    for (int64_t r = 0; r < rows; ++r) first_layer(args, first + r, padded, x + r * padded);
    for (int64_t b = 0; b < args->blocks; ++b) {
      const float *right = args->panels + b * each_block, *const scale = right + padded * padded;
      const float* const bias = scale + 2 * padded;
      for (int64_t r = 0; r < rows; ++r)
        normalize_row(x + r * padded, scale, scale + padded, args->eps, width, padded, y + r * padded);
      __builtin_memset(c, 0, sizeof(float) * FEATURE_ROWS * padded);
      for (int64_t k = 0; k < width; k += BLOCK) {
        const int64_t count = width - k < BLOCK ? width - k : (int64_t)BLOCK;
        Columns{y, padded}.pack(k, count, 0, rows, left);
        for (int64_t j = 0; j < padded; j += PANEL)
          for (int64_t i = 0; i < rows; i += TILE_ROWS)
            multiply_tile(count, left + i / PANEL * PANEL * count + i % PANEL, right + j * count, c + i * padded + j,
                          padded);
        right += count * padded;
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t l = 0; l < padded; l += LANES) {
          float* const at = x + r * padded + l;
          store(at, load(at) + silu(load(c + r * padded + l) + load(bias + l)));
        }
    }
    const float* const scale = args->panels + args->blocks * each_block + padded * padded;
    for (int64_t r = 0; r < rows; ++r) {
      normalize_row(x + r * padded, scale, scale + padded, args->eps, width, padded, y + r * padded);
      __builtin_memcpy(args->features + (first + r) * width, y + r * padded, sizeof(float) * width);
    }
  }
}

// logits[0 .. count] = weight x + bias, four rows of the weight at a time.
SYNTHWARD_INLINE void head(const float* x, const float* weight, const float* bias, int64_t width, int64_t count,
                           float* logits) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t t = 0; t < count; t += 4) {
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = weight + (t + i < count ? t + i : t) * width;
    vf sums[4] = {};
    for (int64_t l = 0; l < whole; l += LANES) {
      const vf value = load(x + l);
      each<4>(SYNTHWARD_BODY(i) { sums[i.value] = multiply_add(value, load(rows[i.value] + l), sums[i.value]); });
    }
    for (int64_t i = 0; i < 4 && t + i < count; ++i) {
      float sum = add_lanes(sums[i]);
      for (int64_t l = whole; l < width; ++l) sum += x[l] * rows[i][l];
      logits[t + i] = sum + bias[t + i];
    }
  }
}

// The place of a uniform number among the cumulated exponentials of `count` logits, which are overwritten. A logit of
// minus infinity is never drawn.
static int64_t draw_one(float* logits, int64_t count, float uniform) {
  float top = logits[0];
  for (int64_t t = 1; t < count; ++t) top = logits[t] > top ? logits[t] : top;
  for (int64_t t = count; t % LANES; ++t) logits[t] = top - 100.0f;
  for (int64_t t = 0; t < count; t += LANES) store(logits + t, exponential(load(logits + t) - top));
  double total = 0.0;
  for (int64_t t = 0; t < count; ++t) total += (double)logits[t];
  const double target = (double)uniform * total;
  double below = 0.0;
  int64_t last = 0;
  for (int64_t t = 0; t < count; ++t) {
    below += (double)logits[t];
    if (logits[t] > 0.0f) last = t;
    if (below > target) return t;
  }
  return last;
}

static int64_t draw_scratch(int64_t longest) { return round_up(longest, LANES); }

static void draw_tokens(const DrawArgs* args, int64_t from, int64_t to, float* scratch) {
  for (int64_t r = from; r < to; ++r)
    for (int64_t j = 0; j < args->count; ++j) {
      const int64_t column = args->columns[r * args->count + j];
      const int64_t first = args->offsets[column], size = args->offsets[column + 1] - first;
      head(args->features + r * args->width, args->weight + first * args->width, args->bias + first, args->width, size,
           scratch);
      const int64_t token = draw_one(scratch, size, args->uniforms[r * args->count + j]);
      args->tokens[r * args->count + j] = token;
      if (!args->table) continue;
      const float* const row = args->table + (first + token) * args->table_width;
      float* __restrict const sum = args->sums + r * args->table_width;
      for (int64_t l = 0; l < args->table_width; ++l) sum[l] += row[l];
    }
}
