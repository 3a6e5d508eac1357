// Per-unit squared norms and row scaling. Products of floats are exact in double, and sums run in sixteen
// fixed lanes, so that the result is the same for every instruction set and thread count.

SYNTHWARD_INLINE double sum_lanes(const double* lanes) {
  double half[8];
  for (int l = 0; l < 8; ++l) half[l] = lanes[l] + lanes[l + 8];
  for (int width = 4; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) half[l] += half[l + width];
  return half[0];
}

SYNTHWARD_INLINE double dot(const float* x, const float* y, int64_t n) {
  double lanes[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += (double)x[i + l] * (double)y[i + l];
  for (int l = 0; i + l < n; ++l) lanes[l] += (double)x[i + l] * (double)y[i + l];
  return sum_lanes(lanes);
}

// ||sum_n g_n a_n^T||^2 = sum_{s,t} (a_s . a_t) (g_s . g_t): the upper triangle of two Gram matrices.
static void outer_sq_norms(const float* a, const float* g, const int64_t* offsets, int64_t from, int64_t to,
                           int64_t d, int64_t p, float* out) {
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets ? offsets[u] : u, last = offsets ? offsets[u + 1] : u + 1;
    double total = 0.0;
    for (int64_t s = first; s < last; ++s) {
      total += dot(a + s * d, a + s * d, d) * dot(g + s * p, g + s * p, p);
      for (int64_t t = s + 1; t < last; ++t)
        total += 2.0 * dot(a + s * d, a + t * d, d) * dot(g + s * p, g + t * p, p);
    }
    out[u] += (float)total;
  }
}

static void diagonal_sq_norms(const float* rows, const float* factors, const int64_t* offsets, int64_t from,
                              int64_t to, int64_t p, float* out) {
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets ? offsets[u] : u, last = offsets ? offsets[u + 1] : u + 1;
    double lanes[16] = {0};
    for (int64_t column = 0; column < p; column += 16) {
      const int width = p - column < 16 ? (int)(p - column) : 16;
      double sums[16] = {0};
      for (int64_t s = first; s < last; ++s) {
        const float* row = rows + s * p + column;
        if (factors) {
          const float* factor = factors + s * p + column;
          for (int l = 0; l < width; ++l) sums[l] += (double)row[l] * (double)factor[l];
        } else {
          for (int l = 0; l < width; ++l) sums[l] += (double)row[l];
        }
      }
      for (int l = 0; l < 16; ++l) lanes[l] += sums[l] * sums[l];
    }
    out[u] += (float)sum_lanes(lanes);
  }
}

// Rows of a unit that hit the same table row add up before they are squared. A negative id is no row at all.
static void scatter_sq_norms(const int64_t* ids, const float* g, const int64_t* offsets, int64_t from, int64_t to,
                             int64_t p, float* out) {
  for (int64_t u = from; u < to; ++u) {
    const int64_t first = offsets ? offsets[u] : u, last = offsets ? offsets[u + 1] : u + 1;
    double total = 0.0;
    for (int64_t s = first; s < last; ++s) {
      if (ids[s] < 0) continue;
      total += dot(g + s * p, g + s * p, p);
      for (int64_t t = s + 1; t < last; ++t)
        if (ids[t] == ids[s]) total += 2.0 * dot(g + s * p, g + t * p, p);
    }
    out[u] += (float)total;
  }
}

// A weight of zero writes zeros whatever the row holds: 0 * inf would poison the sum over all units.
static void scale_rows(const float* x, const float* weights, int64_t from, int64_t to, int64_t p, float* out) {
  for (int64_t n = from; n < to; ++n) {
    const float w = weights[n];
    const float* row = x + n * p;
    float* target = out + n * p;
    if (w == 0.0f)
      for (int64_t i = 0; i < p; ++i) target[i] = 0.0f;
    else
      for (int64_t i = 0; i < p; ++i) target[i] = w * row[i];
  }
}
