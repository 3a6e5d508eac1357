// Backward passes of normalisations. What the parameters need (per-unit sums of the output gradient, and of the output
// gradient times the normalised input) is added up while x and g are in the cache for the input gradient. Sums are of
// doubles in lanes whose number is no register's, so every instruction set gives the same bits.

struct RowSums {
  double g, gx;
};

// Sums of g and of g * (x - mean) over a run, times a weight per element if there is one.
template <bool WEIGHTED>
SYNTHWARD_INLINE RowSums centred_sums(const float* x, const float* g, const float* weight, float mean, int64_t count) {
  vd sums[ROW_PARTS] = {}, products[ROW_PARTS] = {};
  const vd centre = vd{} + (double)mean;
  int64_t i = 0;
  const auto run = [&](const float* xs, const float* gs, const float* ws) __attribute__((always_inline)) {
    each<ROW_PARTS>(SYNTHWARD_BODY(k) {
      vd value = widen(gs + k.value * WIDE);
      if (WEIGHTED) value = value * widen(ws + k.value * WIDE);
      sums[k.value] = sums[k.value] + value;
      // Not fused: the product of a rounded difference is not exact.
      products[k.value] = products[k.value] + value * (widen(xs + k.value * WIDE) - centre);
    });
  };
  for (; i + ROW_LANES <= count; i += ROW_LANES) run(x + i, g + i, WEIGHTED ? weight + i : g);
  if (i < count) {
    // Zeros in g: what x holds there is finite and does not matter.
    float xs[ROW_LANES], gs[ROW_LANES], ws[ROW_LANES];
    run(padded(x + i, count - i, xs), padded(g + i, count - i, gs), WEIGHTED ? padded(weight + i, count - i, ws) : gs);
  }
  return {tree_sum<ROW_LANES>((const double*)sums), tree_sum<ROW_LANES>((const double*)products)};
}

// x, g, dx [rows][width], mean (null for zero: RMS norm), rstd [rows], weight [width] or null. Unit u owns the rows
// order[offsets[u]] .. ; without order they are in place, without offsets every row is a unit. Units from .. to:
// scale[u] = sum g * (x - mean) * rstd, bias[u] = sum g, [width] each; any of dx, scale, bias may be null.
// scratch: floats for two sums of the width, in pairs as doubles and as floats.
static int64_t layer_norm_scratch(int64_t width) { return 6 * width; }

enum { NORM_ROWS = 32 };

static void add_up(double* __restrict total, float* __restrict part, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    total[i] += (double)part[i];
    part[i] = 0.0f;
  }
}

static void layer_norm_row(const float* __restrict x, const float* __restrict g, const float* __restrict weight,
                           float mean, float rstd, int is_centred, int64_t width, float* __restrict dx) {
  const RowSums sums =
      weight ? centred_sums<true>(x, g, weight, mean, width) : centred_sums<false>(x, g, weight, mean, width);
  const double r = (double)rstd;
  const float shift = is_centred ? (float)(-r * sums.g / (double)width) : 0.0f;
  const float slope = (float)(-r * r * r * sums.gx / (double)width);
  if (weight)
    for (int64_t i = 0; i < width; ++i) dx[i] = rstd * (g[i] * weight[i]) + (slope * (x[i] - mean) + shift);
  else
    for (int64_t i = 0; i < width; ++i) dx[i] = rstd * g[i] + (slope * (x[i] - mean) + shift);
}

static void layer_norm_backward(const float* x, const float* g, const float* mean, const float* rstd,
                                const float* weight, const int64_t* offsets, const int64_t* order, int64_t from,
                                int64_t to, int64_t width, float* dx, float* scale, float* bias, float* scratch) {
  double *const scale_total = (double*)scratch, *const bias_total = scale_total + width;
  float *const scale_part = scratch + 4 * width, *const bias_part = scale_part + width;
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets ? offsets[u] : u, last = offsets ? offsets[u + 1] : u + 1;
    for (int64_t i = 0; i < 6 * width; ++i) scratch[i] = 0.0f;
    for (int64_t n = first; n < last; ++n) {
      const int64_t row = order ? order[n] : n;
      const float *const xs = x + row * width, *const gs = g + row * width;
      const float m = mean ? mean[row] : 0.0f, r = rstd[row];
      if (dx) layer_norm_row(xs, gs, weight, m, r, mean != 0, width, dx + row * width);
      if (scale)
        for (int64_t i = 0; i < width; ++i) scale_part[i] += gs[i] * ((xs[i] - m) * r);
      if (bias)
        for (int64_t i = 0; i < width; ++i) bias_part[i] += gs[i];
      if ((n - first) % NORM_ROWS == NORM_ROWS - 1 || n + 1 == last) {
        if (scale) add_up(scale_total, scale_part, width);
        if (bias) add_up(bias_total, bias_part, width);
      }
    }
    if (scale)
      for (int64_t i = 0; i < width; ++i) scale[u * width + i] = (float)scale_total[i];
    if (bias)
      for (int64_t i = 0; i < width; ++i) bias[u * width + i] = (float)bias_total[i];
  }
}

// x, g, dx [rows * groups][channels][length], mean and rstd [rows * groups], weight [groups * channels] or null; scale
// and bias [rows * groups * channels] are the sums over length of g * (x - mean) * rstd and of g. Groups from .. to of
// all rows; dx may be null.
static void group_norm_backward(const float* x, const float* g, const float* mean, const float* rstd,
                                const float* weight, int64_t from, int64_t to, int64_t groups, int64_t channels,
                                int64_t length, float* dx, float* scale, float* bias) {
  for (int64_t i = from; i < to; ++i) {
    const float m = mean[i], r = rstd[i];
    const float* const w = weight ? weight + i % groups * channels : 0;
    double sum = 0.0, product = 0.0;
    for (int64_t c = i * channels; c < (i + 1) * channels; ++c) {
      const RowSums sums = centred_sums<false>(x + c * length, g + c * length, 0, m, length);
      const double factor = w ? (double)w[c - i * channels] : 1.0;
      scale[c] = (float)(sums.gx * (double)r);
      bias[c] = (float)sums.g;
      sum += factor * sums.g;
      product += factor * sums.gx;
    }
    if (!dx) continue;
    const double count = (double)channels * (double)length, wide = (double)r;
    const float shift = (float)(-wide * sum / count), slope = (float)(-wide * wide * wide * product / count);
    for (int64_t c = i * channels; c < (i + 1) * channels; ++c) {
      const float* __restrict xs = x + c * length;
      const float* __restrict gs = g + c * length;
      float* __restrict to_x = dx + c * length;
      const float scale_g = w ? r * w[c - i * channels] : r;
      for (int64_t j = 0; j < length; ++j) to_x[j] = scale_g * gs[j] + (slope * (xs[j] - m) + shift);
    }
  }
}
